//! `hull history`

use clap::Args;
use serde_json::Value;

use super::client::{Client, answer};
use super::error::CliError;
use super::output::{Format, Table, print_json};
use crate::api::runtime::{ImageSpec, ImageStatusRequest};

/// Show how an image was made, the newest step first
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  hull history busybox
  hull history --no-trunc app:1.2")]
pub(super) struct History {
    /// Reference, id, or the beginning of an id
    image: String,

    /// Whole commands, however long
    #[arg(long)]
    no_trunc: bool,
}

/// Characters of a command that a table has room for.
const SHOWN: usize = 70;

impl History {
    pub(super) async fn run(self, client: &mut Client, format: Format) -> Result<(), CliError> {
        let patience = client.patience();
        let image = Some(ImageSpec { image: self.image.clone(), ..Default::default() });
        let call = client.image.image_status(ImageStatusRequest { image, verbose: true });
        let status = answer(format!("look for the image {}", self.image), patience, call).await?;
        if status.image.is_none() {
            let hint = "`hull images` lists images, `hull pull` fetches one.";
            return Err(CliError::NotFound { kind: "image", name: self.image, hint });
        }
        let info: Value =
            status.info.get("info").and_then(|info| serde_json::from_str(info).ok()).unwrap_or_default();
        let steps = info["imageSpec"]["history"].as_array().cloned().unwrap_or_default();
        if format == Format::Json {
            return print_json(&steps);
        }
        let mut table = Table::new(&["CREATED", "LAYER", "CREATED BY", "COMMENT"]);
        for step in steps.iter().rev() {
            let text = |key: &str| step[key].as_str().unwrap_or_default();
            // Dates without fractions of a second, which say nothing to people.
            let created = text("created").split('.').next().unwrap_or_default().trim_end_matches('Z');
            let has_layer = !step["empty_layer"].as_bool().unwrap_or_default();
            let layer = if has_layer { "yes" } else { "-" };
            table.row([
                created.replace('T', " "),
                layer.into(),
                self.shortened(text("created_by")),
                text("comment").into(),
            ]);
        }
        table.print()
    }

    fn shortened(&self, command: &str) -> String {
        let one_line: String = command.split_whitespace().collect::<Vec<_>>().join(" ");
        match one_line.char_indices().nth(SHOWN) {
            Some((at, _)) if !self.no_trunc => format!("{}…", &one_line[..at]),
            _ => one_line,
        }
    }
}
