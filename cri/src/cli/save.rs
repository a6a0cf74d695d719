//! `hull save`

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use hull_images::Reference;

use super::client::{Client, answer};
use super::error::CliError;
use super::output::{printable, short_id, size};
use super::pull::Credentials;
use super::sink::Sink;
use crate::api::hull::SaveImagesRequest;
use crate::api::hull::chunk::Fetched;

/// Write images to a file
///
/// The file is an OCI image layout and a docker archive at once: `hull load`, `docker load`, `podman load`, skopeo and
/// `ctr images import` read it. Layers are in it as they were before compression, and images keep their ids. With --exact
/// everything is in it as it came, so that images keep their digests too, also when `hull load` reads it: layers
/// that were not kept compressed (image.keep_blobs) are fetched again from the registries that the images came from. Saved
/// logins are used as by `hull pull`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull save -f app.tar app:1.2 app:1.3
  hull save app:1.2 | zstd | ssh other 'zstd -d | hull load'
  hull save --exact -f app.tar quay.io/team/app:1.2")]
pub(super) struct Save {
    /// Write to this file, which is replaced when all is in it [default: standard output]
    #[arg(short = 'f', long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Keep the digests that the images came with: layers that were not kept are fetched again from where they came
    /// from
    #[arg(long)]
    exact: bool,

    /// User and password for where the images came from, with --exact: several images are then of one registry
    #[arg(long, value_name = "USER:PASSWORD", requires = "exact")]
    source_creds: Option<String>,

    /// Do not tell of layers that are fetched again
    #[arg(short, long)]
    quiet: bool,

    /// References, ids, or beginnings of ids
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

impl Save {
    pub(super) async fn run(self, client: &mut Client) -> Result<(), CliError> {
        let mut sink = Sink::open(self.file)?;
        let doing = format!("save {}", self.images.join(" "));
        let patience = client.endless();
        let mut source_auths = Vec::new();
        if self.exact {
            let only_for = match &self.source_creds {
                Some(_) => one_registry(&self.images)?,
                None => None,
            };
            let credentials = Credentials::of(self.source_creds);
            for image in &self.images {
                let mut auth = credentials.config(image).await?.unwrap_or_default();
                auth.server_address = only_for.clone().unwrap_or(auth.server_address);
                source_auths.push(auth);
            }
        }
        let request = SaveImagesRequest { images: self.images, exact: self.exact, source_auths };
        let chunks = answer(doing.clone(), patience, client.hull.save_images(request)).await?;
        let is_live = !self.quiet && std::io::stderr().is_terminal();
        sink.take_all(&doing, chunks, |fetched| show(fetched, self.quiet, is_live)).await
    }
}

/// Tells how far a layer has come that is fetched again: on a terminal as it goes, else when it is here.
fn show(fetched: &Fetched, quiet: bool, is_live: bool) {
    let Fetched { layer, bytes, of } = fetched;
    let layer = printable(short_id(layer));
    let begin = if is_live { "\r\x1b[K" } else { "" };
    match bytes == of {
        _ if quiet => {}
        true => eprintln!("{begin}{layer}: fetched again, {}", size(*of)),
        false if is_live => eprint!("{begin}{layer}: {} of {}", size(*bytes), size(*of)),
        false => {}
    }
}

/// The registry of all these names, of which a password may be told to no other. None for one image alone, which may be an
/// id: hulld knows where that came from.
fn one_registry(images: &[String]) -> Result<Option<String>, CliError> {
    if images.len() < 2 {
        return Ok(None);
    }
    let domain = |image: &String| Some(image.parse::<Reference>().ok()?.domain().to_owned());
    let first = domain(&images[0]);
    match first.is_some() && images.iter().all(|image| domain(image) == first) {
        true => Ok(first),
        false => Err(CliError::Refused(
            "--source-creds is for one registry, and these images are of several, or are not named by one.\n\
             Save them into one file each, or log in to each registry with `docker login` or `podman login`."
                .into(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_for_one_registry() {
        let of = |images: &[&str]| {
            one_registry(&images.iter().map(|image| (*image).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(of(&["private.example/a"]).unwrap(), None);
        assert_eq!(
            of(&["private.example/a", "private.example/b:1"]).unwrap().as_deref(),
            Some("private.example")
        );
        assert!(of(&["private.example/a", "busybox"]).is_err());
        assert!(of(&["private.example/a", "0123456789ab"]).is_err());
    }
}
