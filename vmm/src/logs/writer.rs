use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use hull_agent::stdio::{Buffers, LogFile, OutputStream, Progress};
use vmm_sys_util::epoll::EventSet;

use super::greeting::{Greeting, Origin, Progress as Greeted};
use super::{MOST_CONNECTIONS, Shared};
use crate::devices::virtio::{Handler, Registrar};

const WAKE: u32 = 0;

/// The connections, on the worker's thread.
pub(super) struct Writer {
    shared: Arc<Shared>,
    connections: BTreeMap<u32, Connection>,
    next: u32,
}

enum Connection {
    /// It has not said yet whose it is.
    Greeting(Greeting),
    /// Its container has no file yet: not read.
    Waiting(OwnedFd, Origin),
    Logging(OutputStream, Origin),
}

struct Raw(RawFd);

impl AsRawFd for Raw {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl Connection {
    fn descriptor(&self) -> Raw {
        match self {
            Self::Greeting(greeting) => Raw(greeting.socket().as_raw_fd()),
            Self::Waiting(socket, _) => Raw(socket.as_raw_fd()),
            Self::Logging(output, _) => Raw(output.as_fd().as_raw_fd()),
        }
    }

    fn origin(&self) -> Option<&Origin> {
        match self {
            Self::Greeting(_) => None,
            Self::Waiting(_, origin) | Self::Logging(_, origin) => Some(origin),
        }
    }
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, connections: BTreeMap::new(), next: WAKE }
    }

    /// New connections, and files for those that wait.
    fn woken(&mut self, registrar: &mut Registrar<'_>) {
        let arrivals = std::mem::take(&mut *self.shared.arrivals());
        for socket in arrivals {
            let fits = self.connections.len() < MOST_CONNECTIONS;
            // What cannot be served is closed, which the guest sees.
            if fits && rustix::io::ioctl_fionbio(&socket, true).is_ok() {
                let id = self.free_id();
                self.keep(id, Connection::Greeting(Greeting::new(socket)), registrar);
            }
        }
        let waiting: Vec<u32> = self
            .connections
            .iter()
            .filter(|(_, connection)| matches!(connection, Connection::Waiting(..)))
            .map(|(id, _)| *id)
            .collect();
        for id in waiting {
            if let Some(Connection::Waiting(socket, origin)) = self.connections.remove(&id) {
                self.begin(id, socket, origin, registrar);
            }
        }
    }

    /// Puts a connection (back) to the others, under watch if it is to be read; one that cannot be is closed.
    fn keep(&mut self, id: u32, connection: Connection, registrar: &mut Registrar<'_>) {
        let descriptor = connection.descriptor();
        let watched = match connection {
            Connection::Waiting(..) => {
                registrar.remove(&descriptor);
                Ok(())
            }
            _ => registrar.watch(&descriptor, id, EventSet::IN),
        };
        match watched {
            Ok(()) => drop(self.connections.insert(id, connection)),
            Err(_) => self.close(connection, registrar),
        }
    }

    fn close(&mut self, connection: Connection, registrar: &mut Registrar<'_>) {
        registrar.remove(&connection.descriptor());
        if let Some(origin) = connection.origin() {
            self.release(origin);
        }
        // Dropped here, with all of it in the file and said so: the guest sees the end.
    }

    fn read(&mut self, id: u32, registrar: &mut Registrar<'_>) {
        match self.connections.remove(&id) {
            None => {}
            Some(Connection::Greeting(greeting)) => self.greet(id, greeting, registrar),
            Some(Connection::Logging(output, origin)) => self.log(id, output, origin, registrar),
            Some(waiting @ Connection::Waiting(..)) => self.keep(id, waiting, registrar),
        }
    }

    fn greet(&mut self, id: u32, greeting: Greeting, registrar: &mut Registrar<'_>) {
        let descriptor = Raw(greeting.socket().as_raw_fd());
        match greeting.read() {
            Greeted::Incomplete(greeting) => self.keep(id, Connection::Greeting(greeting), registrar),
            Greeted::Complete(socket, origin) => {
                if self.claim(&origin) {
                    self.begin(id, socket, origin, registrar);
                } else {
                    registrar.remove(&descriptor);
                }
            }
            // It is closed by now, and a closed descriptor is in no epoll; only the worker's list has it.
            Greeted::Refused => registrar.remove(&descriptor),
        }
    }

    /// A container has one connection for each output.
    fn claim(&self, origin: &Origin) -> bool {
        let mut logs = self.shared.logs();
        // The names are the guest's; there are as many as it has connections at most.
        let log = logs.entry(origin.container.clone()).or_default();
        log.open.get_mut(origin.place()).is_some_and(|open| !std::mem::replace(open, true))
    }

    fn release(&self, origin: &Origin) {
        let mut logs = self.shared.logs();
        let Some(log) = logs.get_mut(&origin.container) else { return };
        if let Some(open) = log.open.get_mut(origin.place()) {
            *open = false;
        }
        if !log.is_set && !log.open.contains(&true) {
            logs.remove(&origin.container);
        }
    }

    /// Logs if there is a file for it, and otherwise waits.
    fn begin(&mut self, id: u32, socket: OwnedFd, origin: Origin, registrar: &mut Registrar<'_>) {
        let is_set = self.shared.logs().get(&origin.container).is_none_or(|log| log.is_set);
        if !is_set {
            return self.keep(id, Connection::Waiting(socket, origin), registrar);
        }
        let descriptor = Raw(socket.as_raw_fd());
        match OutputStream::new(socket, origin.stream) {
            Ok(output) => self.keep(id, Connection::Logging(output, origin), registrar),
            Err(_) => {
                registrar.remove(&descriptor);
                self.release(&origin);
            }
        }
    }

    /// One chunk, so that all have their turn.
    fn log(&mut self, id: u32, mut output: OutputStream, origin: Origin, registrar: &mut Registrar<'_>) {
        // Given back at once: an idle machine holds no buffers.
        let mut buffers = Buffers::default();
        let progress = match self.shared.logs().get_mut(&origin.container) {
            Some(log) => output.pump(&mut log.file, &mut buffers),
            None => output.pump(&mut LogFile::default(), &mut buffers),
        };
        let connection = Connection::Logging(output, origin);
        match progress {
            Progress::Open => self.keep(id, connection, registrar),
            Progress::Ended => self.close(connection, registrar),
        }
    }

    fn free_id(&mut self) -> u32 {
        loop {
            self.next = self.next.wrapping_add(1);
            if self.next != WAKE && !self.connections.contains_key(&self.next) {
                return self.next;
            }
        }
    }
}

impl Handler for Writer {
    fn start(&mut self, registrar: &mut Registrar<'_>) -> io::Result<()> {
        registrar.watch(&Raw(self.shared.wake.as_raw_fd()), WAKE, EventSet::IN)?;
        for (id, connection) in &self.connections {
            if !matches!(connection, Connection::Waiting(..)) {
                registrar.watch(&connection.descriptor(), *id, EventSet::IN)?;
            }
        }
        self.woken(registrar);
        Ok(())
    }

    fn ready(&mut self, token: u32, _: EventSet, registrar: &mut Registrar<'_>) {
        if token == WAKE {
            let _ = self.shared.wake.read();
            self.woken(registrar);
        } else {
            self.read(token, registrar);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use hull_agent::protocol::messages::LogHello;
    use prost::Message;

    use super::super::{LogState, Logs, LogsHandle};
    use crate::devices::virtio::Worker;
    use crate::devices::virtio::vsock::Service;

    fn logs() -> (Logs, LogsHandle) {
        let logs = Logs::start(&Worker::start("logs", || Ok(())).unwrap()).unwrap();
        let handle = logs.handle();
        (logs, handle)
    }

    /// A connection of the guest's, as the vsock device hands it over.
    fn connect(handle: &LogsHandle, container: &str, stream: u32) -> UnixStream {
        let (mut guest, ours) = UnixStream::pair().unwrap();
        handle.accept(ours.into());
        let body = LogHello { container_id: container.into(), stream }.encode_to_vec();
        guest.write_all(&(body.len() as u32).to_le_bytes()).unwrap();
        guest.write_all(&body).unwrap();
        guest.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        guest.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        guest
    }

    /// Ends the output and waits for the word that all of it is in the file.
    fn end(mut guest: UnixStream) {
        guest.shutdown(Shutdown::Write).unwrap();
        assert_eq!(guest.read(&mut [0]).unwrap(), 0);
    }

    fn file() -> (File, std::os::fd::OwnedFd) {
        let file = tempfile::tempfile().unwrap();
        let own = file.try_clone().unwrap();
        (file, own.into())
    }

    fn lines(file: &mut File) -> Vec<String> {
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text.lines().map(|line| line[31..].to_owned()).collect()
    }

    fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < Duration::from_secs(10), "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn when_the_connection_ends_everything_is_in_the_file() {
        let (_logs, handle) = logs();
        let (mut file, own) = file();
        handle.set("c1", Some(own));
        let (mut out, mut err) = (connect(&handle, "c1", 0), connect(&handle, "c1", 1));
        for number in 0..500 {
            writeln!(out, "out {number}").unwrap();
            writeln!(err, "err {number}").unwrap();
        }
        out.write_all(b"no newline").unwrap();
        end(out);
        let seen = lines(&mut file);
        let of_out: Vec<_> = seen.iter().filter(|line| line.starts_with("stdout")).collect();
        assert_eq!(of_out.len(), 501);
        assert_eq!((of_out[499].as_str(), of_out[500].as_str()), ("stdout F out 499", "stdout P no newline"));
        end(err);
        assert_eq!(lines(&mut file).iter().filter(|line| line.starts_with("stderr F err")).count(), 500);
        assert_eq!(handle.state("c1"), Some(LogState { is_set: true, open: 0, dropped: 0 }));
    }

    #[test]
    fn until_there_is_a_file_the_writer_is_held_up_and_nothing_is_lost() {
        let (_logs, handle) = logs();
        let mut guest = connect(&handle, "c1", 0);
        guest.set_nonblocking(true).unwrap();
        wait_until("the connection is known", || handle.state("c1").is_some_and(|state| state.open == 1));
        let mut count = 0;
        while guest.write_all(&[b'x'; 1000]).is_ok() {
            count += 1;
            assert!(count < 10_000, "it is read without a file");
        }
        let (mut file, own) = file();
        handle.set("c1", Some(own));
        guest.set_nonblocking(false).unwrap();
        end(guest);
        let length: usize = lines(&mut file).iter().map(|line| line.len() - "stdout P ".len()).sum();
        assert!(length >= count * 1000, "{length} {count}");
    }

    #[test]
    fn rotation_loses_no_line_and_tears_none() {
        let (_logs, handle) = logs();
        let (mut old, own_old) = file();
        handle.set("c1", Some(own_old));
        let mut guest = connect(&handle, "c1", 0);
        guest.write_all(b"one\ntwo beg").unwrap();
        wait_until("the first line is there", || lines(&mut old) == ["stdout F one"]);
        let (mut new, own_new) = file();
        handle.set("c1", Some(own_new));
        guest.write_all(b"un\nthree\n").unwrap();
        end(guest);
        assert_eq!(lines(&mut old), ["stdout F one"]);
        assert_eq!(lines(&mut new), ["stdout F two begun", "stdout F three"]);
    }

    #[test]
    fn without_a_log_or_with_a_full_disk_the_container_goes_on() {
        let (_logs, handle) = logs();
        handle.set("none", None);
        let full = std::fs::OpenOptions::new().append(true).open("/dev/full").unwrap();
        handle.set("full", Some(full.into()));
        for container in ["none", "full"] {
            let mut guest = connect(&handle, container, 0);
            for _ in 0..100 {
                guest.write_all(&[b'x'; 9999]).unwrap();
                guest.write_all(b"\n").unwrap();
            }
            end(guest);
        }
        assert_eq!(handle.state("none").unwrap().dropped, 0);
        assert!(handle.dropped() > 1_000_000);
    }

    #[test]
    fn a_removed_container_holds_nobody_up() {
        let (_logs, handle) = logs();
        let (mut file, own) = file();
        handle.set("c1", Some(own));
        let mut guest = connect(&handle, "c1", 0);
        guest.write_all(b"seen\n").unwrap();
        wait_until("the line is there", || lines(&mut file) == ["stdout F seen"]);
        assert_eq!(handle.list(), ["c1"]);
        handle.remove("c1");
        assert!(handle.list().is_empty());
        guest.write_all(&vec![b'x'; 1 << 20]).unwrap();
        end(guest);
        assert_eq!((lines(&mut file).len(), handle.state("c1")), (1, None));
        // The same container may run again.
        handle.set("c1", Some(file.try_clone().unwrap().into()));
        end(connect(&handle, "c1", 0));
    }

    #[test]
    fn a_second_connection_for_the_same_output_is_closed() {
        let (_logs, handle) = logs();
        handle.set("c1", None);
        let first = connect(&handle, "c1", 0);
        wait_until("the first is known", || handle.state("c1").is_some_and(|state| state.open == 1));
        let mut second = connect(&handle, "c1", 0);
        assert!(matches!(second.read(&mut [0]), Ok(0) | Err(_)));
        end(first);
        end(connect(&handle, "c1", 0));
    }

    #[test]
    fn a_connection_that_greets_wrongly_is_closed_and_there_is_a_bound() {
        let (_logs, handle) = logs();
        let (mut guest, ours) = UnixStream::pair().unwrap();
        handle.accept(ours.into());
        guest.write_all(&[0xff; 64]).unwrap();
        assert!(matches!(guest.read(&mut [0]), Ok(0) | Err(_)));
        let mut all = Vec::new();
        for number in 0..super::MOST_CONNECTIONS + 1 {
            let (guest, ours) = UnixStream::pair().unwrap();
            handle.accept(ours.into());
            if number + 1 == super::MOST_CONNECTIONS {
                // All of these are in before the last one comes.
                wait_until("all are taken", || handle.shared.arrivals().is_empty());
                std::thread::sleep(Duration::from_millis(50));
            }
            all.push(guest);
        }
        let mut last = all.pop().unwrap();
        last.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(last.read(&mut [0]).unwrap(), 0);
    }
}
