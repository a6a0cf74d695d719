//! The program hull-virtiofsd; see the library's `volumes`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    hull_vmm::volumes::main()
}
