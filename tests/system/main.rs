//! Whole behaviour through the real socket: an independent CRI client, a real registry, a real kernel. Run as root.
#![forbid(unsafe_code)]
// What the tests share outside #[test] functions panics as they do: a test that cannot go on has failed.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cli;
mod conformance;
mod container_images;
mod dead_sources;
mod effort;
mod events;
mod first_pod;
mod foreign_clients;
mod hostile_images;
mod image_policy;
mod interactive;
mod isolation;
mod kill_anywhere;
mod killed_store;
mod layers_in_guests;
mod lessons;
mod lists;
mod loop_devices;
mod microvm;
mod microvm_crashes;
mod microvm_differences;
mod microvm_volumes;
mod mounts;
mod namespaces;
mod network;
mod registry_logins;
mod requests;
mod resources;
mod round_trips;
mod security_apparmor;
mod security_cdi;
mod security_context;
mod security_selinux;
mod started_again;
mod stats;
mod stream_volume;
mod streaming;
mod streaming_rules;
mod streaming_tls;
mod survival;
mod systemd;
mod torn_records;
mod userns;
