//! A connection to systemd: over the system's bus, or straight to its own socket where there is no bus.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::wire::{Call, Writer, receive};

const SYSTEM_BUS: &str = "/run/dbus/system_bus_socket";
/// Where systemctl of root speaks to systemd without a bus.
const PRIVATE: &str = "/run/systemd/private";
/// How long systemd may take to answer; a daemon-reload takes seconds on a large machine.
const PATIENCE: Duration = Duration::from_secs(25);
/// Longest line of the greeting.
const MAX_LINE: usize = 4096;
/// Most messages of others (signals) that may come before an answer.
const MAX_OTHERS: usize = 10_000;

/// Why systemd did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// There is no way to it, or it broke.
    #[error("cannot speak to systemd: {0}")]
    Io(#[from] io::Error),
    /// It refused.
    #[error("systemd refused ({name}): {message}")]
    Refused {
        /// D-Bus name of the failure.
        name: String,
        /// Its sentence.
        message: String,
    },
}

impl BusError {
    /// Whether it failed with this D-Bus name.
    pub fn is(&self, wanted: &str) -> bool {
        matches!(self, Self::Refused { name, .. } if name == wanted)
    }
}

/// An open connection. Calls block.
#[derive(Debug)]
pub(super) struct Bus {
    stream: UnixStream,
    serial: u32,
    with_bus: bool,
}

impl Bus {
    pub(super) fn connect() -> Result<Self, BusError> {
        match Self::connect_to(SYSTEM_BUS, true) {
            Ok(bus) => Ok(bus),
            Err(first) => Self::connect_to(PRIVATE, false).map_err(|_| first),
        }
    }

    fn connect_to(path: &str, with_bus: bool) -> Result<Self, BusError> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut bus = Self { stream, serial: 0, with_bus };
        // The kernel tells the other side who we are; the number only has to agree.
        let uid = rustix::process::geteuid().as_raw().to_string();
        bus.stream.write_all(format!("\0AUTH EXTERNAL {}\r\n", hex::encode(uid)).as_bytes())?;
        let answer = bus.line()?;
        if !answer.starts_with("OK ") {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, answer).into());
        }
        bus.stream.write_all(b"BEGIN\r\n")?;
        if with_bus {
            let name = "org.freedesktop.DBus";
            let path = "/org/freedesktop/DBus";
            let body = Writer::default();
            bus.send(&Call {
                destination: name,
                path,
                interface: name,
                member: "Hello",
                signature: "",
                body,
            })?;
        }
        Ok(bus)
    }

    /// Byte by byte: what follows the line belongs to messages.
    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        let mut byte = [0];
        while !line.ends_with(b"\r\n") {
            if line.len() > MAX_LINE {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the greeting is too long"));
            }
            self.stream.read_exact(&mut byte)?;
            line.push(byte[0]);
        }
        line.truncate(line.len() - 2);
        Ok(String::from_utf8_lossy(&line).into_owned())
    }

    /// Calls systemd's manager; its answer's first string.
    pub(super) fn manager(
        &mut self,
        member: &str,
        signature: &str,
        body: Writer,
    ) -> Result<String, BusError> {
        self.send(&Call {
            destination: if self.with_bus { "org.freedesktop.systemd1" } else { "" },
            path: "/org/freedesktop/systemd1",
            interface: "org.freedesktop.systemd1.Manager",
            member,
            signature,
            body,
        })
    }

    fn send(&mut self, call: &Call<'_>) -> Result<String, BusError> {
        self.serial += 1;
        self.stream.write_all(&call.encode(self.serial))?;
        for _ in 0..MAX_OTHERS {
            let incoming = receive(&mut self.stream)?;
            match incoming.kind {
                2 if incoming.reply_to == self.serial => return Ok(incoming.text),
                3 if incoming.reply_to == self.serial => {
                    return Err(BusError::Refused { name: incoming.error, message: incoming.text });
                }
                _ => {}
            }
        }
        Err(io::Error::other("no answer among many messages").into())
    }
}
