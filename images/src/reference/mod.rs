//! Image references: what users write (`busybox`, `quay.io/team/app:1.2@sha256:…`), in their normal form.
//!
//! The grammar and the normalisation are those of the distribution project ("reference" package): names without a
//! registry belong to docker.io, single names there to `library/`, and a reference without tag or digest means `latest`.

mod grammar;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::{Digest, DigestError};

/// The registry of names that name none.
const DEFAULT_DOMAIN: &str = "docker.io";
/// Older name of [`DEFAULT_DOMAIN`], still written by users.
const LEGACY_DEFAULT_DOMAIN: &str = "index.docker.io";
/// Where docker.io answers the distribution API.
const DEFAULT_DOMAIN_HOST: &str = "registry-1.docker.io";
/// The namespace of single names at docker.io.
const OFFICIAL_PREFIX: &str = "library/";
/// The tag of a reference that has neither tag nor digest.
const DEFAULT_TAG: &str = "latest";
/// Longest repository path (distribution: RepositoryNameTotalLengthMax).
const MAX_PATH: usize = 255;
/// Longest registry with port: a DNS name is at most 253 bytes.
const MAX_DOMAIN: usize = 253 + 6;
/// Longest text worth looking at: domain, path, tag of 128, a sha512 digest and the separators.
const MAX_REFERENCE: usize = MAX_DOMAIN + 1 + MAX_PATH + 1 + 128 + 1 + 7 + 128;

/// A normalised image reference: registry, repository path, and a tag or a digest or both.
///
/// Where both are given the digest says what is meant and the tag is only carried along.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is not an image reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Nothing was given.
    #[error("the image reference is empty")]
    Empty,
    /// Longer than any valid reference.
    #[error("the image reference is longer than {MAX_REFERENCE} bytes")]
    TooLong,
    /// The repository path is longer than the distribution specification allows.
    #[error("the repository name in image reference {0:?} is longer than {MAX_PATH} characters")]
    NameTooLong(String),
    /// A bare image id where a name is needed.
    #[error("{0:?} is an image id (64 hexadecimal characters), not an image reference")]
    Identifier(String),
    /// Upper case in the repository path.
    #[error("the repository name in image reference {0:?} must be lower case")]
    Uppercase(String),
    /// The registry part is not a host with an optional port.
    #[error("the registry in image reference {0:?} is not a valid host or host:port")]
    Domain(String),
    /// The path part does not follow the grammar.
    #[error("the repository name in image reference {0:?} is not valid")]
    Name(String),
    /// The tag does not follow the grammar.
    #[error("the tag in image reference {0:?} is not valid (letters, digits, '_', '.', '-', at most 128)")]
    Tag(String),
    /// The digest cannot be verified.
    #[error("the digest in image reference {0:?} is not valid: {1}")]
    Digest(String, DigestError),
}

impl Reference {
    /// The registry as it stands in names, with its port: `docker.io`, `localhost:5000`.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The host (with port) that answers for the registry when nothing else is configured. It differs from the domain
    /// for docker.io only.
    pub fn registry_host(&self) -> &str {
        registry_host(&self.domain)
    }

    /// The repository's path in its registry: `library/busybox`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag. None only when there is a digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if the reference is pinned to one.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Registry and path without tag and digest: `docker.io/library/busybox`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The same repository at `digest`, without tag: `docker.io/library/busybox@sha256:…`.
    pub fn at_digest(&self, digest: &Digest) -> Self {
        Self { domain: self.domain.clone(), path: self.path.clone(), tag: None, digest: Some(digest.clone()) }
    }

    /// What the index stores an image under: the digest form when there is a digest (a tag beside it promises nothing),
    /// the tag form otherwise.
    pub fn name(&self) -> String {
        match &self.digest {
            Some(digest) => format!("{}/{}@{digest}", self.domain, self.path),
            None => format!("{}/{}:{}", self.domain, self.path, self.tag.as_deref().unwrap_or(DEFAULT_TAG)),
        }
    }

    /// The shortest form that parses back to this reference: `busybox:latest`, `user/app:1`, `quay.io/a/b@sha256:…`.
    pub fn familiar(&self) -> String {
        let short = self.familiar_name();
        let mut text = short.to_owned();
        self.append_suffix(&mut text);
        text
    }

    fn familiar_name(&self) -> String {
        if self.domain != DEFAULT_DOMAIN {
            return self.repository();
        }
        if let Some(name) = self.path.strip_prefix(OFFICIAL_PREFIX).filter(|name| !name.contains('/')) {
            // A repository that is named like an image id would not parse back without its prefix.
            if !grammar::is_identifier(name) {
                return name.to_owned();
            }
        }
        match self.path.split_once('/') {
            Some((first, _)) if !grammar::looks_like_domain(first) => self.path.clone(),
            _ => self.repository(),
        }
    }

    fn append_suffix(&self, text: &mut String) {
        if let Some(tag) = &self.tag {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(&digest.to_string());
        }
    }
}

/// The host that answers for registry `domain` when nothing else is configured.
pub(crate) fn registry_host(domain: &str) -> &str {
    if domain == DEFAULT_DOMAIN { DEFAULT_DOMAIN_HOST } else { domain }
}

/// Whether two hosts (with ports) name the same registry: docker.io has three names.
pub(crate) fn same_registry(one: &str, other: &str) -> bool {
    fn canonical(host: &str) -> String {
        match host.to_ascii_lowercase().as_str() {
            LEGACY_DEFAULT_DOMAIN | DEFAULT_DOMAIN_HOST => DEFAULT_DOMAIN.to_owned(),
            other => other.to_owned(),
        }
    }
    canonical(one) == canonical(other)
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if text.len() > MAX_REFERENCE {
            return Err(ReferenceError::TooLong);
        }
        if grammar::is_identifier(text) {
            return Err(ReferenceError::Identifier(text.to_owned()));
        }
        let (domain, remainder) = grammar::split_domain(text);
        let (name_and_tag, digest) = match remainder.split_once('@') {
            Some((before, digest)) => (before, Some(digest)),
            None => (remainder, None),
        };
        let (path, tag) = match name_and_tag.split_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (name_and_tag, None),
        };
        let path = if domain == DEFAULT_DOMAIN && !path.contains('/') {
            format!("{OFFICIAL_PREFIX}{path}")
        } else {
            path.to_owned()
        };
        check(text, domain, &path, tag)?;
        let digest = digest
            .map(|digest| digest.parse::<Digest>())
            .transpose()
            .map_err(|error| ReferenceError::Digest(text.to_owned(), error))?;
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, Some(_)) => None,
            (None, None) => Some(DEFAULT_TAG.to_owned()),
        };
        Ok(Self { domain: domain.to_owned(), path, tag, digest })
    }
}

/// Checks the parts of `text` against the grammar.
fn check(text: &str, domain: &str, path: &str, tag: Option<&str>) -> Result<(), ReferenceError> {
    if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err(ReferenceError::Uppercase(text.to_owned()));
    }
    if path.len() > MAX_PATH {
        return Err(ReferenceError::NameTooLong(text.to_owned()));
    }
    if domain.len() > MAX_DOMAIN || !grammar::is_domain(domain) {
        return Err(ReferenceError::Domain(text.to_owned()));
    }
    if !grammar::is_path(path) {
        return Err(ReferenceError::Name(text.to_owned()));
    }
    match tag {
        Some(tag) if !grammar::is_tag(tag) => Err(ReferenceError::Tag(text.to_owned())),
        _ => Ok(()),
    }
}

impl fmt::Display for Reference {
    /// The normal form: registry, path, and what was given of tag and digest.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.repository();
        self.append_suffix(&mut text);
        formatter.write_str(&text)
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests;
