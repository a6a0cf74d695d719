//! The client of one VMM: numbered requests with descriptors, their answers, and its events.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_vmm::protocol::FrameReader;
use hull_vmm::protocol::messages::{Message, error::Code, event, message::Body, request, response};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::super::connection::Connection;
use crate::sandbox::SandboxError;

/// How long a VMM may take to answer: nothing it does for a request waits for the guest.
const ANSWER_TIME: Duration = Duration::from_secs(30);
/// Longest message of a VMM, in bytes: a status with its extents.
const ANSWER_SIZE: usize = 1 << 20;
/// Events that may wait.
const EVENTS: usize = 64;

/// What a VMM tells by itself, in order. It ends when the connection does.
pub(super) type VmmEvents = mpsc::Receiver<event::Kind>;

/// A control connection.
#[derive(Debug)]
pub(super) struct Control {
    shared: Arc<Shared>,
    tasks: [AbortHandle; 2],
}

#[derive(Debug)]
struct Shared {
    connection: Connection,
    next_id: AtomicU64,
    /// Who waits for which answer; None once the connection has ended.
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<response::Outcome>>>>,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<response::Outcome>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read(&self, events: mpsc::Sender<event::Kind>) {
        let mut reader = FrameReader::with_limit(ANSWER_SIZE);
        while let Ok(Some(frame)) = self.connection.receive(&mut reader).await {
            match frame.message.body {
                Some(Body::Response(response)) => {
                    let asker = self.waiting().as_mut().and_then(|waiting| waiting.remove(&frame.message.id));
                    if let Some((asker, outcome)) = asker.zip(response.outcome) {
                        // Whoever asked may have given up.
                        let _ = asker.send(outcome);
                    }
                }
                // Nobody may listen; a full queue means that nobody does.
                Some(Body::Event(event)) => {
                    event.kind.into_iter().for_each(|kind| drop(events.try_send(kind)))
                }
                Some(Body::Request(_)) | None => {}
            }
        }
        *self.waiting() = None;
    }
}

impl Control {
    /// Speaks to the VMM at the other end of `socket`. Must be called inside the runtime.
    pub(super) fn connect(socket: UnixStream) -> Result<(Self, VmmEvents), SandboxError> {
        let connection = Connection::new(socket).map_err(SandboxError::machine("speak to"))?;
        let shared = Arc::new(Shared {
            connection,
            next_id: AtomicU64::new(1),
            waiting: Mutex::new(Some(HashMap::new())),
        });
        let (sender, events) = mpsc::channel(EVENTS);
        let (reader, writer) = (Arc::clone(&shared), Arc::clone(&shared));
        let tasks = [
            tokio::spawn(async move { reader.read(sender).await }).abort_handle(),
            tokio::spawn(async move {
                let error = writer.connection.write_rest().await;
                tracing::debug!(%error, "cannot write to a VMM");
                writer.connection.shut_down();
            })
            .abort_handle(),
        ];
        Ok((Self { shared, tasks }, events))
    }

    /// Asks and waits for the answer; `action` completes "cannot … the pod's machine".
    pub(super) async fn call(
        &self,
        action: &'static str,
        call: request::Call,
        fds: Vec<OwnedFd>,
    ) -> Result<response::Outcome, SandboxError> {
        match self.ask(action, call, fds).await? {
            response::Outcome::Error(error) => Err(SandboxError::Machine { action, reason: error.message }),
            outcome => Ok(outcome),
        }
    }

    async fn ask(
        &self,
        action: &'static str,
        call: request::Call,
        fds: Vec<OwnedFd>,
    ) -> Result<response::Outcome, SandboxError> {
        let failed = |reason: &str| SandboxError::Machine { action, reason: reason.to_owned() };
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let message = Message::request(id, call, fds.len());
        let (sender, answer) = oneshot::channel();
        match self.shared.waiting().as_mut() {
            Some(waiting) => waiting.insert(id, sender),
            None => return Err(SandboxError::Lost("its VMM closed the connection".into())),
        };
        if let Err(error) = self.shared.connection.send(&message, fds) {
            self.shared.waiting().as_mut().map(|waiting| waiting.remove(&id));
            return Err(failed(&error.to_string()));
        }
        match tokio::time::timeout(ANSWER_TIME, answer).await {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(_)) => Err(SandboxError::Lost("its VMM closed the connection".into())),
            Err(_) => {
                self.shared.waiting().as_mut().map(|waiting| waiting.remove(&id));
                Err(failed("its VMM does not answer"))
            }
        }
    }

    /// For calls that are answered with `done`.
    pub(super) async fn order(
        &self,
        action: &'static str,
        call: request::Call,
        fds: Vec<OwnedFd>,
    ) -> Result<(), SandboxError> {
        done(action, self.call(action, call, fds).await?)
    }

    /// [`Self::order`] to a VMM that may be of an earlier hull, which does without.
    pub(super) async fn order_if_known(
        &self,
        action: &'static str,
        call: request::Call,
    ) -> Result<(), SandboxError> {
        match self.ask(action, call, Vec::new()).await? {
            response::Outcome::Error(error) if error.code() == Code::UnknownCall => Ok(()),
            response::Outcome::Error(error) => Err(SandboxError::Machine { action, reason: error.message }),
            outcome => done(action, outcome),
        }
    }
}

fn done(action: &'static str, outcome: response::Outcome) -> Result<(), SandboxError> {
    match outcome {
        response::Outcome::Done(_) => Ok(()),
        _ => Err(SandboxError::Machine { action, reason: "its VMM gave an unexpected answer".into() }),
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hull_vmm::protocol::BlockingConnection;
    use hull_vmm::protocol::messages;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_request_takes_its_descriptors_along_and_an_error_is_the_vmms_sentence() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let vmm = std::thread::spawn(move || {
            let mut connection = BlockingConnection::new(theirs.into());
            let frame = connection.recv().unwrap().unwrap();
            assert_eq!(frame.fds.len(), 1);
            let panicked = messages::Panicked { message: "oops".into() };
            connection.send(&Message::event(event::Kind::Panicked(panicked)), &[]).unwrap();
            let done = response::Outcome::Done(messages::Empty {});
            connection.send(&Message::response(frame.message.id, done), &[]).unwrap();
            let frame = connection.recv().unwrap().unwrap();
            let error = messages::Error { message: "no such slot".into(), ..Default::default() };
            let answer = Message::response(frame.message.id, response::Outcome::Error(error.clone()));
            connection.send(&answer, &[]).unwrap();
            // An older one that does not know a call, and a newer one that fails at it.
            let unknown = messages::Error { code: Code::UnknownCall.into(), ..Default::default() };
            for error in [unknown, error] {
                let frame = connection.recv().unwrap().unwrap();
                let answer = Message::response(frame.message.id, response::Outcome::Error(error));
                connection.send(&answer, &[]).unwrap();
            }
        });
        let (control, mut events) = Control::connect(ours).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let call = messages::SetLog { container_id: "c".into(), file: 0 };
        control.order("log", request::Call::SetLog(call), vec![file.into()]).await.unwrap();
        let clear = request::Call::ClearSlot(messages::ClearSlot { slot: 9 });
        let error = control.order("change", clear.clone(), Vec::new()).await.unwrap_err();
        assert_eq!(error.to_string(), "cannot change the pod's machine: no such slot");
        control.order_if_known("change", clear.clone()).await.unwrap();
        assert!(control.order_if_known("change", clear.clone()).await.is_err());
        vmm.join().unwrap();
        assert!(matches!(events.recv().await, Some(event::Kind::Panicked(_))));
        assert!(events.recv().await.is_none(), "the events end with the VMM");
        assert!(matches!(control.order("change", clear, Vec::new()).await, Err(SandboxError::Lost(_))));
    }
}
