//! `hull info`

use super::client::{Client, answer};
use super::error::CliError;
use super::output::{Format, age, print, print_json, printable, size};
use crate::api::hull::InfoRequest;

pub(super) const EXAMPLES: &str = "\
Examples:
  hull info
  hull -o json info | jq .pods";

pub(super) async fn run(client: &mut Client, format: Format) -> Result<(), CliError> {
    let patience = client.patience();
    let info = answer("ask the daemon about itself", patience, client.hull.info(InfoRequest {})).await?;
    if format == Format::Json {
        return print_json(&info);
    }
    let network = match info.network_problem.as_str() {
        "" if info.network.is_empty() || info.network == info.network_mode => info.network_mode,
        "" => format!("{} ({})", info.network, info.network_mode),
        problem => format!("{}: not ready: {problem}", info.network_mode),
    };
    let handler = |name: &String| match info.handler_problems.get(name) {
        Some(problem) => format!("{name} (not available: {problem})"),
        None => name.clone(),
    };
    let handlers: Vec<String> = info.runtime_handlers.iter().map(handler).collect();
    let lines = [
        ("hulld", format!("{}, pid {}, started {}", info.version, info.pid, age(info.started_at))),
        ("memory", size(info.resident_bytes)),
        ("root", info.root),
        ("state", info.state),
        ("kernel", format!("{} {}", info.kernel, info.architecture)),
        ("cgroups", info.cgroup),
        ("network", network),
        ("handlers", handlers.join(", ")),
        ("pods", format!("{}, {} ready", info.pods, info.pods_ready)),
        ("containers", format!("{}, {} running", info.containers, info.containers_running)),
        ("images", format!("{}, {} on disk", info.images, size(info.image_bytes))),
    ];
    print(&lines.map(|(name, value)| format!("{name:<12}{}\n", printable(&value))).concat())
}
