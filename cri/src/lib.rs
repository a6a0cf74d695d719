//! hulld, the node daemon that speaks CRI, and hull, its command line.
#![forbid(unsafe_code)]

pub mod api;
pub mod cli;
pub mod config;
mod image;
pub mod runtime;
pub mod sandbox;
/// Capabilities, seccomp, devices, sysctls and paths of containers.
pub mod security;
pub mod server;
pub mod store;
