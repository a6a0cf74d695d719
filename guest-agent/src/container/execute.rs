//! The last steps of a started process: limits, labels, user, capabilities, seccomp, execve.

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hull_sys::process::CStringArray;
use hull_sys::{confine, privilege, process, signal};
use rustix::fs::{Access, Mode};
use rustix::io::Errno;
use rustix::process::Rlimit;

use crate::sandbox;

use super::failure::{During, Failure, Stage};
use super::inside::{Kind, Links, Root, file_type};
use super::own_proc::{OwnProc, is_missing};
use super::process_plan::ProcessPlan;
use super::report::{Part, Reporter};
use super::stdio::Streams;
use super::users::{MAX_FILE, Resolved};

/// First of all in a child, whose signals have their default action by its clone: nothing inherited from the agent stays
/// in force, and nobody in a PID namespace that it joins can look into it. (A container's root that opens /proc/PID/exe
/// of such a process could later write to the agent's program: CVE-2019-5736; its descriptors: CVE-2016-9962.)
pub(super) fn begin(process: &ProcessPlan) -> Result<OwnProc, Failure> {
    let prepare = || -> io::Result<OwnProc> {
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
        rustix::process::setsid()?;
        rustix::process::umask(Mode::empty());
        OwnProc::open()
    };
    let own = prepare().during(Stage::Start, || "cannot prepare the process")?;
    leave_keyring(process, &own)?;
    if let Some(value) = process.oom_score_adj {
        sandbox::set_oom_score_adj(own.as_fd(), value)
            .during(Stage::Privileges, || "cannot set the OOM score of the process")?;
    }
    Ok(own)
}

/// What the agent's session keyring holds is not the container's. A new one has the label that the process will have.
fn leave_keyring(process: &ProcessPlan, own: &OwnProc) -> Result<(), Failure> {
    let label = &process.selinux_label;
    if !label.is_empty() {
        own.write_attribute("keycreate", label)
            .during(Stage::Privileges, || format!("cannot set the SELinux label {label} of the keyring"))?;
    }
    confine::leave_session_keyring().during(Stage::Privileges, || "cannot leave the agent's session keyring")
}

/// Puts the process, and so those that it will make, into its class of cache and memory bandwidth.
pub(super) fn join_class(tasks: BorrowedFd<'_>) -> Result<(), Failure> {
    // Zero is whoever writes it (Documentation/arch/x86/resctrl.rst, "tasks").
    let written = rustix::io::write(tasks, b"0");
    written.map(drop).during(Stage::Start, || "cannot enter the RDT class")
}

/// The same for a process that follows into a running container. Where the class has been removed the kernel has put the
/// container's processes into the default group (Documentation/arch/x86/resctrl.rst, "Removing a directory"): then this
/// one belongs there, too, and is there already, as its agent is.
pub(super) fn follow_into_class(tasks: BorrowedFd<'_>) -> Result<(), Failure> {
    match join_class(tasks) {
        // kernfs has taken the file away, or resctrl has marked the group as dead.
        Err(failure) if [Errno::NODEV, Errno::NOENT].map(Errno::raw_os_error).contains(&failure.errno) => {
            Ok(())
        }
        other => other,
    }
}

/// The user, by the files of `root`.
pub(super) fn resolve_user(process: &ProcessPlan, root: &Root, own: &OwnProc) -> Result<Resolved, Failure> {
    let read = |path| {
        own.read_inside(root, path, MAX_FILE)
            .during(Stage::User, || format!("cannot read {path} of the image"))
    };
    let (passwd, group) = (read("/etc/passwd")?, read("/etc/group")?);
    process.user.resolve(&passwd, &group).map_err(|error| Failure::new(Stage::User, error.to_string()))
}

/// The working directory inside `root`, made if it is missing and may be.
pub(super) fn working_directory(process: &ProcessPlan, root: &Root, make: bool) -> Result<OwnedFd, Failure> {
    let path = &process.cwd;
    let doing = || format!("cannot use the working directory {path}");
    let found = if make {
        root.create(path, Kind::Directory, Links::Follow)
    } else {
        root.resolve(path, Links::Follow)
    };
    let found = found.during(Stage::WorkingDirectory, doing)?;
    if file_type(found.as_fd()).during(Stage::WorkingDirectory, doing)? != rustix::fs::FileType::Directory {
        return Err(Failure::system(Stage::WorkingDirectory, doing(), Errno::NOTDIR));
    }
    Ok(found)
}

/// Becomes the program. The root is the container's by now. Returns only with the reason why not.
pub(super) fn become_program(
    plan: &ProcessPlan,
    user: &Resolved,
    streams: &Streams,
    cwd: OwnedFd,
    own: &OwnProc,
    reporter: &Reporter,
) -> Result<Infallible, Failure> {
    let uid = user.identity.uid;
    reporter.identity(&user.identity).during(Stage::Start, || "cannot report the user to the agent")?;
    streams.install(uid)?;
    set_limits(plan)?;
    set_labels(plan, own)?;
    let entered = enter_directory(plan, &cwd)?;
    let program = Program::new(plan, user)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    process::close_on_exec_from(3).during(Stage::Privileges, || "cannot close descriptors")?;
    become_user(plan, user)?;
    if !entered {
        // Root may not search it (FUSE, NFS): the user may.
        rustix::process::chdir(plan.cwd.as_str())
            .during(Stage::WorkingDirectory, || format!("cannot enter the working directory {}", plan.cwd))?;
        check_inside(plan)?;
    }
    signal::unblock_all().during(Stage::Privileges, || "cannot unblock signals")?;
    reporter.done(Part::Privileges);
    // Before the filter, which may not let a process talk.
    reporter.executing().during(Stage::Execute, || "cannot report to the agent")?;
    give_up_privileges(plan)?;
    Err(program.execute())
}

fn set_limits(plan: &ProcessPlan) -> Result<(), Failure> {
    let value = |number: u64| (number != u64::MAX).then_some(number);
    for (resource, soft, hard) in &plan.rlimits {
        let limit = Rlimit { current: value(*soft), maximum: value(*hard) };
        rustix::process::setrlimit(*resource, limit).during(Stage::Privileges, || {
            format!("cannot set the limit {resource:?} to {soft} (soft) and {hard} (hard)")
        })?;
    }
    Ok(())
}

/// Labels take effect with the execve. The file for AppArmor alone exists since Linux 5.8.
fn set_labels(plan: &ProcessPlan, own: &OwnProc) -> Result<(), Failure> {
    let (profile, label) = (&plan.apparmor_profile, &plan.selinux_label);
    if !label.is_empty() {
        own.write_attribute("exec", label)
            .during(Stage::Privileges, || format!("cannot set the SELinux label {label}"))?;
    }
    if !profile.is_empty() {
        let value = format!("exec {profile}");
        let written = match own.write_attribute("apparmor/exec", &value) {
            Err(error) if is_missing(&error) && label.is_empty() => own.write_attribute("exec", &value),
            result => result,
        };
        written.during(Stage::Privileges, || format!("cannot set the AppArmor profile {profile}"))?;
    }
    Ok(())
}

/// True if the directory was entered; false if that has to wait for the user.
fn enter_directory(plan: &ProcessPlan, cwd: &OwnedFd) -> Result<bool, Failure> {
    match rustix::process::fchdir(cwd) {
        Ok(()) => check_inside(plan).map(|()| true),
        Err(Errno::ACCESS) => Ok(false),
        Err(error) => {
            let doing = format!("cannot enter the working directory {}", plan.cwd);
            Err(Failure::system(Stage::WorkingDirectory, doing, error))
        }
    }
}

/// CVE-2024-21626: a working directory outside of the root is the host's. The kernel's path of one that the root does
/// not contain starts with "(unreachable)".
fn check_inside(plan: &ProcessPlan) -> Result<(), Failure> {
    let doing = || format!("cannot use the working directory {}", plan.cwd);
    let path = rustix::process::getcwd(Vec::new()).during(Stage::WorkingDirectory, doing)?;
    if path.as_bytes().starts_with(b"/") {
        return Ok(());
    }
    let message = format!("{}: it is outside of the root filesystem", doing());
    Err(Failure::new(Stage::WorkingDirectory, message))
}

fn become_user(plan: &ProcessPlan, user: &Resolved) -> Result<(), Failure> {
    let identity = &user.identity;
    privilege::limit_bounding_set(plan.capabilities.bounding)
        .during(Stage::Privileges, || "cannot limit the capability bounding set")?;
    privilege::keep_capabilities(true).during(Stage::Privileges, || "cannot keep capabilities")?;
    privilege::become_user(identity.uid, identity.gid, &identity.groups)
        .during(Stage::User, || format!("cannot become user {} with group {}", identity.uid, identity.gid))
}

/// Without no_new_privs a filter needs CAP_SYS_ADMIN, so it goes before the capabilities (which the process still has,
/// permitted, though not effective once it has changed its user); else it is the very last thing.
fn give_up_privileges(plan: &ProcessPlan) -> Result<(), Failure> {
    let install = || {
        if plan.seccomp.is_empty() {
            return Ok(());
        }
        privilege::install_seccomp(&plan.seccomp, plan.seccomp_flags)
            .during(Stage::Privileges, || "cannot install the seccomp profile")
    };
    if plan.no_new_privs {
        privilege::set_no_new_privs().during(Stage::Privileges, || "cannot set no_new_privs")?;
        set_capabilities(plan)?;
        return install();
    }
    if !plan.seccomp.is_empty() {
        let doing = || "cannot use CAP_SYS_ADMIN to install the seccomp profile";
        let held = rustix::thread::capabilities(None).during(Stage::Privileges, doing)?;
        let permitted = held.permitted.bits();
        privilege::set_capabilities(permitted, permitted, held.inheritable.bits())
            .during(Stage::Privileges, doing)?;
    }
    install()?;
    set_capabilities(plan)
}

fn set_capabilities(plan: &ProcessPlan) -> Result<(), Failure> {
    let sets = plan.capabilities;
    privilege::set_capabilities(sets.effective, sets.permitted, sets.inheritable)
        .during(Stage::Privileges, || "cannot set capabilities (does the agent itself lack some?)")?;
    privilege::set_ambient(sets.ambient).during(Stage::Privileges, || "cannot set ambient capabilities")
}

/// Everything that execve needs, made before the filter is there.
struct Program {
    name: String,
    candidates: Vec<CString>,
    args: CStringArray,
    env: CStringArray,
}

impl Program {
    fn new(plan: &ProcessPlan, user: &Resolved) -> Result<Self, Failure> {
        let mut env = plan.env.clone();
        if plan.variable("HOME").is_none_or(str::is_empty) {
            env.retain(|entry| !entry.starts_with("HOME="));
            env.push(format!("HOME={}", user.home.as_deref().unwrap_or("/")));
        }
        // The plan has refused zero bytes; /etc/passwd is checked for control characters.
        let strings =
            |list: &[String]| CStringArray::new(list.iter().map(String::as_str)).map_err(io::Error::from);
        let name = plan.args[0].clone();
        let candidates = if name.contains('/') {
            vec![name.clone()]
        } else {
            let directories = plan.variable("PATH").unwrap_or_default().split(':');
            // An empty entry is the working directory (environ(7)).
            let joined = |directory: &str| match directory {
                "" => format!("./{name}"),
                directory => format!("{directory}/{name}"),
            };
            directories.map(joined).collect()
        };
        let candidates = candidates.into_iter().map(CString::new).collect::<Result<_, _>>();
        let candidates = candidates.map_err(io::Error::from);
        let doing = || format!("exec: {name:?}");
        Ok(Self {
            candidates: candidates.during(Stage::Execute, doing)?,
            args: strings(&plan.args).during(Stage::Execute, doing)?,
            env: strings(&env).during(Stage::Execute, doing)?,
            name,
        })
    }

    /// Tries each candidate as a shell would; the kernel's own look-up is the only one, so nothing can change between a
    /// check and the use.
    fn execute(&self) -> Failure {
        let mut denied = false;
        for path in &self.candidates {
            let error = process::execve(path, &self.args, &self.env);
            match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::NOENT | Errno::NOTDIR)
                    if rustix::fs::access(path.as_c_str(), Access::EXISTS).is_err() => {}
                Some(Errno::NOENT) => {
                    let path = path.to_string_lossy();
                    let message = format!(
                        "exec {path}: no such file or directory (the file is there: its interpreter or dynamic loader is not)"
                    );
                    return Failure {
                        errno: Errno::NOENT.raw_os_error(),
                        ..Failure::new(Stage::Execute, message)
                    };
                }
                Some(Errno::ACCESS) => denied = true,
                _ => {
                    return Failure::system(
                        Stage::Execute,
                        format!("exec {}", path.to_string_lossy()),
                        error,
                    );
                }
            }
        }
        let name = &self.name;
        let (errno, message) = if denied {
            (Errno::ACCESS, format!("exec: {name:?}: permission denied"))
        } else if name.contains('/') {
            (Errno::NOENT, format!("exec: {name:?}: stat {name}: no such file or directory"))
        } else {
            (Errno::NOENT, format!("exec: {name:?}: executable file not found in $PATH"))
        };
        Failure { errno: errno.raw_os_error(), ..Failure::new(Stage::Execute, message) }
    }
}
