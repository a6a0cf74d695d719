//! What is left to a confined process, looked at from outside while it runs, and tried from inside.
//!
//! This program is also the program that it starts: with an argument it becomes hull-vmm or hull-virtiofsd as far as
//! their confinement goes, and does on request what they never would.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fuse;
mod host;
mod machine;
mod volumes;

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("become-machine") => machine::run(),
        Some("become-volumes") => volumes::run(),
        _ => {
            // One after the other: they count descriptors and cgroups.
            machine::tests();
            volumes::tests();
            ExitCode::SUCCESS
        }
    }
}
