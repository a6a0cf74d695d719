//! The grammar of references (distribution, reference/regexp.go), as predicates over single parts.

use super::{DEFAULT_DOMAIN, LEGACY_DEFAULT_DOMAIN};

/// Splits off the registry. Text without one gets docker.io (reference/normalize.go, splitDockerDomain).
pub(super) fn split_domain(text: &str) -> (&str, &str) {
    match text.split_once('/') {
        Some((LEGACY_DEFAULT_DOMAIN, rest)) => (DEFAULT_DOMAIN, rest),
        Some((first, rest)) if looks_like_domain(first) => (first, rest),
        _ => (DEFAULT_DOMAIN, text),
    }
}

/// Whether the first element of a name is a registry and not a part of the path.
pub(super) fn looks_like_domain(element: &str) -> bool {
    element == "localhost"
        || element.contains(['.', ':'])
        || element.bytes().any(|byte| byte.is_ascii_uppercase())
}

/// 64 lower-case hexadecimal characters: an image id, never a name.
pub(super) fn is_identifier(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Host (name, IPv4 address or IPv6 address in brackets) with an optional port.
pub(super) fn is_domain(domain: &str) -> bool {
    if let Some(rest) = domain.strip_prefix('[') {
        let Some((address, after)) = rest.split_once(']') else { return false };
        let port = match after.strip_prefix(':') {
            Some(port) => is_port(port),
            None => after.is_empty(),
        };
        return port
            && !address.is_empty()
            && address.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b':');
    }
    let (host, port) = match domain.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (domain, None),
    };
    port.is_none_or(is_port) && host.split('.').all(is_domain_component)
}

fn is_port(port: &str) -> bool {
    !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_domain_component(component: &str) -> bool {
    !component.is_empty()
        && !component.starts_with('-')
        && !component.ends_with('-')
        && component.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// Path components separated by slashes.
pub(super) fn is_path(path: &str) -> bool {
    path.split('/').all(is_path_component)
}

/// Runs of lower-case letters and digits, joined by `.`, `_`, `__` or any number of `-`.
fn is_path_component(component: &str) -> bool {
    let mut rest = component;
    loop {
        let word = rest.len()
            - rest.trim_start_matches(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()).len();
        if word == 0 {
            return false;
        }
        rest = &rest[word..];
        if rest.is_empty() {
            return true;
        }
        let separator = match rest.as_bytes() {
            [b'-', ..] => rest.len() - rest.trim_start_matches('-').len(),
            [b'_', b'_', ..] => 2,
            [b'_' | b'.', ..] => 1,
            _ => return false,
        };
        rest = &rest[separator..];
    }
}

/// A word character, then at most 127 of word characters, dots and dashes.
pub(super) fn is_tag(tag: &str) -> bool {
    tag.len() <= 128
        && tag.bytes().enumerate().all(|(position, byte)| {
            byte.is_ascii_alphanumeric() || byte == b'_' || (position > 0 && matches!(byte, b'.' | b'-'))
        })
        && !tag.is_empty()
}
