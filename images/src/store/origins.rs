//! Where an image came from: what was not kept of it can be had there again.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;

use crate::image::Image;
use crate::reference::Reference;
use crate::registry::{Blob, Credentials, Registry, RegistryError};

use super::ImageStore;

/// Registries that are asked for a layer, one after the other.
const MAX_ORIGINS: usize = 8;

/// Bytes that are read of a kept blob at a time.
const PIECE: usize = 1 << 20;

/// A layer as it was compressed, piece by piece. Its digest is not verified here: the reader does that.
pub(super) enum Compressed {
    /// The file that was kept, and how much of it was read.
    Kept(Arc<File>, u64),
    Remote(Box<Blob>),
}

/// Why a layer does not come.
pub(super) enum Lost {
    /// The registry does not send it.
    Failed(RegistryError),
    /// What came is not what its digest says, or cannot be read.
    Wrong,
}

impl Compressed {
    pub(super) fn of_file(file: File) -> Self {
        Self::Kept(Arc::new(file), 0)
    }

    pub(super) fn of_registry(blob: Blob) -> Self {
        Self::Remote(Box::new(blob))
    }

    /// The next bytes; None at the end, which may come before the expected size.
    pub(super) async fn chunk(&mut self) -> Result<Option<Bytes>, Lost> {
        match self {
            Self::Remote(blob) => blob.chunk().await.map_err(|error| match error {
                RegistryError::TooLarge { .. } => Lost::Wrong,
                error => Lost::Failed(error),
            }),
            Self::Kept(file, position) => {
                let (file, from) = (Arc::clone(file), *position);
                let read = move || {
                    let mut piece = vec![0; PIECE];
                    let length = file.read_at(&mut piece, from)?;
                    piece.truncate(length);
                    std::io::Result::Ok(piece)
                };
                let piece = tokio::task::spawn_blocking(read).await;
                let piece = piece.ok().and_then(Result::ok).ok_or(Lost::Wrong)?;
                *position += piece.len() as u64;
                Ok((!piece.is_empty()).then(|| piece.into()))
            }
        }
    }

    /// From another host of the same registry, if there is one: what came was wrong.
    pub(super) fn elsewhere(&self) -> Option<Self> {
        match self {
            Self::Remote(blob) => blob.elsewhere().map(Self::of_registry),
            Self::Kept(..) => None,
        }
    }
}

/// What is done about one of the names that an image came by.
pub(super) enum Login {
    /// Its registry is not asked.
    Skip,
    With(Option<Credentials>),
}

impl ImageStore {
    /// The registries that the image came from. `login` is asked about each; its second argument is whether credentials
    /// that were given for the image are meant for this registry: it is the only one, or that of `named_registry`, the
    /// name by which the image was asked for. A secret goes nowhere else.
    pub(super) async fn origins(
        &self,
        image: &Image,
        named_registry: Option<&str>,
        login: impl Fn(&Reference, bool) -> Login,
    ) -> Result<Vec<Registry>, RegistryError> {
        let names = image.repo_digests.iter().filter_map(|name| name.parse::<Reference>().ok());
        let names: Vec<Reference> = names.take(MAX_ORIGINS).collect();
        let is_one_registry = names.windows(2).all(|pair| pair[0].domain() == pair[1].domain());
        let mut origins = Vec::new();
        for reference in names {
            let is_meant = is_one_registry || named_registry == Some(reference.domain());
            let Login::With(credentials) = login(&reference, is_meant) else { continue };
            let config = self.config.clone();
            let open = move || {
                let credentials = credentials.filter(|credentials| !credentials.is_empty());
                let hosts = &config.hosts_dir;
                Registry::new(&reference, credentials.as_ref(), hosts, config.progress_timeout)
            };
            origins.push(blocking(open).await?);
        }
        Ok(origins)
    }

    /// The registry in `name`, if that is one of the image's names.
    pub(super) fn named_registry(name: &str, image: &Image) -> Option<String> {
        let reference = name.parse::<Reference>().ok()?;
        let name = reference.name();
        let is_known = image.repo_tags.contains(&name) || image.repo_digests.contains(&name);
        is_known.then(|| reference.domain().to_owned())
    }
}

/// Reads files and builds TLS clients: work for a blocking thread.
pub(super) async fn blocking(
    open: impl FnOnce() -> Result<Registry, RegistryError> + Send + 'static,
) -> Result<Registry, RegistryError> {
    tokio::task::spawn_blocking(open).await.unwrap_or_else(|_| {
        Err(RegistryError::Protocol { host: String::new(), reason: "the call was cancelled".to_owned() })
    })
}
