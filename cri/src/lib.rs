//! hulld, the node daemon that speaks CRI, and hull, its command line.
#![forbid(unsafe_code)]

pub mod api;
pub mod config;
/// Capabilities, seccomp, devices, sysctls and paths of containers.
pub mod security;
pub mod server;
