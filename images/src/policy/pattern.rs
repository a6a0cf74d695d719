use std::fmt;
use std::str::FromStr;

use crate::reference::Reference;

/// Longest pattern; the longest reference is not much longer.
const MAX_PATTERN: usize = 1024;

/// Which references a rule is about: a repository in full, as in `registry.example/team/app`, in which `*` stands for
/// any characters but `/` and `**` for any at all.
///
/// With a tag (`…/app:1.*`) only references by such a tag fit, with a digest (`…/app@sha256:…`) only those by it. Without
/// either any reference to the repository fits. One that has a digest is by digest: the tag beside it promises nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    kind: Kind,
}

/// What of a reference is compared.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Repository,
    Tag,
    Digest,
}

/// Why a text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// Nothing, or too much.
    #[error("a pattern has 1 to {MAX_PATTERN} characters")]
    Length,
    /// Characters that no reference has.
    #[error("the pattern {0:?} has characters that no image reference has")]
    Characters(String),
    /// It could mean several registries.
    #[error(
        "the pattern {0:?} must begin with a registry, such as docker.io/library/busybox, or with \"*\" for any registry"
    )]
    NoRegistry(String),
}

impl Pattern {
    /// Whether the reference is one of those meant.
    pub fn fits(&self, reference: &Reference) -> bool {
        match (self.kind, reference.digest(), reference.tag()) {
            (Kind::Repository, ..) => self.matches(&reference.repository()),
            (Kind::Digest, Some(_), _) | (Kind::Tag, None, Some(_)) => self.matches(&reference.name()),
            _ => false,
        }
    }

    fn matches(&self, text: &str) -> bool {
        matches(self.text.as_bytes(), text.as_bytes())
    }
}

/// Whether `text` is what `pattern` describes. In time of the product of their lengths at most.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    // Which prefixes of the text the pattern so far describes.
    let mut reached = vec![false; text.len() + 1];
    reached[0] = true;
    let mut rest = pattern;
    while let Some((first, after)) = rest.split_first() {
        if *first != b'*' {
            for at in (0..text.len()).rev() {
                reached[at + 1] = reached[at] && text[at] == *first;
            }
            reached[0] = false;
            rest = after;
            continue;
        }
        let stars = rest.iter().take_while(|byte| **byte == b'*').count();
        for at in 0..text.len() {
            reached[at + 1] |= reached[at] && (stars > 1 || text[at] != b'/');
        }
        rest = &rest[stars..];
    }
    reached[text.len()]
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        if text.is_empty() || text.len() > MAX_PATTERN {
            return Err(PatternError::Length);
        }
        if !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/:@*[]".contains(&byte)) {
            return Err(PatternError::Characters(text.to_owned()));
        }
        let (registry, path) = text.split_once('/').unwrap_or((text, ""));
        let is_registry = registry.contains(['.', ':', '*']) || registry == "localhost";
        if !is_registry || (path.is_empty() && !text.starts_with('*')) {
            return Err(PatternError::NoRegistry(text.to_owned()));
        }
        let kind = match path {
            path if path.contains('@') => Kind::Digest,
            path if path.contains(':') => Kind::Tag,
            _ => Kind::Repository,
        };
        Ok(Self { text: text.to_owned(), kind })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.text)
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}", self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

    fn fits(pattern: &str, reference: &str) -> bool {
        pattern.parse::<Pattern>().unwrap().fits(&reference.parse().unwrap())
    }

    #[test]
    fn repositories_are_compared_in_full() {
        assert!(fits("docker.io/library/busybox", "busybox"));
        assert!(fits("docker.io/library/busybox", &format!("busybox:1@{DIGEST}")));
        assert!(!fits("docker.io/library/busybox", "busybox2"));
        assert!(!fits("docker.io/library/busybox", "evil.example/library/busybox"));
        assert!(fits("localhost:5000/a", "localhost:5000/a:1"));
        assert!(fits("[::1]:5000/a", "[::1]:5000/a:1"));
    }

    #[test]
    fn one_star_stays_within_a_component_and_two_do_not() {
        assert!(fits("quay.io/team/*", "quay.io/team/app"));
        assert!(!fits("quay.io/team/*", "quay.io/team/app/part"));
        assert!(fits("quay.io/team/**", "quay.io/team/app/part:1"));
        assert!(!fits("quay.io/team/**", "quay.io/teams/app"));
        assert!(
            fits("*.example/**", "registry.example/a") && !fits("*.example/**", "registry.example.evil/a")
        );
        assert!(fits("**", "anything") && fits("*/**/app", "quay.io/a/b/app") && !fits("*", "quay.io/a"));
        // A registry's name that begins like another one.
        assert!(!fits("quay.io/**", "quay.io.evil.example/a"));
    }

    #[test]
    fn a_tag_beside_a_digest_promises_nothing() {
        assert!(fits("quay.io/a:1.*", "quay.io/a:1.25"));
        assert!(!fits("quay.io/a:1.*", "quay.io/a:2"));
        assert!(!fits("quay.io/a:1.*", &format!("quay.io/a:1.2@{DIGEST}")));
        assert!(fits(&format!("quay.io/a@{DIGEST}"), &format!("quay.io/a:1.2@{DIGEST}")));
        assert!(!fits(&format!("quay.io/a@{DIGEST}"), "quay.io/a:1.2"));
        assert!(fits("quay.io/*@sha256:a*", &format!("quay.io/a@{DIGEST}")));
    }

    #[test]
    fn what_could_mean_several_things_is_no_pattern() {
        for text in ["", "busybox", "library/busybox", "quay.io", "a b.c/d", "docker.io/x\n", "?.io/a"] {
            assert!(text.parse::<Pattern>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_hostile_pattern_takes_no_long_time() {
        let pattern = format!("{}b", "*a".repeat(500));
        assert!(!matches(pattern.as_bytes(), "a".repeat(700).as_bytes()));
    }
}
