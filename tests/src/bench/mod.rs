mod chart;
mod options;
mod peer;
mod pod_cgroup;
mod processes;
mod report;
mod usage;
mod websocket;
mod workload;

pub use chart::draw;
pub use options::{Named, Network, Options};
pub use peer::Peer;
pub use report::Report;
pub use workload::{WORKLOADS, run};
