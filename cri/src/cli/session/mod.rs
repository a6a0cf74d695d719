//! A command's or a container's streams, here: input, output, the terminal, and how it ended.

mod detach;
mod terminal;

use std::io::{self, Read, Write};

use bytes::Bytes;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::error::{CliError, FAILED};
use crate::streaming::dial::{self, Place};
use crate::streaming::websocket::{ChannelWriter, Channels, Coding, Role};
use detach::DetachKeys;
use terminal::RawTerminal;

const PROTOCOL: &str = "v5.channel.k8s.io";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// Pieces of input that may wait.
const QUEUE: usize = 4;

/// Which streams are wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// Standard input goes there.
    pub(super) stdin: bool,
    /// There is a terminal at the other end.
    pub(super) tty: bool,
    /// The keys that leave it running are heeded.
    pub(super) detachable: bool,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// With this exit status.
    Exit(u8),
    /// It goes on; whoever sat here has left.
    Detached,
}

/// `-t` without a terminal here would be of no use.
pub(super) fn check_terminal(wanted: Wanted) -> Result<(), CliError> {
    if wanted.tty && wanted.stdin && !terminal::is_here() {
        return Err(CliError::Refused(
            "-t needs a terminal, and standard input is none\nLeave -t out, or run it where there is one."
                .into(),
        ));
    }
    Ok(())
}

/// Connects to `place` and passes everything on until the other side ends. `doing` completes the sentence "cannot …";
/// `connected` is done once there is somebody to see what comes of it.
pub(super) async fn attend(
    place: &Place,
    wanted: Wanted,
    doing: &str,
    connected: impl Future<Output = Result<(), CliError>>,
) -> Result<Ended, CliError> {
    let failed = |error: io::Error| CliError::local(doing.to_owned(), error);
    let stream = dial::websocket(place, PROTOCOL).await.map_err(failed)?;
    let coding = Coding { ends: true, numbered: true };
    let (channels, [mut stdout, mut stderr, mut status]) =
        Channels::start(stream, Role::Client, coding, [STDOUT, STDERR, STATUS]);
    connected.await?;
    // Given back whatever happens.
    let raw = match wanted.tty && wanted.stdin {
        true => Some(RawTerminal::begin().map_err(failed)?),
        false => None,
    };
    let mut changes = signal(SignalKind::window_change()).map_err(failed)?;
    let resize = channels.writer(RESIZE);
    if wanted.tty {
        // Before the first key: what is typed may ask for it.
        tell_size(&resize).await;
    }
    let sizes = async {
        if !wanted.tty {
            std::future::pending::<()>().await;
        }
        while changes.recv().await.is_some() {
            tell_size(&resize).await;
        }
        std::future::pending::<()>().await;
    };
    let input = async {
        match wanted.stdin && send_input(channels.writer(STDIN), wanted.detachable && wanted.tty).await {
            true => Ended::Detached,
            false => std::future::pending().await,
        }
    };
    let output = async {
        let (out, err) = tokio::join!(
            show(&mut stdout, || Box::new(io::stdout())),
            show(&mut stderr, || Box::new(io::stderr()))
        );
        out.and(err).map_err(|error| CliError::local("print", error))?;
        let mut text = Vec::new();
        while let Some(piece) = status.recv().await {
            text.extend_from_slice(&piece);
        }
        Ok::<_, CliError>(text)
    };
    let ended = tokio::select! {
        text = output => outcome(&text?, doing),
        ended = input => Ok(ended),
        () = sizes => Ok(Ended::Detached),
    };
    drop(raw);
    channels.close().await;
    ended
}

/// Prints what comes until there is no more.
async fn show(from: &mut mpsc::Receiver<Bytes>, to: impl Fn() -> Box<dyn Write>) -> io::Result<()> {
    while let Some(bytes) = from.recv().await {
        let mut to = to();
        to.write_all(&bytes)?;
        to.flush()?;
    }
    Ok(())
}

/// Sends standard input to its end. True if the keys to detach were typed.
async fn send_input(to: ChannelWriter, detachable: bool) -> bool {
    let (sender, mut input) = mpsc::channel::<Vec<u8>>(QUEUE);
    // A thread of its own: a read of a terminal cannot be taken back, and must not hold up the end of hull.
    std::thread::spawn(move || {
        let mut buffer = vec![0; 16 << 10];
        loop {
            match io::stdin().read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(length) if sender.blocking_send(buffer[..length].to_vec()).is_err() => return,
                Ok(_) => {}
            }
        }
    });
    let mut keys = DetachKeys::default();
    while let Some(bytes) = input.recv().await {
        let (bytes, detached) = if detachable { keys.pass(&bytes) } else { (bytes, false) };
        // The other side reads no more; how it ended is on its way.
        if !bytes.is_empty() && to.write(&bytes).await.is_err() {
            return false;
        }
        if detached {
            return true;
        }
    }
    let _ = to.finish().await;
    false
}

/// Tells the size of the terminal, if there is one.
async fn tell_size(to: &ChannelWriter) {
    if let Some((columns, rows)) = terminal::size() {
        let size = format!("{{\"Width\":{columns},\"Height\":{rows}}}");
        // The other side may have ended; that is told elsewhere.
        let _ = to.write(size.as_bytes()).await;
    }
}

/// What the Status on the last channel says.
fn outcome(text: &[u8], doing: &str) -> Result<Ended, CliError> {
    let broken = || {
        let error = io::Error::new(io::ErrorKind::ConnectionReset, "the connection to hulld broke off");
        CliError::local(doing.to_owned(), error)
    };
    let status: Value = serde_json::from_slice(text).map_err(|_| broken())?;
    if status["status"] == "Success" {
        return Ok(Ended::Exit(0));
    }
    let causes = status["details"]["causes"].as_array();
    let code = causes.into_iter().flatten().find(|cause| cause["reason"] == "ExitCode");
    match code.and_then(|cause| cause["message"].as_str()).map(str::parse::<i32>) {
        Some(Ok(code)) => Ok(Ended::Exit(u8::try_from(code).unwrap_or(FAILED))),
        _ => Err(CliError::Refused(match status["message"].as_str() {
            Some(message) => message.to_owned(),
            None => format!("cannot {doing}: hulld does not say why"),
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streaming::status::Outcome;

    #[test]
    fn an_exit_code_is_passed_on_and_a_failure_is_said() {
        let of = |outcome: Outcome| super::outcome(&outcome.to_json(), "do it");
        assert_eq!(of(Outcome::Success).unwrap(), Ended::Exit(0));
        assert_eq!(of(Outcome::Exit(7)).unwrap(), Ended::Exit(7));
        assert_eq!(of(Outcome::Failed("no".into())).unwrap_err().to_string(), "no");
        let lost = super::outcome(b"", "do it").unwrap_err().to_string();
        assert!(lost.contains("cannot do it") && lost.contains("broke off"), "{lost}");
    }
}
