//! The node daemon: CRI served by hull's own runtime.

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(code) = hull_cri::sandbox::reach::serve_if_asked() {
        return code;
    }
    hull_cri::server::main::<hull_cri::runtime::RuntimeServer>()
}
