//! Entrances to private parsers for the fuzz targets; no API.

use std::path::Path;

use super::challenge;
use super::hosts;
use super::manifest::{Document, candidates};
use super::platform::Platform;
use crate::digest::Digest;

/// A manifest or an index, served with this media type.
pub fn manifest(served_as: &str, bytes: &[u8]) {
    let _ = Document::parse(&Digest::sha256(bytes), served_as, bytes);
}

/// An index, and what of it is for machines of several kinds.
pub fn index(bytes: &[u8]) {
    let served_as = "application/vnd.oci.image.index.v1+json";
    let Ok(Document::Index(entries)) = Document::parse(&Digest::sha256(bytes), served_as, bytes) else {
        return;
    };
    for (architecture, variant) in [("amd64", "v3"), ("arm64", "v8"), ("riscv64", "")] {
        let host = Platform {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
        };
        if let Ok(candidates) = candidates(&entries, &host) {
            assert!(!candidates.is_empty() && candidates.len() <= entries.len());
        }
    }
}

/// A `WWW-Authenticate` header.
pub fn challenge(header: &str) {
    let _ = challenge::parse(header);
}

/// A `hosts.toml`, which may name files below `directory`.
pub fn hosts(directory: &Path, text: &str, domain: &str) {
    let _ = hosts::parse(&directory.join("hosts.toml"), text, domain);
}
