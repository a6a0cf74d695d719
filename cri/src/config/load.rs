//! From a file and flags to a checked configuration, or to an error that names the file, the line and the reason.

use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use thiserror::Error;
use toml::de::{DeTable, DeValue};

use super::{Config, DEFAULT_FILE, LogFormat, value};

/// Longest configuration file in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Why there is no configuration. The text is for the person who wrote it.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Something in the file is not right.
    #[error("{}:{line}:{column}: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// In characters, from 1.
        column: usize,
        /// What is wrong, and what may have been meant.
        reason: String,
    },
    /// A flag's value does not fit.
    #[error("{0}")]
    Flag(String),
}

/// What flags say; each wins over the file.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--root`
    pub root: Option<PathBuf>,
    /// `--state`
    pub state: Option<PathBuf>,
    /// `--listen`, already a path
    pub listen: Option<PathBuf>,
    /// `--log-level`
    pub log_level: Option<String>,
    /// `--log-format`
    pub log_format: Option<LogFormat>,
}

/// Reads `file` (without one: [`DEFAULT_FILE`], which need not exist) and lets the flags override it.
pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Config, ConfigError> {
    let path = file.unwrap_or(Path::new(DEFAULT_FILE));
    let text = match read(path) {
        Ok(text) => text,
        Err(error) if file.is_none() && error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(source) => return Err(ConfigError::Read { path: path.into(), source }),
    };
    parse(path, &text, overrides)
}

/// Like [`load`], with the file's text at hand; `path` is for messages.
pub fn parse(path: &Path, text: &str, overrides: &Overrides) -> Result<Config, ConfigError> {
    let mut config: Config = toml::from_str(text)
        .map_err(|error| invalid(path, text, error.span(), with_suggestion(error.message())))?;
    override_with(&mut config, overrides)?;
    if config.listen.as_os_str().is_empty() {
        let socket = Config::socket_in(&config.state);
        config.listen = value::parse_endpoint(&socket.to_string_lossy())
            .map_err(|reason| ConfigError::Flag(format!("state {}: {reason}", config.state.display())))?;
    }
    check_together(&config).map_err(|(key, reason)| invalid(path, text, find(text, key), reason))?;
    Ok(config)
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let read = std::fs::File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if read as u64 > MAX_FILE {
        return Err(std::io::Error::other(format!("it is larger than {MAX_FILE} bytes")));
    }
    Ok(text)
}

fn override_with(config: &mut Config, overrides: &Overrides) -> Result<(), ConfigError> {
    let flag = |name: &str, reason: String| ConfigError::Flag(format!("{name}: {reason}"));
    for (name, given, target) in
        [("--root", &overrides.root, &mut config.root), ("--state", &overrides.state, &mut config.state)]
    {
        if let Some(given) = given {
            let path = std::path::absolute(given).map_err(|error| flag(name, error.to_string()))?;
            value::check_absolute(&path).map_err(|reason| flag(name, reason))?;
            *target = path;
        }
    }
    if let Some(listen) = &overrides.listen {
        config.listen = listen.clone();
    }
    if let Some(level) = &overrides.log_level {
        value::check_log_level(level).map_err(|reason| flag("--log-level", reason))?;
        config.log.level = level.clone();
    }
    if let Some(format) = overrides.log_format {
        config.log.format = format;
    }
    Ok(())
}

/// What no single value can tell. An error names the key (dots between tables) and the reason.
fn check_together(config: &Config) -> Result<(), (&'static str, String)> {
    if config.root == config.state {
        return Err(("state", "root and state must be different directories".into()));
    }
    if config.streaming.certificate.is_some() != config.streaming.key.is_some() {
        return Err(("streaming", "certificate and key are given together or not at all".into()));
    }
    for name in config.runtimes.handlers.keys() {
        let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
        // A RuntimeClass's handler is a DNS label (node.k8s.io/v1 RuntimeClass).
        if name.is_empty() || name.len() > 63 || !name.chars().all(legal) {
            let reason =
                format!("\"{name}\" cannot be a handler's name (lowercase letters, digits, - and .)");
            return Err(("runtimes.handlers", reason));
        }
    }
    for (name, handler) in &config.runtimes.handlers {
        if handler.kind == super::SandboxKind::Process && handler.machine.is_some() {
            let reason = format!("the handler \"{name}\" has no machine: its kind is \"process\"");
            return Err(("runtimes.handlers", reason));
        }
        if let Some(machine) = &handler.machine
            && machine.max_memory.is_some_and(|most| most < machine.memory)
        {
            let reason = format!("the handler \"{name}\" has a max_memory that is less than its memory");
            return Err(("runtimes.handlers", reason));
        }
    }
    if !config.runtimes.handlers.contains_key(&config.runtimes.default) {
        let known: Vec<_> = config.runtimes.handlers.keys().map(String::as_str).collect();
        let reason =
            format!("there is no handler \"{}\"; there is: {}", config.runtimes.default, known.join(", "));
        return Err(("runtimes.default", reason));
    }
    Ok(())
}

fn invalid(path: &Path, text: &str, span: Option<Range<usize>>, reason: String) -> ConfigError {
    let before = span.and_then(|span| text.get(..span.start)).unwrap_or("");
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
    ConfigError::Invalid { path: path.into(), line, column, reason }
}

/// Where `key` (`a.b.c`) stands in the text, or the innermost table of it that is there.
fn find(text: &str, key: &str) -> Option<Range<usize>> {
    let document = DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let mut span = None;
    for part in key.split('.') {
        let Some((_, value)) = table.iter().find(|(name, _)| name.get_ref() == part) else { break };
        span = Some(value.span());
        match value.get_ref() {
            DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    span
}

/// serde says "unknown field `a`, expected one of `b`, `c`": adds which of them was probably meant.
fn with_suggestion(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let kind = if message.starts_with("unknown field") {
        "key"
    } else if message.starts_with("unknown variant") {
        "value"
    } else {
        return message.trim_end().to_owned();
    };
    let Some(given) = quoted.next() else { return message.to_owned() };
    let known: Vec<&str> = quoted.collect();
    let nearest = known.iter().map(|name| (distance(given, name), *name)).min();
    match nearest {
        Some((distance, name)) if distance <= 1 + name.len() / 3 => {
            format!("unknown {kind} \"{given}\"; did you mean \"{name}\"?")
        }
        _ => format!("unknown {kind} \"{given}\"; there are: {}", known.join(", ")),
    }
}

/// Levenshtein distance: how many letters to add, drop or change. Long words are cut; they are no near miss anyway.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
