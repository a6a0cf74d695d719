use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hull_images::store::PullErrorKind;

use crate::image::{Layer, Packing, TestImage, digest};
use crate::server::{Reply, Request, Server};
use crate::{TestStore, reference};

const MIB: usize = 1 << 20;

/// An image of one layer with a blob of so many MiB.
fn large(mebibytes: usize, seed: u64) -> TestImage {
    TestImage::new(vec![Layer::packed_noise("large", mebibytes * MIB, seed, Packing::Plain)])
}

/// A store that waits however busy this machine is: each timeout would be a further request.
fn patient() -> TestStore {
    TestStore::with(|config| config.progress_timeout = Duration::from_secs(60))
}

/// So slow that every machine waits for it.
fn slow(reply: Reply) -> Reply {
    reply.paced(64 << 10, Duration::from_millis(8))
}

/// The server's answers for the image's layer.
async fn serve(
    image: &TestImage,
    answer: impl Fn(&[u8], &Request) -> Reply + Send + Sync + 'static,
) -> Server {
    let blob = image.layers[0].blob.clone();
    let part = digest(&blob);
    Server::start(&[("app:1", image)], move |request| {
        request.target.contains(&part).then(|| answer(&blob, request))
    })
    .await
}

/// The ranges that a server was asked for, in order.
fn parts(server: &Server) -> Vec<(usize, usize)> {
    let requests = server.requests();
    let ranges = requests.iter().filter_map(Request::range);
    let mut parts: Vec<_> = ranges.filter_map(|(first, last)| Some((first, last? + 1))).collect();
    parts.sort_unstable();
    parts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_layer_comes_over_several_connections() {
    let image = large(40, 1);
    // What is not asked for by parts comes so slowly that every machine wants them.
    let server = serve(&image, |blob, request| match request.range() {
        Some((_, Some(_))) => slow(Reply::range_of(blob, request)),
        _ => Reply::range_of(blob, request).paced(64 << 10, Duration::from_millis(30)),
    })
    .await;
    let test = patient();
    let pulled = test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    assert_eq!(pulled.id, image.id());
    let parts = parts(&server);
    let in_parts: usize = parts.iter().map(|(first, end)| end - first).sum();
    assert!(in_parts >= 20 * MIB, "at most the beginning comes in one piece: {parts:?}");
    assert!(parts.windows(2).all(|pair| pair[0].1 <= pair[1].0), "nothing is fetched twice: {parts:?}");
    assert!(parts.iter().all(|(first, end)| end - first <= 2 * MIB), "{parts:?}");
    assert!((2..=7).contains(&server.most_at_once()), "{}", server.most_at_once());
    test.store.remove(&pulled.id).unwrap();
    test.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_ignores_ranges_sends_the_layer_once() {
    let image = large(24, 2);
    let server = serve(&image, |blob, _| slow(Reply::ok(blob))).await;
    let test = patient();
    test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    assert!(parts(&server).len() <= 1, "it is asked once: {:?}", parts(&server));
    assert!(server.count("GET", &digest(&image.layers[0].blob)) <= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_refuses_or_confuses_ranges_sends_the_layer_once() {
    let image = large(24, 3);
    let confusions: [fn(&[u8], usize) -> Reply; 4] = [
        |_, _| Reply::new(416, ""),
        |_, _| Reply::new(403, ""),
        |blob, first| Reply::new(206, &blob[first..]).header("Content-Range", "bytes 0-5/6"),
        |blob, first| Reply::new(206, &blob[first..]),
    ];
    for confusion in confusions {
        let server = serve(&image, move |blob, request| match request.range() {
            Some((first, _)) => confusion(blob, first),
            None => slow(Reply::ok(blob)),
        })
        .await;
        let test = patient();
        test.pull(&format!("{}/app:1", server.host())).await.unwrap();
        assert!(server.count("GET", &digest(&image.layers[0].blob)) <= 2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_that_is_cut_goes_on_where_it_was() {
    let image = large(40, 4);
    let server = serve(&image, |blob, request| match request.range() {
        // Each part breaks off after 1 MiB; what follows does too.
        Some((first, Some(last))) if last + 1 - first > MIB => Reply::range_of(blob, request).cut_after(MIB),
        _ => slow(Reply::range_of(blob, request)),
    })
    .await;
    let test = patient();
    test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    let parts = parts(&server);
    let continued = parts.windows(2).filter(|pair| pair[0].1 == pair[1].1 && pair[1].0 == pair[0].0 + MIB);
    assert!(continued.count() >= 3, "{parts:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_that_fail_for_good_are_read_in_one_piece() {
    let image = large(40, 5);
    let asked = Arc::new(AtomicUsize::new(0));
    let server = serve(&image, move |blob, request| match request.range() {
        Some((_, Some(_))) if asked.fetch_add(1, Ordering::SeqCst) > 0 => Reply::new(403, ""),
        _ => slow(Reply::range_of(blob, request)),
    })
    .await;
    let test = patient();
    test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    let rest = |request: &Request| matches!(request.range(), Some((first, None)) if first > 0);
    assert_eq!(server.requests().iter().filter(|request| rest(request)).count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_with_wrong_bytes_fails_the_layer() {
    let image = large(40, 6);
    let server = serve(&image, |blob, request| match request.range() {
        Some((first, Some(last))) => {
            let mut wrong = blob.to_vec();
            wrong[first + (last - first) / 2] ^= 1;
            Reply::range_of(&wrong, request)
        }
        _ => slow(Reply::range_of(blob, request)),
    })
    .await;
    let test = patient();
    let error = test.pull(&format!("{}/app:1", server.host())).await.unwrap_err();
    assert_eq!(error.kind(), PullErrorKind::Invalid, "{error}");
    assert!(error.to_string().contains(&digest(&image.layers[0].blob)), "{error}");
    test.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_layer_comes_over_one_connection() {
    let image = large(12, 7);
    let server = serve(&image, |blob, request| slow(Reply::range_of(blob, request))).await;
    let test = patient();
    test.pull(&format!("{}/app:1", server.host())).await.unwrap();
    assert_eq!(server.count("GET", &digest(&image.layers[0].blob)), 1);
    assert_eq!(parts(&server), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_limit_on_downloads_holds_over_all_pulls_and_parts() {
    let (one, two) = (large(20, 8), large(20, 9));
    let third = TestImage::new(vec![Layer::noise("a", MIB, 1), Layer::noise("b", MIB, 2)]);
    let blobs: Vec<Vec<u8>> =
        [&one, &two, &third].iter().flat_map(|image| image.layers.iter().map(|l| l.blob.clone())).collect();
    let images = [("app:1", &one), ("app:2", &two), ("app:3", &third)];
    let server = Server::start(&images, move |request| {
        let blob = blobs.iter().find(|blob| request.target.contains(&digest(blob)))?;
        Some(slow(Reply::range_of(blob, request)))
    })
    .await;
    let test = TestStore::with(|config| {
        config.max_parallel_downloads = 2;
        config.progress_timeout = Duration::from_secs(60);
    });
    let names = [1, 2, 3].map(|tag| reference(&format!("{}/app:{tag}", server.host())));
    let pulls = names.iter().map(|name| test.store.pull(name, None, None));
    for pulled in futures::future::join_all(pulls).await {
        pulled.unwrap();
    }
    // One more, because the server learns late of a connection that was given up.
    assert!((2..=3).contains(&server.most_at_once()), "{}", server.most_at_once());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_in_parts_that_nobody_waits_for_leaves_nothing() {
    let image = large(40, 10);
    let server = serve(&image, |blob, request| match request.range() {
        Some(_) => Reply::range_of(blob, request).stall_after(MIB),
        None => slow(Reply::ok(blob)),
    })
    .await;
    let test = patient();
    let name = reference(&format!("{}/app:1", server.host()));
    let parts_stall = async {
        // As many as are ever fetched ahead, and none of them ends.
        while parts(&server).len() < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(test.layer_files().len(), 1, "it is at work");
    };
    tokio::select! {
        pulled = test.store.pull(&name, None, None) => panic!("{pulled:?}"),
        () = parts_stall => {}
    }
    test.assert_nothing_left();
}

/// The promise of bounded memory, measured as the peak of a process of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_in_parts_take_less_than_64_mib() {
    let layer = |seed| Layer::packed_noise("large", 24 * MIB, seed, Packing::Plain);
    let image = TestImage::new((1..=4).map(layer).collect());
    let blobs: Vec<Vec<u8>> = image.layers.iter().map(|layer| layer.blob.clone()).collect();
    let server = Server::start(&[("app:1", &image)], move |request| {
        let blob = blobs.iter().find(|blob| request.target.contains(&digest(blob)))?;
        // The parts come at once, the first one late: as much as ever is held.
        Some(match request.range() {
            Some(_) => Reply::range_of(blob, request),
            None => Reply::ok(blob.as_slice()).paced(256 << 10, Duration::from_millis(20)),
        })
    })
    .await;
    let name = format!("{}/app:1", server.host());
    let child = tokio::task::spawn_blocking(move || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "--nocapture", "ranges::pull_and_print_the_peak"])
            .env("HULL_TEST_IMAGE", name)
            .output()
            .unwrap()
    });
    let output = child.await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let line = text.lines().find(|line| line.contains("VmHWM")).unwrap();
    let peak: u64 = line.split_ascii_whitespace().rev().nth(1).unwrap().parse().unwrap();
    println!("peak {peak} KiB, {} parts", parts(&server).len());
    assert!(!parts(&server).is_empty());
    assert!(peak < 64 << 10, "{peak} KiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "started in a process of its own by layers_in_parts_take_less_than_64_mib"]
async fn pull_and_print_the_peak() {
    let test = TestStore::with(|config| {
        config.max_parallel_layers = 4;
        config.progress_timeout = Duration::from_secs(30);
    });
    test.pull(&std::env::var("HULL_TEST_IMAGE").unwrap()).await.unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    println!("\n{}", status.lines().find(|line| line.starts_with("VmHWM")).unwrap());
}
