//! Image references, as users and the kubelet write them.
#![no_main]

use hull_images::Reference;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(reference) = text.parse::<Reference>() {
        let normal = reference.to_string();
        assert_eq!(normal.parse::<Reference>().as_ref(), Ok(&reference), "the normal form means the same");
    }
});
