use std::path::{Path, PathBuf};

/// `name` in HULL_BIN_DIR, or in the build directory that this test program came from.
pub fn program(name: &str) -> PathBuf {
    let path = match std::env::var_os("HULL_BIN_DIR") {
        Some(directory) => PathBuf::from(directory).join(name),
        // Static programs have a build directory of their own.
        None if matches!(name, "hull-agent" | "hull-vmm" | "hull-virtiofsd") => static_programs().join(name),
        None => build_directory().join(name),
    };
    assert!(path.is_file(), "{} is missing: run hack/build debug (or tests) first", path.display());
    path
}

/// Where hack/build puts what is linked statically.
pub fn static_programs() -> PathBuf {
    workspace().join("target-agent/x86_64-unknown-linux-gnu/agent")
}

/// The checkout.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace")
}

fn build_directory() -> PathBuf {
    let mut path = std::env::current_exe().expect("own path");
    while path.file_name().is_some_and(|name| name != "deps") {
        path.pop();
    }
    path.pop();
    path
}
