//! The program hull-agent; see the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    hull_agent::server::main()
}
