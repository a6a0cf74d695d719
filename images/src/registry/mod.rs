//! The client of OCI distribution registries (distribution-spec spec.md, "Pull").

mod authorization;
mod blob;
mod challenge;
mod client;
mod credentials;
mod downloads;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod host;
mod hosts;
mod manifest;
mod pace;
mod part;
mod platform;
mod span;
mod text;
mod upload;

pub(crate) use blob::Blob;
pub(crate) use client::{Registry, Resolved};
pub use credentials::{Credentials, CredentialsError};
pub(crate) use downloads::{Downloads, RegistryDownloads};
pub use error::RegistryError;
pub(crate) use manifest::{Descriptor, Document, MAX_INDEX_DEPTH, MAX_MANIFEST, Manifest, candidates};
pub(crate) use platform::Platform;
