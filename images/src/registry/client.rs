//! One image's view of its registry: resolve the reference, fetch documents, open blobs, over all configured hosts.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::Method;
use reqwest::header::{CONTENT_TYPE, HeaderMap};

use crate::digest::Digest;
use crate::reference::Reference;

use super::blob::Blob;
use super::credentials::Credentials;
use super::error::RegistryError;
use super::host::{Ask, Host};
use super::hosts;
use super::manifest::{ACCEPT, Descriptor, Document, MAX_INDEX_DEPTH, MAX_MANIFEST, Manifest, candidates};
use super::platform::Platform;
use super::text::read_bounded;

/// The header with which a registry names the digest of a manifest.
const DIGEST_HEADER: &str = "docker-content-digest";

/// Most documents fetched on the way from a reference to its manifest: indexes that name no platforms are searched.
const MAX_FETCHES: u32 = 64;

/// A registry for the duration of one pull.
pub(crate) struct Registry {
    reference: Reference,
    hosts: Vec<Arc<Host>>,
}

/// A fetched manifest or index, its digest verified.
#[derive(Clone, Debug)]
pub(crate) struct Fetched {
    pub(crate) digest: Digest,
    pub(crate) media_type: String,
    pub(crate) bytes: Bytes,
}

/// What a reference means for this machine.
pub(crate) struct Resolved {
    /// The digest of what the registry serves for the reference itself.
    pub(crate) digest: Digest,
    /// Every document on the way, the reference's own first, the manifest last.
    pub(crate) documents: Vec<Fetched>,
    /// The image.
    pub(crate) manifest: Manifest,
}

impl Registry {
    /// Reads the registry's configuration and prepares its hosts. Nothing is sent yet.
    pub(crate) fn new(
        reference: &Reference,
        credentials: Option<&Credentials>,
        hosts_dir: &Path,
        progress_timeout: Duration,
    ) -> Result<Self, RegistryError> {
        let scope = format!("repository:{}:pull", reference.path());
        Self::open(reference, credentials, hosts_dir, progress_timeout, &scope)
    }

    /// The same for a push, which may take blobs from the repositories `sources` of this registry.
    pub(crate) fn for_push(
        reference: &Reference,
        sources: &[String],
        credentials: Option<&Credentials>,
        hosts_dir: &Path,
        progress_timeout: Duration,
    ) -> Result<Self, RegistryError> {
        let mut scope = format!("repository:{}:pull,push", reference.path());
        for source in sources {
            scope.push_str(&format!(" repository:{source}:pull"));
        }
        let mut registry = Self::open(reference, credentials, hosts_dir, progress_timeout, &scope)?;
        registry.hosts.retain(|host| host.is_server());
        match registry.hosts.is_empty() {
            true => Err(RegistryError::Configuration {
                path: hosts_dir.join(reference.domain()),
                reason: "it names no server that images could be pushed to".to_owned(),
            }),
            false => Ok(registry),
        }
    }

    fn open(
        reference: &Reference,
        credentials: Option<&Credentials>,
        hosts_dir: &Path,
        progress_timeout: Duration,
        scope: &str,
    ) -> Result<Self, RegistryError> {
        if let Some(credentials) = credentials {
            credentials.check()?;
        }
        let mut hosts = Vec::new();
        for config in hosts::load(hosts_dir, reference.domain())? {
            let scope = scope.to_owned();
            let host = Host::new(config, reference.domain(), credentials, progress_timeout, scope)?;
            hosts.push(Arc::new(host));
        }
        Ok(Self { reference: reference.clone(), hosts })
    }

    /// The registry itself; only after [`Registry::for_push`], which has made sure that there is one.
    pub(super) fn server(&self) -> Option<&Host> {
        self.hosts.first().map(Arc::as_ref)
    }

    /// The registry in the image's name, whichever hosts serve it.
    pub(crate) fn domain(&self) -> &str {
        self.reference.domain()
    }

    /// Path of the repository.
    pub(super) fn repository(&self) -> &str {
        self.reference.path()
    }

    /// The digest that the reference means now, without fetching anything; None when the registry does not say so in a
    /// header. Also proves that the credentials are good for the repository.
    pub(crate) async fn digest(&self) -> Result<Option<Digest>, RegistryError> {
        let (path, by_tag) = self.manifest_path();
        let ask = Ask {
            method: Method::HEAD,
            path: &path,
            accept: Some(ACCEPT),
            range: None,
            upload: None,
            what: "the manifest",
        };
        self.ask(&ask, by_tag, |_, response| async move { Ok(digest_header(response.headers())) }).await
    }

    /// Fetches what the reference means for this machine: indexes down to one manifest.
    pub(crate) async fn resolve(&self, platform: &Platform) -> Result<Resolved, RegistryError> {
        let first = self.fetch_reference().await?;
        let digest = first.digest.clone();
        let mut documents = Vec::new();
        let manifest = self.descend(first, platform, &mut documents).await?;
        Ok(Resolved { digest, documents, manifest })
    }

    /// Opens a blob for reading. Connecting happens with the first read.
    pub(crate) fn blob(&self, descriptor: &Descriptor) -> Blob {
        let hosts = self.hosts(false).cloned().collect();
        let path = format!("{}/blobs/{}", self.reference.path(), descriptor.digest);
        Blob::new(hosts, path, descriptor.size)
    }

    /// Fetches a small blob whole, digest verified.
    pub(crate) async fn small_blob(
        &self,
        descriptor: &Descriptor,
        limit: u64,
        what: &str,
    ) -> Result<Bytes, RegistryError> {
        let path = format!("{}/blobs/{}", self.reference.path(), descriptor.digest);
        let ask = Ask { method: Method::GET, path: &path, accept: None, range: None, upload: None, what };
        let fetched = self.fetch(&ask, false, limit.min(descriptor.size), Some(&descriptor.digest)).await?;
        Ok(fetched.bytes)
    }

    /// Walks from a document to the manifest for this machine, best candidate first, depth first. Documents that lead
    /// nowhere are dropped again.
    async fn descend(
        &self,
        first: Fetched,
        platform: &Platform,
        documents: &mut Vec<Fetched>,
    ) -> Result<Manifest, RegistryError> {
        let mut document = first;
        // What is left to try at each level that was entered.
        let mut levels: Vec<std::vec::IntoIter<Descriptor>> = Vec::new();
        let mut failure = None;
        let mut fetched = 0;
        loop {
            match Document::parse(&document.digest, &document.media_type, &document.bytes)? {
                Document::Manifest(manifest) => {
                    documents.push(document);
                    return Ok(manifest);
                }
                Document::Index(_) if levels.len() >= MAX_INDEX_DEPTH => {
                    return Err(RegistryError::Manifest {
                        what: format!("index {}", document.digest),
                        reason: format!("indexes nest deeper than {MAX_INDEX_DEPTH}"),
                    });
                }
                Document::Index(entries) => match candidates(&entries, platform) {
                    Ok(candidates) => {
                        documents.push(document);
                        levels.push(candidates.into_iter());
                    }
                    Err(error) => {
                        failure.get_or_insert(error);
                    }
                },
            }
            let next = loop {
                let Some(level) = levels.last_mut() else {
                    let nothing =
                        || RegistryError::Platform { wanted: platform.to_string(), available: "none".into() };
                    return Err(failure.unwrap_or_else(nothing));
                };
                match level.next() {
                    Some(next) => break next,
                    None => {
                        levels.pop();
                        documents.pop();
                    }
                }
            };
            fetched += 1;
            if fetched > MAX_FETCHES {
                return Err(RegistryError::Manifest {
                    what: format!("index {}", self.reference),
                    reason: format!("no image for this machine among {MAX_FETCHES} documents"),
                });
            }
            document = self.fetch_manifest(&next.digest).await?;
        }
    }

    async fn fetch_reference(&self) -> Result<Fetched, RegistryError> {
        if let Some(digest) = self.reference.digest() {
            return self.fetch_manifest(digest).await;
        }
        let (path, by_tag) = self.manifest_path();
        let ask = Ask {
            method: Method::GET,
            path: &path,
            accept: Some(ACCEPT),
            range: None,
            upload: None,
            what: "the manifest",
        };
        self.fetch(&ask, by_tag, MAX_MANIFEST, None).await
    }

    async fn fetch_manifest(&self, digest: &Digest) -> Result<Fetched, RegistryError> {
        let path = format!("{}/manifests/{digest}", self.reference.path());
        let ask = Ask {
            method: Method::GET,
            path: &path,
            accept: Some(ACCEPT),
            range: None,
            upload: None,
            what: "the manifest",
        };
        self.fetch(&ask, false, MAX_MANIFEST, Some(digest)).await
    }

    /// The path of the reference's own manifest, and whether it goes by a tag.
    fn manifest_path(&self) -> (String, bool) {
        let path = self.reference.path();
        match (self.reference.digest(), self.reference.tag()) {
            (None, Some(tag)) => (format!("{path}/manifests/{tag}"), true),
            (Some(digest), _) => (format!("{path}/manifests/{digest}"), false),
            (None, None) => (format!("{path}/manifests/latest"), true),
        }
    }

    /// The hosts that may be asked, in order; those that were found away only if there is no other.
    fn hosts(&self, by_tag: bool) -> impl Iterator<Item = &Arc<Host>> {
        let able = move |host: &&Arc<Host>| if by_tag { host.resolves() } else { host.serves() };
        let all_away = self.hosts.iter().filter(able).all(|host| host.is_away());
        self.hosts.iter().filter(able).filter(move |host| all_away || !host.is_away())
    }

    /// Fetches a whole answer, from the first host that gives one with the right digest: what is expected, else what
    /// the host itself names.
    async fn fetch(
        &self,
        ask: &Ask<'_>,
        by_tag: bool,
        limit: u64,
        expected: Option<&Digest>,
    ) -> Result<Fetched, RegistryError> {
        let what = ask.what;
        self.ask(ask, by_tag, |host, response| async move {
            let named = expected.cloned().or_else(|| digest_header(response.headers()));
            let media_type = media_type(response.headers());
            let bytes = read_bounded(response, host.pace(), host.name(), what, limit).await?;
            let digest = match named {
                Some(named) => {
                    verify(host.name(), what, &bytes, &named)?;
                    named
                }
                None => Digest::sha256(&bytes),
            };
            Ok(Fetched { digest, media_type, bytes })
        })
        .await
    }

    /// Asks the hosts in order until one gives an answer that `read` accepts. The last failure stands for all: the
    /// registry itself comes last.
    async fn ask<T, F>(
        &self,
        ask: &Ask<'_>,
        by_tag: bool,
        read: impl Fn(Arc<Host>, reqwest::Response) -> F,
    ) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, RegistryError>>,
    {
        let mut failure = None;
        for host in self.hosts(by_tag) {
            let answer = match host.request(ask).await {
                Ok(response) => read(host.clone(), response).await,
                Err(error) => Err(error),
            };
            match answer {
                Ok(answer) => return Ok(answer),
                Err(error) => {
                    if let Some(earlier) = failure.replace(error) {
                        tracing::warn!(image = %self.reference, error = %earlier, "a mirror failed");
                    }
                }
            }
        }
        Err(failure.unwrap_or_else(|| RegistryError::Configuration {
            path: self.reference.domain().into(),
            reason: "no configured host has the capability to answer".to_owned(),
        }))
    }
}

fn digest_header(headers: &HeaderMap) -> Option<Digest> {
    headers.get(DIGEST_HEADER)?.to_str().ok()?.parse().ok()
}

fn media_type(headers: &HeaderMap) -> String {
    let value = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().chars().take(255).collect()
}

fn verify(host: &str, what: &str, bytes: &[u8], expected: &Digest) -> Result<(), RegistryError> {
    let actual = Digest::of(expected.algorithm(), bytes);
    if actual != *expected {
        return Err(RegistryError::Digest {
            host: host.to_owned(),
            what: what.to_owned(),
            actual,
            expected: expected.clone(),
        });
    }
    Ok(())
}
