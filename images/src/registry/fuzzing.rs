//! Entrances to private parsers for the fuzz targets; no API.

use std::path::Path;

use super::challenge;
use super::hosts;
use super::manifest::Document;
use crate::digest::Digest;

/// A manifest or an index, served with this media type.
pub fn manifest(served_as: &str, bytes: &[u8]) {
    let _ = Document::parse(&Digest::sha256(bytes), served_as, bytes);
}

/// A `WWW-Authenticate` header.
pub fn challenge(header: &str) {
    let _ = challenge::parse(header);
}

/// A `hosts.toml`, which may name files below `directory`.
pub fn hosts(directory: &Path, text: &str, domain: &str) {
    let _ = hosts::parse(&directory.join("hosts.toml"), text, domain);
}
