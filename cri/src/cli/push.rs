//! `hull push`

use std::io::IsTerminal;

use clap::Args;
use tonic::Code;

use super::client::{Client, answer};
use super::error::CliError;
use super::output::{Format, print, print_json, short_id, size};
use super::pull::Credentials;
use crate::api::hull::PushImageRequest;
use crate::api::hull::push_progress::Event;

/// Send an image to a registry
///
/// What the registry has already is not sent again, be it in another repository. The image keeps its id everywhere. Layers
/// that the registry lacks are compressed anew, unless they were kept compressed (image.keep_blobs); then the image has
/// another digest there. With --exact it keeps the one that it came with. Saved logins are used as by
/// `hull pull`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull push registry.example.com/team/app:1.2
  hull push web:debugged registry.example.com/team/web:debugged --creds me:secret
  hull push --exact quay.io/team/app:1.2 registry.example.com/mirror/app:1.2")]
pub(super) struct Push {
    #[command(flatten)]
    credentials: Credentials,

    /// Keep the digest that the image came with: what the registry lacks, and was not kept, is fetched again from where
    /// the image came from
    #[arg(long)]
    exact: bool,

    /// User and password for where the image came from, with --exact
    #[arg(long, value_name = "USER:PASSWORD", requires = "exact")]
    source_creds: Option<String>,

    /// Only the digest, no progress
    #[arg(short, long)]
    quiet: bool,

    /// Reference, id, or the beginning of an id
    image: String,

    /// Registry, repository and tag to send it to [default: what IMAGE says]
    target: Option<String>,
}

impl Push {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        let target = self.target.clone().unwrap_or_else(|| self.image.clone());
        let doing = format!("push {target}");
        let failed = |status| {
            let error = CliError::Call { doing: doing.clone(), status: Box::new(status) };
            error.hint(Code::Unauthenticated, "--creds USER:PASSWORD logs in.")
        };
        let auth = self.credentials.config(&target).await?;
        let source_auth = match self.exact {
            true => Credentials::of(self.source_creds).config(&self.image).await?,
            false => None,
        };
        let (image, exact) = (self.image, self.exact);
        let request = PushImageRequest { image, target: target.clone(), auth, exact, source_auth };
        let patience = client.endless();
        let mut events = answer(doing.clone(), patience, client.hull.push_image(request)).await?;
        let is_live = !self.quiet && std::io::stderr().is_terminal();
        while let Some(event) = events.message().await.map_err(failed)? {
            match event.event {
                Some(Event::Done(digest)) => {
                    return match format {
                        Format::Table => print(&format!("{digest}\n")),
                        Format::Json => print_json(&serde_json::json!({ "image": target, "digest": digest })),
                    };
                }
                Some(Event::CameWith(digest)) if !self.quiet => {
                    eprintln!("It came with another digest, {digest}; --exact keeps that.");
                }
                Some(Event::Exists(layer)) if !self.quiet => {
                    eprintln!("{}: the registry has it", short_id(&layer));
                }
                Some(Event::LayerDone(layer)) if !self.quiet => {
                    eprintln!("{}{}: sent", if is_live { "\r\x1b[K" } else { "" }, short_id(&layer));
                }
                Some(Event::Sent(sent)) if is_live => {
                    eprint!("\r\x1b[K{}: {}", short_id(&sent.layer), size(sent.bytes));
                }
                _ => {}
            }
        }
        Err(CliError::Refused("the push broke off before its end".into()))
    }
}
