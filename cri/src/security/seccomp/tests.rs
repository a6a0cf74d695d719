//! Compiled profiles, run: by an interpreter of the kernel's language, for any call of any architecture, and by the
//! kernel itself.

use rustix::io::Errno;

use super::*;
use crate::security::capabilities;

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0001;
const ENOSYS: u32 = 0x0005_0026;

/// What the program says to a call.
pub(super) fn verdict(program: &[u8], architecture: u32, number: u32, arguments: &[u64]) -> u32 {
    // struct seccomp_data
    let mut data = vec![];
    data.extend(number.to_ne_bytes());
    data.extend(architecture.to_ne_bytes());
    data.extend([0; 8]);
    data.extend((0..6).flat_map(|index| arguments.get(index).copied().unwrap_or(0).to_ne_bytes()));
    let word =
        |offset: u32| u32::from_ne_bytes(data[offset as usize..offset as usize + 4].try_into().unwrap());

    let (mut accumulator, mut place) = (0_u32, 0_usize);
    loop {
        let code: [u8; 8] = program[place * 8..place * 8 + 8].try_into().unwrap();
        let (if_true, if_false) = (usize::from(code[2]), usize::from(code[3]));
        let value = u32::from_ne_bytes(code[4..].try_into().unwrap());
        place += 1;
        let mut branch = |holds: bool| place += if holds { if_true } else { if_false };
        match u16::from_ne_bytes([code[0], code[1]]) {
            0x20 => accumulator = word(value),
            0x54 => accumulator &= value,
            0x05 => place += value as usize,
            0x15 => branch(accumulator == value),
            0x25 => branch(accumulator > value),
            0x35 => branch(accumulator >= value),
            0x45 => branch(accumulator & value != 0),
            0x06 => return value,
            other => panic!("an instruction {other:#x} at {place}"),
        }
    }
}

fn default_program(caps: u64) -> Arc<Program> {
    compile(Profile::RuntimeDefault, caps).unwrap().unwrap()
}

#[cfg(target_arch = "x86_64")]
#[test]
fn the_default_profile_decides_as_containerds_does() {
    let program = default_program(capabilities::DEFAULT);
    let says = |number, arguments: &[u64]| verdict(&program.bpf, X86_64, number, arguments);
    for (number, name) in
        [(0, "read"), (59, "execve"), (101, "ptrace"), (161, "chroot"), (435 - 1, "pidfd_open")]
    {
        assert_eq!(says(number, &[]), ALLOW, "{name}");
    }
    for (number, name) in [
        (165, "mount"),
        (166, "umount2"),
        (155, "pivot_root"),
        (246, "kexec_load"),
        (250, "keyctl"),
        (248, "add_key"),
        (272, "unshare"),
        (308, "setns"),
        (321, "bpf"),
        (323, "userfaultfd"),
        (425, "io_uring_setup"),
        (428, "open_tree"),
        (103, "syslog"),
        (304, "open_by_handle_at"),
        (238, "set_mempolicy"),
    ] {
        assert_eq!(says(number, &[]), EPERM, "{name}");
    }
    // Arguments decide.
    const CLONE: u32 = 56;
    assert_eq!(says(CLONE, &[0x003d_0f00]), ALLOW, "a thread");
    for namespace in
        [0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000]
    {
        assert_eq!(says(CLONE, &[namespace | 17]), EPERM, "{namespace:#x}");
    }
    assert_eq!(says(435, &[]), ENOSYS, "clone3");
    const SOCKET: u32 = 41;
    for (family, expected) in
        [(1, ALLOW), (2, ALLOW), (16, ALLOW), (38, EPERM), (39, ALLOW), (40, EPERM), (44, ALLOW)]
    {
        assert_eq!(says(SOCKET, &[family]), expected, "address family {family}");
    }
    for (persona, expected) in
        [(0, ALLOW), (8, ALLOW), (0xffff_ffff, ALLOW), (0x0040_0000, EPERM), (0x4_0000, EPERM)]
    {
        assert_eq!(says(135, &[persona]), expected, "personality {persona:#x}");
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn capabilities_open_the_calls_that_need_them() {
    let everything = default_program(u64::MAX);
    for (number, name) in
        [(165, "mount"), (272, "unshare"), (435, "clone3"), (321, "bpf"), (238, "set_mempolicy")]
    {
        assert_eq!(verdict(&everything.bpf, X86_64, number, &[]), ALLOW, "{name}");
    }
    assert_eq!(verdict(&everything.bpf, X86_64, 56, &[0x1000_0000]), ALLOW, "clone of a user namespace");
    assert_eq!(verdict(&everything.bpf, X86_64, 250, &[]), EPERM, "keyctl");
}

#[cfg(target_arch = "x86_64")]
#[test]
fn older_architectures_of_the_processor_are_filtered_too() {
    let program = default_program(capabilities::DEFAULT);
    let i386 = |number| verdict(&program.bpf, I386, number, &[]);
    assert_eq!(i386(4), ALLOW, "write");
    assert_eq!(i386(140), ALLOW, "_llseek");
    assert_eq!(i386(21), EPERM, "mount");
    assert_eq!(i386(288), EPERM, "keyctl");
    assert_eq!(i386(310), EPERM, "unshare");
    const X32: u32 = 0x4000_0000;
    assert_eq!(verdict(&program.bpf, X86_64, X32 | 1, &[]), ALLOW, "write");
    assert_eq!(verdict(&program.bpf, X86_64, X32 | 165, &[]), EPERM, "mount");
    // A machine nobody named is killed, as libseccomp does.
    assert_eq!(verdict(&program.bpf, 0xc000_00b7, 64, &[]), 0);
}

#[test]
fn calls_younger_than_libseccomp_are_known_and_those_younger_than_the_profile_do_not_exist() {
    let program = default_program(capabilities::DEFAULT);
    for token in [X86_64, I386] {
        let says = |number| verdict(&program.bpf, token, number, &[]);
        assert_eq!(says(451), ALLOW, "cachestat");
        assert_eq!(says(452), ALLOW, "fchmodat2");
        assert_eq!(says(462), ALLOW, "mseal");
        assert_eq!(says(466), ALLOW, "removexattrat");
        assert_eq!(says(459), EPERM, "lsm_get_self_attr needs CAP_SYS_ADMIN");
        assert_eq!(says(450), EPERM, "set_mempolicy_home_node needs CAP_SYS_NICE");
        assert_eq!(says(467), ENOSYS, "open_tree_attr");
        assert_eq!(says(600), ENOSYS);
    }
    assert_eq!(verdict(&program.bpf, X86_64, u32::MAX, &[]), EPERM, "a call that a tracer skips");
}

#[test]
fn a_profile_from_a_file_decides_what_it_says() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("profile.json");
    let write = |text: &str| std::fs::write(&path, text).unwrap();
    let says = |number| {
        let program = compile(Profile::Localhost(&path), 0).unwrap().unwrap();
        verdict(&program.bpf, X86_64, number, &[])
    };
    write(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
        {"names":["mkdir","mkdirat","fchmodat2","not_a_call"],"action":"SCMP_ACT_ERRNO","errnoRet":13}]}"#,
    );
    assert_eq!(says(83), 0x0005_000d, "mkdir");
    assert_eq!(says(452), 0x0005_000d, "fchmodat2");
    assert_eq!(says(0), ALLOW, "read");
    assert_eq!(says(600), ALLOW, "what is allowed by default is not made unknown");

    // A changed file is another profile.
    write(
        r#"{"defaultAction":"SCMP_ACT_KILL_PROCESS","syscalls":[{"names":["read","exit"],"action":"SCMP_ACT_LOG"}]}"#,
    );
    assert_eq!(says(0), 0x7ffc_0000, "read");
    assert_eq!(says(1), 0x8000_0000, "write");
    assert_eq!(says(61), ENOSYS, "wait4 is younger than the youngest call that the profile names");

    // Conditions on one argument are alternatives; on several, all must hold.
    write(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[
        {"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":0,"value":2,"op":"SCMP_CMP_EQ"}]},
        {"names":["write"],"action":"SCMP_ACT_ALLOW","args":[
        {"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":2,"value":9,"op":"SCMP_CMP_LT"}]}]}"#,
    );
    let program = compile(Profile::Localhost(&path), 0).unwrap().unwrap();
    let says = |number, arguments: &[u64]| verdict(&program.bpf, X86_64, number, arguments);
    assert_eq!((says(0, &[1]), says(0, &[2]), says(0, &[3])), (ALLOW, ALLOW, EPERM));
    assert_eq!((says(1, &[1, 0, 8]), says(1, &[1, 0, 9]), says(1, &[2, 0, 8])), (ALLOW, EPERM, EPERM));
}

#[test]
fn a_file_that_is_no_profile_is_refused_with_its_path() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("profile.json");
    let refused = |path: &Path| compile(Profile::Localhost(path), 0).unwrap_err().to_string();
    assert!(refused(&path).contains("profile.json"));
    std::fs::write(&path, "{").unwrap();
    assert!(refused(&path).contains("profile.json"));
    assert!(refused(directory.path()).contains("not a regular file"));
    assert!(refused(Path::new("profile.json")).contains("not absolute"));
    std::fs::write(&path, vec![b' '; MAX_FILE as usize + 1]).unwrap();
    assert!(refused(&path).contains("larger than 1 MiB"));
    let pipe = directory.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
        .unwrap();
    assert!(refused(&pipe).contains("not a regular file"));
}

#[test]
fn the_same_profile_is_compiled_once() {
    let first = default_program(capabilities::DEFAULT);
    let chown = 1;
    assert!(Arc::ptr_eq(&first, &default_program(capabilities::DEFAULT & !chown)), "CHOWN changes nothing");
    assert!(!Arc::ptr_eq(&first, &default_program(0)));
    assert!(compile(Profile::Unconfined, 0).unwrap().is_none());
}

#[test]
fn the_kernel_takes_the_default_profile_and_blocks_what_it_blocks() {
    let program = default_program(capabilities::DEFAULT);
    // A filter cannot be taken off, so the thread that gets it is thrown away.
    let filtered = std::thread::spawn(move || {
        hull_sys::privilege::install_seccomp(&program.bpf, program.flags).unwrap();
        let nowhere = c"/hull-test-absent";
        let mount = rustix::mount::mount(nowhere, nowhere, nowhere, rustix::mount::MountFlags::empty(), None);
        let alg = rustix::net::AddressFamily::from_raw(38);
        let socket = |family| rustix::net::socket(family, rustix::net::SocketType::SEQPACKET, None).map(drop);
        // Threads and processes still start, by clone where clone3 does not exist.
        let thread = std::thread::spawn(|| 7).join().unwrap();
        let process = std::process::Command::new("/bin/sh").args(["-c", "exit 7"]).status().unwrap().code();
        (mount, socket(alg), socket(rustix::net::AddressFamily::UNIX), thread, process)
    });
    let (mount, alg, unix, thread, process) = filtered.join().unwrap();
    assert_eq!(mount, Err(Errno::PERM));
    assert_eq!(alg, Err(Errno::PERM));
    assert_eq!(unix, Ok(()));
    assert_eq!((thread, process), (7, Some(7)));
}
