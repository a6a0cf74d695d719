//! Pushing (distribution-spec spec.md, "Push"): blobs in chunks, or not at all where the registry has them, then the
//! manifest.

use bytes::Bytes;
use reqwest::Method;
use url::Url;

use crate::digest::Digest;

use super::client::Registry;
use super::error::RegistryError;
use super::host::{Ask, Host, Upload};

/// What an upload's bytes are.
const OCTETS: &str = "application/octet-stream";

/// A blob on its way to the registry.
pub(crate) struct BlobUpload<'r> {
    host: &'r Host,
    to: Url,
    sent: u64,
}

impl Registry {
    /// Whether the repository has the blob.
    pub(crate) async fn has_blob(&self, digest: &Digest) -> Result<bool, RegistryError> {
        let path = format!("{}/blobs/{digest}", self.repository());
        let ask = Ask {
            method: Method::HEAD,
            path: &path,
            accept: None,
            range: None,
            upload: None,
            what: "a layer",
        };
        match self.push_host()?.request(&ask).await {
            Ok(_) => Ok(true),
            Err(RegistryError::Status { status: 404, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Takes the blob over from another repository of the registry, if it may.
    pub(crate) async fn mount_blob(&self, digest: &Digest, from: &str) -> Result<bool, RegistryError> {
        let host = self.push_host()?;
        let digest = digest.to_string();
        let query = [("mount", digest.as_str()), ("from", from)];
        let answer = self.begin(host, &query).await?;
        // 202 is an upload that was begun instead; nobody goes on with it, and the registry forgets it.
        Ok(answer.status().as_u16() == 201)
    }

    /// Begins to send a blob.
    pub(crate) async fn begin_blob(&self) -> Result<BlobUpload<'_>, RegistryError> {
        let host = self.push_host()?;
        let answer = self.begin(host, &[]).await?;
        Ok(BlobUpload { host, to: host.location(&answer)?, sent: 0 })
    }

    /// Sends a manifest under the reference's tag or digest.
    pub(crate) async fn put_manifest(
        &self,
        reference: &str,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<(), RegistryError> {
        let path = format!("{}/manifests/{reference}", self.repository());
        let upload = Upload { to: None, query: &[], content_type: media_type, bytes, range: None };
        let what = "the manifest";
        let ask =
            Ask { method: Method::PUT, path: &path, accept: None, range: None, upload: Some(upload), what };
        self.push_host()?.request(&ask).await.map(drop)
    }

    async fn begin(&self, host: &Host, query: &[(&str, &str)]) -> Result<reqwest::Response, RegistryError> {
        let path = format!("{}/blobs/uploads/", self.repository());
        let upload = Upload { to: None, query, content_type: OCTETS, bytes: Bytes::new(), range: None };
        let what = "an upload";
        let ask =
            Ask { method: Method::POST, path: &path, accept: None, range: None, upload: Some(upload), what };
        host.request(&ask).await
    }

    fn push_host(&self) -> Result<&Host, RegistryError> {
        self.server().ok_or_else(|| RegistryError::Protocol {
            host: self.repository().to_owned(),
            reason: "there is no host to push to".to_owned(),
        })
    }
}

impl BlobUpload<'_> {
    /// Sends the next bytes.
    pub(crate) async fn chunk(&mut self, bytes: Bytes) -> Result<(), RegistryError> {
        let length = bytes.len() as u64;
        let upload =
            Upload { to: Some(&self.to), query: &[], content_type: OCTETS, bytes, range: Some(self.sent) };
        let what = "a chunk of a layer";
        let ask =
            Ask { method: Method::PATCH, path: "", accept: None, range: None, upload: Some(upload), what };
        let answer = self.host.request(&ask).await?;
        self.to = self.host.location(&answer)?;
        self.sent += length;
        Ok(())
    }

    /// Ends the upload: what was sent is the blob with this digest.
    pub(crate) async fn finish(self, digest: &Digest) -> Result<(), RegistryError> {
        let digest = digest.to_string();
        let query = [("digest", digest.as_str())];
        let upload = Upload {
            to: Some(&self.to),
            query: &query,
            content_type: OCTETS,
            bytes: Bytes::new(),
            range: None,
        };
        let what = "the end of a layer";
        let ask =
            Ask { method: Method::PUT, path: "", accept: None, range: None, upload: Some(upload), what };
        self.host.request(&ask).await.map(drop)
    }
}
