use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use hull_images::digest::Digest;

use crate::TestStore;
use crate::image::{Layer, Packing, TestImage};
use crate::server::Server;

async fn two_images(test: &TestStore) -> (TestImage, TestImage) {
    let layer = |name: &str| Layer::new(&[(name, &[7; 20_000])], Packing::Gzip);
    let one = TestImage::new(vec![layer("base"), layer("one")]);
    let two = TestImage::new(vec![layer("base"), layer("two")]);
    let server = Server::start(&[("app:1", &one), ("app:2", &two)], |_| None).await;
    for tag in ["1", "2"] {
        test.pull(&format!("{}/app:{tag}", server.host())).await.unwrap();
    }
    (one, two)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_store_has_no_problems_and_gives_its_archives_back() {
    let test = TestStore::new();
    let (one, _) = two_images(&test).await;
    let report = test.store.check(false, |_| true).unwrap();
    assert_eq!(report.problems, []);
    assert_eq!((report.layers, report.unverifiable.len()), (3, 0));
    assert!(report.bytes > 60_000);
    for layer in &test.store.find(&one.id()).unwrap().unwrap().config.diff_ids {
        let mut archive = Vec::new();
        test.store.write_archive(layer, &mut archive).unwrap();
        assert_eq!(Digest::sha256(&archive).to_string(), layer.as_str());
    }
    let mut seen = 0;
    let stopped = test
        .store
        .check(false, |_| {
            seen += 1;
            seen < 2
        })
        .unwrap();
    assert_eq!(stopped.layers, 1);
}

/// One flipped bit in a file's content, which no file system would notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_layer_is_found_and_taken_out_with_its_image() {
    let test = TestStore::new();
    let (one, two) = two_images(&test).await;
    let own = test.store.find(&one.id()).unwrap().unwrap().layers[1].clone();
    let path = test.root().join("layers").join(format!("{}.erofs", own.hex()));
    let mut byte = [0];
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.read_exact_at(&mut byte, 8000).unwrap();
    file.write_all_at(&[byte[0] ^ 4], 8000).unwrap();
    fs::write(test.root().join("layers/stray"), "x").unwrap();

    let report = test.store.check(false, |_| true).unwrap();
    let damage = report.problems.iter().find(|problem| problem.subject == own.as_str()).unwrap();
    assert_eq!(damage.images, [one.id()]);
    assert!(damage.reason.contains("damaged"), "{}", damage.reason);
    assert_eq!(report.problems.len(), 2, "{:?}", report.problems);
    assert!(test.store.find(&one.id()).unwrap().is_some(), "without repair nothing changes");

    test.store.check(true, |_| true).unwrap();
    assert!(test.store.find(&one.id()).unwrap().is_none());
    assert!(test.store.find(&two.id()).unwrap().is_some());
    assert_eq!(test.layer_files().len(), 2);
    assert_eq!(test.store.check(false, |_| true).unwrap().problems, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_layer_file_is_found() {
    let test = TestStore::new();
    let (one, two) = two_images(&test).await;
    let base = test.store.find(&one.id()).unwrap().unwrap().layers[0].clone();
    fs::remove_file(test.root().join("layers").join(format!("{}.erofs", base.hex()))).unwrap();
    let report = test.store.check(true, |_| true).unwrap();
    let mut affected = report.problems[0].images.clone();
    affected.sort();
    let mut both = vec![one.id(), two.id()];
    both.sort();
    assert_eq!(affected, both);
    test.assert_nothing_left();
}
