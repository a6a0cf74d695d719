//! `hull system check`: whether the machine has what hull needs, and whether the images are whole.

use std::io::IsTerminal;

use clap::Args;

use super::requirements::{self, Requirement, Weight};
use crate::api::hull::CheckImagesRequest;
use crate::api::hull::check_images_progress::Event;
use crate::cli::client::{Client, answer};
use crate::cli::error::CliError;
use crate::cli::output::{Format, print, print_json, printable, short_id, size};
use crate::config;

/// Look at what the machine lacks, and compare every image layer with its digest
///
/// First each requirement of pods and of microVM pods, with what to do about one that is missing. Then the images: the
/// archive that each layer was made from is put together again and hashed, so that a single wrong bit is found; blobs
/// that were kept (image.keep_blobs) likewise. The exit status is 1 if something is wrong and was not repaired,
/// or if no pod can run here.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull system check
  hull system check --repair    then pull the images that it names again")]
pub(super) struct Check {
    /// Take out what is damaged, with the images that need it (none needs a kept blob)
    #[arg(long)]
    repair: bool,
    #[arg(skip)]
    requirements: Vec<Requirement>,
}

impl Check {
    pub(super) async fn look_at_machine(&mut self, format: Format) -> Result<(), CliError> {
        let look = || {
            // The daemon's own may be another file, which it alone knows.
            let config = config::load(None, &config::Overrides::default()).unwrap_or_default();
            requirements::look(&config)
        };
        let broke_off = |error: tokio::task::JoinError| CliError::Refused(error.to_string());
        self.requirements = tokio::task::spawn_blocking(look).await.map_err(broke_off)?;
        if format == Format::Json { Ok(()) } else { requirements::table(&self.requirements).print() }
    }

    /// 1 if no pod can run.
    fn of_machine(&self) -> u8 {
        u8::from(self.requirements.iter().any(|one| one.weight == Weight::Pods && one.found.is_err()))
    }

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
                            "layers": done.layers, "blobs": done.blobs, "bytes": done.bytes, "unverifiable": done.unverifiable,
                            "problems": problems, "repaired": self.repair,
                            "requirements": requirements::json(&self.requirements),
                        }))?;
                        return Ok(self.of_machine().max(u8::from(!problems.is_empty() && !self.repair)));
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
                    let blobs = match done.blobs {
                        0 => String::new(),
                        count => format!(" and {count} kept blobs"),
                    };
                    print(&format!(
                        "{} layers{blobs}, {read} compared{unverifiable}: {outcome}\n",
                        done.layers
                    ))?;
                    return Ok(self.of_machine().max(u8::from(!problems.is_empty() && !self.repair)));
                }
                _ => {}
            }
        }
        Err(CliError::Refused("the check broke off before its end".into()))
    }
}
