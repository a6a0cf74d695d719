//! The client of one agent: numbered requests and their answers, and the stream of events.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_agent::protocol::FrameReader;
use hull_agent::protocol::messages::{self, message, request, response, slot};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::connection::Connection;
use super::error::SandboxError;

/// How long an agent may take to answer what is not a container's own doing.
pub const ANSWER_TIME: Duration = Duration::from_secs(30);
/// Longest message of an agent, in bytes: a state report of thousands of containers. Requests may be longer.
const ANSWER_SIZE: usize = 1 << 20;
/// Events that may wait; then the agent's socket is not read, and the agent waits.
const EVENTS: usize = 1024;

/// The events of one agent, in order. It ends when the connection does.
pub type Events = mpsc::Receiver<messages::Event>;

/// One end of a pipe that a process in the pod is to have.
#[derive(Debug)]
pub enum Pipe {
    /// The process reads from it.
    Input(OwnedFd),
    /// The process writes to it.
    Output(OwnedFd),
}

/// Carries pipes into a pod to which no descriptor can be passed.
pub trait Streams: fmt::Debug + Send + Sync {
    /// Begins to carry what passes through the pipe, to its end in both directions, and says how the agent finds the
    /// other end. Called inside the runtime.
    fn carry(&self, pipe: Pipe) -> slot::Kind;
}

/// A connection to an agent.
#[derive(Debug)]
pub struct Agent {
    shared: Arc<Shared>,
    tasks: [AbortHandle; 2],
    /// None: pipes are passed as descriptors.
    streams: Option<Arc<dyn Streams>>,
}

#[derive(Debug)]
struct Shared {
    connection: Connection,
    next_id: AtomicU64,
    pending: Mutex<Pending>,
}

/// Who waits for which answer; None once the connection has ended, with the reason.
#[derive(Debug)]
enum Pending {
    Open(HashMap<u64, oneshot::Sender<messages::Response>>),
    Ended(String),
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, reason: String) {
        let mut pending = self.pending();
        if matches!(*pending, Pending::Open(_)) {
            // The waiting senders are dropped here; their receivers learn it.
            *pending = Pending::Ended(reason);
        }
    }

    async fn read(&self, events: mpsc::Sender<messages::Event>) {
        let mut reader = FrameReader::with_limit(ANSWER_SIZE);
        let reason = loop {
            let frame = match self.connection.receive(&mut reader).await {
                Ok(Some(frame)) => frame,
                Ok(None) => break "it closed its connection".to_owned(),
                Err(error) => break error.to_string(),
            };
            match frame.message.body {
                Some(message::Body::Response(response)) => self.answer(frame.message.id, response),
                Some(message::Body::Event(event)) => {
                    // Without a listener events are of no interest to anybody.
                    let _ = events.send(event).await;
                }
                Some(message::Body::Request(_)) | None => {
                    tracing::debug!("an agent sent a message that is no answer and no event");
                }
            }
        };
        self.end(reason);
    }

    fn answer(&self, id: u64, response: messages::Response) {
        let waiting = match &mut *self.pending() {
            Pending::Open(waiting) => waiting.remove(&id),
            Pending::Ended(_) => None,
        };
        if let Some(waiting) = waiting {
            // Whoever asked may have given up.
            let _ = waiting.send(response);
        }
    }
}

impl Agent {
    /// Speaks to the agent at the other end of `socket`. Must be called inside the runtime.
    pub fn connect(socket: UnixStream) -> Result<(Self, Events), SandboxError> {
        Self::over(socket, None)
    }

    /// [`Self::connect`] to an agent that takes no descriptors: `streams` carries pipes to it.
    pub fn connect_apart(
        socket: UnixStream,
        streams: Arc<dyn Streams>,
    ) -> Result<(Self, Events), SandboxError> {
        Self::over(socket, Some(streams))
    }

    fn over(socket: UnixStream, streams: Option<Arc<dyn Streams>>) -> Result<(Self, Events), SandboxError> {
        let lost = |error: io::Error| SandboxError::Lost(error.to_string());
        let connection = Connection::new(socket).map_err(lost)?;
        let pending = Mutex::new(Pending::Open(HashMap::new()));
        let shared = Arc::new(Shared { connection, next_id: AtomicU64::new(1), pending });
        let (sender, events) = mpsc::channel(EVENTS);
        let reader = Arc::clone(&shared);
        let writer = Arc::clone(&shared);
        let tasks = [
            tokio::spawn(async move { reader.read(sender).await }).abort_handle(),
            tokio::spawn(async move {
                let error = writer.connection.write_rest().await;
                tracing::debug!(%error, "cannot write to an agent");
                writer.connection.shut_down();
            })
            .abort_handle(),
        ];
        Ok((Self { shared, tasks, streams }, events))
    }

    /// Asks and waits for the answer, however long it takes.
    pub async fn call(&self, call: request::Call, slots: Slots) -> Result<response::Outcome, SandboxError> {
        self.ask(call, slots)?.answer().await
    }

    /// Asks. The answer can be waited for while other calls refer to this one by its number.
    pub fn ask(&self, call: request::Call, slots: Slots) -> Result<Asked<'_>, SandboxError> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let (slots, fds) = slots.settle(self.streams.as_deref())?;
        let body = messages::Request { slots, call: Some(call) };
        let message = messages::Message { id, body: Some(message::Body::Request(body)) };
        let (sender, receiver) = oneshot::channel();
        match &mut *self.shared.pending() {
            Pending::Open(waiting) => waiting.insert(id, sender),
            Pending::Ended(reason) => return Err(SandboxError::Lost(reason.clone())),
        };
        let asked = Asked { agent: self, receiver, waiting: Waiting { shared: &self.shared, id } };
        match self.shared.connection.send(&message, fds) {
            Ok(()) => Ok(asked),
            // Nothing of it was sent: too long, too many descriptors, or the agent does not read.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(SandboxError::Encode(error.to_string()))
            }
            Err(error) => {
                self.shared.connection.shut_down();
                Err(SandboxError::Lost(error.to_string()))
            }
        }
    }

    /// [`Self::call`] with a time limit; `what` completes "the agent did not … in time".
    pub async fn call_within(
        &self,
        limit: Duration,
        what: &'static str,
        call: request::Call,
        slots: Slots,
    ) -> Result<response::Outcome, SandboxError> {
        match tokio::time::timeout(limit, self.call(call, slots)).await {
            Ok(result) => result,
            Err(_) => Err(SandboxError::Silent(what)),
        }
    }

    /// For calls that are answered with `done`.
    pub async fn order(
        &self,
        what: &'static str,
        call: request::Call,
        slots: Slots,
    ) -> Result<(), SandboxError> {
        match self.call_within(ANSWER_TIME, what, call, slots).await? {
            response::Outcome::Done(_) => Ok(()),
            _ => Err(SandboxError::Unexpected(what)),
        }
    }

    /// What the agent knows of its pod.
    pub async fn state(&self, limit: Duration) -> Result<messages::StateReport, SandboxError> {
        let call = request::Call::State(messages::State {});
        match self.call_within(limit, "tell its state", call, Slots::default()).await? {
            response::Outcome::State(report) => Ok(report),
            _ => Err(SandboxError::Unexpected("the question for its state")),
        }
    }

    fn reason(&self) -> String {
        match &*self.shared.pending() {
            Pending::Ended(reason) => reason.clone(),
            Pending::Open(_) => "the connection ended".to_owned(),
        }
    }

    /// True until the connection ends.
    pub fn is_connected(&self) -> bool {
        matches!(&*self.shared.pending(), Pending::Open(_))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// A question whose answer is still to come. Dropping it does not take the question back.
pub struct Asked<'a> {
    agent: &'a Agent,
    receiver: oneshot::Receiver<messages::Response>,
    waiting: Waiting<'a>,
}

impl Asked<'_> {
    /// The number of the request, by which others on the same connection refer to it.
    pub const fn id(&self) -> u64 {
        self.waiting.id
    }

    /// Waits for the answer, however long it takes.
    pub async fn answer(self) -> Result<response::Outcome, SandboxError> {
        let response = self.receiver.await.map_err(|_| SandboxError::Lost(self.agent.reason()))?;
        match response.outcome {
            Some(response::Outcome::Error(error)) => Err(error.into()),
            Some(outcome) => Ok(outcome),
            None => Err(SandboxError::Unexpected("the request")),
        }
    }
}

/// Forgets a request whose caller went away, so that the table does not grow.
struct Waiting<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Pending::Open(waiting) = &mut *self.shared.pending() {
            waiting.remove(&self.id);
        }
    }
}

/// What a request brings along from outside the pod, in the order of its slots.
#[derive(Debug, Default)]
pub struct Slots(Vec<Entry>);

#[derive(Debug)]
enum Entry {
    Descriptor(OwnedFd),
    Pipe(Pipe),
    Named(slot::Kind),
}

impl Slots {
    fn push(&mut self, entry: Entry) -> u32 {
        self.0.push(entry);
        self.0.len() as u32 - 1
    }

    /// Adds a descriptor and returns the number of its slot. Only an agent on this host can take it.
    pub fn descriptor(&mut self, fd: impl Into<OwnedFd>) -> u32 {
        self.push(Entry::Descriptor(fd.into()))
    }

    /// Adds the end of a pipe from which a process is to read, and returns the number of its slot.
    pub fn input(&mut self, fd: impl Into<OwnedFd>) -> u32 {
        self.push(Entry::Pipe(Pipe::Input(fd.into())))
    }

    /// Adds the end of a pipe to which a process is to write, and returns the number of its slot.
    pub fn output(&mut self, fd: impl Into<OwnedFd>) -> u32 {
        self.push(Entry::Pipe(Pipe::Output(fd.into())))
    }

    /// Adds something that the agent finds by its name, and returns the number of its slot.
    pub fn named(&mut self, kind: slot::Kind) -> u32 {
        self.push(Entry::Named(kind))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As they travel: descriptors are numbered, and pipes are descriptors unless somebody carries them.
    fn settle(
        self,
        streams: Option<&dyn Streams>,
    ) -> Result<(Vec<messages::Slot>, Vec<OwnedFd>), SandboxError> {
        let mut fds = Vec::new();
        let mut slots = Vec::with_capacity(self.0.len());
        for entry in self.0 {
            let kind = match (entry, streams) {
                (Entry::Named(kind), _) => kind,
                (Entry::Pipe(pipe), Some(streams)) => streams.carry(pipe),
                (Entry::Descriptor(_), Some(_)) => {
                    return Err(SandboxError::Encode("a machine takes no descriptors".into()));
                }
                (Entry::Descriptor(fd) | Entry::Pipe(Pipe::Input(fd) | Pipe::Output(fd)), None) => {
                    fds.push(fd);
                    slot::Kind::Descriptor(fds.len() as u32 - 1)
                }
            };
            slots.push(messages::Slot { kind: Some(kind) });
        }
        Ok((slots, fds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hull_agent::protocol::BlockingConnection;

    fn done(id: u64) -> messages::Message {
        let outcome = Some(response::Outcome::Done(messages::Empty {}));
        messages::Message { id, body: Some(message::Body::Response(messages::Response { outcome })) }
    }

    fn signal() -> request::Call {
        request::Call::Signal(messages::Signal { signal: 15, ..Default::default() })
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn answers_find_their_questions_whatever_their_order() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = std::thread::spawn(move || {
            let mut connection = BlockingConnection::new(theirs.into());
            let first = connection.recv().unwrap().unwrap();
            let second = connection.recv().unwrap().unwrap();
            assert_eq!((first.fds.len(), second.fds.len()), (1, 0));
            connection.send(&done(second.message.id), &[]).unwrap();
            connection.send(&done(first.message.id), &[]).unwrap();
        });
        let (client, mut events) = Agent::connect(ours).unwrap();
        let mut slots = Slots::default();
        slots.descriptor(std::fs::File::open("/dev/null").unwrap());
        let both = tokio::join!(
            client.order("take the first", signal(), slots),
            client.order("take the second", signal(), Slots::default())
        );
        both.0.unwrap();
        both.1.unwrap();
        agent.join().unwrap();
        assert!(events.recv().await.is_none(), "the events end with the connection");
        let late = client.order("take the third", signal(), Slots::default()).await;
        assert!(matches!(late, Err(SandboxError::Lost(_))), "{late:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_question_open_when_the_agent_dies_is_answered_lost() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (client, _events) = Agent::connect(ours).unwrap();
        let death = std::thread::spawn(move || {
            let mut connection = BlockingConnection::new(theirs.into());
            connection.recv().unwrap().unwrap();
        });
        let answer = client.order("do something", signal(), Slots::default()).await;
        assert!(matches!(answer, Err(SandboxError::Lost(_))), "{answer:?}");
        death.join().unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn more_descriptors_than_one_message_holds_all_arrive() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (client, _events) = Agent::connect(ours).unwrap();
        let agent = std::thread::spawn(move || {
            let mut connection = BlockingConnection::new(theirs.into());
            let frame = connection.recv().unwrap().unwrap();
            connection.send(&done(frame.message.id), &[]).unwrap();
            frame.fds.len()
        });
        let mut slots = Slots::default();
        let null = std::fs::File::open("/dev/null").unwrap();
        for _ in 0..600 {
            slots.descriptor(null.try_clone().unwrap());
        }
        client.order("take many", signal(), slots).await.unwrap();
        assert_eq!(agent.join().unwrap(), 600);
    }
}
