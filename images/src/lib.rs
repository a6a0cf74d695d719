//! OCI images: references, registries, layers as EROFS files, the image index.
#![forbid(unsafe_code)]
