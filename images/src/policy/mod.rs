//! The image policy: which images may be pulled, and which containers may be made of. A file that the node's owner
//! writes; hull reads it again whenever it has changed.
//!
//! ```toml
//! default = "reject"
//!
//! [[rule]]
//! image = "registry.example/team/**"
//! action = "accept"
//! ```
//!
//! The first rule that fits a reference decides, else the default.

mod pattern;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;
use toml::Spanned;

use crate::image::Image;
use crate::reference::Reference;

pub use pattern::{Pattern, PatternError};

/// Longest policy file in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Most rules.
const MAX_RULES: usize = 4096;
/// Longest reason in characters.
const MAX_REASON: usize = 256;

/// A policy in its file. Every question looks whether the file has changed.
#[derive(Debug)]
pub struct PolicyFile {
    path: PathBuf,
    read: Mutex<Option<(String, Arc<Policy>)>>,
}

/// The rules in force.
#[derive(Debug)]
pub struct Policy {
    path: PathBuf,
    default: Action,
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    pattern: Pattern,
    action: Action,
    reason: String,
    line: usize,
}

/// What becomes of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Action {
    Accept,
    Reject,
    /// Accepted if the reference has a digest.
    RequireDigest,
}

/// Why an image is not accepted. The text names the file, and the line of the rule.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The policy cannot be read. Then nothing is accepted.
    #[error("the image policy {} cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The policy is not a policy. Then nothing is accepted.
    #[error("the image policy {}:{line} is invalid: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A rule decided.
    #[error("the image policy {}:{line} (image = \"{pattern}\") {verdict} {image}{reason}", path.display())]
    Rule {
        /// The file.
        path: PathBuf,
        /// Of the rule, from 1.
        line: usize,
        /// The rule's pattern.
        pattern: String,
        /// What it does.
        verdict: &'static str,
        /// The image.
        image: String,
        /// The rule's reason with a leading separator, or empty.
        reason: String,
    },
    /// No rule fits, and the default decided.
    #[error("the image policy {} {verdict} {image}: no rule is about it, and that is its default", path.display())]
    Default {
        /// The file.
        path: PathBuf,
        /// What the default does.
        verdict: &'static str,
        /// The image.
        image: String,
    },
}

impl PolicyFile {
    /// The policy at `path`. Nothing is read yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, read: Mutex::default() }
    }

    /// The policy as the file has it now. Blocking, for as long as a small file takes.
    pub fn current(&self) -> Result<Arc<Policy>, PolicyError> {
        let text =
            read(&self.path).map_err(|source| PolicyError::Read { path: self.path.clone(), source })?;
        let mut known = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, policy)) = known.as_ref().filter(|(before, _)| *before == text) {
            return Ok(policy.clone());
        }
        let policy = Arc::new(Policy::parse(&self.path, &text)?);
        *known = Some((text, policy.clone()));
        Ok(policy)
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    if File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)? as u64 > MAX_FILE {
        return Err(io::Error::other(format!("it is larger than {MAX_FILE} bytes")));
    }
    Ok(text)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPolicy {
    default: Action,
    #[serde(default)]
    rule: Vec<RawRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    image: Spanned<String>,
    action: Action,
    #[serde(default)]
    reason: String,
}

impl Policy {
    /// Reads a policy; `path` is for messages.
    pub fn parse(path: &Path, text: &str) -> Result<Self, PolicyError> {
        let invalid = |at: usize, reason: String| PolicyError::Invalid {
            path: path.to_owned(),
            line: line(text, at),
            reason,
        };
        let raw: RawPolicy = toml::from_str(text).map_err(|error| {
            invalid(error.span().map_or(0, |span| span.start), error.message().trim_end().to_owned())
        })?;
        if raw.rule.len() > MAX_RULES {
            return Err(invalid(0, format!("it has more than {MAX_RULES} rules")));
        }
        let mut rules = Vec::with_capacity(raw.rule.len());
        for rule in raw.rule {
            let at = rule.image.span().start;
            let pattern =
                rule.image.get_ref().parse().map_err(|error: PatternError| invalid(at, error.to_string()))?;
            if rule.reason.chars().count() > MAX_REASON || rule.reason.chars().any(char::is_control) {
                let reason = format!("a reason has at most {MAX_REASON} characters, on one line");
                return Err(invalid(at, reason));
            }
            rules.push(Rule { pattern, action: rule.action, reason: rule.reason, line: line(text, at) });
        }
        Ok(Self { path: path.to_owned(), default: raw.default, rules })
    }

    /// Whether what `reference` means may be here.
    pub fn check(&self, reference: &Reference) -> Result<(), PolicyError> {
        let rule = self.rules.iter().find(|rule| rule.pattern.fits(reference));
        let verdict = match rule.map_or(self.default, |rule| rule.action) {
            Action::Accept => return Ok(()),
            Action::RequireDigest if reference.digest().is_some() => return Ok(()),
            Action::RequireDigest => "wants a digest for",
            Action::Reject => "rejects",
        };
        Err(self.refusal(rule, verdict, reference.to_string()))
    }

    /// Whether containers may be made of `image`, which the caller asked for as `asked` (None: by its id).
    ///
    /// Asked for by id it may be used if one of its names may: they all mean the same content. An id is as good as a
    /// digest. What has no name at all is not by any rule, and the default decides.
    pub fn check_image(&self, image: &Image, asked: Option<&Reference>) -> Result<(), PolicyError> {
        if let Some(reference) = asked {
            return self.check(reference);
        }
        let mut refusal = None;
        for name in image.repo_digests.iter().chain(&image.repo_tags) {
            let Ok(reference) = name.parse::<Reference>() else { continue };
            match self.check(&reference) {
                Ok(()) => return Ok(()),
                Err(error) => drop(refusal.get_or_insert(error)),
            }
        }
        match (refusal, self.default) {
            (Some(refusal), _) => Err(refusal),
            (None, Action::Accept | Action::RequireDigest) => Ok(()),
            (None, Action::Reject) => {
                Err(self.refusal(None, "rejects", format!("{}, which has no name", image.id)))
            }
        }
    }

    fn refusal(&self, rule: Option<&Rule>, verdict: &'static str, image: String) -> PolicyError {
        let path = self.path.clone();
        match rule {
            None => PolicyError::Default { path, verdict, image },
            Some(rule) => PolicyError::Rule {
                path,
                line: rule.line,
                pattern: rule.pattern.to_string(),
                verdict,
                image,
                reason: if rule.reason.is_empty() { String::new() } else { format!(": {}", rule.reason) },
            },
        }
    }
}

/// The line, from 1, of a place in the text.
fn line(text: &str, at: usize) -> usize {
    text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    const TEXT: &str = "\
default = \"reject\"

[[rule]]
image = \"quay.io/team/broken\"
action = \"reject\"
reason = \"see ticket 7\"

[[rule]]
image = \"quay.io/team/**\"
action = \"accept\"

[[rule]]
image = \"docker.io/library/*\"
action = \"require-digest\"
";

    fn policy(text: &str) -> Result<Policy, PolicyError> {
        Policy::parse(Path::new("/etc/p.toml"), text)
    }

    fn verdict(reference: &str) -> Result<(), String> {
        policy(TEXT).unwrap().check(&reference.parse().unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_first_rule_that_fits_decides_and_is_named() {
        verdict("quay.io/team/app:1").unwrap();
        let error = verdict("quay.io/team/broken:1").unwrap_err();
        assert_eq!(
            error,
            "the image policy /etc/p.toml:4 (image = \"quay.io/team/broken\") rejects quay.io/team/broken:1: see ticket 7"
        );
        verdict(&format!("busybox@{DIGEST}")).unwrap();
        let error = verdict("busybox").unwrap_err();
        assert!(error.contains("p.toml:13") && error.contains("wants a digest for"), "{error}");
        let error = verdict("ghcr.io/a/b").unwrap_err();
        assert!(error.contains("rejects ghcr.io/a/b:latest") && error.contains("default"), "{error}");
    }

    fn image(names: &[&str]) -> Image {
        let (repo_digests, repo_tags) =
            names.iter().map(|name| name.to_string()).partition(|n| n.contains('@'));
        let config = br#"{"os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
        Image {
            id: "sha256:1".into(),
            repo_tags,
            repo_digests,
            size: 0,
            layers: Vec::new(),
            upper_directories: Vec::new(),
            config: crate::ImageConfig::parse(bytes::Bytes::from_static(config)).unwrap(),
            pinned: false,
            pulled_at: 0,
        }
    }

    #[test]
    fn an_image_by_id_is_as_good_as_the_best_of_its_names() {
        let policy = policy(TEXT).unwrap();
        let both = image(&["quay.io/team/broken:1", "quay.io/team/app:1"]);
        policy.check_image(&both, None).unwrap();
        policy.check_image(&both, Some(&"quay.io/team/broken:1".parse().unwrap())).unwrap_err();
        policy.check_image(&image(&["quay.io/team/broken:1"]), None).unwrap_err();
        policy.check_image(&image(&["docker.io/library/a:1"]), None).unwrap_err();
        let digest = format!("docker.io/library/a@{DIGEST}");
        policy.check_image(&image(&["docker.io/library/a:1", &digest]), None).unwrap();
        let error = policy.check_image(&image(&[]), None).unwrap_err().to_string();
        assert!(error.contains("has no name"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, line, part) in [
            ("", 1, "default"),
            ("default = \"maybe\"", 1, "maybe"),
            ("default = \"accept\"\nrules = 1", 2, "rules"),
            ("default = \"accept\"\n\n[[rule]]\naction = \"accept\"\nimage = \"busybox\"", 5, "registry"),
            ("default = \"accept\"\n[[rule]]\nimage = \"a.b/c\"\n", 2, "action"),
            (
                "default = \"accept\"\n[[rule]]\nimage = \"a.b/c\"\naction = \"accept\"\nreason = \"\\u0007\"",
                3,
                "reason",
            ),
        ] {
            let error = policy(text).unwrap_err().to_string();
            assert!(
                error.contains(&format!("/etc/p.toml:{line} ")) && error.contains(part),
                "{text:?}: {error}"
            );
        }
    }

    #[test]
    fn the_file_is_read_again_when_it_has_changed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policy.toml");
        let file = PolicyFile::new(path.clone());
        let reference: Reference = "busybox".parse().unwrap();
        assert!(matches!(file.current(), Err(PolicyError::Read { .. })), "no file: nothing is accepted");
        std::fs::write(&path, "default = \"accept\"").unwrap();
        file.current().unwrap().check(&reference).unwrap();
        // As long as the one before, and in the same instant.
        std::fs::write(&path, "default = \"reject\"").unwrap();
        file.current().unwrap().check(&reference).unwrap_err();
        std::fs::write(&path, "default = ").unwrap();
        assert!(
            matches!(file.current(), Err(PolicyError::Invalid { .. })),
            "half written: nothing is accepted"
        );
    }
}
