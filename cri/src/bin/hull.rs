//! The command line. Everything is in [`hull_cri::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    hull_cri::cli::main()
}
