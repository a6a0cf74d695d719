//! Where an image came from: what is not kept of it can be had there again.

use crate::image::Image;
use crate::reference::Reference;
use crate::registry::{Credentials, Registry, RegistryError};

use super::ImageStore;

/// Registries that are asked for a layer, one after the other.
const MAX_ORIGINS: usize = 8;

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
