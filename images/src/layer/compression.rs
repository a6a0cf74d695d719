use super::error::LayerError;

/// How a layer blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// A plain tar archive.
    None,
    /// One or more gzip members.
    Gzip,
    /// One or more zstd frames.
    Zstd,
}

/// Bytes that [`Compression::from_magic`] wants to see.
pub(crate) const MAGIC_LEN: usize = 4;

impl Compression {
    /// From a manifest's media type: OCI image-spec media-types.md and layer.md, and Docker's schema 2.
    pub fn from_media_type(media_type: &str) -> Result<Self, LayerError> {
        const OCI: &str = "application/vnd.oci.image.layer.";
        const DOCKER: &str = "application/vnd.docker.image.rootfs.";
        let kind = if let Some(rest) = media_type.strip_prefix(OCI) {
            rest.strip_prefix("nondistributable.").unwrap_or(rest).strip_prefix("v1.")
        } else if let Some(rest) = media_type.strip_prefix(DOCKER) {
            rest.strip_prefix("foreign.").unwrap_or(rest).strip_prefix("diff.")
        } else {
            None
        };
        match kind {
            Some("tar") => Ok(Self::None),
            Some("tar+gzip" | "tar.gzip") => Ok(Self::Gzip),
            Some("tar+zstd" | "tar.zstd") => Ok(Self::Zstd),
            _ => Err(LayerError::UnsupportedMediaType(media_type.chars().take(200).collect())),
        }
    }

    /// From a blob's first bytes; what is neither gzip nor zstd counts as plain.
    pub fn from_magic(start: &[u8]) -> Self {
        if start.starts_with(&[0x1f, 0x8b]) {
            Self::Gzip
        } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || is_skippable_frame(start) {
            Self::Zstd
        } else {
            Self::None
        }
    }

    /// Refuses a blob whose first bytes contradict its media type.
    pub(super) fn check(self, start: &[u8], media_type: &str) -> Result<(), LayerError> {
        let found = Self::from_magic(start);
        if found == self {
            return Ok(());
        }
        let found = match found {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::None => "in another format",
        };
        Err(LayerError::CompressionMismatch { media_type: media_type.to_owned(), declared: self, found })
    }
}

// RFC 8878, 3.1.2: 0x184D2A50 to 0x184D2A5F, little-endian.
fn is_skippable_frame(start: &[u8]) -> bool {
    matches!(start, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_types_of_oci_and_docker_are_known_and_others_refused() {
        for (media_type, compression) in [
            ("application/vnd.oci.image.layer.v1.tar", Compression::None),
            ("application/vnd.oci.image.layer.v1.tar+gzip", Compression::Gzip),
            ("application/vnd.oci.image.layer.v1.tar+zstd", Compression::Zstd),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", Compression::Gzip),
            ("application/vnd.docker.image.rootfs.diff.tar", Compression::None),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Compression::Gzip),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Compression::Gzip),
        ] {
            assert_eq!(Compression::from_media_type(media_type).unwrap(), compression);
        }
        for unknown in ["", "application/json", "application/vnd.oci.image.layer.v1.tar+bzip2", "tar"] {
            assert!(matches!(
                Compression::from_media_type(unknown),
                Err(LayerError::UnsupportedMediaType(_))
            ));
        }
    }
}
