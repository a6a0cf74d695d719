//! hosts.toml, which names the hosts that serve a registry.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    // Files that it names are read, bounded; none of the machine's own.
    if !text.contains("\"/") && !text.contains("'/") && !text.contains("..") && !text.contains('\\') {
        hull_images::fuzzing::hosts(Path::new("/nonexistent"), text, "registry.example:5000");
    }
});
