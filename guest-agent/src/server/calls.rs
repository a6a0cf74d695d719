//! The requests, each to its answer.

use std::os::fd::AsFd;

use hull_sys::{process, signal};

use super::Server;
use super::failure::CallError;
use crate::container::Slots;
use crate::protocol::exit_record;
use crate::protocol::messages::{
    Empty, Forget, Request, ResizeTerminal, SetLog, Signal, Slot, StateReport, request::Call,
    response::Outcome, slot::Kind,
};

/// errno of a process that has ended.
const ESRCH: i32 = rustix::io::Errno::SRCH.raw_os_error();

impl Server {
    /// Does what a request asks for and answers it, at once or later.
    pub(super) fn call(&mut self, connection: u32, id: u64, request: Request, fds: &[std::os::fd::OwnedFd]) {
        if self.guest.is_some() {
            return self.call_in_guest(connection, id, request);
        }
        if let Err(error) = check_slots(&request.slots) {
            return self.connections.respond(connection, id, error.into_outcome(), &self.poll);
        }
        let Request { slots, call } = request;
        self.answer_call(connection, id, call, &Slots::new(&slots, fds));
    }

    /// The same, when it is clear what is behind the slots.
    pub(super) fn answer_call(&mut self, connection: u32, id: u64, call: Option<Call>, slots: &Slots<'_>) {
        let mut started = None;
        let answer = match call {
            None => Err(CallError::unknown_call()),
            Some(Call::CreateSandbox(_) | Call::Prepare(_)) => {
                Err(CallError::precondition("this agent has its sandbox already"))
            }
            Some(Call::StartContainer(_) | Call::Exec(_)) if self.stopping.is_some() => {
                Err(CallError::precondition("the pod is being stopped"))
            }
            Some(Call::StartContainer(_) | Call::Exec(_)) if self.connections.is_superseded(connection) => {
                Err(CallError::precondition("a newer connection has taken the pod over"))
            }
            Some(Call::StartContainer(spec)) => {
                let answer = self.start_container(&spec, slots).map(Outcome::ContainerStarted);
                started = Some(spec.id);
                answer
            }
            Some(Call::Exec(call)) => match self.start_exec(connection, id, &call, slots) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
            Some(Call::Archive(call)) => match self.start_archive(connection, id, &call, slots) {
                Ok(()) => return,
                Err(error) => Err(error),
            },
            Some(Call::Signal(call)) => self.signal(&call).map(done),
            Some(Call::UpdateResources(call)) => self.update_resources(&call).map(done),
            Some(Call::SetLog(call)) => self.set_log(&call, slots).map(done),
            Some(Call::State(_)) => {
                self.connections.supersede_older(connection);
                Ok(Outcome::State(self.state()))
            }
            Some(Call::PrepareContainer(call)) => self.prepare_container(&call).map(done),
            Some(Call::Forget(call)) => self.forget(&call).map(done),
            Some(Call::ResizeTerminal(call)) => self.resize_terminal(connection, &call).map(done),
            Some(Call::Attach(call)) => self.attach(&call, slots).map(done),
            Some(Call::StopExec(call)) => {
                if !self.stop_parked(connection, call.exec_request) {
                    self.stop_exec(connection, call.exec_request);
                }
                Ok(done(()))
            }
            Some(Call::StopSandbox(_)) => return self.begin_stop(Some((connection, id))),
            Some(
                call @ (Call::AddVolume(_)
                | Call::RemoveVolume(_)
                | Call::WriteVolume(_)
                | Call::ReadVolume(_)
                | Call::Measure(_)
                | Call::Dial(_)
                | Call::Resize(_)
                | Call::Ping(_)),
            ) => self.guest_call(&call, slots),
        };
        let started = started.filter(|_| answer.is_ok());
        let outcome = answer.unwrap_or_else(CallError::into_outcome);
        self.connections.respond(connection, id, outcome, &self.poll);
        // The caller has its answer; what is left of the start need not keep it waiting. It may have been woken on this
        // processor, as the kernel expects whoever writes to a socket to wait for what comes back.
        if let Some(id) = started {
            std::thread::yield_now();
            self.watch_started(&id);
        }
    }

    fn signal(&self, call: &Signal) -> Result<(), CallError> {
        let container = self.container(&call.container_id)?;
        let number = i32::try_from(call.signal).ok().filter(|number| (1..=signal::MAX).contains(number));
        let number = number.ok_or_else(|| CallError::invalid(format!("{} is not a signal", call.signal)))?;
        let failed =
            |error| CallError::system(format_args!("cannot signal container {}", container.id), error);
        if call.all {
            if number == super::SIGKILL {
                return Ok(container.leaf.kill()?);
            }
            for pid in container.leaf.processes()? {
                // One that has just ended needs no signal.
                match process::kill(pid, number) {
                    Err(error) if error.raw_os_error() != Some(ESRCH) => return Err(failed(error)),
                    _ => {}
                }
            }
            return Ok(());
        }
        let (pidfd, _) = container.running().ok_or_else(|| CallError::not_running(&container.id))?;
        match process::pidfd_send_signal(pidfd, number) {
            // Ended a moment ago; the event is on its way.
            Err(error) if error.raw_os_error() == Some(ESRCH) => Err(CallError::not_running(&container.id)),
            other => other.map_err(failed),
        }
    }

    pub(super) fn set_log(&mut self, call: &SetLog, slots: &Slots<'_>) -> Result<(), CallError> {
        let container = self.container_mut(&call.container_id)?;
        let file = slots.get(call.log).ok_or_else(|| CallError::no_slot("the log file", call.log))?;
        let file = file
            .try_clone_to_owned()
            .map_err(|error| CallError::system("cannot keep the log file", error))?;
        container.log.replace(file);
        container.close_idle();
        Ok(())
    }

    fn state(&self) -> StateReport {
        StateReport {
            sandbox_id: self.pod.id.clone(),
            agent_pid: rustix::process::getpid().as_raw_nonzero().get(),
            agent_version: env!("CARGO_PKG_VERSION").into(),
            reaper_pid: self.pod.reaper.as_ref().map_or(0, |reaper| reaper.pid),
            cgroup_created_levels: self.pod.cgroup.created_levels(),
            rdt_tasks: true,
            containers: self.containers.iter().map(super::container::Container::state).collect(),
        }
    }

    fn forget(&mut self, call: &Forget) -> Result<(), CallError> {
        let Some(index) = self.containers.iter().position(|container| container.id == call.container_id)
        else {
            // Never started, or told twice, or after a failed start: nothing is known, as was asked.
            return self.forget_expected(&call.container_id);
        };
        let container = &self.containers[index];
        if !container.has_ended() {
            return Err(CallError::precondition(format!("container {} has not ended", container.id)));
        }
        container.leaf.remove()?;
        exit_record::remove(self.pod.state_directory.as_fd(), &container.id)
            .map_err(|error| CallError::system("cannot remove the exit record", error))?;
        let container = self.containers.swap_remove(index);
        for stream in [&container.stdout, &container.stderr].into_iter().flatten() {
            self.poll.remove(stream);
        }
        if let Some(machine) = &mut self.guest {
            container.holdings.give_back(&mut machine.ranges);
        }
        Ok(())
    }

    fn resize_terminal(&mut self, connection: u32, call: &ResizeTerminal) -> Result<(), CallError> {
        let size =
            |number: u32| number.try_into().map_err(|_| CallError::invalid("a terminal's size fits 16 bits"));
        let (rows, columns) = (size(call.rows)?, size(call.columns)?);
        if call.exec_request != 0 && self.resize_parked(connection, call) {
            return Ok(());
        }
        let container = self.container(&call.container_id)?;
        let terminal = if call.exec_request == 0 {
            container.terminal()
        } else {
            self.exec_terminal(container.serial, connection, call.exec_request).map(|relay| relay.terminal())
        };
        let terminal = terminal.ok_or_else(|| {
            CallError::precondition(format!("container {} has no such terminal", container.id))
        })?;
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(terminal, size)
            .map_err(|error| CallError::system("cannot set the terminal's size", error))
    }
}

/// Refuses what only an agent in a guest can have behind a slot.
pub(super) fn check_slots(slots: &[Slot]) -> Result<(), CallError> {
    match slots.iter().position(|slot| !matches!(slot.kind, None | Some(Kind::Descriptor(_)))) {
        Some(number) => Err(CallError::only_in_a_guest(format_args!("slot {number} of the request"))),
        None => Ok(()),
    }
}

pub(super) fn done((): ()) -> Outcome {
    Outcome::Done(Empty {})
}
