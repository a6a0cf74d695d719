//! What hulld knows of a pod and of a container, as it is written to disk.
//!
//! A field is never renumbered or given another meaning; a new field's absence means the old behaviour. The state
//! machines are here too: a transition is a method that changes the record only in the ways that can happen.

use std::collections::BTreeMap;

use prost::Message;

use crate::api::runtime::{ContainerConfig, LinuxContainerResources, PodSandboxConfig};

/// Where a pod stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum PodPhase {
    /// Being made; after a restart of hulld everything of it is undone.
    Creating = 0,
    /// Its agent lives and containers can be started.
    Ready = 1,
    /// Its agent is gone (or the machine was restarted); network and directories are still there.
    Lost = 2,
    /// Stopped: nothing runs, no network.
    Stopped = 3,
}

/// Where a container stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum ContainerPhase {
    /// Made, never started.
    Created = 0,
    /// The agent was, or is about to be, told to start it.
    Starting = 1,
    /// It runs.
    Running = 2,
    /// It ended, or could not be started.
    Exited = 3,
}

/// A pod.
#[derive(Clone, PartialEq, Message)]
pub struct SandboxRecord {
    /// 64 hex digits.
    #[prost(string, tag = "1")]
    pub id: String,
    /// As it was asked for.
    #[prost(message, optional, tag = "2")]
    pub config: Option<PodSandboxConfig>,
    /// Empty or the name of a launcher.
    #[prost(string, tag = "3")]
    pub runtime_handler: String,
    /// Boot of the machine in which it was made.
    #[prost(string, tag = "4")]
    pub boot_id: String,
    /// See [`PodPhase`].
    #[prost(enumeration = "PodPhase", tag = "5")]
    pub phase: i32,
    /// Nanoseconds since 1970.
    #[prost(int64, tag = "6")]
    pub created_at: i64,
    /// Its addresses, primary first; none on the host's network.
    #[prost(string, repeated, tag = "7")]
    pub addresses: Vec<String>,
    /// Path of its pinned network namespace; empty on the host's network.
    #[prost(string, tag = "8")]
    pub network_namespace: String,
    /// Name of the network it is attached to; empty on the host's network.
    #[prost(string, tag = "9")]
    pub network: String,
    /// The network may still hold something of it.
    #[prost(bool, tag = "10")]
    pub network_held: bool,
    /// Path of its cgroup below each hierarchy's root.
    #[prost(string, tag = "11")]
    pub cgroup_parent: String,
    /// How many of that path's lowest levels hull made and removes again.
    #[prost(uint32, tag = "12")]
    pub cgroup_levels: u32,
    /// The agent as the host numbers it, 0 before it was started.
    #[prost(int32, tag = "13")]
    pub agent_pid: i32,
    /// Hostname inside the pod.
    #[prost(string, tag = "14")]
    pub hostname: String,
    /// PID 1 of the shared PID namespace, 0 if there is none.
    #[prost(int32, tag = "15")]
    pub reaper_pid: i32,
    /// It is being stopped: what is found dead was killed with it. Written only where its end leaves no exit records
    /// ([`crate::sandbox::Launcher::has_own_kernel`]).
    #[prost(bool, tag = "16")]
    pub stopping: bool,
    /// What its containers may use together, where that was changed after it was made.
    #[prost(message, optional, tag = "40")]
    pub resources: Option<LinuxContainerResources>,
    /// The overhead of the sandbox itself, where that was changed after it was made.
    #[prost(message, optional, tag = "41")]
    pub overhead: Option<LinuxContainerResources>,
    /// SELinux label of its processes; empty: none was set.
    #[prost(string, tag = "42")]
    pub process_label: String,
    /// SELinux label of what is mounted for its containers; empty: none was set.
    #[prost(string, tag = "43")]
    pub mount_label: String,
}

/// What of an image's configuration a container needs; the image may be gone by the time it is started.
#[derive(Clone, PartialEq, Message)]
pub struct ImageFacts {
    /// "sha256:…", the digest of its configuration.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Lowest first.
    #[prost(string, repeated, tag = "2")]
    pub layers: Vec<String>,
    /// USER
    #[prost(string, tag = "3")]
    pub user: String,
    /// ENV, `KEY=value`.
    #[prost(string, repeated, tag = "4")]
    pub env: Vec<String>,
    /// ENTRYPOINT
    #[prost(string, repeated, tag = "5")]
    pub entrypoint: Vec<String>,
    /// CMD
    #[prost(string, repeated, tag = "6")]
    pub cmd: Vec<String>,
    /// WORKDIR
    #[prost(string, tag = "7")]
    pub working_dir: String,
    /// VOLUME
    #[prost(string, repeated, tag = "8")]
    pub volumes: Vec<String>,
    /// STOPSIGNAL; empty if the image names none.
    #[prost(string, tag = "9")]
    pub stop_signal: String,
    /// A digest reference by which the image was known when the container was made; empty if it had none.
    #[prost(string, tag = "10")]
    pub repo_digest: String,
    /// A tag reference likewise, the one that was asked for if the image has it.
    #[prost(string, tag = "11")]
    pub repo_tag: String,
}

/// An image that a container mounts.
#[derive(Clone, PartialEq, Message)]
pub struct ImageVolume {
    /// The mount's path, as it was asked for.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// "sha256:…", the digest of the image's configuration.
    #[prost(string, tag = "2")]
    pub image_id: String,
    /// Lowest first.
    #[prost(string, repeated, tag = "3")]
    pub layers: Vec<String>,
}

/// Who a container runs as, as the agent found it.
#[derive(Clone, PartialEq, Message)]
pub struct RunningUser {
    /// User id.
    #[prost(uint32, tag = "1")]
    pub uid: u32,
    /// Primary group id.
    #[prost(uint32, tag = "2")]
    pub gid: u32,
    /// Supplementary groups.
    #[prost(uint32, repeated, tag = "3")]
    pub groups: Vec<u32>,
}

/// A container.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerRecord {
    /// 64 hex digits.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Its pod.
    #[prost(string, tag = "2")]
    pub sandbox_id: String,
    /// As it was asked for; resources follow UpdateContainerResources.
    #[prost(message, optional, tag = "3")]
    pub config: Option<ContainerConfig>,
    /// Its image.
    #[prost(message, optional, tag = "4")]
    pub image: Option<ImageFacts>,
    /// Boot of the machine in which it was last started (made, before that).
    #[prost(string, tag = "5")]
    pub boot_id: String,
    /// See [`ContainerPhase`].
    #[prost(enumeration = "ContainerPhase", tag = "6")]
    pub phase: i32,
    /// Nanoseconds since 1970.
    #[prost(int64, tag = "7")]
    pub created_at: i64,
    /// Nanoseconds since 1970; 0 before.
    #[prost(int64, tag = "8")]
    pub started_at: i64,
    /// Nanoseconds since 1970; 0 before.
    #[prost(int64, tag = "9")]
    pub finished_at: i64,
    /// 128 + signal where a signal ended it.
    #[prost(int32, tag = "10")]
    pub exit_code: i32,
    /// One CamelCase word: Completed, Error, OOMKilled, StartError, AgentLost, NodeRebooted.
    #[prost(string, tag = "11")]
    pub reason: String,
    /// A sentence for people.
    #[prost(string, tag = "12")]
    pub message: String,
    /// Absolute path of its log; empty if it has none.
    #[prost(string, tag = "13")]
    pub log_path: String,
    /// As the agent numbers it, 0 before it was started.
    #[prost(int32, tag = "14")]
    pub pid: i32,
    /// Absent before it was started.
    #[prost(message, optional, tag = "15")]
    pub user: Option<RunningUser>,
    /// Directories of the image's VOLUMEs: path in the container → name below the container's directory.
    #[prost(btree_map = "string, string", tag = "16")]
    pub volumes: BTreeMap<String, String>,
    /// The images that its mounts name, in the order of these mounts.
    #[prost(message, repeated, tag = "60")]
    pub image_volumes: Vec<ImageVolume>,
}

/// Exit code and reason of a container whose end nobody saw.
pub const EXIT_CODE_UNKNOWN: i32 = 255;

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 128 + signal where a signal ended it.
    pub code: i32,
    /// Nanoseconds since 1970.
    pub finished_at: i64,
    /// The kernel killed it for memory.
    pub oom_killed: bool,
    /// Instead of the reason that follows from code and OOM.
    pub reason: Option<&'static str>,
    /// A sentence for people, or nothing.
    pub message: String,
}

impl ContainerRecord {
    /// Starting begins. False if it is not in a state to be started.
    pub fn begin_start(&mut self, boot_id: &str) -> bool {
        if self.phase() != ContainerPhase::Created {
            return false;
        }
        self.set_phase(ContainerPhase::Starting);
        self.boot_id = boot_id.to_owned();
        true
    }

    /// Starting begins once more, after an end that stays noted until it runs. False if it has not ended.
    pub fn begin_start_again(&mut self, boot_id: &str) -> bool {
        if self.phase() != ContainerPhase::Exited {
            return false;
        }
        self.set_phase(ContainerPhase::Starting);
        self.boot_id = boot_id.to_owned();
        true
    }

    /// The agent started it. It may have ended since: that report can overtake this one.
    pub fn started(&mut self, pid: i32, started_at: i64, user: RunningUser) {
        self.pid = pid;
        self.user = Some(user);
        if self.phase() == ContainerPhase::Starting {
            self.set_phase(ContainerPhase::Running);
            self.started_at = started_at;
            // Of the run before this one, if there was one.
            self.finished_at = 0;
            self.exit_code = 0;
            self.reason.clear();
            self.message.clear();
        } else if self.started_at == 0 {
            self.started_at = started_at;
        }
    }

    /// It turned out that the start never reached the agent: it is as it was before.
    pub fn start_never_happened(&mut self) {
        if self.phase() == ContainerPhase::Starting {
            let ran_before = self.finished_at != 0;
            self.set_phase(if ran_before { ContainerPhase::Exited } else { ContainerPhase::Created });
        }
    }

    /// Whether a run that began at this time is over and another one has taken its place.
    pub fn is_of_earlier_run(&self, started_at: i64) -> bool {
        let known = started_at != 0 && self.started_at != 0;
        match self.phase() {
            ContainerPhase::Starting => known && started_at == self.started_at,
            // Not `<`: the clock may have been set back since.
            ContainerPhase::Running => known && started_at != self.started_at,
            ContainerPhase::Created | ContainerPhase::Exited => false,
        }
    }

    /// It ended. False, and nothing changes, if it had ended before or never began.
    pub fn exited(&mut self, exit: Exit) -> bool {
        if !matches!(self.phase(), ContainerPhase::Starting | ContainerPhase::Running) {
            return false;
        }
        self.set_phase(ContainerPhase::Exited);
        self.exit_code = exit.code;
        self.finished_at = exit.finished_at;
        self.reason = match exit.reason {
            Some(reason) => reason,
            None if exit.oom_killed => "OOMKilled",
            None if exit.code == 0 => "Completed",
            None => "Error",
        }
        .to_owned();
        self.message = exit.message;
        self.pid = 0;
        true
    }

    /// True once nothing of it can run any more.
    pub fn is_over(&self) -> bool {
        self.phase() == ContainerPhase::Exited
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: i32, oom_killed: bool) -> Exit {
        Exit { code, finished_at: 9, oom_killed, reason: None, message: String::new() }
    }

    #[test]
    fn a_container_goes_from_created_to_exited_once() {
        let mut record = ContainerRecord::default();
        assert!(!record.clone().exited(exit(0, false)), "a container that never began cannot end");
        assert!(record.begin_start("boot"));
        assert!(!record.begin_start("boot"));
        record.started(7, 5, RunningUser::default());
        assert_eq!(record.phase(), ContainerPhase::Running);
        assert!(record.exited(exit(0, false)));
        assert_eq!((record.reason.as_str(), record.started_at, record.finished_at), ("Completed", 5, 9));
        assert!(!record.exited(exit(1, false)), "the first end is the end");
        assert_eq!(record.exit_code, 0);
    }

    #[test]
    fn an_exit_report_may_overtake_the_answer_to_start() {
        let mut record = ContainerRecord::default();
        record.begin_start("boot");
        record.started_at = 4;
        assert!(record.exited(exit(3, false)));
        record.started(7, 5, RunningUser { uid: 1, ..Default::default() });
        assert_eq!(record.phase(), ContainerPhase::Exited);
        assert_eq!((record.exit_code, record.started_at), (3, 4));
    }

    #[test]
    fn reasons_are_those_kubelet_knows() {
        for (code, oom, reason) in [(0, false, "Completed"), (7, false, "Error"), (137, true, "OOMKilled")] {
            let mut record = ContainerRecord::default();
            record.begin_start("boot");
            record.exited(exit(code, oom));
            assert_eq!(record.reason, reason);
        }
    }

    #[test]
    fn a_start_that_never_reached_the_agent_can_be_tried_again() {
        let mut record = ContainerRecord::default();
        record.begin_start("boot");
        record.start_never_happened();
        assert!(record.begin_start("boot"));
    }

    #[test]
    fn a_container_that_has_ended_starts_again_only_when_that_is_meant() {
        let mut record = ContainerRecord::default();
        assert!(!record.begin_start_again("boot"));
        record.begin_start("boot");
        record.started(7, 5, RunningUser::default());
        assert!(!record.begin_start_again("boot"));
        record.exited(exit(3, false));
        assert!(!record.begin_start("boot"), "kubelet starts a container once");

        assert!(record.begin_start_again("next boot"));
        assert_eq!(
            (record.exit_code, record.boot_id.as_str()),
            (3, "next boot"),
            "its end is known until it runs"
        );
        record.start_never_happened();
        assert_eq!((record.phase(), record.exit_code), (ContainerPhase::Exited, 3));

        record.begin_start_again("boot");
        assert!(record.is_of_earlier_run(5) && !record.is_of_earlier_run(20) && !record.is_of_earlier_run(0));
        record.started(8, 20, RunningUser::default());
        assert!(record.is_of_earlier_run(5) && !record.is_of_earlier_run(20));
        assert_eq!((record.started_at, record.finished_at, record.exit_code), (20, 0, 0));
        assert_eq!((record.pid, record.reason.as_str()), (8, ""));

        record.exited(exit(0, false));
        record.begin_start_again("boot");
        record.started(9, 3, RunningUser::default());
        assert!(record.is_of_earlier_run(20) && !record.is_of_earlier_run(3), "the clock was set back");
    }
}
