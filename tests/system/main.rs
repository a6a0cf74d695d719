//! Whole behaviour through the real socket: an independent CRI client, a real registry, a real kernel. Run as root.
#![forbid(unsafe_code)]

mod conformance;
mod first_pod;
mod hostile_images;
mod isolation;
mod loop_devices;
mod mounts;
mod namespaces;
mod network;
mod security_context;
mod survival;
