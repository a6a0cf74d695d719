//! `hull version`

use super::client::{Client, answer};
use super::error::CliError;
use super::output::{Format, print, print_json, printable};
use crate::api::runtime::VersionRequest;

pub(super) const EXAMPLES: &str = "\
Examples:
  hull version
  hull -o json version | jq -r .server.runtimeVersion";

pub(super) async fn run(client: &mut Client, format: Format) -> Result<(), CliError> {
    let patience = client.patience();
    let server =
        answer("ask for the version", patience, client.runtime.version(VersionRequest::default())).await?;
    let own = env!("CARGO_PKG_VERSION");
    if format == Format::Json {
        return print_json(&serde_json::json!({ "client": { "version": own }, "server": server }));
    }
    let name = printable(&server.runtime_name);
    let version = printable(&server.runtime_version);
    print(&format!(
        "hull        {own}\n{name:<12}{version}\nCRI         {}\n",
        printable(&server.runtime_api_version)
    ))
}
