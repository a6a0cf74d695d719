//! hulld, the node daemon that speaks CRI, and hull, its command line.
#![forbid(unsafe_code)]

pub mod api;
mod blockio;
pub mod cli;
pub mod config;
/// Changes, told in order to everybody who listens.
pub mod events;
mod image;
mod local_stream;
mod rdt;
pub mod runtime;
pub mod sandbox;
/// Capabilities, seccomp, devices, sysctls and paths of containers.
pub mod security;
pub mod server;
/// What pods and containers use.
pub mod stats;
pub mod store;
pub mod streaming;
pub mod systemd;
mod yaml;

/// Tests count what a start allocates.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: hull_sys::memory::Counting = hull_sys::memory::Counting;
