//! TLS of the server for streams: a certificate and its key, read again when their files change.
//!
//! TLS 1.2 is the least that is spoken. Who a client is, its token tells; certificates of clients are not asked for.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{self, ServerConfig};

/// Longest file in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file has something else in it.
    #[error("{} holds no {what} in PEM form: {reason}", path.display())]
    Content {
        /// Which one.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// What was found.
        reason: String,
    },
    /// The two do not fit.
    #[error("cannot use the certificate {} with the key {}: {source}", certificate.display(), key.display())]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
        /// Why not.
        source: rustls::Error,
    },
}

/// A certificate with its key, as their files have them.
#[derive(Debug)]
pub struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    /// What was tried last, whether it could be used or not.
    tried: [Option<Version>; 2],
    identity: Identity,
}

/// What the server shows.
#[derive(Clone)]
pub struct Identity {
    /// Its own certificate (DER), without those that signed it.
    pub certificate: CertificateDer<'static>,
    /// What takes connections with it.
    pub acceptor: TlsAcceptor,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").finish_non_exhaustive()
    }
}

/// One content of a file: device, inode, size, and its last change in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version(u64, u64, u64, i128);

impl Version {
    /// None if there is no such file at the moment.
    fn of(path: &Path) -> Option<Self> {
        let file = std::fs::metadata(path).ok()?;
        let changed = i128::from(file.ctime()) * 1_000_000_000 + i128::from(file.ctime_nsec());
        Some(Self(file.dev(), file.ino(), file.size(), changed))
    }
}

impl Tls {
    /// Reads both files: the certificate, followed by those that signed it, and its key (PKCS #8, PKCS #1 or SEC 1).
    /// Blocks for a little while.
    pub fn open(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        // Looked at first: what changes while it is read is seen to have changed afterwards.
        let tried = [Version::of(certificate), Version::of(key)];
        let identity = read(certificate, key)?;
        let current = Mutex::new(Current { tried, identity });
        Ok(Self { certificate: certificate.to_owned(), key: key.to_owned(), current })
    }

    /// What is in the files now. As long as that cannot be used (a new certificate whose key has not come yet), what was
    /// there before. Blocks for a little while.
    pub fn identity(&self) -> Identity {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let now = [Version::of(&self.certificate), Version::of(&self.key)];
        if now != current.tried {
            current.tried = now;
            match read(&self.certificate, &self.key) {
                Ok(identity) => {
                    tracing::info!(certificate = %self.certificate.display(), "streams have a new certificate");
                    current.identity = identity;
                }
                Err(error) => tracing::warn!(%error, "streams keep the certificate that they had"),
            }
        }
        current.identity.clone()
    }
}

fn read(certificate: &Path, key: &Path) -> Result<Identity, TlsError> {
    let content =
        |path: &Path, what, reason: String| TlsError::Content { path: path.to_owned(), what, reason };
    let text = read_file(certificate)?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|error| content(certificate, "certificate", error.to_string()))?;
    let Some(own) = chain.first().cloned() else {
        return Err(content(certificate, "certificate", "there is none".into()));
    };
    let text = read_file(key)?;
    let private = PrivateKeyDer::from_pem_slice(&text)
        .map_err(|error| content(key, "private key", error.to_string()))?;
    let pair = |source| TlsError::Pair { certificate: certificate.to_owned(), key: key.to_owned(), source };
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(pair)?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(pair)?;
    Ok(Identity { certificate: own, acceptor: TlsAcceptor::from(Arc::new(config)) })
}

fn read_file(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let read =
        File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if read as u64 > MAX_FILE {
        return Err(failed(std::io::Error::other(format!("it is longer than {MAX_FILE} bytes"))));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A certificate of its own authority and its key, in PEM.
    fn pair() -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        (parameters.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    #[test]
    fn changed_files_are_read_again_and_a_half_changed_pair_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let [certificate, key] = ["crt", "key"].map(|name| directory.path().join(name));
        let put = |path: &Path, text: &str| {
            let new = path.with_extension("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(&new, path).unwrap();
        };
        let (first, second) = (pair(), pair());
        put(&certificate, &first.0);
        put(&key, &first.1);
        let tls = Tls::open(&certificate, &key).unwrap();
        let shown = || CertificateDer::pem_slice_iter(tls.identity().certificate.as_ref()).count();
        assert_eq!(shown(), 0, "it is DER");
        let before = tls.identity().certificate;

        put(&certificate, &second.0);
        assert_eq!(tls.identity().certificate, before, "its key has not come yet");
        put(&key, &second.1);
        let after = tls.identity().certificate;
        assert_ne!(after, before);
        std::fs::remove_file(&key).unwrap();
        assert_eq!(tls.identity().certificate, after);
        put(&key, "nonsense");
        assert_eq!(tls.identity().certificate, after);
    }

    #[test]
    fn what_cannot_be_used_is_told_by_file_and_reason() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let (one, other) = (pair(), pair());
        let (certificate, key) = (path("crt", &one.0), path("key", &one.1));
        let wrong = |certificate: &Path, key: &Path| Tls::open(certificate, key).unwrap_err().to_string();
        assert!(wrong(&directory.path().join("none"), &key).contains("cannot read"));
        assert!(wrong(&path("empty", ""), &key).contains("holds no certificate"));
        assert!(wrong(&key, &key).contains("holds no certificate"));
        assert!(wrong(&certificate, &certificate).contains("holds no private key"));
        assert!(wrong(&certificate, &path("other", &other.1)).contains("cannot use the certificate"));
        assert!(wrong(&path("large", &"x".repeat(2 << 20)), &key).contains("longer than"));
    }
}
