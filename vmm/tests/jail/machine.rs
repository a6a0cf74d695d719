//! hull-vmm's confinement.

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::{Arc, Barrier};

use hull_vmm::control::{self, CallError, Events};
use hull_vmm::jail::{self, ThreadKind, VMM_ID};
use hull_vmm::protocol::messages::{
    self, Boot, Extent, Jail, Metrics, RemoveExtent, Status, error::Code, request::Call, response::Outcome,
};

use crate::host::{self, BASE, Cgroups, Confined, check_confinement, test};

const KINDS: [ThreadKind; 5] =
    [ThreadKind::Vcpu, ThreadKind::Block, ThreadKind::Net, ThreadKind::Vsock, ThreadKind::Misc];

/// The confined program.
pub(crate) fn run() -> ExitCode {
    let Ok(born) = jail::enter() else { return ExitCode::FAILURE };
    // What a process without a filter could still do, were one forgotten.
    let attempts = attempts();
    let confined = Arc::new(Barrier::new(KINDS.len() + 1));
    for kind in KINDS {
        let confined = confined.clone();
        std::thread::Builder::new()
            .name(format!("{kind:?}"))
            .spawn(move || {
                jail::confine(kind).unwrap();
                confined.wait();
                loop {
                    std::thread::park();
                }
            })
            .unwrap();
    }
    confined.wait();
    // Nobody reports anything here.
    let (_events, receiver) = Events::channel().unwrap();
    let mut machine = Machine { attempts };
    match control::serve(&mut machine, born.birth, born.files.control_listener, receiver, |_| Ok(())) {
        Ok(_) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// What succeeded of what must not.
fn attempts() -> Vec<String> {
    use rustix::fs::{CWD, Mode};
    let mut done = Vec::new();
    let mut attempt = |what: &str, succeeded: bool| {
        if succeeded {
            done.push(what.to_owned());
        }
    };
    for path in ["/", ".", "..", "/proc", "/proc/self", "/dev/null", "/dev/kvm", "/etc/passwd", "/tmp"] {
        attempt(path, File::open(path).is_ok());
    }
    attempt("mkdir", rustix::fs::mkdir("/x", Mode::RWXU).is_ok());
    attempt("create", File::create("x").is_ok());
    attempt("setuid 0", hull_sys::privilege::become_user(0, 0, &[]).is_ok());
    attempt("capabilities", hull_sys::privilege::set_capabilities(1, 1, 0).is_ok());
    attempt("securebits", hull_sys::privilege::set_securebits(0).is_ok());
    attempt("mount", hull_sys::mount::fsopen("tmpfs", hull_sys::mount::FsOpenFlags::empty()).is_ok());
    attempt(
        "tree",
        hull_sys::mount::open_tree(CWD, "/", hull_sys::mount::OpenTreeFlags::OPEN_TREE_CLONE).is_ok(),
    );
    attempt("network", std::net::TcpStream::connect("1.1.1.1:53").is_ok());
    attempt("another process", hull_sys::process::kill(2, 0).is_ok());
    attempt("more descriptors", {
        let limit = rustix::process::Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).is_ok()
    });
    done
}

/// Answers with what was tried before, and does what is forbidden.
struct Machine {
    attempts: Vec<String>,
}

impl control::Machine for Machine {
    fn status(&mut self) -> Status {
        Status { activated: self.attempts.clone(), ..Status::default() }
    }
    fn remove_extent(&mut self, what: &str) -> Result<(), CallError> {
        match what {
            "open" => drop(File::open("/")),
            "thread" => drop(std::thread::Builder::new().spawn(|| ())),
            "execute" => drop(std::process::Command::new("/bin/true").status()),
            "socket" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
            "namespace" => drop(hull_sys::namespace::unshare(hull_sys::namespace::Namespaces::USER)),
            "nothing" => {}
            other => return Err(CallError::invalid(other)),
        }
        Ok(())
    }
    fn add_extent(&mut self, _: &str, _: u64, _: OwnedFd) -> Result<Extent, CallError> {
        Err(CallError::unknown())
    }
    fn open_scratch(&mut self, _: u64, _: u64) -> Result<(), CallError> {
        Ok(())
    }
    fn close_scratch(&mut self, _: u64) -> Result<(), CallError> {
        Ok(())
    }
    fn fill_slot(&mut self, _: u32, _: bool, _: OwnedFd) -> Result<(), CallError> {
        Err(CallError::unknown())
    }
    fn clear_slot(&mut self, _: u32) -> Result<(), CallError> {
        Err(CallError::unknown())
    }
    fn serve_volumes(&mut self, _: OwnedFd) -> Result<(), CallError> {
        Err(CallError::unknown())
    }
    fn set_log(&mut self, _: &str, _: OwnedFd) -> Result<(), CallError> {
        Err(CallError::unknown())
    }
    fn remove_log(&mut self, _: &str) -> Result<(), CallError> {
        Err(CallError::unknown())
    }
    fn resize_memory(&mut self, _: u64) -> Result<(), CallError> {
        Err(CallError::unknown())
    }
    fn pause(&mut self) -> Result<(), CallError> {
        Err(CallError::unknown())
    }
    fn resume(&mut self) -> Result<(), CallError> {
        Err(CallError::unknown())
    }
    fn save(&mut self, _: OwnedFd) -> Result<(), CallError> {
        Err(CallError::unknown())
    }
    fn metrics(&mut self) -> Metrics {
        Metrics::default()
    }
}

/// A request with descriptors of the right types; /dev/null stands for /dev/kvm, which a test machine may lack.
pub(crate) fn boot(directory: &std::path::Path, cgroups: Option<&Cgroups>) -> (Boot, Vec<OwnedFd>) {
    let path = |name: &str| directory.join(name);
    let both =
        |name: &str| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path(name));
    let append = OpenOptions::new().append(true).create(true).open(path("console")).unwrap();
    let listener = |name: &str| {
        let _ = fs::remove_file(path(name));
        UnixListener::bind(path(name)).unwrap()
    };
    let mut fds: Vec<OwnedFd> = vec![
        OpenOptions::new().read(true).write(true).open("/dev/null").unwrap().into(),
        File::open("/proc/self/exe").unwrap().into(),
        File::open("/proc/self/exe").unwrap().into(),
        both("scratch").unwrap().into(),
        listener("vsock").into(),
        listener("control").into(),
        append.into(),
    ];
    let mut jail = Jail { uid_base: BASE, gid_base: BASE, ids: 65_536, ..Jail::default() };
    if let Some(cgroups) = cgroups {
        let (unified, tasks) = cgroups.open();
        jail.cgroup = Some(fds.len() as u32);
        fds.push(unified);
        jail.cgroup_tasks = (0..tasks.len()).map(|number| (fds.len() + number) as u32).collect();
        fds.extend(tasks);
    }
    let machine = messages::Machine { id: "test".into(), cpus: 1, ..messages::Machine::default() };
    (Boot::in_order(machine, jail), fds)
}

pub(crate) fn start(directory: &std::path::Path, cgroups: Option<&Cgroups>) -> Confined {
    let (boot, fds) = boot(directory, cgroups);
    Confined::start("become-machine", Call::Boot(boot), &fds)
}

fn remove(what: &str) -> Call {
    Call::RemoveExtent(RemoveExtent { key: what.into() })
}

pub(crate) fn tests() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    test("a_machine_has_no_capability_no_root_and_nothing_that_it_was_not_given", || {
        // Something inheritable that hulld forgot to close: it must not arrive.
        let leaked = rustix::fs::open("/etc", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        let mut process = start(directory, None);
        drop(leaked);
        check_confinement(&process, KINDS.len() + 1, 0, BASE + VMM_ID);
        assert_eq!(fs::read_dir(process.proc("root")).unwrap().count(), 0, "an empty root");
        let mounts = fs::read_to_string(process.proc("mountinfo")).unwrap();
        assert_eq!(mounts.lines().count(), 1, "{mounts}");
        let options = mounts.split_whitespace().nth(5).unwrap();
        for option in ["ro", "nosuid", "nodev", "noexec"] {
            assert!(options.split(',').any(|set| set == option), "{mounts}");
        }
        for entry in fs::read_dir(process.proc("fd")).unwrap() {
            let link = fs::read_link(entry.unwrap().path()).unwrap();
            assert_ne!(link, std::path::Path::new("/etc"));
        }
        let Some(Outcome::Status(status)) = process.ask(Call::Status(messages::GetStatus {})) else {
            panic!()
        };
        assert_eq!(status.activated, Vec::<String>::new(), "what succeeded without any filter");
        let maps = fs::read_to_string(process.proc("uid_map")).unwrap();
        let numbers: Vec<u32> = maps.split_whitespace().map(|number| number.parse().unwrap()).collect();
        assert_eq!(numbers, [0, BASE, 65_536, 65_536, 1 << 31, (1 << 31) - 65_536]);
    });
    test("a_machine_is_in_its_pods_cgroups_from_its_first_instruction", || {
        let cgroups = Cgroups::new();
        let process = start(directory, Some(&cgroups));
        let own = fs::read_to_string(process.proc("cgroup")).unwrap();
        let unified = own.lines().find(|line| line.starts_with("0::")).unwrap();
        assert_eq!(unified, format!("0::/{}", cgroups.name));
        if let Some(pids) = own.lines().find(|line| line.contains(":pids:")) {
            assert!(pids.ends_with(&cgroups.name), "{own}");
        }
        drop(process);
    });
    test("a_forbidden_system_call_kills_a_machine", || {
        for what in ["open", "thread", "execute", "socket", "namespace"] {
            let mut process = start(directory, None);
            assert!(matches!(process.ask(remove("nothing")), Some(Outcome::Done(_))));
            assert!(process.ask(remove(what)).is_none(), "{what} was survived");
            assert!(process.is_gone(), "{what}");
        }
    });
    test("a_machine_outlives_hulld_and_serves_the_next_one", || {
        let mut process = start(directory, None);
        let (gone, _) = std::os::unix::net::UnixStream::pair().unwrap();
        process.connection = hull_vmm::protocol::BlockingConnection::new(gone.into());
        let next = std::os::unix::net::UnixStream::connect(directory.join("control")).unwrap();
        process.connection = hull_vmm::protocol::BlockingConnection::new(next.into());
        assert!(matches!(process.ask(remove("nothing")), Some(Outcome::Done(_))));
        assert!(matches!(process.ask(Call::Stop(messages::Stop {})), Some(Outcome::Done(_))));
        assert!(process.is_gone());
    });
    test("a_wrong_first_request_is_told_and_leaves_no_process", || {
        let wrong = |change: fn(&mut Boot, &mut Vec<OwnedFd>)| {
            let (mut boot, mut fds) = boot(directory, None);
            change(&mut boot, &mut fds);
            let (mut connection, outcome) = host::start("become-machine", Call::Boot(boot), &fds);
            let Outcome::Error(error) = outcome else { panic!("{outcome:?}") };
            assert!(connection.recv().unwrap().is_none(), "nobody holds the socket");
            error
        };
        let no_jail = wrong(|boot, _| boot.jail = None);
        assert_eq!(no_jail.code(), Code::Invalid);
        let root = wrong(|boot, _| boot.jail.as_mut().unwrap().uid_base = 0);
        assert_eq!(root.code(), Code::Invalid, "{root:?}");
        let type_ = wrong(|boot, _| boot.kernel = 4);
        assert!(type_.message.contains("kernel") && type_.message.contains("a socket"), "{type_:?}");
        let twice = wrong(|boot, _| boot.initramfs = boot.kernel);
        assert_eq!(twice.code(), Code::Invalid, "{twice:?}");
        let tap = wrong(|boot, _| boot.machine.as_mut().unwrap().network = true);
        assert!(tap.message.contains("tap"), "{tap:?}");
        let scratch = wrong(|boot, _| boot.scratch = 6);
        assert!(scratch.message.contains("reading and writing"), "{scratch:?}");
        let volumes = Call::BootVolumes(messages::BootVolumes::default());
        let (_, outcome) = host::start("become-machine", volumes, &[]);
        assert!(matches!(outcome, Outcome::Error(_)));
    });
}
