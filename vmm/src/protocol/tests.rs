use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use super::messages::{AddExtent, Message, request::Call};
use super::*;

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn add_extent(descriptors: usize) -> Message {
    Message::request(1, Call::AddExtent(AddExtent { key: "k".into(), length: 1, file: 0 }), descriptors)
}

#[test]
fn a_request_brings_exactly_the_descriptors_that_it_announces() {
    let (left, right) = UnixStream::pair().unwrap();
    let (mut left, mut right) = (BlockingConnection::new(left.into()), BlockingConnection::new(right.into()));
    let fd = null();
    left.send(&add_extent(1), &[fd.as_fd()]).unwrap();
    left.send(&add_extent(0), &[]).unwrap();
    assert_eq!(right.recv().unwrap().unwrap().fds.len(), 1);
    assert_eq!(right.recv().unwrap().unwrap().fds.len(), 0);
    left.send(&add_extent(0), &[fd.as_fd()]).unwrap();
    assert!(right.recv().is_err(), "a stray descriptor ends the connection");
}

#[test]
fn a_frame_that_announces_more_descriptors_than_a_frame_may_have_is_refused() {
    let mut reader = FrameReader::with_limit(MAX_REQUEST);
    reader.push(&encode(&add_extent(65)).unwrap(), (0..65).map(|_| null()).collect());
    assert!(matches!(reader.next(), Err(FrameError::MissingDescriptors { .. })));
}

#[test]
fn a_descriptor_is_taken_once_and_only_by_its_number() {
    let mut descriptors = Descriptors::new(vec![null()]);
    assert!(descriptors.take(1, "file").is_err());
    assert!(descriptors.take(u32::MAX, "file").is_err());
    descriptors.take(0, "file").unwrap();
    assert!(matches!(descriptors.take(0, "file"), Err(DescriptorError::Missing { .. })));
}

/// How a descriptor is taken.
type Take = fn(&mut Descriptors) -> Result<OwnedFd, DescriptorError>;

#[test]
fn only_the_right_type_of_file_with_the_right_access_is_taken() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    File::create(&path).unwrap();
    let open = |options: &mut OpenOptions| -> OwnedFd { options.open(&path).unwrap().into() };
    let read = || open(OpenOptions::new().read(true));
    let both = || open(OpenOptions::new().read(true).write(true));
    let append = || open(OpenOptions::new().append(true));
    let folder = || OwnedFd::from(File::open(directory.path()).unwrap());
    let socket = || OwnedFd::from(UnixStream::pair().unwrap().0);
    let listener = |name: &str| OwnedFd::from(UnixListener::bind(directory.path().join(name)).unwrap());

    let takes: [(&str, Take); 6] = [
        ("read", |d| d.file(0, "file", Access::ReadOnly)),
        ("both", |d| d.file(0, "file", Access::ReadWrite)),
        ("append", |d| d.file(0, "file", Access::Append)),
        ("disk", |d| d.disk(0, "disk", Access::ReadWrite)),
        ("socket", |d| d.socket(0, "socket", false)),
        ("listener", |d| d.socket(0, "socket", true)),
    ];
    let cases = [
        (read(), vec!["read"]),
        (both(), vec!["both", "disk"]),
        (append(), vec!["append"]),
        (folder(), vec![]),
        (null(), vec![]),
        (socket(), vec!["socket"]),
        (listener("l"), vec!["listener"]),
        (std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into(), vec![]),
    ];
    for (fd, wanted) in cases {
        let taken: Vec<&str> = takes
            .iter()
            .filter(|(_, take)| take(&mut Descriptors::new(vec![fd.try_clone().unwrap()])).is_ok())
            .map(|(name, _)| *name)
            .collect();
        assert_eq!(taken, wanted, "{fd:?}");
    }
}

#[test]
fn a_path_descriptor_gives_no_access() {
    let file = OpenOptions::new();
    let mut file = file.clone();
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut file, libc::O_PATH);
    let fd = file.read(true).open("/proc/self/status").unwrap();
    assert!(Descriptors::new(vec![fd.into()]).file(0, "file", Access::ReadOnly).is_err());
}
