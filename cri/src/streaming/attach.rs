//! The streams of a container's first process, while the agent goes on logging them.
//!
//! The agent writes each piece of output into the log and into the pipes of whoever is attached. A client that falls
//! further behind than its pipe holds is let go: neither the container nor its log ever waits for one.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use hull_agent::protocol::messages::{self, request};
use tokio::net::unix::pipe;
use tokio_util::sync::CancellationToken;

use super::command::{Client, Wanted};
use super::exec::follow_sizes;
use super::pipes;
use super::status::Outcome;
use crate::runtime::objects::Container;
use crate::sandbox::Slots;

/// How far a client may fall behind the container, in bytes; /proc/sys/fs/pipe-max-size does not bind root.
const BACKLOG: usize = 1 << 20;
/// How long after the last output the end of the container may become known.
const AFTERMATH: Duration = Duration::from_secs(1);

/// An attach that was asked for.
#[derive(Debug)]
pub struct AttachSession {
    /// To which container.
    pub container: Arc<Container>,
    /// With which streams.
    pub wanted: Wanted,
}

impl AttachSession {
    /// Passes bytes both ways until the container ends or the client goes away.
    pub(super) async fn serve(self, mut client: Client) {
        let gone = client.gone.clone();
        let outcome = tokio::select! {
            outcome = self.run(&mut client) => outcome,
            () = gone.cancelled() => Outcome::Success,
        };
        client.end(&outcome).await;
    }

    async fn run(self, client: &mut Client) -> Outcome {
        let id = self.container.id();
        let failed = |reason: &dyn std::fmt::Display| {
            Outcome::Failed(format!("cannot attach to the container {id}: {reason}"))
        };
        let agent = match self.container.pod.ready_agent() {
            Ok(agent) => agent,
            Err(error) => return failed(&error),
        };
        let mut slots = Slots::default();
        let mut call = messages::Attach { container_id: id.to_owned(), ..Default::default() };
        let ends = match Ends::make(client, &mut call, &mut slots) {
            Ok(ends) => ends,
            Err(error) => return failed(&error),
        };
        let attached = match self.container.attach_at_start(call, slots) {
            Ok(started) => match started.await {
                Ok(attached) => attached,
                Err(_) => return failed(&"it was not started"),
            },
            Err((call, slots)) => agent.order("attach", request::Call::Attach(call), slots).await,
        };
        if let Err(error) = attached {
            return failed(&error);
        }
        let resizes = client.resizes.take().filter(|_| self.wanted.tty);
        let resizes = async {
            if let Some(resizes) = resizes {
                follow_sizes(&agent, id, 0, resizes).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = resizes => Outcome::Success,
            () = ends.pass(client, &self.container) => {
                match tokio::time::timeout(AFTERMATH, self.container.wait_over()).await {
                    Ok(()) => Outcome::Success,
                    Err(_) => failed(&format!(
                        "its output ended before it did: it closed it, or the client fell more than {} KiB behind",
                        BACKLOG >> 10
                    )),
                }
            }
        }
    }
}

/// hulld's ends of the pipes to the agent.
struct Ends {
    stdin: Option<pipe::Sender>,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
}

impl Ends {
    fn make(client: &Client, call: &mut messages::Attach, slots: &mut Slots) -> std::io::Result<Self> {
        let mut ends = Self { stdin: None, stdout: None, stderr: None };
        if client.stdin.is_some() {
            let (ours, theirs) = pipes::input()?;
            (ends.stdin, call.stdin) = (Some(ours), Some(slots.input(theirs)));
        }
        let output = |slots: &mut Slots| {
            let (ours, theirs) = pipes::output()?;
            // The kernel may have less to give; then less is kept.
            let _ = rustix::pipe::fcntl_setpipe_size(ours.as_fd(), BACKLOG);
            std::io::Result::Ok((ours, slots.output(theirs)))
        };
        if client.stdout.is_some() {
            let (ours, theirs) = output(slots)?;
            (ends.stdout, call.stdout) = (Some(ours), Some(theirs));
        }
        if client.stderr.is_some() {
            let (ours, theirs) = output(slots)?;
            (ends.stderr, call.stderr) = (Some(ours), Some(theirs));
        }
        Ok(ends)
    }

    /// Until there is no more output; without output, until the container ends.
    async fn pass(self, client: &mut Client, container: &Container) {
        let input = client.stdin.take().zip(self.stdin);
        let input = async {
            if let Some((from, to)) = input {
                pipes::feed(from, to).await;
            }
            std::future::pending::<()>().await;
        };
        let over = CancellationToken::new();
        let ended = async {
            container.wait_over().await;
            over.cancel();
        };
        let outputs = [(self.stdout, &client.stdout), (self.stderr, &client.stderr)];
        let [stdout, stderr] = outputs.map(|(from, to)| from.zip(to.as_ref()));
        let no_output = stdout.is_none() && stderr.is_none();
        let show = async |output: Option<(pipe::Receiver, &super::command::Output)>| {
            if let Some((from, to)) = output {
                pipes::show(from, to, &over).await;
            }
        };
        let outputs = async {
            tokio::join!(show(stdout), show(stderr));
            if no_output {
                over.cancelled().await;
            }
        };
        let both = async {
            tokio::pin!(ended, outputs);
            // The container's end alone does not end the output.
            tokio::select! {
                () = &mut ended => outputs.await,
                () = &mut outputs => {}
            }
        };
        tokio::select! {
            () = input => {}
            () = both => {}
        }
    }
}
