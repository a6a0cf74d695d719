//! ExecSync: a command inside a container, with its output.
//!
//! The output goes through pipes from the process to hulld; the agent never sees it. Each stream is kept up to a bound
//! and read on to the end (containerd CVE-2022-31030).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hull_agent::protocol::messages::{self, ExecEnded, request, response};
use rustix::pipe::PipeFlags;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::{Error, Result, Runtime};
use crate::api::runtime::{ExecSyncRequest, ExecSyncResponse};
use crate::sandbox::{Agent, SandboxError, Slots};
use crate::store::record::ContainerPhase;

/// Most bytes of each stream that are kept.
const MAX_OUTPUT: usize = 16 << 20;
/// Of each stream so much is kept in any case: what probes write, and then some.
const CERTAIN_OUTPUT: usize = 64 << 10;
/// Most bytes beyond that which are kept for all commands together; what finds no room is dropped.
const MAX_HELD: usize = 256 << 20;
/// The answer must fit into one gRPC message with both streams and a little more.
const MAX_ANSWER: usize = crate::api::MAX_MESSAGE - 4096;
/// How long output is waited for after the command has ended: something that it left behind may hold the pipes open.
const AFTERMATH: Duration = Duration::from_secs(1);
/// How long after its time limit an agent may take to say that it killed the command.
const LIMIT_PATIENCE: Duration = Duration::from_secs(30);

impl Runtime {
    /// Runs a command to its end, or to its time limit.
    pub async fn exec_sync(&self, request: ExecSyncRequest) -> Result<ExecSyncResponse> {
        let container = self.objects.container(&request.container_id)?;
        if request.cmd.first().is_none_or(String::is_empty) {
            return Err(Error::Invalid("the request has no command".into()));
        }
        if container.phase() != ContainerPhase::Running {
            return Err(Error::FailedPrecondition(format!("the container {} does not run", container.id())));
        }
        let agent = container.pod.ready_agent()?;
        let limit = Duration::from_secs(u64::try_from(request.timeout).unwrap_or(0));
        let mut slots = Slots::default();
        let (stdout, theirs) = output_pipe()?;
        let stdout_slot = slots.output(theirs);
        let (stderr, theirs) = output_pipe()?;
        let stderr_slot = slots.output(theirs);
        let process = messages::Process { args: request.cmd, ..Default::default() };
        let exec = messages::Exec {
            container_id: container.id().to_owned(),
            process: Some(process),
            stdin: None,
            stdout: Some(stdout_slot),
            stderr: Some(stderr_slot),
            timeout_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
            inherit: true,
            output_at_end: true,
        };
        let doing = format!("cannot execute a command in the container {}", container.id());
        let call = execute(&agent, exec, slots);
        let ended = async {
            let answer = if limit.is_zero() {
                call.await
            } else {
                match tokio::time::timeout(limit + LIMIT_PATIENCE, call).await {
                    Ok(answer) => answer,
                    Err(_) => return Err(timed_out(limit)),
                }
            };
            match answer.map_err(Error::sandbox(doing))? {
                response::Outcome::ExecEnded(ended) if ended.timed_out => Err(timed_out(limit)),
                response::Outcome::ExecEnded(ended) => Ok(ended),
                _ => Err(Error::Internal("the agent gave an answer that does not fit an exec".into())),
            }
        };
        let (ended, mut stdout, mut stderr) = collect(ended, stdout, stderr).await?;
        Ok(answer(ended, stdout.take(), stderr.take()))
    }
}

/// Runs the command in the agent. Given up before the answer (the client went away), the command is killed: without a
/// time limit it might run for ever.
async fn execute(
    agent: &Agent,
    exec: messages::Exec,
    slots: Slots,
) -> std::result::Result<response::Outcome, SandboxError> {
    let asked = agent.ask(request::Call::Exec(exec), slots)?;
    let mut unfinished = Unfinished { agent, request: Some(asked.id()) };
    let answer = asked.answer().await;
    unfinished.request = None;
    answer
}

/// An exec that nobody has heard the end of.
struct Unfinished<'a> {
    agent: &'a Agent,
    request: Option<u64>,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        let Some(exec_request) = self.request else { return };
        let call = request::Call::StopExec(messages::StopExec { exec_request });
        // Nobody waits for the answer; an agent that is gone has taken the command with it.
        if let Err(error) = self.agent.ask(call, Slots::default()) {
            tracing::debug!(%error, "cannot end a command whose caller has gone");
        }
    }
}

/// As kubelet expects of a probe that takes too long: DEADLINE_EXCEEDED.
fn timed_out(limit: Duration) -> Error {
    Error::DeadlineExceeded(format!("the command did not end within {} s and was killed", limit.as_secs()))
}

/// A pipe for one stream; our end never blocks, theirs is an ordinary one.
fn output_pipe() -> Result<(pipe::Receiver, OwnedFd)> {
    let failed = |error: io::Error| Error::Internal(format!("cannot make a pipe: {error}"));
    let (ours, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
    rustix::io::ioctl_fionbio(&ours, true).map_err(|errno| failed(errno.into()))?;
    Ok((pipe::Receiver::from_owned_fd(ours).map_err(failed)?, theirs))
}

/// Bytes beyond [`CERTAIN_OUTPUT`] that all commands hold at this moment.
static HELD: AtomicUsize = AtomicUsize::new(0);

/// The beginning of a stream.
#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    held: usize,
}

impl Kept {
    /// Keeps as much as there is room for.
    fn push(&mut self, bytes: &[u8]) {
        let mut room = (MAX_OUTPUT - self.bytes.len()).min(bytes.len());
        let beyond = (self.bytes.len() + room).saturating_sub(CERTAIN_OUTPUT.max(self.bytes.len()));
        let taken = HELD.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
            Some(held + beyond).filter(|held| *held <= MAX_HELD)
        });
        match taken {
            Ok(_) => self.held += beyond,
            Err(_) => room -= beyond,
        }
        self.bytes.extend_from_slice(&bytes[..room]);
    }

    fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        HELD.fetch_sub(self.held, Ordering::Relaxed);
    }
}

/// Reads both streams while the command runs, and what is left of them after it.
async fn collect(
    ended: impl Future<Output = Result<ExecEnded>>,
    mut stdout: pipe::Receiver,
    mut stderr: pipe::Receiver,
) -> Result<(ExecEnded, Kept, Kept)> {
    let (mut out, mut err) = (Kept::default(), Kept::default());
    let ended = {
        let streams = async {
            tokio::join!(read_bounded(&mut stdout, &mut out), read_bounded(&mut stderr, &mut err));
        };
        let (mut streams, mut ended) = (std::pin::pin!(streams), std::pin::pin!(ended));
        tokio::select! {
            result = &mut ended => {
                let result = result?;
                // What the process itself wrote is in the pipes; only others can make this wait.
                let _ = tokio::time::timeout(AFTERMATH, streams).await;
                result
            }
            () = &mut streams => ended.await?,
        }
    };
    Ok((ended, out, err))
}

/// Reads to the end and keeps the beginning. A stream that breaks has ended.
async fn read_bounded(stream: &mut pipe::Receiver, kept: &mut Kept) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => kept.push(&buffer[..length]),
        }
    }
}

fn answer(ended: ExecEnded, mut stdout: Vec<u8>, mut stderr: Vec<u8>) -> ExecSyncResponse {
    if stdout.len() + stderr.len() > MAX_ANSWER {
        // The shorter one is kept whole as far as possible.
        let half = MAX_ANSWER / 2;
        let room_for_stderr = stderr.len().min(half.max(MAX_ANSWER.saturating_sub(stdout.len())));
        stderr.truncate(room_for_stderr);
        stdout.truncate(MAX_ANSWER - stderr.len());
    }
    ExecSyncResponse { stdout, stderr, exit_code: ended.exit_code }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn ended() -> ExecEnded {
        ExecEnded { exit_code: 3, timed_out: false }
    }

    #[tokio::test]
    async fn output_beyond_the_bound_is_read_and_dropped() {
        let (stdout, theirs) = output_pipe().unwrap();
        let (stderr, no_output) = output_pipe().unwrap();
        drop(no_output);
        let writer = std::thread::spawn(move || {
            let mut theirs = std::fs::File::from(theirs);
            let block = vec![b'x'; 1 << 20];
            for _ in 0..20 {
                theirs.write_all(&block).unwrap();
            }
        });
        let (ended, out, err) = collect(async { Ok(ended()) }, stdout, stderr).await.unwrap();
        assert_eq!((ended.exit_code, out.bytes.len(), err.bytes.len()), (3, MAX_OUTPUT, 0));
        writer.join().unwrap();
        let (mut out, mut err) = (out, err);
        assert!(answer(ended, out.take(), err.take()).stdout.len() <= MAX_ANSWER);
    }

    #[test]
    fn the_output_of_all_commands_together_is_bounded_and_each_gets_its_first_part() {
        let block = vec![b'x'; 1 << 20];
        let mut hogs: Vec<Kept> = Vec::new();
        for _ in 0..20 {
            let mut hog = Kept::default();
            (0..17).for_each(|_| hog.push(&block));
            assert!(hog.bytes.len() <= MAX_OUTPUT);
            hogs.push(hog);
        }
        let kept: usize = hogs.iter().map(|hog| hog.bytes.len()).sum();
        assert!(kept <= MAX_HELD + hogs.len() * CERTAIN_OUTPUT, "{kept}");
        let mut probe = Kept::default();
        probe.push(&block);
        assert!(probe.bytes.len() >= CERTAIN_OUTPUT - 1, "{}", probe.bytes.len());
        drop(hogs);
        let mut later = Kept::default();
        later.push(&block);
        assert_eq!(later.bytes.len(), block.len());
    }

    #[tokio::test]
    async fn a_child_left_behind_does_not_hold_up_the_answer() {
        let (stdout, held_open) = output_pipe().unwrap();
        let (stderr, _also_held_open) = output_pipe().unwrap();
        let mut file = std::fs::File::from(held_open.try_clone().unwrap());
        file.write_all(b"last words").unwrap();
        let (_, out, _) = collect(async { Ok(ended()) }, stdout, stderr).await.unwrap();
        assert_eq!(out.bytes, b"last words");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_command_that_is_given_up_is_stopped_and_a_finished_one_is_not() {
        use hull_agent::protocol::BlockingConnection;
        use messages::{Message, Request, Response, message::Body};
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let agent = std::thread::spawn(move || {
            let mut connection = BlockingConnection::new(theirs.into());
            let mut receive = || connection.recv().unwrap().unwrap().message;
            let finished = receive();
            let outcome = Some(response::Outcome::ExecEnded(ended()));
            let answer = Message { id: finished.id, body: Some(Body::Response(Response { outcome })) };
            connection.send(&answer, &[]).unwrap();
            let mut receive = || connection.recv().unwrap().unwrap().message;
            let given_up = receive();
            let Some(Body::Request(Request { call, .. })) = receive().body else { panic!() };
            let stop = messages::StopExec { exec_request: given_up.id };
            assert_eq!(call, Some(request::Call::StopExec(stop)));
        });
        let (client, _events) = Agent::connect(ours).unwrap();
        execute(&client, messages::Exec::default(), Slots::default()).await.unwrap();
        let call = execute(&client, messages::Exec::default(), Slots::default());
        tokio::time::timeout(Duration::from_millis(50), call).await.unwrap_err();
        agent.join().unwrap();
    }

    #[test]
    fn both_streams_share_one_answer() {
        let long = vec![0; MAX_OUTPUT];
        let both = answer(ended(), long.clone(), long.clone());
        assert_eq!(both.stdout.len() + both.stderr.len(), MAX_ANSWER);
        let one = answer(ended(), long, vec![0; 10]);
        assert_eq!((one.stdout.len(), one.stderr.len()), (MAX_ANSWER - 10, 10));
    }
}
