use crate::image::{Layer, Packing, TestImage};
use crate::server::Server;
use crate::{TestStore, reference};

fn image(name: &str) -> TestImage {
    TestImage::new(vec![
        Layer::new(&[("base", b"base")], Packing::Gzip),
        Layer::new(&[(name, name.as_bytes())], Packing::Gzip),
    ])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_is_given_moved_and_taken_away() {
    let (one, two) = (image("one"), image("two"));
    let server = Server::start(&[("app:1", &one), ("app:2", &two)], |_| None).await;
    let test = TestStore::new();
    for tag in ["1", "2"] {
        test.pull(&format!("{}/app:{tag}", server.host())).await.unwrap();
    }
    let new = reference("example.com/mine:latest");
    assert_eq!(test.store.tag("no/such", &new).unwrap(), None);
    assert_eq!(test.store.tag(&one.id()[7..20], &new).unwrap(), Some(one.id()));
    assert_eq!(test.store.tag(&one.id(), &new).unwrap(), Some(one.id()), "a second time changes nothing");
    let test = test.reopen();
    assert_eq!(test.store.find("example.com/mine").unwrap().unwrap().id, one.id());
    assert_eq!(test.store.tag(&two.id(), &new).unwrap(), Some(two.id()));
    assert_eq!(test.store.find("example.com/mine").unwrap().unwrap().id, two.id());
    assert_eq!(test.store.find(&one.id()).unwrap().unwrap().repo_tags.len(), 1);

    assert_eq!(test.store.remove_name(&new).unwrap(), ["example.com/mine:latest"]);
    assert_eq!(test.store.remove_name(&new).unwrap(), Vec::<String>::new());
    assert!(test.store.find(&two.id()).unwrap().is_some());
    let last = reference(&format!("{}/app:2", server.host()));
    assert!(test.store.remove_name(&last).unwrap().contains(&two.id()), "an image goes with its last tag");
    assert!(test.store.find(&two.id()).unwrap().is_none());
    assert_eq!(test.layer_files().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_tag_leads_to_is_pruned_but_not_what_is_in_use() {
    let (one, two, three) = (image("one"), image("two"), image("three"));
    let server = Server::start(&[("app:1", &one), ("app:2", &two), ("app:3", &three)], |_| None).await;
    let test = TestStore::new();
    for tag in ["1", "2", "3"] {
        test.pull(&format!("{}/app:{tag}", server.host())).await.unwrap();
    }
    // As when newer images took the tags: only their digests are left.
    let tag = reference(&format!("{}/app:3", server.host()));
    for image in [&one, &two] {
        let own = format!("{}/app:{}", server.host(), if image.id() == one.id() { 1 } else { 2 });
        test.store.tag(&three.id(), &reference(&own)).unwrap();
    }
    let used = one.id();
    let (removed, freed) = test.store.prune(false, |id| id == used).unwrap();
    assert_eq!(removed, [two.id()]);
    assert!(freed >= 4096);
    let usage = test.store.layer_usage();
    assert_eq!(usage.len(), 3);
    let shared = usage.iter().find(|usage| usage.images.len() == 2).unwrap();
    assert!(shared.bytes >= 4096 && !shared.held);
    assert!(test.store.find(&tag.to_string()).unwrap().is_some());
    let (removed, _) = test.store.prune(true, |_| false).unwrap();
    assert_eq!(removed.len(), 2);
    test.assert_nothing_left();
}
