//! hulld around the runtime: command line, directories, socket, logs, readiness and the way out.

mod args;
pub mod authority;
mod daemon;
pub mod descriptors;
pub mod directories;
pub mod logging;
pub mod notify;
pub mod requests;
mod serve;
pub mod socket;

pub use args::Args;
pub use daemon::{Node, main};
pub use serve::serve;
