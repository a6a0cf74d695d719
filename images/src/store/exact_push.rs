//! Pushes with the manifest that an image came with. What the target lacks of its layers is sent as it was kept, else
//! passed on from where the image came from, without touching the disk.

use bytes::{Bytes, BytesMut};

use crate::digest::Hasher;
use crate::layer::{Compression, LayerId};
use crate::reference::Reference;
use crate::registry::{Descriptor, Registry, RegistryError};

use super::origins::{Compressed, Login, Lost};
use super::push::{CHUNK, Known, MAX_ATTEMPTS, Push, PushError, PushOptions, PushProgress, Pushed, is_cut};

impl Push<'_> {
    pub(super) async fn exactly(
        &self,
        known: Option<Known>,
        options: &PushOptions,
        progress: &mut impl FnMut(PushProgress),
    ) -> Result<Pushed, PushError> {
        let known = known.ok_or_else(|| {
            self.not_exact("it came without a manifest, from a container or a docker archive".to_owned())
        })?;
        let mut origins = None;
        for (descriptor, layer) in known.manifest.layers.iter().zip(&self.image.config.diff_ids) {
            if self.has(descriptor).await.map_err(|source| self.failed(source))? {
                progress(PushProgress::Exists(layer.clone()));
                continue;
            }
            if Compression::from_media_type(&descriptor.media_type).is_ok_and(|one| one == Compression::None)
            {
                self.send_archive(layer, false, progress).await?;
            } else if !self.send_kept(descriptor, layer, progress).await? {
                let origins = match &mut origins {
                    Some(origins) => origins,
                    unknown => unknown.insert(self.origins(options).await?),
                };
                self.pass_on(origins, descriptor, layer, progress).await?;
            }
            progress(PushProgress::Done(layer.clone()));
        }
        self.config().await?;
        self.finish_with(&known).await
    }

    /// The registries that the image came from, the target left out: it has been asked already.
    async fn origins(&self, options: &PushOptions) -> Result<Vec<Registry>, PushError> {
        let login = |reference: &Reference, is_meant: bool| {
            let is_same_registry = reference.domain() == self.target.domain();
            if is_same_registry && reference.path() == self.target.path() {
                return Login::Skip;
            }
            Login::With(match &options.source_credentials {
                Some(given) if is_meant => Some(given.clone()),
                _ if is_same_registry => options.credentials.clone(),
                _ => None,
            })
        };
        let origins = self.store.origins(self.image, self.named_registry.as_deref(), login);
        let origins = origins.await.map_err(|source| self.failed(source))?;
        match origins.is_empty() {
            true => Err(self.not_exact(
                "layers were not kept as they were compressed, and it is not known where they could be had again"
                    .to_owned(),
            )),
            false => Ok(origins),
        }
    }

    /// Sends a layer as it was kept; false if it was not, or is damaged.
    pub(super) async fn send_kept(
        &self,
        descriptor: &Descriptor,
        layer: &LayerId,
        progress: &mut impl FnMut(PushProgress),
    ) -> Result<bool, PushError> {
        let mut attempt = 1;
        while let Some(file) = self.store.kept(&descriptor.digest) {
            let mut compressed = Compressed::of_file(file);
            match self.pass_on_from(&mut compressed, descriptor, layer, progress).await {
                Ok(()) => return Ok(true),
                Err(Side::Target(error)) if attempt < MAX_ATTEMPTS && is_cut(&error) => attempt += 1,
                Err(Side::Target(error)) => return Err(self.failed(error)),
                Err(Side::Origin(Lost::Wrong | Lost::Failed(_))) => self.store.drop_kept(&descriptor.digest),
            }
        }
        Ok(false)
    }

    async fn pass_on(
        &self,
        origins: &[Registry],
        descriptor: &Descriptor,
        layer: &LayerId,
        progress: &mut impl FnMut(PushProgress),
    ) -> Result<(), PushError> {
        let mut reasons = Vec::new();
        for origin in origins {
            let (mut attempt, mut blob) = (1, Compressed::of_registry(origin.blob(descriptor)));
            loop {
                let other = match self.pass_on_from(&mut blob, descriptor, layer, progress).await {
                    Ok(()) => return Ok(()),
                    Err(Side::Target(error)) if attempt < MAX_ATTEMPTS && is_cut(&error) => {
                        attempt += 1;
                        Some(Compressed::of_registry(origin.blob(descriptor)))
                    }
                    Err(Side::Target(error)) => return Err(self.failed(error)),
                    Err(Side::Origin(Lost::Failed(error))) => {
                        reasons.push(error.to_string());
                        None
                    }
                    // One of its mirrors may be damaged, and the next one not.
                    Err(Side::Origin(Lost::Wrong)) => {
                        reasons.push(format!("what came for {} is something else", descriptor.digest));
                        blob.elsewhere()
                    }
                };
                match other {
                    Some(other) => blob = other,
                    None => break,
                }
            }
        }
        Err(self.not_exact(format!(
            "layer {}, which was not kept as it was compressed, cannot be had again: {}",
            descriptor.digest,
            reasons.join("; ")
        )))
    }

    async fn pass_on_from(
        &self,
        blob: &mut Compressed,
        descriptor: &Descriptor,
        layer: &LayerId,
        progress: &mut impl FnMut(PushProgress),
    ) -> Result<(), Side> {
        let mut hasher = Hasher::new(descriptor.digest.algorithm());
        let mut upload = self.registry.begin_blob().await.map_err(Side::Target)?;
        let (mut gathered, mut size) = (BytesMut::with_capacity(CHUNK), 0);
        loop {
            let piece = blob.chunk().await.map_err(Side::Origin)?;
            let is_last = piece.is_none();
            let piece = piece.unwrap_or_default();
            hasher.update(&piece);
            size += piece.len() as u64;
            gathered.extend_from_slice(&piece);
            if gathered.len() >= CHUNK || is_last && !gathered.is_empty() {
                let chunk: Bytes = std::mem::replace(&mut gathered, BytesMut::with_capacity(CHUNK)).freeze();
                upload.chunk(chunk).await.map_err(Side::Target)?;
                progress(PushProgress::Sent(layer.clone(), size));
            }
            if is_last {
                break;
            }
        }
        if size != descriptor.size || hasher.finish() != descriptor.digest {
            return Err(Side::Origin(Lost::Wrong));
        }
        upload.finish(&descriptor.digest).await.map_err(Side::Target)
    }

    fn not_exact(&self, reason: String) -> PushError {
        PushError::NotExact { image: self.target.to_string(), reason }
    }
}

/// Whose fault it is.
enum Side {
    Origin(Lost),
    Target(RegistryError),
}
