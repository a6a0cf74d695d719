//! A file that `hull load` reads: an OCI layout, a docker archive, both, or something else. With an odd first byte the
//! archive gets the checksums that its headers should have, so that what is behind them is reached.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, OnceLock};

use hull_images::store::{ImageStore, StoreConfig};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};

/// What a zstd archive of this length unpacks to fits into memory.
const MAX_ZSTD: usize = 4096;

/// One for all inputs, in the directory that hack/fuzz makes in memory and takes away.
fn store() -> &'static Arc<ImageStore> {
    static STORE: OnceLock<Arc<ImageStore>> = OnceLock::new();
    STORE.get_or_init(|| {
        let place = std::env::var_os("HULL_FUZZ_DIRECTORY").unwrap_or("/dev/shm".into());
        let directory = tempfile::Builder::new().prefix("hull-fuzz-").tempdir_in(place).unwrap().keep();
        ImageStore::open(StoreConfig::new(directory.join("root"), directory.join("state"))).unwrap()
    })
}

fuzz_target!(|data: &[u8]| {
    let Some((first, bytes)) = data.split_first() else { return };
    if bytes.starts_with(b"\x28\xb5\x2f\xfd") && bytes.len() > MAX_ZSTD {
        return;
    }
    let archive = if first % 2 == 1 { hull_fuzz::sealed(bytes) } else { bytes.to_vec() };
    let mut file = File::from(memfd_create("archive", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(&archive).unwrap();
    let store = store();
    // Layers below an opaque root are not mounted.
    let loaded = store.load(file, |image| assert!(image.config.diff_ids.ends_with(&image.layers)));
    let images = store.list().unwrap();
    // What is refused leaves nothing of the image that it is about; those before it are whole.
    if loaded.is_ok() || !images.is_empty() {
        let report = store.check(false, |_| true).unwrap();
        assert!(report.problems.is_empty(), "{report:?}");
        for image in images {
            store.remove(&image.id).unwrap();
        }
    }
    assert!(store.layer_usage().is_empty());
    let left = std::fs::read_dir(store.usage().unwrap().mountpoint.parent().unwrap().join("layers"));
    assert_eq!(left.unwrap().count(), 0);
});
