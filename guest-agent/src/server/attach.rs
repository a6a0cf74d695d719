//! Attach: others read what a container writes, beside its log, and write what it reads.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll::EventFlags;

use super::Server;
use super::exec::own_end;
use super::failure::CallError;
use super::poll::Source;
use crate::container::Slots;
use crate::protocol::messages::Attach;
use crate::stdio::{InputRelay, Typed};

/// Most callers that are attached to one container at a time.
const MAX_ATTACHED: usize = 16;

/// A caller's input on its way to a container.
pub(super) struct AttachedInput {
    relay: InputRelay,
}

impl Server {
    /// Gives a caller's pipes their part of a container's streams. They are closed when the container has ended or
    /// the caller has fallen behind.
    pub(super) fn attach(&mut self, call: &Attach, slots: &Slots<'_>) -> Result<(), CallError> {
        let context = || format!("cannot attach to container {}", call.container_id);
        let end = |slot: Option<u32>, what| slot.map(|slot| own_end(slots, slot, what)).transpose();
        let (stdin, stdout, stderr) =
            (end(call.stdin, "stdin")?, end(call.stdout, "stdout")?, end(call.stderr, "stderr")?);
        let number = self.take_serial();
        let container = self.container_mut(&call.container_id).map_err(|error| error.during(context()))?;
        if container.running().is_none() {
            return Err(CallError::not_running(&container.id).during(context()));
        }
        for stream in [&mut container.stdout, &mut container.stderr].into_iter().flatten() {
            stream.forget_gone_taps();
        }
        let taps =
            [&container.stdout, &container.stderr].into_iter().flatten().map(|stream| stream.taps()).max();
        if taps.unwrap_or(0).max(container.inputs.len()) >= MAX_ATTACHED {
            let reason = format!("{MAX_ATTACHED} are attached already");
            return Err(CallError::precondition(reason).during(context()));
        }
        let failed = |error| CallError::system("cannot use the caller's pipes", error).during(context());
        let outputs = [(stdout, &mut container.stdout), (stderr, &mut container.stderr)];
        for (pipe, stream) in outputs {
            // An output that has ended already has nothing more to give: its pipe is closed.
            if let (Some(pipe), Some(stream)) = (pipe, stream) {
                stream.tap(number, pipe).map_err(failed)?;
            }
        }
        if let Some(stdin) = stdin {
            self.attach_input(&call.container_id, stdin).map_err(failed)?;
        }
        Ok(())
    }

    fn attach_input(&mut self, id: &str, stdin: OwnedFd) -> std::io::Result<()> {
        let Ok(container) = self.container_mut(id) else { return Ok(()) };
        if container.stdin.is_none() {
            // Nobody reads it: the caller learns that when it writes.
            return Ok(());
        }
        container.inputs.push(AttachedInput { relay: InputRelay::new(stdin)? });
        let serial = container.serial;
        self.input_ready(serial);
        Ok(())
    }

    /// Passes on what attached callers typed.
    pub(super) fn input_ready(&mut self, serial: u32) {
        let Some(container) = self.containers.iter_mut().find(|container| container.serial == serial) else {
            return;
        };
        let Some(stdin) = &container.stdin else {
            container.inputs = Vec::new();
            return;
        };
        let source = Source::Input(serial);
        let arm = |fd: &dyn AsFd, flags: EventFlags| {
            let (fd, flags) = (fd.as_fd(), flags | EventFlags::ONESHOT);
            if self.poll.change(&fd, source, flags).is_err() {
                // Not in the set yet. A regular file cannot be: then nothing more is read from it.
                let _ = self.poll.add_for(&fd, source, flags);
            }
        };
        let (mut stuck, mut ended, mut closed) = (false, false, false);
        container.inputs.retain_mut(|input| match input.relay.step(stdin.as_fd()) {
            Typed::Wanted => {
                arm(&input.relay, EventFlags::IN);
                true
            }
            Typed::Stuck => {
                stuck = true;
                true
            }
            Typed::Ended => {
                ended = true;
                false
            }
            Typed::Unread => {
                closed = true;
                false
            }
        });
        if stuck {
            arm(stdin, EventFlags::OUT);
        }
        // A terminal has no end of input; its user types it.
        if closed || (ended && container.stdin_once && !container.is_terminal) {
            container.stdin = None;
            container.inputs = Vec::new();
        }
    }
}
