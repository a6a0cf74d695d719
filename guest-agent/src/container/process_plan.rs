use rustix::process::Resource;

use crate::protocol::messages;

use super::plan::PlanError;
use super::report::Identity;
use super::users::WantedUser;

/// PATH of a process whose environment has none, as other runtimes set it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Bytes of a path (PATH_MAX).
pub(super) const MAX_PATH: usize = 4096;

/// Everything about a process that is not its filesystem, checked.
#[derive(Clone, Debug)]
pub(super) struct ProcessPlan {
    pub(super) args: Vec<String>,
    /// Each name once; has PATH, may lack HOME.
    pub(super) env: Vec<String>,
    pub(super) cwd: String,
    pub(super) user: WantedUser,
    pub(super) capabilities: Capabilities,
    pub(super) no_new_privs: bool,
    pub(super) seccomp: Vec<u8>,
    pub(super) seccomp_flags: u32,
    pub(super) apparmor_profile: String,
    pub(super) selinux_label: String,
    pub(super) rlimits: Vec<(Resource, u64, u64)>,
    pub(super) oom_score_adj: Option<i32>,
    /// Rows and columns.
    pub(super) terminal: Option<(u16, u16)>,
}

/// Bit masks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capabilities {
    pub(super) bounding: u64,
    pub(super) effective: u64,
    pub(super) permitted: u64,
    pub(super) inheritable: u64,
    pub(super) ambient: u64,
}

impl ProcessPlan {
    pub(super) fn new(process: &messages::Process) -> Result<Self, PlanError> {
        if process.args.first().is_none_or(String::is_empty) {
            return Err(PlanError::NoCommand);
        }
        let texts = process.args.iter().chain(&process.env).chain([
            &process.cwd,
            &process.apparmor_profile,
            &process.selinux_label,
        ]);
        if let Some(text) = texts.into_iter().find(|text| text.contains('\0')) {
            return Err(PlanError::ZeroByte(text.chars().take(80).collect()));
        }
        for text in [&process.cwd, &process.apparmor_profile, &process.selinux_label] {
            if text.chars().any(char::is_control) || text.len() >= MAX_PATH {
                return Err(PlanError::BadText(text.chars().take(80).collect()));
            }
        }
        let cwd = if process.cwd.is_empty() { "/" } else { &process.cwd };
        if !cwd.starts_with('/') {
            return Err(PlanError::RelativeWorkingDirectory(cwd.into()));
        }
        let limits = process.rlimits.iter().map(|limit| {
            let resource =
                resource(&limit.r#type).ok_or_else(|| PlanError::UnknownLimit(limit.r#type.clone()))?;
            Ok((resource, limit.soft, limit.hard))
        });
        let dimension = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        Ok(Self {
            args: process.args.clone(),
            env: environment(&process.env),
            cwd: cwd.to_owned(),
            user: WantedUser::new(&process.user.clone().unwrap_or_default())?,
            capabilities: capabilities(process)?,
            no_new_privs: process.no_new_privs,
            seccomp: process.seccomp.clone(),
            seccomp_flags: process.seccomp_flags,
            apparmor_profile: process.apparmor_profile.clone(),
            selinux_label: process.selinux_label.clone(),
            rlimits: limits.collect::<Result<_, PlanError>>()?,
            oom_score_adj: process.oom_score_adj,
            terminal: process
                .terminal
                .then(|| (dimension(process.terminal_rows), dimension(process.terminal_columns))),
        })
    }

    /// The value of a variable of the environment.
    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        self.env.iter().find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
    }
}

/// The SELinux label, if it can be one.
pub(super) fn label(text: &str) -> Result<&str, PlanError> {
    match text.chars().any(char::is_control) || text.len() >= MAX_PATH {
        true => Err(PlanError::BadText(text.chars().take(80).collect())),
        false => Ok(text),
    }
}

/// `process` as another process of the same container would be asked for: user in numbers, groups exact.
pub(super) fn settled(process: &messages::Process, identity: &Identity) -> messages::Process {
    use messages::user::{Group, User};
    let user = messages::User {
        user: Some(User::Uid(identity.uid)),
        group: Some(Group::Gid(identity.gid)),
        supplemental_groups: identity.groups.clone(),
        strict_groups: true,
    };
    messages::Process { user: Some(user), terminal: false, ..process.clone() }
}

/// What a process in a running container gets that says nothing of its own: all of the container's but command and
/// terminal.
pub(super) fn inherit(container: &messages::Process, request: &messages::Process) -> messages::Process {
    messages::Process {
        args: request.args.clone(),
        terminal: request.terminal,
        terminal_rows: request.terminal_rows,
        terminal_columns: request.terminal_columns,
        ..container.clone()
    }
}

/// Of a name that is there twice the last value holds, at the first one's place; PATH is added if it is missing.
fn environment(entries: &[String]) -> Vec<String> {
    let name = |entry: &str| entry.split_once('=').map_or(entry.len(), |(name, _)| name.len());
    let mut places = std::collections::BTreeMap::new();
    let mut result: Vec<String> = Vec::with_capacity(entries.len() + 1);
    for entry in entries {
        let place = *places.entry(&entry[..name(entry)]).or_insert(result.len());
        match result.get_mut(place) {
            Some(earlier) => earlier.clone_from(entry),
            None => result.push(entry.clone()),
        }
    }
    if !places.contains_key("PATH") {
        result.push(format!("PATH={DEFAULT_PATH}"));
    }
    result
}

/// The rules of capabilities(7) that the kernel would answer with a bare EPERM.
fn capabilities(process: &messages::Process) -> Result<Capabilities, PlanError> {
    let sets = Capabilities {
        bounding: process.cap_bounding,
        effective: process.cap_effective,
        permitted: process.cap_permitted,
        inheritable: process.cap_inheritable,
        ambient: process.cap_ambient,
    };
    if sets.effective & !sets.permitted != 0 {
        return Err(PlanError::Capabilities("effective", "permitted"));
    }
    if sets.ambient & !sets.permitted != 0 {
        return Err(PlanError::Capabilities("ambient", "permitted"));
    }
    if sets.ambient & !sets.inheritable != 0 {
        return Err(PlanError::Capabilities("ambient", "inheritable"));
    }
    if sets.inheritable & !sets.bounding != 0 {
        return Err(PlanError::Capabilities("inheritable", "bounding"));
    }
    Ok(sets)
}

/// getrlimit(2).
fn resource(name: &str) -> Option<Resource> {
    Some(match name.strip_prefix("RLIMIT_")? {
        "AS" => Resource::As,
        "CORE" => Resource::Core,
        "CPU" => Resource::Cpu,
        "DATA" => Resource::Data,
        "FSIZE" => Resource::Fsize,
        "LOCKS" => Resource::Locks,
        "MEMLOCK" => Resource::Memlock,
        "MSGQUEUE" => Resource::Msgqueue,
        "NICE" => Resource::Nice,
        "NOFILE" => Resource::Nofile,
        "NPROC" => Resource::Nproc,
        "RSS" => Resource::Rss,
        "RTPRIO" => Resource::Rtprio,
        "RTTIME" => Resource::Rttime,
        "SIGPENDING" => Resource::Sigpending,
        "STACK" => Resource::Stack,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> messages::Process {
        messages::Process { args: vec!["sh".into()], ..Default::default() }
    }

    #[test]
    fn the_last_value_of_a_variable_holds_and_path_is_added() {
        let entries = ["A=1", "B=2", "A=3=x", "ODD"].map(String::from);
        let env = environment(&entries);
        assert_eq!(env[..3], ["A=3=x", "B=2", "ODD"]);
        assert!(env[3].starts_with("PATH=/usr/local/sbin"));
        assert_eq!(environment(&["PATH=/x".into()]), ["PATH=/x"]);
    }

    #[test]
    fn what_execve_or_the_kernel_would_refuse_is_refused_with_a_reason() {
        let refused = |change: fn(&mut messages::Process)| {
            let mut process = process();
            change(&mut process);
            ProcessPlan::new(&process).unwrap_err()
        };
        refused(|process| process.args.clear());
        refused(|process| process.args[0].clear());
        refused(|process| process.env.push("A=\0".into()));
        refused(|process| process.cwd = "tmp".into());
        refused(|process| process.cwd = "/tmp\n".into());
        refused(|process| process.apparmor_profile = "a\nb".into());
        refused(|process| process.cap_effective = 1);
        refused(|process| (process.cap_ambient, process.cap_permitted) = (1, 1));
        refused(|process| process.cap_inheritable = 1);
        refused(|process| {
            process.rlimits.push(messages::Rlimit { r#type: "RLIMIT_FUN".into(), ..Default::default() });
        });
    }

    #[test]
    fn an_exec_inherits_everything_but_command_and_terminal() {
        let mut container = process();
        container.env.push("A=1".into());
        container.cap_bounding = 5;
        container.no_new_privs = true;
        let identity = Identity { uid: 5, gid: 6, groups: vec![6, 7] };
        let remembered = settled(&container, &identity);
        let request = messages::Process { args: vec!["id".into()], terminal: true, ..Default::default() };
        let plan = ProcessPlan::new(&inherit(&remembered, &request)).unwrap();
        assert_eq!((plan.args[0].as_str(), plan.variable("A")), ("id", Some("1")));
        assert!(plan.no_new_privs && plan.terminal.is_some() && plan.capabilities.bounding == 5);
        // A passwd file that says otherwise changes nothing.
        let resolved = plan.user.resolve(b"root:x:5:0::/:\n", b"g:x:9:root\n").unwrap();
        assert_eq!(resolved.identity, identity);
    }
}
