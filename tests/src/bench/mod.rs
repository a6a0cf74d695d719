mod peer;
mod report;

/// What the processes of a runtime hold.
pub mod memory;
pub use peer::Peer;
pub use report::Report;
