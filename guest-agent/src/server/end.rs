//! Children that end: containers, execs, the reaper, and orphans of the pod.

use std::time::{Duration, Instant};

use hull_sys::process::{self, Ended};

use super::container::{OomState, Phase};
use super::report;
use super::{SIGKILL, Server};
use crate::protocol::exit_record;
use crate::protocol::messages::{Event, ExitRecord, event};
use crate::stdio::now;

use std::os::fd::AsFd;

/// How long the report of an end waits for output that somebody else can still write.
const LINGER: Duration = Duration::from_millis(250);
/// How long it waits for somebody else who has not logged all of it yet.
const LOG_PATIENCE: Duration = Duration::from_secs(10);

impl Server {
    /// Takes the status of every child that has ended.
    pub(super) fn children_ended(&mut self) {
        loop {
            match process::peek_ended_child() {
                Ok(Some(pid)) => {
                    if !self.child_ended(pid) {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    return report::line(format_args!("cannot ask which children have ended: {error}"));
                }
            }
        }
    }

    /// False if the status could not be taken, so that asking again would bring the same child.
    fn child_ended(&mut self, pid: i32) -> bool {
        if let Some(index) =
            self.containers.iter().position(|one| one.started.pid == pid && one.running().is_some())
        {
            let ended = self.containers[index]
                .running()
                .and_then(|(pidfd, _)| process::try_wait(pidfd).ok().flatten());
            return ended.map(|ended| self.container_ended(index, ended)).is_some();
        }
        if let Some(index) = self.execs.iter().position(|exec| exec.running().is_some_and(|one| one.0 == pid))
        {
            let ended =
                self.execs[index].running().and_then(|(_, pidfd)| process::try_wait(pidfd).ok().flatten());
            return ended.map(|ended| self.exec_ended(index, ended)).is_some();
        }
        if self.is_archiving(pid) {
            let ended = process::try_wait_pid(pid).ok().flatten();
            return ended.map(|_| self.archive_ended(pid)).is_some();
        }
        if self.pod.reaper.as_ref().is_some_and(|reaper| reaper.pid == pid) {
            self.pod.reaper = None;
            if self.stopping.is_none() {
                report::line(format_args!("PID 1 of the pod's shared PID namespace has ended"));
            }
        }
        // An orphan that the kernel gave to this subreaper.
        matches!(process::try_wait_pid(pid), Ok(Some(_)))
    }

    /// The first process of a container has ended; the report follows when its output is in the log.
    fn container_ended(&mut self, index: usize, ended: Ended) {
        let buffers = self.buffers.get_or_insert_default();
        self.buffers_used = Instant::now();
        let container = &mut self.containers[index];
        if !container.own_pid_namespace {
            // The others of its processes would live on and hold its mounts, its output and its cgroup.
            if let Err(error) = container.leaf.kill() {
                report::line(format_args!("cannot kill what is left of container {}: {error}", container.id));
            }
        }
        let all = container.drain(buffers);
        let killed = matches!(ended, Ended::Killed(SIGKILL));
        self.look_for_oom_kills(index, killed);
        let container = &mut self.containers[index];
        container.leaf.let_go();
        let this_moment = Instant::now();
        container.phase = Phase::Ending {
            ended,
            finished_at: now(),
            deadline: this_moment + LINGER,
            give_up: this_moment + LOG_PATIENCE,
        };
        if let Err(error) = super::output::watch_all(container, &self.poll) {
            report::line(format_args!("output of container {} is not watched: {error}", container.id));
        }
        if all {
            self.report_end(index);
        }
    }

    /// Notes whether the kernel has killed any of a container's processes for memory. Whoever else owns cgroups (systemd)
    /// may have removed the container's by now; then the pod's, which counts those of all below it, tells, if a signal
    /// `killed` the container.
    fn look_for_oom_kills(&mut self, index: usize, killed: bool) {
        let in_pod = self.pod.cgroup.oom_kills().unwrap_or(0);
        let container = &mut self.containers[index];
        let own = container.leaf.oom_kills().unwrap_or(0);
        let noticed = container.oom.as_ref().map_or(0, OomState::kills);
        let gone = killed && own == 0 && !container.leaf.exists();
        if own > 0 || noticed > 0 || gone && in_pod > self.oom_kills_told {
            container.oom_killed = true;
            self.oom_kills_told = in_pod;
        }
    }

    /// Both outputs of a container have come to their end.
    pub(super) fn output_ended(&mut self, serial: u32) {
        let Some(index) = self.containers.iter().position(|container| container.serial == serial) else {
            return;
        };
        match self.containers[index].phase {
            Phase::Running { .. } => {}
            Phase::Ending { .. } => self.report_end(index),
            Phase::Ended(_) => self.containers[index].close_idle(),
        }
    }

    /// Reports ends whose output somebody else still holds open. Logging goes on afterwards.
    pub(super) fn report_overdue_ends(&mut self, now: Instant) {
        for index in 0..self.containers.len() {
            let container = &mut self.containers[index];
            let waits_for_log = container.waits_for_log();
            let Phase::Ending { deadline, give_up, .. } = &mut container.phase else { continue };
            if *deadline > now {
                continue;
            }
            if waits_for_log && now < *give_up {
                *deadline = (now + LINGER).min(*give_up);
            } else {
                let buffers = self.buffers.get_or_insert_default();
                self.buffers_used = now;
                self.containers[index].drain(buffers);
                self.containers[index].flush(buffers);
                self.report_end(index);
            }
        }
    }

    /// Writes the exit record, then tells of it.
    fn report_end(&mut self, index: usize) {
        let Phase::Ending { ended, finished_at, .. } = self.containers[index].phase else { return };
        self.look_for_oom_kills(index, false);
        let container = &mut self.containers[index];
        let record = ExitRecord {
            container_id: container.id.clone(),
            exit_code: ended.exit_code(),
            finished_at,
            started_at: container.started.started_at,
            oom_killed: container.oom_killed,
        };
        if let Err(error) = exit_record::write(self.pod.state_directory.as_fd(), &record) {
            report::line(format_args!("cannot write the exit record of container {}: {error}", container.id));
        }
        if container.log.dropped() > 0 {
            let (dropped, id) = (container.log.dropped(), &container.id);
            report::line(format_args!("{dropped} bytes of the log of container {id} could not be written"));
        }
        container.oom = None;
        container.detach_all();
        container.phase = Phase::Ended(record.clone());
        container.close_idle();
        self.send_event(Event { event: Some(event::Event::Exited(record)) });
    }
}
