//! The control socket: hulld's requests to a machine, served on the process's main thread.
//!
//! Several connections may be open: the one that the process was born with and those that came over the listener. Each
//! gets the answers to its own requests, the newest gets the events. A peer that sends nonsense loses its connection; the
//! machine goes on.

/// Requests and what comes of them.
mod calls;
/// Connections: frames in, frames out.
mod connection;
/// What happens in the machine, for hulld.
mod events;
/// The machine as requests see it.
mod machine;
/// The main thread's loop.
mod server;
#[cfg(test)]
mod tests;

pub use calls::{Answer, call};
pub use events::{EventReceiver, Events};
pub use machine::{CallError, Machine};
pub use server::{End, serve};
