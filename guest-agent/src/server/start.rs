//! StartContainer: from the request to a running first process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use hull_sys::process;
use rustix::pipe::{PipeFlags, pipe_with};

use super::Server;
use super::container::{Container, OomState, Phase};
use super::ending::is_ending;
use super::exec::own_end;
use super::failure::CallError;
use super::leaves::KEPT_OPEN;
use super::output::Log;
use super::poll::Source;
use super::report;
use crate::cgroup::{CgroupError, Leaf, default_device_rules};
use crate::container::{ChildStdio, ContainerPlan, LaunchError, Launched, PidNamespace, Slots, launch};
use crate::guest::slots::Holdings;
use crate::protocol::messages::{ContainerStarted, DeviceRule, PidMode, Resources, StartContainer};
use crate::stdio::{Forward, LogFile, OutputStream, Stream, now};
use crate::steps::Steps;

/// The agent's ends of a container's standard streams.
#[derive(Default)]
struct AgentStdio {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl Server {
    /// Starts a container. Its output is watched only by [`Self::watch_started`], after the answer has been sent.
    pub(super) fn start_container(
        &mut self,
        spec: &StartContainer,
        slots: &Slots<'_>,
    ) -> Result<ContainerStarted, CallError> {
        let mut steps = Steps::begin();
        self.check_new(&spec.id, &spec.cgroup_leaf)?;
        let context = || format!("cannot start container {}", spec.id);
        let log = Log::new(spec, slots)?;
        let rdt_tasks = spec.rdt_tasks.map(|slot| own_end(slots, slot, "RDT class")).transpose()?;
        let plan = ContainerPlan::new(spec, &self.pod.facts)
            .map_err(|error| CallError::invalid(error.to_string()).during(context()))?;
        steps.done("plan");
        let leaf = self.leaf_of(spec).map_err(|error| CallError::from(error).during(context()))?;
        let launched = self.prepare_and_launch(spec, &plan, slots, &leaf, &mut steps);
        let (launched, stdio) = match launched {
            Ok(launched) => launched,
            Err(error) => {
                // Nothing of a failed start may stay; the error tells of the start, not of this.
                let _ = leaf.kill();
                let _ = leaf.remove();
                return Err(error.during(context()));
            }
        };
        let process = Box::new(plan.process_of(&launched));
        let started = ContainerStarted {
            pid: launched.pid,
            uid: launched.uid,
            gid: launched.gid,
            groups: launched.groups,
            started_at: now(),
            steps: steps.into_messages(),
        };
        let serial = self.take_serial();
        let is_terminal = launched.terminal.is_some();
        // What is typed at a terminal goes in where it shows things.
        let typed = launched.terminal.as_ref().filter(|_| spec.stdin);
        let stdin = typed.and_then(|terminal| terminal.try_clone().ok()).or(stdio.stdin);
        if let Some(stdin) = &stdin {
            // Nobody who is attached may hold up the agent.
            let _ = rustix::io::ioctl_fionbio(stdin, true);
        }
        // The terminal shows both; CRI logs it as stdout.
        let stdout = launched.terminal.or(stdio.stdout);
        let Log { file, stdout: to_stdout, stderr: to_stderr } = log;
        let stream = |fd: Option<OwnedFd>, stream, forward: Option<Forward>| {
            let mut output = OutputStream::new(fd?, stream).ok()?;
            forward.into_iter().for_each(|forward| output.forward_to(forward));
            Some(output)
        };
        self.containers.push(Container {
            serial,
            id: spec.id.clone(),
            leaf,
            leaf_name: spec.cgroup_leaf.clone(),
            own_pid_namespace: spec.pid_mode() == PidMode::PidContainer,
            private_cgroup_namespace: spec.private_cgroup_namespace,
            rdt_tasks,
            started: ContainerStarted { steps: Vec::new(), ..started.clone() },
            log: LogFile::new(file),
            stdout: stream(stdout, Stream::Stdout, to_stdout),
            stderr: stream(stdio.stderr, Stream::Stderr, to_stderr),
            is_terminal,
            stdin,
            stdin_once: spec.stdin_once,
            inputs: Vec::new(),
            oom: None,
            oom_killed: false,
            phase: Phase::Running { pidfd: launched.pidfd, process },
            holdings: Holdings::default(),
        });
        Ok(started)
    }

    /// Begins to watch what a started container writes and whether it runs out of memory.
    pub(super) fn watch_started(&mut self, id: &str) {
        let few = self.containers.len() <= KEPT_OPEN;
        let Some(container) = self.containers.iter_mut().find(|container| container.id == id) else { return };
        if let Err(error) = super::output::watch_all(container, &self.poll) {
            report::line(format_args!("output of container {id} is not logged until its end: {error}"));
        }
        if few {
            // Processes that follow it enter the same way.
            container.leaf.keep_open();
        }
        match container.leaf.oom_watch() {
            Ok(Some(watch)) => {
                let interest = watch.interest();
                if self.poll.add_for(&watch, Source::Oom(container.serial), interest).is_ok() {
                    container.oom = Some(OomState::new(watch));
                }
            }
            Ok(None) => {}
            Err(error) => {
                report::line(format_args!("kills for memory in container {id} are told at its end: {error}"))
            }
        }
    }

    /// The container's cgroup, which may have been made already.
    fn leaf_of(&mut self, spec: &StartContainer) -> Result<Leaf, CgroupError> {
        // Others clear up empty cgroups, too.
        if let Some(leaf) = self.take_expected(&spec.id, &spec.cgroup_leaf).filter(Leaf::exists) {
            return Ok(leaf);
        }
        let leaf = self.pod.cgroup.leaf(&spec.cgroup_leaf)?;
        leaf.create()?;
        Ok(leaf)
    }

    fn prepare_and_launch(
        &self,
        spec: &StartContainer,
        plan: &ContainerPlan,
        slots: &Slots<'_>,
        leaf: &Leaf,
        steps: &mut Steps,
    ) -> Result<(Launched, AgentStdio), CallError> {
        let pid_namespace = self.pid_namespace(spec)?;
        let (limits, cpu_time) = split_cpu_time(spec.resources.clone().unwrap_or_default());
        leaf.apply(&limits)?;
        leaf.restrict_devices(&device_rules(spec))?;
        let terminal = spec.process.as_ref().is_some_and(|process| process.terminal);
        let (agent, child) = if terminal {
            Default::default()
        } else {
            pipes(spec.stdin).map_err(|error| CallError::system("cannot make pipes", error))?
        };
        steps.done("make the cgroup");
        let launched = launch(plan, slots, child, leaf, pid_namespace);
        let launched = launched.map_err(|error| self.refusal(error, spec))?;
        steps.done_in_steps(&launched.parts, "seccomp, execve");
        if let Err(error) = leaf.apply(&cpu_time) {
            let _ = process::pidfd_send_signal(launched.pidfd.as_fd(), super::SIGKILL);
            let _ = process::wait(launched.pidfd.as_fd());
            return Err(error.into());
        }
        steps.done("limits of processor time");
        Ok((launched, agent))
    }

    fn pid_namespace(&self, spec: &StartContainer) -> Result<PidNamespace<'_>, CallError> {
        use std::os::fd::AsFd;
        Ok(match spec.pid_mode() {
            PidMode::PidContainer => PidNamespace::New,
            PidMode::PidNode => PidNamespace::Agent,
            PidMode::PidPod => match &self.pod.reaper {
                Some(reaper) => PidNamespace::Join(reaper.pidfd.as_fd()),
                None => return Err(CallError::precondition("the pod has no shared PID namespace")),
            },
            PidMode::PidTarget => {
                let target = self.container(&spec.pid_target)?;
                let (pidfd, _) = target.running().ok_or_else(|| CallError::not_running(&target.id))?;
                PidNamespace::Join(pidfd)
            }
        })
    }

    /// Why it was not launched. A container whose processes it was to join and that ends meanwhile fails a step or another
    /// of it, whichever comes first.
    fn refusal(&self, error: LaunchError, spec: &StartContainer) -> CallError {
        let joins = spec.pid_mode() == PidMode::PidTarget && !error.is_invalid_request();
        match self.container(&spec.pid_target) {
            Ok(target) if joins && is_ending(target.started.pid) => CallError::not_running(&target.id),
            _ => error.into(),
        }
    }
}

/// The limits that hold from the beginning, and those of CPU time, which come when the program runs: a container with
/// two shares, on a busy machine, or with a quota of a hundredth of a CPU would take long to be made by its own means.
fn split_cpu_time(all: Resources) -> (Resources, Resources) {
    // Files that are given verbatim win over the limits that mean the same.
    if all.unified.keys().any(|file| file.starts_with("cpu.")) {
        return (all, Resources::default());
    }
    let cpu_time = Resources {
        cpu_shares: all.cpu_shares,
        cpu_quota: all.cpu_quota,
        cpu_period: all.cpu_period,
        ..Resources::default()
    };
    (Resources { cpu_shares: None, cpu_quota: None, cpu_period: None, ..all }, cpu_time)
}

/// The default set, the container's own devices, and what else the request allows or denies.
fn device_rules(spec: &StartContainer) -> Vec<DeviceRule> {
    let mut rules = default_device_rules();
    // A named pipe is no device to the cgroup.
    for device in spec.devices.iter().filter(|device| device.r#type != "p" && !device.access.is_empty()) {
        rules.push(DeviceRule {
            allow: true,
            r#type: device.r#type.clone(),
            major: device.major.into(),
            minor: device.minor.into(),
            access: device.access.clone(),
        });
    }
    rules.extend_from_slice(&spec.device_rules);
    rules
}

fn pipes(stdin: bool) -> io::Result<(AgentStdio, ChildStdio)> {
    let (mut agent, mut child) = (AgentStdio::default(), ChildStdio::default());
    if stdin {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        (child.stdin, agent.stdin) = (Some(read), Some(write));
    }
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    (agent.stdout, child.stdout) = (Some(read), Some(write));
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    (agent.stderr, child.stderr) = (Some(read), Some(write));
    Ok((agent, child))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_cpu_time_come_last_unless_they_are_given_verbatim() {
        let all = Resources {
            cpu_shares: Some(2),
            cpu_quota: Some(1000),
            cpu_period: Some(100_000),
            memory_limit: Some(1 << 20),
            ..Resources::default()
        };
        let (limits, cpu_time) = split_cpu_time(all.clone());
        assert_eq!(limits, Resources { memory_limit: Some(1 << 20), ..Resources::default() });
        assert_eq!(cpu_time, Resources { memory_limit: None, ..all.clone() });

        let verbatim = Resources { unified: [("cpu.weight".into(), "7".into())].into(), ..all };
        assert_eq!(split_cpu_time(verbatim.clone()), (verbatim, Resources::default()));
    }
}
