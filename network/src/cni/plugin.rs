//! One run of a plugin executable.

use std::ffi::OsString;
use std::io;
#[cfg(test)]
use std::path::Path;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

/// Plugins answer in milliseconds; those that ask a server may wait for it.
const DEADLINE: Duration = Duration::from_secs(60);
/// STATUS is asked for a health check that must itself answer soon.
const STATUS_DEADLINE: Duration = Duration::from_secs(5);
/// How long a plugin that somebody is still writing may stay so: an upgrade of the plugins, seen midway.
const BUSY_DEADLINE: Duration = Duration::from_secs(3);
/// Longest result, in bytes; more ends the plugin.
const LONGEST_OUTPUT: usize = 1 << 20;
/// What of standard error is kept for the error; the rest is read and dropped.
const LONGEST_COMPLAINT: usize = 4 << 10;

/// Why a plugin's run failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum PluginError {
    #[error("{0}")]
    Missing(String),
    #[error("starting {path}: {source}")]
    Start { path: PathBuf, source: io::Error },
    #[error("talking to it: {0}")]
    Io(io::Error),
    #[error("it did not end within {} s and was killed", .0.as_secs())]
    Deadline(Duration),
    #[error("it printed more than {LONGEST_OUTPUT} bytes and was killed")]
    TooLong,
    /// The plugin's own error (SPEC.md, "Error").
    #[error("error {code}: {message}{}", if .details.is_empty() { String::new() } else { format!(" ({details})") })]
    Reported { code: u64, message: String, details: String },
    #[error("it ended with {status} and no error of its own: {complaint}")]
    Failed { status: std::process::ExitStatus, complaint: String },
}

/// What a plugin prints when it fails.
#[derive(Deserialize)]
struct Report {
    code: u64,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

/// A plugin run that is to be.
#[derive(Debug)]
pub(super) struct Invocation<'a> {
    bin_dirs: &'a [PathBuf],
    kind: &'a str,
    config: &'a Map<String, Value>,
    environment: Vec<(&'static str, OsString)>,
    deadline: Duration,
}

impl<'a> Invocation<'a> {
    pub(super) fn for_network(
        command: &'static str,
        bin_dirs: &'a [PathBuf],
        kind: &'a str,
        config: &'a Map<String, Value>,
    ) -> Self {
        let path = std::env::join_paths(bin_dirs).unwrap_or_default();
        let environment = vec![("CNI_COMMAND", command.into()), ("CNI_PATH", path)];
        let deadline = if command == "STATUS" { STATUS_DEADLINE } else { DEADLINE };
        Self { bin_dirs, kind, config, environment, deadline }
    }

    pub(super) fn environment(&mut self, name: &'static str, value: impl AsRef<std::ffi::OsStr>) {
        self.environment.push((name, value.as_ref().to_owned()));
    }

    /// Runs the plugin and returns what it printed. It has a process group of its own, which ends with this future.
    pub(super) async fn run(self) -> Result<Vec<u8>, PluginError> {
        let path = find(self.bin_dirs, self.kind).map_err(PluginError::Missing)?;
        let config = serde_json::to_vec(self.config).map_err(|error| PluginError::Io(error.into()))?;
        // Plugins find iptables and others by the daemon's own PATH, as with every other runtime.
        let mut command = Command::new(&path);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true).current_dir("/");
        let mut child = spawn(&mut command).await.map_err(|source| PluginError::Start { path, source })?;
        let group = Group::of(&child);
        let outcome = tokio::time::timeout(self.deadline, converse(&mut child, &config)).await;
        match outcome {
            Ok(done) => {
                let (status, output, complaint) = done?;
                group.has_ended();
                if status.success() { Ok(output) } else { Err(explain(status, &output, &complaint)) }
            }
            Err(_) => Err(PluginError::Deadline(self.deadline)),
        }
    }
}

/// Starts it; one whose file is open for writing (ETXTBSY) within [`BUSY_DEADLINE`], as soon as it no longer is.
async fn spawn(command: &mut Command) -> io::Result<Child> {
    let start = Instant::now();
    loop {
        match command.spawn() {
            Err(error)
                if error.kind() == io::ErrorKind::ExecutableFileBusy && start.elapsed() < BUSY_DEADLINE =>
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            done => return done,
        }
    }
}

/// The first executable of this name in the directories.
pub(super) fn find(bin_dirs: &[PathBuf], kind: &str) -> Result<PathBuf, String> {
    bin_dirs.iter().map(|directory| directory.join(kind)).find(|path| path.is_file()).ok_or_else(|| {
        let places: Vec<String> = bin_dirs.iter().map(|directory| directory.display().to_string()).collect();
        format!("CNI plugin {kind} is not in {}", places.join(" or "))
    })
}

async fn converse(
    child: &mut Child,
    config: &[u8],
) -> Result<(std::process::ExitStatus, Vec<u8>, Vec<u8>), PluginError> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let write = async {
        if let Some(mut stdin) = stdin {
            // A plugin that does not read its input says by its exit what it thinks of it.
            let _ = stdin.write_all(config).await;
        }
        Ok(())
    };
    let read = async {
        let mut output = Vec::new();
        if let Some(stdout) = stdout {
            stdout.take(LONGEST_OUTPUT as u64 + 1).read_to_end(&mut output).await.map_err(PluginError::Io)?;
        }
        if output.len() > LONGEST_OUTPUT { Err(PluginError::TooLong) } else { Ok(output) }
    };
    let complain = async { Ok(keep_beginning(stderr).await) };
    let wait = async { child.wait().await.map_err(PluginError::Io) };
    let ((), output, complaint, status) = tokio::try_join!(write, read, complain, wait)?;
    Ok((status, output, complaint))
}

async fn keep_beginning(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let Some(mut stream) = stream else { return Vec::new() };
    let (mut kept, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        let room = LONGEST_COMPLAINT.saturating_sub(kept.len()).min(length);
        kept.extend_from_slice(buffer.get(..room).unwrap_or_default());
    }
    kept
}

fn explain(status: std::process::ExitStatus, output: &[u8], complaint: &[u8]) -> PluginError {
    match serde_json::from_slice::<Report>(output) {
        Ok(report) => PluginError::Reported {
            code: report.code,
            message: printable(report.msg.as_bytes()),
            details: printable(report.details.as_bytes()),
        },
        Err(_) => {
            let said = if complaint.is_empty() { output } else { complaint };
            PluginError::Failed { status, complaint: printable(said) }
        }
    }
}

/// The beginning of a plugin's text on one line.
fn printable(text: &[u8]) -> String {
    let text = text.get(..LONGEST_COMPLAINT).unwrap_or(text);
    let text = String::from_utf8_lossy(text);
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A plugin's process group; killed if the run does not come to its end.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        Self(child.id().and_then(|pid| Pid::from_raw(pid as i32)))
    }

    fn has_ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// Used by tests of this crate that need an executable.
#[cfg(test)]
pub(super) fn script(directory: &Path, name: &str, body: &str) {
    use std::os::unix::fs::PermissionsExt;
    let path = directory.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn run(body: &str, deadline: Duration) -> Result<Vec<u8>, PluginError> {
        let directory = tempfile::tempdir().unwrap();
        script(directory.path(), "p", body);
        let dirs = [directory.path().to_owned()];
        let config = serde_json::json!({ "name": "net" });
        let mut call = Invocation::for_network("ADD", &dirs, "p", config.as_object().unwrap());
        call.deadline = deadline;
        call.environment("CNI_IFNAME", "eth0");
        call.run().await
    }

    const LONG: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_plugin_gets_its_configuration_and_environment() {
        let output = run("cat; echo $CNI_COMMAND $CNI_IFNAME; echo noise >&2", LONG).await.unwrap();
        assert_eq!(String::from_utf8(output).unwrap(), "{\"name\":\"net\"}ADD eth0\n");
    }

    #[tokio::test]
    async fn a_plugin_that_is_still_being_written_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        script(directory.path(), "p", "echo done");
        let writer = std::fs::OpenOptions::new().append(true).open(directory.path().join("p")).unwrap();
        let end = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            drop(writer);
        };
        let dirs = [directory.path().to_owned()];
        let config = serde_json::Map::new();
        let call = Invocation::for_network("ADD", &dirs, "p", &config);
        let (output, ()) = tokio::join!(call.run(), end);
        assert_eq!(output.unwrap(), b"done\n");
    }

    #[tokio::test]
    async fn a_plugins_error_is_told_with_code_message_and_details() {
        let body = r#"printf '%s' '{"cniVersion":"1.0.0","code":11,"msg":"try again","details":"pool\nbusy"}'; exit 1"#;
        let error = run(body, LONG).await.unwrap_err().to_string();
        assert_eq!(error, "error 11: try again (pool busy)");
        let error = run("echo oops >&2; exit 3", LONG).await.unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("oops"), "{error}");
    }

    #[tokio::test]
    async fn endless_output_is_cut_off() {
        let error = run("exec cat /dev/zero", LONG).await.unwrap_err();
        assert!(matches!(error, PluginError::TooLong), "{error}");
        // Noise on standard error alone is no failure.
        assert!(run("head -c 3000000 /dev/zero >&2", LONG).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_plugin_that_hangs_is_killed_with_its_children() {
        let start = Instant::now();
        let directory = tempfile::tempdir().unwrap();
        let pid_file = directory.path().join("pid");
        let body = format!("sleep 1000 & echo $! > {}; wait", pid_file.display());
        let error = run(&body, Duration::from_millis(300)).await.unwrap_err();
        assert!(matches!(error, PluginError::Deadline(_)), "{error}");
        assert!(start.elapsed() < Duration::from_secs(5));
        let pid = std::fs::read_to_string(pid_file).unwrap();
        let stat = Path::new("/proc").join(pid.trim()).join("stat");
        let gone = || std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "));
        for _ in 0..100 {
            if gone() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the plugin's child lives");
    }
}
