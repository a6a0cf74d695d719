//! The way into a machine: the socket whose connections become streams to the guest's agent.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_agent::protocol::messages::{Hello, hello, slot};
use prost::Message as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, copy_buf};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::Notify;

use crate::sandbox::{Connection, Pipe, Streams};

/// In the pod's directory.
const VSOCK: &str = "vsock.sock";
/// Likewise.
const CONTROL: &str = "vmm.sock";
/// What one read of a relay takes.
const CHUNK: usize = 64 << 10;
/// How often a stream looks whether anybody in hulld still has the other end of its pipe.
const LOOK: Duration = Duration::from_secs(2);
/// Streams of one pod that may wait for nothing but its guest.
const LINGERING: usize = 64;

/// The sockets of one pod's VMM.
#[derive(Clone, Debug)]
pub(super) struct Door {
    directory: PathBuf,
    lingering: Arc<Lingering>,
}

impl Door {
    /// Of the pod whose volatile directory this is.
    pub(super) fn of(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), lingering: Arc::default() }
    }

    /// The listeners that the VMM is born with: for streams, and for control connections.
    pub(super) fn listen(&self) -> io::Result<(UnixListener, UnixListener)> {
        let directory = fs::File::open(&self.directory)?;
        Ok((UnixListener::bind(short(&directory, VSOCK))?, UnixListener::bind(short(&directory, CONTROL))?))
    }

    /// A control connection to the VMM.
    pub(super) async fn vmm(&self) -> io::Result<StdUnixStream> {
        self.connect(CONTROL).await?.into_std()
    }

    /// A control connection to the agent.
    pub(super) async fn agent(&self) -> io::Result<StdUnixStream> {
        self.greet(hello::Kind::Control(hello::Control {})).await?.into_std()
    }

    /// The stream that slots name by this number.
    async fn stream(&self, number: u64) -> io::Result<UnixStream> {
        self.greet(hello::Kind::Stream(number)).await
    }

    async fn connect(&self, name: &str) -> io::Result<UnixStream> {
        let directory = fs::File::open(&self.directory)?;
        UnixStream::connect(short(&directory, name)).await
    }

    async fn greet(&self, kind: hello::Kind) -> io::Result<UnixStream> {
        let mut stream = self.connect(VSOCK).await?;
        let body = Hello { kind: Some(kind) }.encode_to_vec();
        let mut frame = (body.len() as u32).to_le_bytes().to_vec();
        frame.extend_from_slice(&body);
        stream.write_all(&frame).await?;
        Ok(stream)
    }

    /// A stream of its own with the number by which a slot names it.
    pub(super) async fn dial(&self) -> io::Result<(slot::Kind, Connection)> {
        let number = number();
        let (reader, writer) = self.stream(number).await?.into_split();
        Ok((slot::Kind::Stream(number), Connection { reader: Box::new(reader), writer: Box::new(writer) }))
    }
}

impl Streams for Door {
    fn carry(&self, pipe: Pipe) -> slot::Kind {
        let (number, door) = (number(), self.clone());
        tokio::spawn(async move {
            let carried = match pipe {
                Pipe::Input(fd) => door.carry_in(number, fd).await,
                Pipe::Output(fd) => door.carry_out(number, fd).await,
            };
            if let Err(error) = carried {
                tracing::debug!(%error, "a stream to a machine ended early");
            }
        });
        slot::Kind::Stream(number)
    }
}

impl Door {
    /// What comes out of the pipe goes to the process, its end too. That the process reads no more is noticed as on the
    /// host: by the next thing written.
    async fn carry_in(&self, number: u64, fd: OwnedFd) -> io::Result<()> {
        let stream = self.stream(number).await?;
        let pipe = pipe::Receiver::from_owned_fd(fd)?;
        let watched = pipe.as_fd().try_clone_to_owned()?;
        let (mut back, mut there) = stream.into_split();
        let carry = async {
            copy_buf(&mut BufReader::with_capacity(CHUNK, pipe), &mut there).await?;
            there.shutdown().await?;
            // Closed before the process has read all, the stream would be reset. Nothing ever comes back but the end.
            back.read(&mut [0]).await.map(drop)
        };
        // Once nobody writes any more the guest alone decides when it has read all, and may never.
        let left_to_the_guest = async {
            while !is_abandoned(&watched) {
                tokio::time::sleep(LOOK).await;
            }
            drop(watched);
            self.lingering.wait_until_displaced().await;
        };
        tokio::select! {
            carried = carry => carried,
            () = left_to_the_guest => Err(io::Error::other("the guest does not read what it was sent")),
        }
    }

    /// What the process writes goes into the pipe, to its end, or until nobody reads it any more.
    async fn carry_out(&self, number: u64, fd: OwnedFd) -> io::Result<()> {
        let stream = self.stream(number).await?;
        let mut pipe = pipe::Sender::from_owned_fd(fd)?;
        let watched = pipe.as_fd().try_clone_to_owned()?;
        let unread = async {
            while !is_abandoned(&watched) {
                tokio::time::sleep(LOOK).await;
            }
        };
        let mut stream = BufReader::with_capacity(CHUNK, stream);
        tokio::select! {
            carried = copy_buf(&mut stream, &mut pipe) => carried.map(drop),
            () = unread => Ok(()),
        }
    }
}

/// Whether nobody has the other end of a pipe any more.
fn is_abandoned(pipe: &OwnedFd) -> bool {
    let mut look = [PollFd::new(pipe, PollFlags::empty())];
    let told = poll(&mut look, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    told.is_ok_and(|count| count > 0) && look[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

/// Streams that only the guest can end: the most recent ones may wait for that, as each has descriptors of hulld.
#[derive(Debug, Default)]
struct Lingering(Mutex<VecDeque<Arc<Notify>>>);

impl Lingering {
    fn all(&self) -> MutexGuard<'_, VecDeque<Arc<Notify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when enough others have come later. Given up, it makes room.
    async fn wait_until_displaced(&self) {
        let displaced = Arc::new(Notify::new());
        {
            let mut all = self.all();
            if all.len() >= LINGERING
                && let Some(oldest) = all.pop_front()
            {
                oldest.notify_one();
            }
            all.push_back(Arc::clone(&displaced));
        }
        let _place = Place { lingering: self, displaced: &displaced };
        displaced.notified().await;
    }
}

/// One's place among those that linger, as long as this lives.
struct Place<'a> {
    lingering: &'a Lingering,
    displaced: &'a Arc<Notify>,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.lingering.all().retain(|one| !Arc::ptr_eq(one, self.displaced));
    }
}

/// Random, so that no other caller's stream can be meant.
fn number() -> u64 {
    rand::random_range(1..=u64::MAX)
}

/// Unix socket addresses hold 107 bytes; through the directory's descriptor any directory is short enough.
fn short(directory: &fs::File, name: &str) -> PathBuf {
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    /// Takes one connection and its greeting.
    fn accept(listener: &UnixListener) -> (StdUnixStream, Hello) {
        let (mut stream, _) = listener.accept().unwrap();
        let mut length = [0; 4];
        stream.read_exact(&mut length).unwrap();
        let mut body = vec![0; u32::from_le_bytes(length) as usize];
        stream.read_exact(&mut body).unwrap();
        (stream, Hello::decode(&body[..]).unwrap())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn output_is_carried_to_its_end_and_named_by_its_number() {
        let directory = tempfile::tempdir().unwrap();
        let door = Door::of(directory.path());
        let (listener, _control) = door.listen().unwrap();
        let (mut ours, theirs) = crate::streaming::pipes::output().unwrap();
        let slot::Kind::Stream(number) = door.carry(Pipe::Output(theirs)) else { panic!() };
        let guest = std::thread::spawn(move || {
            let (mut stream, hello) = accept(&listener);
            assert_eq!(hello.kind, Some(hello::Kind::Stream(number)));
            stream.write_all(&vec![b'x'; 300_000]).unwrap();
        });
        let mut text = Vec::new();
        ours.read_to_end(&mut text).await.unwrap();
        assert_eq!(text.len(), 300_000);
        guest.join().unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_end_of_input_is_passed_on_and_a_reader_that_left_ends_the_pipe() {
        let directory = tempfile::tempdir().unwrap();
        let door = Door::of(directory.path());
        let (listener, _control) = door.listen().unwrap();
        let (mut ours, theirs) = crate::streaming::pipes::input().unwrap();
        door.carry(Pipe::Input(theirs));
        ours.write_all(b"typed").await.unwrap();
        drop(ours);
        let listener = std::thread::spawn(move || {
            let (mut stream, _) = accept(&listener);
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert_eq!(text, "typed");
            listener
        })
        .join()
        .unwrap();
        let (mut ours, theirs) = crate::streaming::pipes::input().unwrap();
        door.carry(Pipe::Input(theirs));
        std::thread::spawn(move || drop(accept(&listener))).join().unwrap();
        let refused = async {
            while ours.write_all(b"nobody reads this").await.is_ok() {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(5), refused).await.unwrap();
    }

    /// A guest that takes streams, reads nothing, writes nothing and ends nothing.
    fn silent(listener: UnixListener) -> std::sync::mpsc::Receiver<StdUnixStream> {
        let (sender, streams) = std::sync::mpsc::channel();
        std::thread::spawn(move || while sender.send(accept(&listener).0).is_ok() {});
        streams
    }

    fn has_ended(stream: &StdUnixStream) -> bool {
        stream.set_nonblocking(true).unwrap();
        !matches!((&*stream).read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn output_that_a_guest_never_ends_is_given_up_with_its_reader() {
        let directory = tempfile::tempdir().unwrap();
        let door = Door::of(directory.path());
        let (listener, _control) = door.listen().unwrap();
        let streams = silent(listener);
        let (ours, theirs) = crate::streaming::pipes::output().unwrap();
        door.carry(Pipe::Output(theirs));
        let stream = tokio::task::spawn_blocking(move || streams.recv().unwrap()).await.unwrap();
        drop(ours);
        let ended = async {
            while !has_ended(&stream) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), ended).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn input_that_a_guest_never_reads_costs_a_bounded_number_of_descriptors() {
        let directory = tempfile::tempdir().unwrap();
        let door = Door::of(directory.path());
        let (listener, _control) = door.listen().unwrap();
        let streams = silent(listener);
        for _ in 0..LINGERING + 20 {
            let (ours, theirs) = crate::streaming::pipes::input().unwrap();
            door.carry(Pipe::Input(theirs));
            drop(ours);
        }
        let taken = move || (0..LINGERING + 20).map(|_| streams.recv().unwrap()).collect::<Vec<_>>();
        let taken = tokio::task::spawn_blocking(taken).await.unwrap();
        // The write side of each is shut down at once, so what tells is whether the other one is closed, too.
        let is_closed = |stream: &&StdUnixStream| (&**stream).write_all(&[0]).is_err();
        let enough = async {
            while taken.iter().filter(is_closed).count() < 20 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), enough).await.unwrap();
        assert!(door.lingering.all().len() <= LINGERING);
    }
}
