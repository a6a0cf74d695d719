//! Pulls: from a reference to a committed image.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use tokio::sync::mpsc::UnboundedSender;

use crate::digest::Digest;
use crate::image::{Image, ImageConfig, MAX_CONFIG};
use crate::layer::LayerId;
use crate::reference::Reference;
use crate::registry::{Credentials, Descriptor, Platform, Registry, RegistryError, Resolved};

use super::ImageStore;
use super::arrival::Arrival;
use super::error::{PullError, StoreError};
use super::layers::LayerFailure;
use super::progress::{Board, PullProgress};
use super::staged::Staged;

/// What makes two pulls the same: the reference and the credentials. Only a digest of the credentials is kept.
pub(super) type Key = (Reference, Digest);
/// The result that joined pulls share.
pub(super) type Outcome = Result<Image, PullError>;

impl ImageStore {
    /// Pulls the image. The same pull that is already under way is joined. Dropping the future leaves the pull; when
    /// nobody waits any more it is cancelled and nothing of it stays. `progress` hears what happened so far and all that
    /// follows.
    pub async fn pull(
        self: &Arc<Self>,
        reference: &Reference,
        credentials: Option<Credentials>,
        progress: Option<UnboundedSender<PullProgress>>,
    ) -> Result<Image, PullError> {
        let credentials = credentials.filter(|credentials| !credentials.is_empty());
        let key = (reference.clone(), fingerprint(credentials.as_ref()));
        let (flight, _) = self.pulls.join(&key, || {
            let board = Arc::new(Board::default());
            let pull = Pull { store: self.clone(), reference: reference.clone(), board: board.clone() };
            (board, async move { pull.run(credentials).await })
        });
        if let Some(progress) = progress {
            flight.progress().subscribe(progress);
        }
        let outcome = flight.result().await;
        outcome.unwrap_or_else(|| Err(PullError::Cancelled { image: reference.to_string() }))
    }
}

/// Distinguishes credentials without keeping them.
fn fingerprint(credentials: Option<&Credentials>) -> Digest {
    let mut bytes = Vec::new();
    if let Some(credentials) = credentials {
        for part in [
            &credentials.username,
            &credentials.password,
            &credentials.identity_token,
            &credentials.registry_token,
            &credentials.server_address,
        ] {
            bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
            bytes.extend_from_slice(part.as_bytes());
        }
    }
    Digest::sha256(&bytes)
}

/// One pull.
struct Pull {
    store: Arc<ImageStore>,
    reference: Reference,
    board: Arc<Board>,
}

impl Pull {
    async fn run(self, credentials: Option<Credentials>) -> Outcome {
        let registry = self.registry(credentials).await?;
        if let Some(image) = self.unchanged(&registry).await? {
            return Ok(image);
        }
        let resolved =
            registry.resolve(&Platform::host()).await.map_err(|error| self.registry_error(error))?;
        let config = self.config(&registry, &resolved).await?;
        self.check(&resolved, &config)?;
        let layers =
            resolved.manifest.layers.iter().map(|layer| (layer.digest.clone(), layer.size)).collect();
        self.board.tell(PullProgress::Resolved { digest: resolved.digest.clone(), layers });
        // From here on nothing of the image that is on the node already can be removed.
        let hold = self.store.hold(&config.diff_ids);
        let staged = self.layers(&registry, &resolved.manifest.layers, &config.diff_ids).await?;
        let arrival = self.arrival(resolved, config, staged);
        let store = self.store.clone();
        let committed = tokio::task::spawn_blocking(move || {
            let committed = store.commit(&arrival);
            drop(hold);
            committed
        });
        match committed.await {
            Ok(committed) => committed.map_err(|error| self.store_error(error)),
            Err(_) => Err(PullError::Cancelled { image: self.reference.to_string() }),
        }
    }

    /// Reads files and builds TLS clients: work for a blocking thread.
    async fn registry(&self, credentials: Option<Credentials>) -> Result<Registry, PullError> {
        let (reference, config) = (self.reference.clone(), self.store.config.clone());
        let open = move || {
            Registry::new(&reference, credentials.as_ref(), &config.hosts_dir, config.progress_timeout)
        };
        match tokio::task::spawn_blocking(open).await {
            Ok(registry) => registry.map_err(|error| self.registry_error(error)),
            Err(_) => Err(PullError::Cancelled { image: self.reference.to_string() }),
        }
    }

    /// The image, if the reference is known here and still means the same at the registry, which is asked in any case:
    /// it decides whether these credentials may have the image.
    async fn unchanged(&self, registry: &Registry) -> Result<Option<Image>, PullError> {
        if !self.store.read().names.contains_key(&self.reference.name()) {
            return Ok(None);
        }
        let digest = match registry.digest().await {
            Ok(Some(digest)) => digest,
            Ok(None) | Err(RegistryError::Status { status: 400 | 405 | 501, .. }) => return Ok(None),
            Err(error) => return Err(self.registry_error(error)),
        };
        let known = self.reference.at_digest(&digest).name();
        let id = {
            let catalogue = self.store.read();
            let Some(id) = catalogue.names.get(&known).cloned() else { return Ok(None) };
            if catalogue.names.get(&self.reference.name()) != Some(&id) {
                // The tag moved to an image that is here under another name; the usual way moves the name.
                return Ok(None);
            }
            catalogue.image(&id)
        };
        let Some(image) = id else { return Ok(None) };
        if !self.store.came_last_by(&image.id, &digest).map_err(|error| self.store_error(error))? {
            // The usual way makes this manifest the latest again, which is the one that the tag means.
            return Ok(None);
        }
        self.board.tell(PullProgress::Resolved { digest, layers: Vec::new() });
        Ok(Some(image))
    }

    async fn config(&self, registry: &Registry, resolved: &Resolved) -> Result<ImageConfig, PullError> {
        let descriptor = &resolved.manifest.config;
        let known =
            self.store.read().images.get(&descriptor.digest.to_string()).map(|entry| entry.config.clone());
        if let Some(config) = known {
            return Ok(config);
        }
        let raw = registry.small_blob(descriptor, MAX_CONFIG, "the configuration").await;
        let raw = raw.map_err(|error| self.registry_error(error))?;
        // Into a buffer of its own: the answer's may be part of a larger one.
        ImageConfig::parse(Bytes::copy_from_slice(&raw)).map_err(|source| PullError::Config {
            image: self.reference.to_string(),
            digest: descriptor.digest.clone(),
            source,
        })
    }

    /// Manifest and configuration must describe the same stack, for this machine.
    fn check(&self, resolved: &Resolved, config: &ImageConfig) -> Result<(), PullError> {
        let not_runnable =
            |reason: String| Err(PullError::NotRunnable { image: self.reference.to_string(), reason });
        let (layers, diff_ids) = (resolved.manifest.layers.len(), config.diff_ids.len());
        if layers != diff_ids {
            return not_runnable(format!("its manifest has {layers} layers, its configuration {diff_ids}"));
        }
        let host = Platform::host();
        // Hand-made images leave these out; then there is nothing to contradict.
        if !config.os.is_empty() && config.os != host.os {
            return not_runnable(format!("it is for the operating system {:?}", config.os));
        }
        let architecture =
            Platform { variant: String::new(), architecture: config.architecture.clone(), ..host.clone() };
        if !config.architecture.is_empty() && host.fit(&architecture).is_none() {
            return not_runnable(format!("it is for {architecture}, this machine is {host}"));
        }
        Ok(())
    }

    /// All layers, some at a time. The first failure ends the others.
    async fn layers(
        &self,
        registry: &Registry,
        descriptors: &[Descriptor],
        diff_ids: &[LayerId],
    ) -> Result<Vec<Arc<Staged>>, PullError> {
        let mut layers = Vec::with_capacity(descriptors.len());
        for (descriptor, layer) in descriptors.iter().zip(diff_ids) {
            layers.push(async move {
                let obtained = self.store.obtain_layer(registry, descriptor, layer, &self.board).await;
                obtained.map_err(|failure| self.layer_error(descriptor, failure))
            });
        }
        let parallel = self.store.config.max_parallel_layers.max(1);
        let staged: Vec<Option<Arc<Staged>>> =
            stream::iter(layers).buffer_unordered(parallel).try_collect().await?;
        Ok(staged.into_iter().flatten().collect())
    }

    /// The image has the reference's name and that of the digest which the reference led to.
    fn arrival(&self, resolved: Resolved, config: ImageConfig, staged: Vec<Arc<Staged>>) -> Arrival {
        let mut names = vec![self.reference.at_digest(&resolved.digest).name()];
        if self.reference.digest().is_none() {
            names.push(self.reference.name());
        }
        let documents =
            resolved.documents.into_iter().map(|document| (document.digest, document.bytes)).collect();
        Arrival { id: resolved.manifest.config.digest, config, documents, names, staged }
    }

    fn registry_error(&self, source: RegistryError) -> PullError {
        PullError::Registry { image: self.reference.to_string(), source: Box::new(source) }
    }

    fn store_error(&self, source: StoreError) -> PullError {
        PullError::Store { image: self.reference.to_string(), source }
    }

    fn layer_error(&self, descriptor: &Descriptor, failure: LayerFailure) -> PullError {
        let (image, layer) = (self.reference.to_string(), descriptor.digest.clone());
        match failure {
            LayerFailure::Download(source) => PullError::Download { image, layer, source: Box::new(source) },
            LayerFailure::Content(source) => PullError::Layer { image, layer, source },
            LayerFailure::Store(source) => PullError::Store { image, source },
            LayerFailure::Cancelled => PullError::Cancelled { image },
        }
    }
}
