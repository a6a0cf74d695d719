//! Manifests and indexes, as the registry serves them.
#![no_main]

use libfuzzer_sys::fuzz_target;

const TYPES: [&str; 3] =
    ["", "application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];

fuzz_target!(|data: &[u8]| {
    let Some((first, bytes)) = data.split_first() else { return };
    hull_images::fuzzing::manifest(TYPES[usize::from(*first) % TYPES.len()], bytes);
});
