//! Version: who speaks here.

use super::Runtime;
use crate::api::runtime::{VersionRequest, VersionResponse};

impl Runtime {
    /// Answers every client: CRI has had one version since Kubernetes 1.26.
    pub fn version(&self, _request: &VersionRequest) -> VersionResponse {
        VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "hull".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: "v1".into(),
        }
    }
}
