use std::fmt;
use std::str::FromStr;

use url::Url;

use crate::reference::{Reference, same_registry};

/// Longest pattern; the longest reference is not much longer.
const MAX_PATTERN: usize = 1024;
/// The registry whose single names are in `library`.
const DOCKER: &str = "docker.io";

/// Which references a rule is about: a repository in full, as in `registry.example/team/app`, in which `*` stands for
/// any characters but `/` and `**` for any at all.
///
/// With a tag (`…/app:1.*`) only references by such a tag fit, with a digest (`…/app@sha256:…`) only those by it. Without
/// either any reference to the repository fits. One that has a digest is by digest: the tag beside it promises nothing.
///
/// However a reference writes its registry's host and port, it is the same registry, so that no rule is passed by with
/// `REGISTRY.example` or `registry.example:443`. Other names that lead to the same machine are other registries.
#[derive(Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    /// The same with the registry as references are compared by it.
    compared: String,
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
        "the pattern {0:?} must begin with a registry, such as docker.io/library/busybox, or with \"*/\" or \"**\" for any registry"
    )]
    NoRegistry(String),
}

impl Pattern {
    /// Whether the reference is one of those meant.
    pub fn fits(&self, reference: &Reference) -> bool {
        let name = match (self.kind, reference.digest(), reference.tag()) {
            (Kind::Repository, ..) => reference.repository(),
            (Kind::Digest, Some(_), _) | (Kind::Tag, None, Some(_)) => reference.name(),
            _ => return false,
        };
        let path = name.strip_prefix(reference.domain()).unwrap_or(&name);
        matches(self.compared.as_bytes(), format!("{}{path}", registry(reference.domain())).as_bytes())
    }
}

/// A registry's host and port in the one form in which they are compared: lower case, addresses in their usual notation,
/// without the port that is meant anyway.
fn registry(domain: &str) -> String {
    if same_registry(domain, DOCKER) {
        return DOCKER.to_owned();
    }
    let canonical = Url::parse(&format!("https://{domain}")).ok().and_then(|url| {
        let host = url.host_str()?;
        Some(url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}")))
    });
    // What is no address can be connected to by nobody.
    let canonical = canonical.unwrap_or_else(|| domain.to_ascii_lowercase());
    if same_registry(&canonical, DOCKER) { DOCKER.to_owned() } else { canonical }
}

/// The same for a host with a `*`, which is no address: what can be said of it without knowing what it stands for.
fn without_usual_port(host: &str) -> String {
    let bare = match host.rsplit_once(':') {
        Some((bare, port)) if port.parse() == Ok(443_u16) => bare,
        _ => host,
    };
    bare.to_ascii_lowercase()
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
        let wrong = || PatternError::NoRegistry(text.to_owned());
        let Some((host, path)) = text.split_once('/') else {
            // All of it is for any registry and any path: nothing less fits any.
            let any = text.starts_with("**").then(|| text.to_owned()).ok_or_else(wrong)?;
            return Ok(Self { text: any.clone(), compared: any, kind: Kind::of(text) });
        };
        if path.is_empty() || !(host.contains(['.', ':', '*']) || host == "localhost") {
            return Err(wrong());
        }
        let host = if host.contains('*') { without_usual_port(host) } else { registry(host) };
        // As names are completed.
        let library =
            if host == DOCKER && !path.contains('/') && !path.contains("**") { "library/" } else { "" };
        let compared = format!("{host}/{library}{path}");
        Ok(Self { text: text.to_owned(), compared, kind: Kind::of(path) })
    }
}

impl Kind {
    /// By what stands behind the registry.
    fn of(path: &str) -> Self {
        match path {
            path if path.contains('@') => Self::Digest,
            path if path.contains(':') => Self::Tag,
            _ => Self::Repository,
        }
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
        assert!(fits("**", "anything") && fits("*/**/app", "quay.io/a/b/app"));
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
    fn a_rule_about_all_registries_can_be_about_tags_and_digests() {
        assert!(fits("**:latest", "busybox") && fits("**:latest", "quay.io/a/b:latest"));
        assert!(!fits("**:latest", "busybox:1") && !fits("**:latest", &format!("busybox@{DIGEST}")));
        assert!(fits("**@sha256:*", &format!("busybox@{DIGEST}")) && !fits("**@sha256:*", "busybox"));
        assert!(fits("**/app:1.*", "quay.io/a/app:1.2"));
    }

    #[test]
    fn another_spelling_of_a_registry_passes_no_rule_by() {
        for same in ["Evil.Example", "evil.example:443", "evil.example:0443", "EVIL.example:443"] {
            for pattern in [
                "evil.example/**",
                "EVIL.example:443/a",
                "*.example/a",
                "*.Example:443/a",
                "evil.example/a:1",
            ] {
                assert!(fits(pattern, &format!("{same}/a:1")), "{pattern} {same}");
            }
        }
        assert!(
            !fits("evil.example/**", "evil.example:5000/a")
                && !fits("evil.example:5000/**", "evil.example/a")
        );
        assert!(fits("evil.example:5000/**", "Evil.example:05000/a"));
        assert!(fits("127.0.0.1:5000/a", "127.1:5000/a") && fits("[::1]:5000/a", "[0:0::1]:5000/a"));
        for docker in ["index.docker.io", "registry-1.docker.io", "Docker.io", "docker.io:443"] {
            assert!(fits("docker.io/**", &format!("{docker}/library/busybox")), "{docker}");
            assert!(fits(&format!("{docker}/library/busybox"), "busybox"), "{docker}");
        }
    }

    #[test]
    fn single_names_of_dockers_registry_are_completed_as_those_of_images() {
        assert!(fits("docker.io/busybox", "busybox:1") && fits("docker.io/busybox:1.*", "busybox:1.2"));
        assert!(fits("docker.io/*", "busybox") && !fits("docker.io/*", "team/app"));
        assert!(fits("docker.io/**", "busybox") && fits("docker.io/**", "team/app"));
        assert_eq!("docker.io/busybox".parse::<Pattern>().unwrap().to_string(), "docker.io/busybox");
    }

    #[test]
    fn what_could_mean_several_things_is_no_pattern() {
        // And what would fit nothing at all.
        let never = ["*", "*:latest", "*@sha256:a", "quay.io/"];
        let unclear = ["", "busybox", "library/busybox", "quay.io", "a b.c/d", "docker.io/x\n", "?.io/a"];
        for text in unclear.into_iter().chain(never) {
            assert!(text.parse::<Pattern>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_hostile_pattern_takes_no_long_time() {
        let pattern = format!("{}b", "*a".repeat(500));
        assert!(!matches(pattern.as_bytes(), "a".repeat(700).as_bytes()));
    }
}
