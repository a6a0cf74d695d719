//! The program hull-agent; see the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use hull_agent::sandbox::user_namespace;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [command, mappings @ ..] = arguments.as_slice()
        && command == user_namespace::COMMAND
    {
        return if user_namespace::main(mappings).is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    hull_agent::server::main()
}
