//! An image's configuration, as the registry serves it.
#![no_main]

use hull_images::ImageConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = ImageConfig::parse(data.to_vec().into());
});
