//! A command in a running container, with its streams.
//!
//! The command's pipes come from here and pass the agent by; with a terminal the agent relays, because the terminal
//! belongs to the container's own devpts. A command whose client goes away is killed with its process group: nobody
//! is left to end it, or to read what it says.

use std::sync::Arc;
use std::time::Duration;

use hull_agent::protocol::messages::{self, request, response};
use tokio_util::sync::CancellationToken;

use super::command::{Client, Output, Wanted};
use super::pipes;
use super::status::Outcome;
use super::terminal_size::SizeReader;
use crate::runtime::objects::Container;
use crate::sandbox::{Agent, SandboxError, Slots};

/// How often, and for how many times, a terminal that is not there yet is looked for.
const TERMINAL_PAUSE: Duration = Duration::from_millis(50);
const TERMINAL_TRIES: u32 = 200;

/// An exec that was asked for.
#[derive(Debug)]
pub struct ExecSession {
    /// Where.
    pub container: Arc<Container>,
    /// What.
    pub command: Vec<String>,
    /// With which streams.
    pub wanted: Wanted,
}

impl ExecSession {
    /// Runs the command to its end, or until the client goes away.
    pub(super) async fn serve(self, mut client: Client) {
        let outcome = self.run(&mut client).await;
        client.end(&outcome).await;
    }

    async fn run(self, client: &mut Client) -> Outcome {
        let failed = |reason: &dyn std::fmt::Display| {
            Outcome::Failed(format!(
                "cannot execute a command in the container {}: {reason}",
                self.container.id()
            ))
        };
        let agent = match self.container.pod.ready_agent() {
            Ok(agent) => agent,
            Err(error) => return failed(&error),
        };
        let mut slots = Slots::default();
        let mut exec = messages::Exec {
            container_id: self.container.id().to_owned(),
            process: Some(messages::Process {
                args: self.command.clone(),
                terminal: self.wanted.tty,
                ..Default::default()
            }),
            inherit: true,
            ..Default::default()
        };
        let ends = match Ends::make(client, &mut exec, &mut slots) {
            Ok(ends) => ends,
            Err(error) => return failed(&error),
        };
        let asked = match agent.ask(request::Call::Exec(exec), slots) {
            Ok(asked) => asked,
            Err(error) => return failed(&error),
        };
        let number = asked.id();
        let resizes = client.resizes.take();
        let resizes = async {
            if let Some(resizes) = resizes {
                follow_sizes(&agent, self.container.id(), number, resizes).await;
            }
            std::future::pending::<()>().await;
        };
        let over = CancellationToken::new();
        let answer = async {
            let answer = asked.answer().await;
            over.cancel();
            answer
        };
        let gone = client.gone.clone();
        // Its pipes stay open until the command has been killed.
        let mut passing = std::pin::pin!(ends.pass(client, &over, answer));
        let answer = tokio::select! {
            answer = &mut passing => answer,
            () = resizes => return Outcome::Success,
            () = gone.cancelled() => {
                stop(&agent, number).await;
                return failed(&"the client has gone");
            }
        };
        match answer {
            Ok(response::Outcome::ExecEnded(ended)) if ended.exit_code == 0 => Outcome::Success,
            Ok(response::Outcome::ExecEnded(ended)) => Outcome::Exit(ended.exit_code),
            Ok(_) => failed(&"the agent gave an answer that does not fit an exec"),
            Err(error) => failed(&error),
        }
    }
}

/// Nobody waits for the command any more.
async fn stop(agent: &Agent, number: u64) {
    let call = request::Call::StopExec(messages::StopExec { exec_request: number });
    if let Err(error) = agent.order("stop a command", call, Slots::default()).await {
        tracing::debug!(%error, "a command whose client has gone goes on");
    }
}

/// Sets the terminal's size whenever the client's changes; `exec` is 0 for the container's own terminal.
pub(super) async fn follow_sizes(
    agent: &Agent,
    container: &str,
    exec: u64,
    mut sizes: tokio::sync::mpsc::Receiver<bytes::Bytes>,
) {
    let mut reader = SizeReader::default();
    // A command in a machine begins once its streams have arrived there. Until then an older agent knows no terminal of
    // it; this one keeps the size for it.
    let mut tries = 0;
    let mut wanted = None;
    loop {
        let bytes = match wanted.is_some() && tries < TERMINAL_TRIES {
            false => sizes.recv().await,
            true => tokio::select! {
                bytes = sizes.recv() => bytes,
                () = tokio::time::sleep(TERMINAL_PAUSE) => Some(bytes::Bytes::new()),
            },
        };
        let Some(bytes) = bytes else { return };
        match reader.push(&bytes) {
            Some(size) => (wanted, tries) = (Some(size), 0),
            None => tries += 1,
        }
        let Some(size) = wanted else { continue };
        let call = messages::ResizeTerminal {
            container_id: container.to_owned(),
            rows: size.height.into(),
            columns: size.width.into(),
            exec_request: exec,
        };
        let call = request::Call::ResizeTerminal(call);
        match agent.order("resize a terminal", call, Slots::default()).await {
            Err(SandboxError::Refused { code: messages::error::Code::FailedPrecondition, .. })
                if exec != 0 && tries < TERMINAL_TRIES => {}
            Ok(()) => wanted = None,
            Err(error) => {
                tracing::debug!(%error, container, "a terminal keeps its size");
                wanted = None;
            }
        }
    }
}

/// hulld's ends of the command's pipes.
struct Ends {
    stdin: Option<tokio::net::unix::pipe::Sender>,
    stdout: Option<tokio::net::unix::pipe::Receiver>,
    stderr: Option<tokio::net::unix::pipe::Receiver>,
}

impl Ends {
    fn make(client: &Client, exec: &mut messages::Exec, slots: &mut Slots) -> std::io::Result<Self> {
        let mut ends = Self { stdin: None, stdout: None, stderr: None };
        if client.stdin.is_some() {
            let (ours, theirs) = pipes::input()?;
            (ends.stdin, exec.stdin) = (Some(ours), Some(slots.input(theirs)));
        }
        if client.stdout.is_some() {
            let (ours, theirs) = pipes::output()?;
            (ends.stdout, exec.stdout) = (Some(ours), Some(slots.output(theirs)));
        }
        if client.stderr.is_some() {
            let (ours, theirs) = pipes::output()?;
            (ends.stderr, exec.stderr) = (Some(ours), Some(slots.output(theirs)));
        }
        Ok(ends)
    }

    /// Passes bytes both ways until `answer` is there and all output is passed on.
    async fn pass<T>(
        self,
        client: &mut Client,
        over: &CancellationToken,
        answer: impl Future<Output = T>,
    ) -> T {
        let input = client.stdin.take().zip(self.stdin);
        let gone = client.gone.clone();
        let input = async {
            let fed = match input {
                Some((from, to)) => Some(pipes::feed(from, to).await),
                None => None,
            };
            // A client that has gone has not said all. The command, which is about to be killed, must not take what came for
            // the whole.
            let _open = fed.filter(|_| gone.is_cancelled());
            std::future::pending::<()>().await;
        };
        let outputs = async {
            tokio::join!(
                show(self.stdout, client.stdout.as_ref(), over),
                show(self.stderr, client.stderr.as_ref(), over)
            );
        };
        let to_the_end = async { tokio::join!(answer, outputs).0 };
        let (to_the_end, input) = (std::pin::pin!(to_the_end), std::pin::pin!(input));
        match futures::future::select(to_the_end, input).await {
            futures::future::Either::Left((answer, _)) => answer,
            // The input never ends.
            futures::future::Either::Right((_, to_the_end)) => to_the_end.await,
        }
    }
}

async fn show(from: Option<tokio::net::unix::pipe::Receiver>, to: Option<&Output>, over: &CancellationToken) {
    if let Some((from, to)) = from.zip(to) {
        pipes::show(from, to, over).await;
    }
}
