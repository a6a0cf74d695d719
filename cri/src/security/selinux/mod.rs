//! SELinux: which labels the processes and files of pods and containers get.
//!
//! A pod has a label of the policy's for containers with two categories of its own, so that pods are kept apart from
//! each other (multi-category security); its containers share it. What a request names takes the place of that part.
//! Mounts get the policy's label for files of containers with the same categories.

mod contexts;
mod label;
mod relabel;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use self::contexts::Contexts;
use self::label::{Label, is_part};
use crate::api::runtime::SeLinuxOption;

pub use relabel::relabel;

/// Where the kernel offers it, once it is on.
const SELINUXFS: &str = "/sys/fs/selinux";
/// `f_type` of it (linux/magic.h).
const SELINUX_MAGIC: u64 = 0xf97c_ff8c;
/// The type of processes that the policy does not confine although they are in a container.
const UNCONFINED: &str = "spc_t";
/// Types that a request names to be free of confinement, which without SELinux everything is.
const FREE: [&str; 2] = [UNCONFINED, "unconfined_t"];
/// Categories of a policy (MCS).
const CATEGORIES: u16 = 1024;

/// The labels of a pod or container; empty: none is set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    /// Of its processes.
    pub process: String,
    /// Of its root filesystem and what else is mounted for it alone.
    pub mount: String,
}

/// Why labels cannot be what a request wants.
#[derive(Debug, thiserror::Error)]
pub enum SELinuxError {
    /// The node confines nobody by SELinux.
    #[error(
        "SELinux options are asked for ({0}), but this node has no SELinux, or no policy loaded; without options, or with \
         the type spc_t, nothing is confined"
    )]
    Missing(String),
    /// A part with characters that none has.
    #[error("the SELinux {part} {value:?} cannot be one")]
    Part {
        /// "user", "role", "type" or "level".
        part: &'static str,
        /// As it was asked for.
        value: String,
    },
    /// The policy has no types for containers, so that nothing can be added to what was asked for.
    #[error(
        "SELinux options need user, role and type here: the policy has no lxc_contexts, so there is no label to begin with"
    )]
    NoContexts,
    /// The policy does not know it.
    #[error("the policy of this node does not know the SELinux label {0:?}")]
    Unknown(String),
    /// The kernel could not be asked.
    #[error("cannot ask the kernel for the SELinux label {label:?}: {error}")]
    Ask {
        /// Which one.
        label: String,
        /// Why not.
        error: io::Error,
    },
    /// All pairs of categories are in use.
    #[error("there is no pair of SELinux categories left for another pod")]
    Exhausted,
}

/// The policy that is loaded on this node.
#[derive(Debug)]
pub struct Policy {
    contexts: Option<Contexts>,
    /// Whether a label is known to it.
    check: fn(&str) -> io::Result<()>,
    /// Levels of pods that are being made.
    promised: Mutex<BTreeSet<String>>,
}

/// A level that no other pod gets while this is kept.
#[derive(Debug)]
pub struct Promise {
    policy: Arc<Policy>,
    level: String,
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.policy.promised().remove(&self.level);
    }
}

impl Policy {
    /// `None`: the kernel has no SELinux, it is off, or no policy was loaded.
    pub fn of_node() -> Option<Self> {
        let mounted = rustix::fs::statfs(SELINUXFS).is_ok_and(|status| status.f_type as u64 == SELINUX_MAGIC);
        // What everything is as long as there is no policy.
        let current = fs::read_to_string("/proc/thread-self/attr/current").unwrap_or_default();
        if !mounted || matches!(current.trim_end_matches(['\0', '\n']), "" | "kernel") {
            return None;
        }
        let contexts = Contexts::of_node().unwrap_or_else(|error| {
            tracing::error!(%error, "containers that ask for no SELinux label get none");
            None
        });
        Some(Self::new(contexts, ask_kernel))
    }

    fn new(contexts: Option<Contexts>, check: fn(&str) -> io::Result<()>) -> Self {
        let policy = Self { contexts: None, check, promised: Mutex::default() };
        let known = |contexts: &Contexts| {
            // Debian's policy names types in its file that it does not have.
            let unknown = [&contexts.process, &contexts.file]
                .into_iter()
                .find_map(|label| policy.check(&label.to_string()).err());
            if let Some(error) = &unknown {
                tracing::warn!(%error, "containers that ask for no SELinux label get none");
            }
            unknown.is_none()
        };
        let contexts = contexts.filter(known);
        Self { contexts, ..policy }
    }

    fn promised(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The labels of a new pod. `shared`: it sees the host's processes or IPC objects, so that it cannot be kept apart.
    /// `id` is random; `is_taken` says whether another pod has a level. The promise is kept until that would say so.
    pub fn of_pod(
        self: &Arc<Self>,
        wanted: &SeLinuxOption,
        shared: bool,
        id: &str,
        is_taken: impl Fn(&str) -> bool,
    ) -> Result<(Labels, Option<Promise>), SELinuxError> {
        check_parts(wanted)?;
        let Some(contexts) = &self.contexts else { return Ok((self.without_contexts(wanted)?, None)) };
        if shared && is_empty(wanted) {
            let mount = contexts.file.to_string();
            return Ok((Labels { process: self.unconfined(contexts), mount }, None));
        }
        let mut process = contexts.process.clone();
        let mut promise = None;
        if wanted.level.is_empty() && !process.level.is_empty() {
            let made = self.promise(process.sensitivity(), id, is_taken)?;
            process.level.clone_from(&made.level);
            promise = Some(made);
        }
        Ok((self.labels(process, wanted, contexts)?, promise))
    }

    /// The labels of a container in a pod with these.
    pub fn of_container(
        &self,
        wanted: &SeLinuxOption,
        pod: &Labels,
        privileged: bool,
    ) -> Result<Labels, SELinuxError> {
        check_parts(wanted)?;
        let Some(contexts) = &self.contexts else {
            return if is_empty(wanted) { Ok(pod.clone()) } else { self.without_contexts(wanted) };
        };
        if privileged && is_empty(wanted) {
            return Ok(Labels { process: self.unconfined(contexts), mount: pod.mount.clone() });
        }
        if is_empty(wanted) {
            return Ok(pod.clone());
        }
        let of_pod = Label::parse(&pod.process);
        let base = match privileged {
            true => Label::parse(&self.unconfined(contexts)).or(of_pod),
            false => of_pod,
        };
        let labels = self.labels(base.unwrap_or_else(|| contexts.process.clone()), wanted, contexts)?;
        let keeps_level = wanted.level.is_empty() && wanted.user.is_empty() && !pod.mount.is_empty();
        Ok(if keeps_level { Labels { mount: pod.mount.clone(), ..labels } } else { labels })
    }

    /// `process` with what is wanted instead, and the files' label that goes with it.
    fn labels(
        &self,
        mut process: Label,
        wanted: &SeLinuxOption,
        contexts: &Contexts,
    ) -> Result<Labels, SELinuxError> {
        let mut file = contexts.file.clone();
        let parts = [
            (&mut process.user, &wanted.user),
            (&mut process.role, &wanted.role),
            (&mut process.kind, &wanted.r#type),
            (&mut process.level, &wanted.level),
            (&mut file.user, &wanted.user),
        ];
        for (part, asked) in parts {
            if !asked.is_empty() {
                part.clone_from(asked);
            }
        }
        file.level.clone_from(&process.level);
        let labels = Labels { process: process.to_string(), mount: file.to_string() };
        self.check(&labels.process)?;
        self.check(&labels.mount)?;
        Ok(labels)
    }

    fn without_contexts(&self, wanted: &SeLinuxOption) -> Result<Labels, SELinuxError> {
        if is_empty(wanted) {
            return Ok(Labels::default());
        }
        let label = [&wanted.user, &wanted.role, &wanted.r#type].map(String::as_str).join(":");
        let label = if wanted.level.is_empty() { label } else { format!("{label}:{}", wanted.level) };
        if Label::parse(&label).is_none() {
            return Err(SELinuxError::NoContexts);
        }
        self.check(&label)?;
        Ok(Labels { process: label, mount: String::new() })
    }

    /// What the policy does not confine; empty if it has no such type: then the policy's own transition decides.
    fn unconfined(&self, contexts: &Contexts) -> String {
        let level = contexts.process.sensitivity().to_owned();
        let label = Label { kind: UNCONFINED.into(), level, ..contexts.process.clone() }.to_string();
        if (self.check)(&label).is_ok() { label } else { String::new() }
    }

    fn check(&self, label: &str) -> Result<(), SELinuxError> {
        (self.check)(label).map_err(|error| match error.raw_os_error() {
            Some(errno) if errno == rustix::io::Errno::INVAL.raw_os_error() => {
                SELinuxError::Unknown(label.to_owned())
            }
            _ => SELinuxError::Ask { label: label.to_owned(), error },
        })
    }

    /// Two categories that no pod has.
    fn promise(
        self: &Arc<Self>,
        sensitivity: &str,
        id: &str,
        is_taken: impl Fn(&str) -> bool,
    ) -> Result<Promise, SELinuxError> {
        let mut promised = self.promised();
        // The id is random, and so is where the search begins.
        let seed = id.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0);
        let pairs = u32::from(CATEGORIES) * u32::from(CATEGORIES);
        for step in 0..pairs {
            let number = (seed.wrapping_add(step)) % pairs;
            let (low, high) = (number / u32::from(CATEGORIES), number % u32::from(CATEGORIES));
            if low >= high {
                continue;
            }
            let level = format!("{sensitivity}:c{low},c{high}");
            if !is_taken(&level) && promised.insert(level.clone()) {
                return Ok(Promise { policy: Arc::clone(self), level });
            }
        }
        Err(SELinuxError::Exhausted)
    }
}

/// Refuses what would have to confine on a kernel that cannot.
pub fn refuse(wanted: &SeLinuxOption) -> Result<(), SELinuxError> {
    check_parts(wanted)?;
    if is_empty(wanted) || FREE.contains(&wanted.r#type.as_str()) {
        return Ok(());
    }
    let parts =
        [("user", &wanted.user), ("role", &wanted.role), ("type", &wanted.r#type), ("level", &wanted.level)];
    let named: Vec<String> = parts
        .into_iter()
        .filter(|(_, part)| !part.is_empty())
        .map(|(name, part)| format!("{name} {part}"))
        .collect();
    Err(SELinuxError::Missing(named.join(", ")))
}

/// The level in a label; empty if it has none.
pub fn level_of(label: &str) -> String {
    Label::parse(label).map(|label| label.level).unwrap_or_default()
}

const fn is_empty(wanted: &SeLinuxOption) -> bool {
    wanted.user.is_empty() && wanted.role.is_empty() && wanted.r#type.is_empty() && wanted.level.is_empty()
}

fn check_parts(wanted: &SeLinuxOption) -> Result<(), SELinuxError> {
    let parts = [
        ("user", &wanted.user, false),
        ("role", &wanted.role, false),
        ("type", &wanted.r#type, false),
        ("level", &wanted.level, true),
    ];
    match parts.into_iter().find(|(_, value, level)| !is_part(value, *level)) {
        Some((part, value, _)) => Err(SELinuxError::Part { part, value: value.chars().take(80).collect() }),
        None => Ok(()),
    }
}

/// selinuxfs, "context": the kernel refuses what the policy does not know.
fn ask_kernel(label: &str) -> io::Result<()> {
    let path = Path::new(SELINUXFS).join("context");
    fs::OpenOptions::new().read(true).write(true).open(path)?.write_all(label.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "00000402abcdef";

    fn policy(check: fn(&str) -> io::Result<()>) -> Arc<Policy> {
        let process = Label::parse("system_u:system_r:container_t:s0").unwrap();
        let file = Label::parse("system_u:object_r:container_file_t:s0").unwrap();
        let contexts = Some(Contexts { process, file });
        Arc::new(Policy { contexts, check, promised: Mutex::default() })
    }

    fn anything() -> Arc<Policy> {
        policy(|_| Ok(()))
    }

    fn wanted(kind: &str, level: &str) -> SeLinuxOption {
        SeLinuxOption { r#type: kind.into(), level: level.into(), ..Default::default() }
    }

    #[test]
    fn pods_are_kept_apart_and_containers_of_one_are_not() {
        let policy = anything();
        let none = SeLinuxOption::default();
        let (one, _kept) = policy.of_pod(&none, false, ID, |_| false).unwrap();
        assert_eq!(one.process, "system_u:system_r:container_t:s0:c1,c2");
        assert_eq!(one.mount, "system_u:object_r:container_file_t:s0:c1,c2");
        // While the first is being made, and when it is there.
        let (other, promise) = policy.of_pod(&none, false, ID, |_| false).unwrap();
        assert_eq!(level_of(&other.process), "s0:c1,c3");
        drop(promise);
        let (third, _promise) = policy.of_pod(&none, false, ID, |level| level == "s0:c1,c3").unwrap();
        assert_eq!(level_of(&third.process), "s0:c1,c4");
        assert_eq!(policy.of_container(&none, &one, false).unwrap(), one);
    }

    #[test]
    fn what_a_request_names_takes_the_place_of_that_part() {
        let policy = anything();
        let (pod, _) = policy.of_pod(&wanted("web_t", ""), false, ID, |_| false).unwrap();
        assert_eq!(pod.process, "system_u:system_r:web_t:s0:c1,c2");
        let (fixed, promise) = policy.of_pod(&wanted("", "s0:c7,c9"), false, ID, |_| true).unwrap();
        assert_eq!(fixed.mount, "system_u:object_r:container_file_t:s0:c7,c9");
        assert!(promise.is_none());
        let own = policy.of_container(&wanted("db_t", ""), &pod, false).unwrap();
        assert_eq!(own.process, "system_u:system_r:db_t:s0:c1,c2");
        assert_eq!(own.mount, pod.mount);
        let own = policy.of_container(&wanted("", "s0"), &pod, false).unwrap();
        assert_eq!(own.process, "system_u:system_r:web_t:s0");
        assert_eq!(own.mount, "system_u:object_r:container_file_t:s0");
    }

    #[test]
    fn who_shares_the_hosts_processes_or_is_privileged_is_not_confined() {
        let policy = anything();
        let none = SeLinuxOption::default();
        let (shared, _) = policy.of_pod(&none, true, ID, |_| false).unwrap();
        assert_eq!(shared.process, "system_u:system_r:spc_t:s0");
        let (pod, _kept) = policy.of_pod(&none, false, ID, |_| false).unwrap();
        let privileged = policy.of_container(&none, &pod, true).unwrap();
        assert_eq!((privileged.process, privileged.mount), (shared.process, pod.mount.clone()));
        let named = policy.of_container(&wanted("container_t", ""), &pod, true).unwrap();
        assert_eq!(named.process, "system_u:system_r:container_t:s0");
        // A policy that has no such type decides by itself.
        let strict = super::tests::policy(|label| match label.contains("spc_t") {
            true => Err(rustix::io::Errno::INVAL.into()),
            false => Ok(()),
        });
        assert_eq!(strict.of_container(&none, &pod, true).unwrap().process, "");
    }

    #[test]
    fn labels_that_cannot_be_are_refused() {
        let none = policy(|_| Err(rustix::io::Errno::INVAL.into()));
        let refused = none.of_pod(&wanted("nobody_t", "s0:c1"), false, ID, |_| false).unwrap_err();
        assert!(matches!(refused, SELinuxError::Unknown(_)), "{refused}");
        let broken = policy(|_| Err(rustix::io::Errno::ACCESS.into()));
        let refused = broken.of_pod(&wanted("", "s0"), false, ID, |_| false).unwrap_err();
        assert!(matches!(refused, SELinuxError::Ask { .. }), "{refused}");
        for bad in [wanted("a:b", ""), wanted("a\n", ""), wanted("", "s0 c1")] {
            let refused = anything().of_pod(&bad, false, ID, |_| false).unwrap_err();
            assert!(matches!(refused, SELinuxError::Part { .. }), "{refused}");
            assert!(anything().of_container(&bad, &Labels::default(), false).is_err());
        }
    }

    #[test]
    fn a_policy_without_labels_for_containers_takes_whole_ones() {
        let policy = Arc::new(Policy { contexts: None, check: |_| Ok(()), promised: Mutex::default() });
        let none = SeLinuxOption::default();
        assert_eq!(policy.of_pod(&none, false, ID, |_| false).unwrap().0, Labels::default());
        assert!(matches!(
            policy.of_pod(&wanted("t", ""), false, ID, |_| false),
            Err(SELinuxError::NoContexts)
        ));
        let whole = SeLinuxOption { user: "u".into(), role: "r".into(), ..wanted("t", "s0") };
        assert_eq!(policy.of_container(&whole, &Labels::default(), false).unwrap().process, "u:r:t:s0");
    }

    #[test]
    fn a_policy_that_lacks_its_own_types_for_containers_has_none() {
        let contexts = policy(|_| Ok(())).contexts.clone();
        assert!(Policy::new(contexts.clone(), |_| Ok(())).contexts.is_some());
        let unknown = |label: &str| match label.contains("container_file_t") {
            true => Err(rustix::io::Errno::INVAL.into()),
            false => Ok(()),
        };
        assert!(Policy::new(contexts, unknown).contexts.is_none());
    }

    #[test]
    fn without_selinux_only_what_would_confine_is_refused() {
        refuse(&SeLinuxOption::default()).unwrap();
        refuse(&wanted("spc_t", "s0")).unwrap();
        let refused = refuse(&wanted("container_t", "s0:c1,c2")).unwrap_err().to_string();
        assert!(
            refused.contains("(type container_t, level s0:c1,c2), but this node has no SELinux"),
            "{refused}"
        );
        assert!(refuse(&wanted("", "s0:c1")).is_err());
    }
}
