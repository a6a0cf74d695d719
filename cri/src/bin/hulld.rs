//! The node daemon: CRI served by hull's own runtime.

use std::process::ExitCode;

fn main() -> ExitCode {
    hull_cri::server::main::<hull_cri::runtime::RuntimeServer>()
}
