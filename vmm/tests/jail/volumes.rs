//! hull-virtiofsd: the real program's main function, its confinement, and what it serves to a guest that is this test.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::ExitCode;

use hull_sys::mount::{Attributes, FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, Propagation};
use hull_sys::namespace::{Namespaces, unshare};
use hull_vmm::attach::{AttachError, Attached, Server};
use hull_vmm::jail::VOLUME_CAPABILITIES;
use hull_vmm::protocol::messages::{
    BootVolumes, HaltQueues, Jail, ServeQueues, request::Call, response::Outcome,
};
use rustix::fs::{CWD, Mode, OFlags};

use crate::fuse::{Fields, Guest, REPLY_SIZE, ROOT, op, u32_at, u64_at};
use crate::host::{BASE, Confined, check_confinement, own_namespace, test};
use crate::machine;

/// The confined program.
pub(crate) fn run() -> ExitCode {
    hull_vmm::volumes::main()
}

/// A pod: its VMM as far as namespaces go, its hull-virtiofsd, and a guest that has said INIT.
struct Pod {
    guest: Guest,
    server: Confined,
    machine: Confined,
    handle: Server,
}

impl Pod {
    fn new(directory: &Path, open_files: u64) -> Self {
        let machine = machine::start(directory, None);
        let (mut guest, theirs) = Guest::new();
        let users: OwnedFd = fs::File::open(machine.proc("ns/user")).unwrap().into();
        let boot = BootVolumes { jail: Some(Jail::default()), user_namespace: 0, vmm: 1, open_files };
        let server = Confined::start("become-volumes", Call::BootVolumes(boot), &[users, theirs]);
        let handle = Server::of(server.pid).unwrap();
        guest.serve();
        guest.init();
        Self { guest, server, machine, handle }
    }

    fn attach(&self, index: u32, source: &Path, readonly: bool) -> Result<Attached, AttachError> {
        let place = rustix::fs::open(source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        self.handle.attach(index, source, place.as_fd(), readonly)
    }

    /// The root node of a volume.
    fn volume(&mut self, index: u32) -> u64 {
        self.guest.node(ROOT, &index.to_string())
    }
}

/// A file system of its own on the path.
fn mount(kind: &str, path: &Path) {
    let context = hull_sys::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    hull_sys::mount::fsconfig_create(&context).unwrap();
    let mount =
        hull_sys::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    hull_sys::mount::move_mount(&mount, "", CWD, path, flags).unwrap();
}

fn directory(path: &Path) -> &Path {
    fs::create_dir_all(path).unwrap();
    path
}

pub(crate) fn tests() {
    // Mounts of the tests go with this program.
    unshare(Namespaces::MOUNT).unwrap();
    let private = Attributes { propagation: Some(Propagation::Private), ..Attributes::default() };
    hull_sys::mount::set_attributes_at(CWD, c"/", true, &private).unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let base = temporary.path();
    test("a_server_of_volumes_sees_volumes_only_and_has_few_capabilities", || confinement(base));
    test("files_made_by_any_user_of_the_guest_are_that_users_on_the_host", || users(base));
    test("read_only_is_a_matter_of_the_host", || readonly(base));
    test("a_single_file_is_a_volume_and_shows_the_hosts_changes", || single_file(base));
    test("nothing_beside_the_volumes_can_be_reached_or_made", || beside(base));
    test("mounts_below_a_volume_are_seen_and_mapped_one_by_one", || below(base));
    test("what_cannot_be_mapped_is_refused_by_name_or_read_by_everybody", || unmappable(base));
    test("requests_that_make_no_sense_get_an_error_and_end_nothing", || nonsense(base));
    test("queues_come_back_and_can_be_handed_over_again", || handing_over(base));
    test("a_guest_opens_as_many_files_as_it_may_and_no_more", || open_files(base));
    test("the_server_ends_with_its_vmm", || ends(base));
    test("volumes_come_and_go_while_others_are_used", || come_and_go(base));
}

fn confinement(base: &Path) {
    let pod = Pod::new(directory(&base.join("vmm")), 0);
    let server = &pod.server;
    check_confinement(server, 6, VOLUME_CAPABILITIES, BASE);
    assert_eq!(server.namespace("user"), pod.machine.namespace("user"));
    for kind in ["mnt", "pid", "ipc", "uts", "net"] {
        assert_ne!(server.namespace(kind), pod.machine.namespace(kind), "{kind}");
        assert_ne!(server.namespace(kind), own_namespace(kind), "{kind}");
    }
    let root = server.proc("root");
    let names: Vec<_> = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["volumes"]);
    assert_eq!(fs::read_dir(root.join("volumes")).unwrap().count(), 0);
    let mounts = fs::read_to_string(server.proc("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
}

fn users(base: &Path) {
    let source = base.join("users");
    fs::create_dir(&source).unwrap();
    fs::set_permissions(&source, PermissionsExt::from_mode(0o777)).unwrap();
    let mut pod = Pod::new(base, 0);
    let attached = pod.attach(3, &source, false).unwrap();
    assert_eq!(attached, Attached { directory: true, readonly: false });
    let volume = pod.volume(3);
    for user in [0, 1000, 65_535, 65_536, 70_000, (1 << 31) - 1] {
        let name = format!("by-{user}");
        let (node, handle) = pod.guest.create(user, volume, &name).unwrap();
        assert_eq!(pod.guest.write(node, handle, name.as_bytes()), Ok(name.len() as u32));
        let made = fs::metadata(source.join(&name)).unwrap();
        assert_eq!((made.uid(), made.gid()), (user, user), "on the host");
        assert_eq!(fs::read_to_string(source.join(&name)).unwrap(), name);
        let seen = pod.guest.lookup(volume, &name).unwrap();
        assert_eq!((u32_at(&seen, 108), u32_at(&seen, 112)), (user, user), "in the guest");
    }
    // FATTR_UID | FATTR_GID: chown by the guest's root.
    let node = pod.guest.node(volume, "by-1000");
    pod.guest.set(node, 6, 0, (70_001, 70_002)).unwrap();
    let made = fs::metadata(source.join("by-1000")).unwrap();
    assert_eq!((made.uid(), made.gid()), (70_001, 70_002));
    // A set-group-ID directory, as fsGroup makes: FATTR_MODE.
    let node = pod.guest.node(volume, "by-0");
    pod.guest.set(node, 1, 0o2664, (0, 0)).unwrap();
    assert_eq!(fs::metadata(source.join("by-0")).unwrap().mode() & 0o7777, 0o2664);
    // A file of a host user that the guest's root may read, whatever its mode.
    fs::write(source.join("secret"), "s").unwrap();
    fs::set_permissions(source.join("secret"), PermissionsExt::from_mode(0o600)).unwrap();
    std::os::unix::fs::chown(source.join("secret"), Some(4711), Some(4711)).unwrap();
    assert_eq!(pod.guest.content(volume, "secret"), b"s");
    let value = Fields::default().u32(1).u32(0).name("user.note").bytes(b"x");
    pod.guest.call(op::SETXATTR, node, value).unwrap();
    let read = Fields::default().u32(16).u32(0).name("user.note");
    assert_eq!(pod.guest.call(op::GETXATTR, node, read), Ok(b"x".to_vec()));
}

fn readonly(base: &Path) {
    let source = base.join("readonly");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "text").unwrap();
    let mut pod = Pod::new(base, 0);
    assert!(pod.attach(0, &source, true).unwrap().readonly);
    let volume = pod.volume(0);
    assert_eq!(pod.guest.content(volume, "file"), b"text");
    assert_eq!(pod.guest.create(0, volume, "new"), Err(libc::EROFS));
    let node = pod.guest.node(volume, "file");
    assert_eq!(pod.guest.open(node, libc::O_RDWR), Err(libc::EROFS));
    assert_eq!(pod.guest.set(node, 1, 0o777, (0, 0)), Err(libc::EROFS));
}

fn single_file(base: &Path) {
    let source = base.join("hosts");
    fs::write(&source, "one").unwrap();
    let mut pod = Pod::new(base, 0);
    assert!(!pod.attach(7, &source, false).unwrap().directory);
    assert_eq!(pod.guest.content(ROOT, "7"), b"one");
    fs::write(&source, "changed").unwrap();
    assert_eq!(pod.guest.content(ROOT, "7"), b"changed");
    let seen = pod.guest.lookup(ROOT, "7").unwrap();
    assert_eq!(u64_at(&seen, 48), 7, "its size, at once");
    assert_eq!((u64_at(&seen, 16), u64_at(&seen, 24)), (0, 0), "nothing is remembered");
    let node = u64_at(&seen, 0);
    let handle = pod.guest.open(node, libc::O_RDWR).unwrap();
    pod.guest.write(node, handle, b"guest").unwrap();
    assert_eq!(fs::read_to_string(&source).unwrap(), "guested");
}

fn beside(base: &Path) {
    let source = base.join("beside");
    fs::create_dir(&source).unwrap();
    symlink("/etc/passwd", source.join("link")).unwrap();
    symlink("../..", source.join("up")).unwrap();
    let mut pod = Pod::new(base, 0);
    pod.attach(0, &source, false).unwrap();
    let volume = pod.volume(0);
    for name in ["link/x", "up/volumes", "../0", "../../etc/passwd", "/etc/passwd"] {
        assert!(pod.guest.lookup(volume, name).is_err(), "{name}");
    }
    let link = pod.guest.node(volume, "link");
    assert_eq!(pod.guest.call(op::READLINK, link, Fields::default()), Ok(b"/etc/passwd".to_vec()));
    assert!(pod.guest.open(link, libc::O_RDONLY).is_err(), "a link is not followed");
    // The root that the volumes lie in belongs to the host's root alone.
    assert_eq!(pod.guest.create(0, ROOT, "9"), Err(libc::EACCES));
    let made = pod.guest.call(op::MKDIR, ROOT, Fields::default().u32(0o777).u32(0).name("9"));
    assert_eq!(made, Err(libc::EACCES));
    assert!(pod.guest.set(ROOT, 1, 0o777, (0, 0)).is_err());
    let names = list(&mut pod.guest, ROOT);
    assert_eq!(names, [".", "..", "0"]);
}

fn list(guest: &mut Guest, node: u64) -> Vec<String> {
    let handle = u64_at(&guest.call(op::OPENDIR, node, Fields::default().u32(0).u32(0)).unwrap(), 0);
    let body = Fields::default().u64(handle).u64(0).u32(4096).u32(0).u64(0).u32(0).u32(0);
    let entries = guest.call(op::READDIR, node, body).unwrap();
    let (mut names, mut rest) = (Vec::new(), &entries[..]);
    while rest.len() >= 24 {
        let length = u32_at(rest, 16) as usize;
        names.push(String::from_utf8(rest[24..24 + length].to_vec()).unwrap());
        rest = &rest[(24 + length).next_multiple_of(8)..];
    }
    names.sort();
    names
}

fn below(base: &Path) {
    let source = base.join("with mounts");
    fs::create_dir_all(source.join("sub/deep")).unwrap();
    mount("tmpfs", &source.join("sub"));
    fs::create_dir(source.join("sub/inner")).unwrap();
    mount("tmpfs", &source.join("sub/inner"));
    fs::write(source.join("sub/inner/file"), "inner").unwrap();
    fs::create_dir(source.join("proc")).unwrap();
    mount("proc", &source.join("proc"));
    let mut pod = Pod::new(base, 0);
    pod.attach(0, &source, false).unwrap();
    let volume = pod.volume(0);
    let sub = pod.guest.lookup(volume, "sub").unwrap();
    assert_eq!(u32_at(&sub, 124) & 1, 1, "FUSE_ATTR_SUBMOUNT");
    let sub = u64_at(&sub, 0);
    assert_eq!(pod.guest.lookup(sub, "deep"), Err(libc::ENOENT), "what lies under the mount stays hidden");
    let inner = pod.guest.node(sub, "inner");
    assert_eq!(pod.guest.content(inner, "file"), b"inner");
    pod.guest.create(70_000, inner, "new").unwrap();
    assert_eq!(fs::metadata(source.join("sub/inner/new")).unwrap().uid(), 70_000);
    let proc = pod.guest.node(volume, "proc");
    assert!(pod.guest.content(proc, "version").starts_with(b"Linux"));
    assert_eq!(pod.guest.set(proc, 1, 0o777, (0, 0)), Err(libc::EROFS));
}

fn unmappable(base: &Path) {
    let source = base.join("unmappable");
    fs::create_dir(&source).unwrap();
    mount("proc", &source);
    let mut pod = Pod::new(base, 0);
    let error = pod.attach(0, &source, false).unwrap_err();
    assert!(error.to_string().contains("is on proc"), "{error}");
    pod.attach(0, &source, true).unwrap();
    let volume = pod.volume(0);
    assert!(pod.guest.content(volume, "version").starts_with(b"Linux"));
    let secret = pod.guest.node(volume, "kpagecount");
    assert_eq!(pod.guest.open(secret, libc::O_RDONLY), Err(libc::EACCES), "root's own");
    let socket = base.join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let error = pod.attach(1, &socket, false).unwrap_err();
    assert!(error.to_string().contains("is a socket"), "{error}");
}

fn nonsense(base: &Path) {
    let mut pod = Pod::new(base, 0);
    let guest = &mut pod.guest;
    assert_eq!(guest.raw(&[1; 39], 4096), Some(vec![]), "not even a header");
    // No room for a reply, for requests that have one and those that have none.
    for opcode in [op::LOOKUP, op::READ, op::READDIR, 44, op::FORGET, 42, 9999] {
        for room in [0, 15] {
            let request = guest.header(opcode, ROOT, 0, 64).bytes(&[0; 64]);
            assert_eq!(guest.raw(&request.0, room), Some(vec![]), "{opcode} {room}");
        }
    }
    for (opcode, body) in [
        (op::LOOKUP, &b""[..]),
        (op::LOOKUP, b"no zero"),
        (op::LOOKUP, b"two\0zeros\0"),
        (op::CREATE, b"short"),
        (op::WRITE, b""),
        (op::SETXATTR, b"xxxxxxxxxxxxxxxx"),
    ] {
        assert_eq!(guest.call(opcode, ROOT, Fields(body.to_vec())), Err(libc::EIO), "{opcode}");
    }
    assert_eq!(guest.call(9999, ROOT, Fields::default()), Err(libc::ENOSYS));
    // A length that is a lie, up and down.
    for length in [0_u32, 39, 1 << 20, u32::MAX] {
        let mut request = guest.header(op::LOOKUP, ROOT, 0, 2).name("x").0;
        request[..4].copy_from_slice(&length.to_le_bytes());
        let reply = guest.raw(&request, REPLY_SIZE).unwrap();
        assert!((u32_at(&reply, 4) as i32) < 0, "{length}");
    }
    for (opcode, node) in [(op::GETATTR, 4711), (op::OPEN, u64::MAX), (op::GETATTR, 0)] {
        assert_eq!(guest.call(opcode, node, Fields::default().u64(0).u64(0)), Err(libc::EBADF));
    }
    assert_eq!(guest.read(ROOT, 99), Err(libc::EBADF));
    assert_eq!(list(guest, ROOT), [".", ".."]);
}

fn handing_over(base: &Path) {
    let mut pod = Pod::new(base, 0);
    let guest = &mut pod.guest;
    list(guest, ROOT);
    let call = guest.hand_over();
    assert!(matches!(guest.serve_with(call), Outcome::Error(_)), "twice");
    let positions = guest.halt();
    assert_eq!(positions[1].next_available, positions[1].next_used);
    assert_eq!(positions[1].next_available, 3 + 1 - 1, "INIT, OPENDIR, READDIR");
    assert!(matches!(guest.ask(Call::HaltQueues(HaltQueues {}), &[]), Outcome::Error(_)), "twice");
    let changes: [fn(&mut ServeQueues); 8] = [
        |call| call.regions.clear(),
        |call| call.regions[0].size = 1 << 40,
        |call| call.regions[0].file = 60,
        |call| call.queues[1].size = 3,
        |call| call.queues[1].size = 4096,
        |call| call.queues[1].used_ring = 1 << 40,
        |call| call.queues[1].kick = 0,
        |call| call.queues.clear(),
    ];
    for change in changes {
        let mut call = guest.hand_over();
        change(&mut call);
        assert!(matches!(guest.serve_with(call), Outcome::Error(_)));
    }
    guest.serve();
    assert_eq!(list(guest, ROOT), [".", ".."]);
}

fn open_files(base: &Path) {
    let source = base.join("many");
    fs::create_dir(&source).unwrap();
    for number in 0..20 {
        fs::write(source.join(number.to_string()), "").unwrap();
    }
    let mut pod = Pod::new(base, 10);
    pod.attach(0, &source, false).unwrap();
    let volume = pod.volume(0);
    let results: Vec<_> = (0..20).map(|number| pod.guest.lookup(volume, &number.to_string())).collect();
    assert!(results[0].is_ok());
    assert_eq!(results[19], Err(libc::ENFILE));
    // What is forgotten makes room.
    let node = u64_at(results[0].as_ref().unwrap(), 0);
    let forget = pod.guest.header(op::FORGET, node, 0, 8).u64(1).0;
    assert_eq!(pod.guest.raw(&forget, 0), Some(vec![]));
    assert!(pod.guest.lookup(volume, "19").is_ok());
}

fn ends(base: &Path) {
    let Pod { guest, server, machine, handle } = Pod::new(base, 0);
    drop(guest);
    assert!(server.is_gone());
    drop((machine, handle));
}

fn come_and_go(base: &Path) {
    let (one, two) = (base.join("one"), base.join("two"));
    for source in [&one, &two] {
        fs::create_dir(source).unwrap();
        fs::write(source.join("file"), source.file_name().unwrap().as_encoded_bytes()).unwrap();
    }
    let mut pod = Pod::new(base, 0);
    assert_eq!(pod.guest.lookup(ROOT, "1"), Err(libc::ENOENT));
    pod.attach(1, &one, false).unwrap();
    pod.attach(1, &one, false).unwrap();
    pod.attach(2, &two, false).unwrap();
    let (first, second) = (pod.volume(1), pod.volume(2));
    assert_eq!(pod.guest.content(first, "file"), b"one");
    let node = pod.guest.node(first, "file");
    let handle = pod.guest.open(node, libc::O_RDONLY).unwrap();
    pod.handle.detach(1).unwrap();
    pod.handle.detach(1).unwrap();
    assert_eq!(pod.guest.lookup(ROOT, "1"), Err(libc::ENOENT));
    assert_eq!(pod.guest.read(node, handle).unwrap(), b"one", "what is open stays");
    assert_eq!(pod.guest.content(second, "file"), b"two");
    let mounts = fs::read_to_string(pod.server.proc("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 2, "{mounts}");
}
