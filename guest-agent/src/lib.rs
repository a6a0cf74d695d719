//! hull-agent: the one program that creates containers.
//!
//! For a process pod it runs on the host, one per pod, parent of everything in the pod. For a microVM pod the same
//! program is PID 1 of the guest. hulld speaks one protocol ([`protocol`]) to both.
#![forbid(unsafe_code)]

/// Cgroups v1 (hybrid included) and v2: create, limit, enter, kill, ask, remove.
pub mod cgroup;
/// From a request to a running process: plan, then launch.
pub mod container;
/// What an agent has that is the first process of a guest.
pub mod guest;
/// The messages between hulld and the agent, and their framing.
pub mod protocol;
/// The pod as a place: namespaces and a root of the agent's own.
pub mod sandbox;
/// The agent's life: birth, event loop, requests, end.
pub mod server;
/// What containers write: CRI log lines, log files, terminals.
pub mod stdio;
mod steps;

/// Tests count what a start allocates.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: hull_sys::memory::Counting = hull_sys::memory::Counting;
