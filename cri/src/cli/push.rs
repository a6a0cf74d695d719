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
/// What the registry has already is not sent again, be it in another repository. The image keeps its id everywhere; its
/// digest stays the one that it was pulled with if the registry has all its layers as they were then. Saved logins are
/// used as by `hull pull`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull push registry.example.com/team/app:1.2
  hull push web:debugged registry.example.com/team/web:debugged --creds me:secret")]
pub(super) struct Push {
    #[command(flatten)]
    credentials: Credentials,

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
        let request = PushImageRequest { image: self.image, target: target.clone(), auth };
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
