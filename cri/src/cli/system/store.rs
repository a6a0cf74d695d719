//! `hull system check`: whether the images are whole.

use std::io::IsTerminal;

use clap::Args;

use crate::api::hull::CheckImagesRequest;
use crate::api::hull::check_images_progress::Event;
use crate::cli::client::{Client, answer};
use crate::cli::error::CliError;
use crate::cli::output::{Format, print, print_json, printable, short_id, size};

/// Compare every image layer with its digest
///
/// The archive that each layer was made from is put together again and hashed, so that a single wrong bit is found. The
/// exit status is 1 if something is wrong and was not repaired.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull system check
  hull system check --repair    then pull the images that it names again")]
pub(super) struct Check {
    /// Take out what is damaged, with the images that need it
    #[arg(long)]
    repair: bool,
}

impl Check {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<u8, CliError> {
        let doing = "check the images";
        let patience = client.endless();
        let call = client.hull.check_images(CheckImagesRequest { repair: self.repair });
        let mut events = answer(doing, patience, call).await?;
        let failed = |status| CliError::Call { doing: doing.into(), status: Box::new(status) };
        let (mut problems, mut number) = (Vec::new(), 0);
        let shows_progress = std::io::stderr().is_terminal();
        while let Some(event) = events.message().await.map_err(failed)? {
            match event.event {
                Some(Event::Layer(layer)) if shows_progress => {
                    number += 1;
                    eprint!("\r\x1b[Klayer {number}: {}", short_id(&layer));
                }
                Some(Event::Problem(problem)) => problems.push(problem),
                Some(Event::Done(done)) => {
                    if shows_progress {
                        eprint!("\r\x1b[K");
                    }
                    if format == Format::Json {
                        let problems: Vec<_> = problems
                            .iter()
                            .map(|problem| {
                                serde_json::json!({"subject": problem.subject, "reason": problem.reason,
                                                   "images": problem.image_ids})
                            })
                            .collect();
                        print_json(&serde_json::json!({
                            "layers": done.layers, "bytes": done.bytes, "unverifiable": done.unverifiable,
                            "problems": problems, "repaired": self.repair,
                        }))?;
                        return Ok(u8::from(!problems.is_empty() && !self.repair));
                    }
                    for problem in &problems {
                        let images: Vec<&str> = problem.image_ids.iter().map(|id| short_id(id)).collect();
                        let suffering = match images.is_empty() {
                            true => String::new(),
                            false => format!(" (images {})", images.join(", ")),
                        };
                        let line = format!("{}: {}{suffering}", problem.subject, problem.reason);
                        print(&(printable(&line) + "\n"))?;
                    }
                    let unverifiable = match done.unverifiable.len() {
                        0 => String::new(),
                        count => {
                            format!(", {count} of them only in form (pull their images again to change that)")
                        }
                    };
                    let outcome = match (problems.len(), self.repair) {
                        (0, _) => "all is well".to_owned(),
                        (count, true) => format!("{count} problems repaired"),
                        (count, false) => format!("{count} problems; --repair takes them out"),
                    };
                    let read = size(done.bytes);
                    print(&format!("{} layers, {read} compared{unverifiable}: {outcome}\n", done.layers))?;
                    return Ok(u8::from(!problems.is_empty() && !self.repair));
                }
                _ => {}
            }
        }
        Err(CliError::Refused("the check broke off before its end".into()))
    }
}
