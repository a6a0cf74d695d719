//! The image configuration (image-spec config.md), read with bounds.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::layer::LayerId;

/// Largest configuration that is read, in bytes. Real ones are a few KiB; long histories reach some hundred.
pub const MAX_CONFIG: u64 = 4 << 20;
/// Most layers of one image: overlayfs stacks at most 500 (fs/overlayfs/params.h, OVL_MAX_STACK).
pub const MAX_LAYERS: usize = 500;
/// Most entries of each list and map that the runtime uses.
const MAX_ENTRIES: usize = 16 * 1024;
/// Longest single value: a process argument or variable is at most 128 KiB (MAX_ARG_STRLEN).
const MAX_VALUE: usize = 128 * 1024;
/// Longest path (PATH_MAX).
const MAX_PATH: usize = 4096;

/// What an image says about the processes that run from it. Every string is free of NUL bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImageConfig {
    /// `user`, `uid`, `user:group` or `uid:gid` as written; empty for root.
    pub user: String,
    /// `NAME=value` entries in order.
    pub env: Vec<String>,
    /// Program and leading arguments.
    pub entrypoint: Vec<String>,
    /// Arguments, or the whole command when there is no entrypoint.
    pub cmd: Vec<String>,
    /// Absolute working directory, or empty.
    pub working_dir: String,
    /// Paths that the image declares as volumes, sorted.
    pub volumes: Vec<String>,
    /// Signal that asks the container to stop, as written (`SIGTERM`, `15`).
    pub stop_signal: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Processor architecture in Go's names (`amd64`); empty when the image does not say.
    pub architecture: String,
    /// Operating system in Go's names (`linux`); empty when the image does not say.
    pub os: String,
    /// When it was built, as written.
    pub created: Option<String>,
    /// The layers' digests of their uncompressed tar streams, lowest first.
    pub diff_ids: Vec<LayerId>,
    /// The exact bytes of the configuration.
    pub raw: Bytes,
}

/// Why an image's configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// More bytes than [`MAX_CONFIG`].
    #[error("the configuration has {0} bytes, more than {MAX_CONFIG}")]
    TooLarge(u64),
    /// Not JSON, or not of the specified shape.
    #[error("the configuration cannot be read: {0}")]
    Malformed(String),
    /// A list or map has too many entries.
    #[error("{field} has {count} entries, more than {limit}")]
    TooMany {
        /// Which one.
        field: &'static str,
        /// How many it has.
        count: usize,
        /// How many are allowed.
        limit: usize,
    },
    /// One value is too long.
    #[error("{field} has a value of {length} bytes, more than {limit}")]
    TooLong {
        /// Where.
        field: &'static str,
        /// How long it is.
        length: usize,
        /// How long it may be.
        limit: usize,
    },
    /// A NUL byte, which no kernel interface can carry.
    #[error("{0} has a NUL byte")]
    Nul(&'static str),
    /// A control character where the value ends up in files or paths.
    #[error("{0} has a control character")]
    ControlCharacter(&'static str),
    /// A working directory that is not absolute.
    #[error("the working directory is not an absolute path")]
    WorkingDirectory,
    /// A root filesystem that is not a stack of layers.
    #[error("rootfs.type is {0:?}, expected \"layers\"")]
    RootfsType(String),
    /// A layer's identity is not a SHA-256 digest.
    #[error("rootfs.diff_ids has {0:?}, which is not a sha256 digest")]
    DiffId(String),
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    created: Option<String>,
    #[serde(default)]
    config: Option<Process>,
    rootfs: Rootfs,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Process {
    #[serde(default)]
    user: Option<String>,
    #[serde(default)]
    env: Option<Vec<String>>,
    #[serde(default)]
    entrypoint: Option<Command>,
    #[serde(default)]
    cmd: Option<Command>,
    #[serde(default)]
    working_dir: Option<String>,
    #[serde(default)]
    volumes: Option<BTreeMap<String, IgnoredAny>>,
    #[serde(default)]
    stop_signal: Option<String>,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
}

/// Old builders wrote a single string where the specification has a list.
#[derive(Deserialize)]
#[serde(untagged)]
enum Command {
    List(Vec<String>),
    Text(String),
}

#[derive(Deserialize)]
struct Rootfs {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    diff_ids: Option<Vec<String>>,
}

impl ImageConfig {
    /// Reads a configuration. The caller has verified its digest.
    pub fn parse(raw: Bytes) -> Result<Self, ConfigError> {
        if raw.len() as u64 > MAX_CONFIG {
            return Err(ConfigError::TooLarge(raw.len() as u64));
        }
        let document: Document =
            serde_json::from_slice(&raw).map_err(|error| ConfigError::Malformed(error.to_string()))?;
        if document.rootfs.kind != "layers" {
            return Err(ConfigError::RootfsType(excerpt(&document.rootfs.kind)));
        }
        let process = document.config.unwrap_or_default();
        let config = Self {
            user: process.user.unwrap_or_default(),
            env: process.env.unwrap_or_default(),
            entrypoint: words(process.entrypoint),
            cmd: words(process.cmd),
            working_dir: process.working_dir.unwrap_or_default(),
            volumes: process.volumes.unwrap_or_default().into_keys().collect(),
            stop_signal: process.stop_signal.filter(|signal| !signal.is_empty()),
            labels: process.labels.unwrap_or_default(),
            architecture: document.architecture.unwrap_or_default(),
            os: document.os.unwrap_or_default(),
            created: document.created,
            diff_ids: diff_ids(document.rootfs.diff_ids.unwrap_or_default())?,
            raw,
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        for (field, list, limit) in [
            ("config.Env", &self.env, MAX_VALUE),
            ("config.Entrypoint", &self.entrypoint, MAX_VALUE),
            ("config.Cmd", &self.cmd, MAX_VALUE),
            ("config.Volumes", &self.volumes, MAX_PATH),
        ] {
            check_count(field, list.len())?;
            list.iter().try_for_each(|value| check_value(field, value, limit))?;
        }
        check_count("config.Labels", self.labels.len())?;
        for (key, value) in &self.labels {
            check_value("config.Labels", key, MAX_VALUE)?;
            check_value("config.Labels", value, MAX_VALUE)?;
        }
        let texts = [
            ("config.User", Some(&self.user), 512),
            ("config.WorkingDir", Some(&self.working_dir), MAX_PATH),
            ("config.StopSignal", self.stop_signal.as_ref(), 64),
            ("architecture", Some(&self.architecture), 64),
            ("os", Some(&self.os), 64),
            ("created", self.created.as_ref(), 128),
        ];
        for (field, text, limit) in texts {
            let Some(text) = text else { continue };
            check_value(field, text, limit)?;
            if text.chars().any(char::is_control) {
                return Err(ConfigError::ControlCharacter(field));
            }
        }
        if !self.working_dir.is_empty() && !self.working_dir.starts_with('/') {
            return Err(ConfigError::WorkingDirectory);
        }
        Ok(())
    }
}

fn words(command: Option<Command>) -> Vec<String> {
    match command {
        None => Vec::new(),
        Some(Command::List(words)) => words,
        Some(Command::Text(text)) if text.is_empty() => Vec::new(),
        Some(Command::Text(text)) => vec![text],
    }
}

fn diff_ids(texts: Vec<String>) -> Result<Vec<LayerId>, ConfigError> {
    if texts.len() > MAX_LAYERS {
        return Err(ConfigError::TooMany { field: "rootfs.diff_ids", count: texts.len(), limit: MAX_LAYERS });
    }
    texts.iter().map(|text| text.parse().map_err(|_| ConfigError::DiffId(excerpt(text)))).collect()
}

fn check_count(field: &'static str, count: usize) -> Result<(), ConfigError> {
    if count > MAX_ENTRIES {
        return Err(ConfigError::TooMany { field, count, limit: MAX_ENTRIES });
    }
    Ok(())
}

fn check_value(field: &'static str, value: &str, limit: usize) -> Result<(), ConfigError> {
    if value.len() > limit {
        return Err(ConfigError::TooLong { field, length: value.len(), limit });
    }
    if value.contains('\0') {
        return Err(ConfigError::Nul(field));
    }
    Ok(())
}

/// Enough of a hostile value to recognise it in a message.
fn excerpt(text: &str) -> String {
    text.chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<ImageConfig, ConfigError> {
        ImageConfig::parse(Bytes::copy_from_slice(json.as_bytes()))
    }

    fn with_process(process: &str) -> Result<ImageConfig, ConfigError> {
        parse(&format!(r#"{{"rootfs":{{"type":"layers","diff_ids":[]}},"config":{process}}}"#))
    }

    #[test]
    fn a_full_configuration_is_read() {
        let diff = format!("sha256:{}", "ab".repeat(32));
        let json = format!(
            r#"{{"architecture":"amd64","os":"linux","created":"2024-01-01T00:00:00Z","history":[{{}}],
            "config":{{"User":"1000:1000","Env":["PATH=/bin"],"Entrypoint":["/init"],"Cmd":["a","b"],
            "WorkingDir":"/srv","Volumes":{{"/z":{{}},"/data":{{}}}},"StopSignal":"SIGQUIT","Labels":{{"k":"v"}},
            "ExposedPorts":{{"80/tcp":{{}}}}}},"rootfs":{{"type":"layers","diff_ids":["{diff}"]}}}}"#
        );
        let config = parse(&json).unwrap();
        assert_eq!(config.user, "1000:1000");
        assert_eq!(config.entrypoint, ["/init"]);
        assert_eq!(config.cmd, ["a", "b"]);
        assert_eq!(config.volumes, ["/data", "/z"]);
        assert_eq!(config.stop_signal.as_deref(), Some("SIGQUIT"));
        assert_eq!(config.diff_ids.len(), 1);
        assert_eq!(config.raw, json.as_bytes());
    }

    #[test]
    fn null_and_missing_fields_are_empty() {
        let config =
            with_process(r#"{"Env":null,"Cmd":null,"Entrypoint":"/bin/sh","User":null,"Labels":null}"#);
        assert_eq!(config.unwrap().entrypoint, ["/bin/sh"]);
        assert!(parse(r#"{"rootfs":{"type":"layers"},"config":null}"#).unwrap().cmd.is_empty());
    }

    #[test]
    fn absurd_values_are_refused() {
        use ConfigError as E;
        assert!(matches!(parse("[]"), Err(E::Malformed(_))));
        assert!(matches!(parse("{}"), Err(E::Malformed(_))));
        assert!(matches!(parse(r#"{"rootfs":{"type":"windows"}}"#), Err(E::RootfsType(_))));
        assert!(matches!(
            parse(r#"{"rootfs":{"type":"layers","diff_ids":["sha256:../x"]}}"#),
            Err(E::DiffId(_))
        ));
        assert_eq!(with_process(r#"{"Env":["A=\u0000"]}"#), Err(E::Nul("config.Env")));
        assert_eq!(with_process(r#"{"User":"root\nevil::0:0"}"#), Err(E::ControlCharacter("config.User")));
        assert_eq!(with_process(r#"{"WorkingDir":"tmp"}"#), Err(E::WorkingDirectory));
        let long = "x".repeat(MAX_VALUE + 1);
        assert!(matches!(with_process(&format!(r#"{{"Cmd":["{long}"]}}"#)), Err(E::TooLong { .. })));
        let many = vec!["\"a\""; MAX_ENTRIES + 1].join(",");
        assert!(matches!(with_process(&format!(r#"{{"Cmd":[{many}]}}"#)), Err(E::TooMany { .. })));
        let nested = "[".repeat(100_000);
        assert!(matches!(parse(&nested), Err(E::Malformed(_))));
        assert!(matches!(
            ImageConfig::parse(Bytes::from(vec![b' '; MAX_CONFIG as usize + 1])),
            Err(E::TooLarge(_))
        ));
    }
}
