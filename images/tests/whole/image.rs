use std::io::Write;

use serde_json::{Value, json};
use sha2::{Digest, Sha256, Sha512};

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// `sha256:…` of some bytes.
pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// `sha512:…` of some bytes.
pub(crate) fn sha512(bytes: &[u8]) -> String {
    format!("sha512:{}", hex::encode(Sha512::digest(bytes)))
}

/// A layer as it is uploaded.
#[derive(Clone)]
pub(crate) struct Layer {
    pub(crate) blob: Vec<u8>,
    pub(crate) diff_id: String,
    pub(crate) media_type: &'static str,
}

#[derive(Clone, Copy)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Layer {
    /// A layer with these files.
    pub(crate) fn new(files: &[(&str, &[u8])], packing: Packing) -> Self {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, path, *content).unwrap();
        }
        Self::of_tar(&tar.into_inner().unwrap(), packing)
    }

    /// A layer of directories: path, mode, and owner and group in one.
    pub(crate) fn with_directories(directories: &[(&str, u32, u64)]) -> Self {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, mode, owner) in directories {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(tar::EntryType::Directory);
            header.set_size(0);
            header.set_mode(*mode);
            header.set_uid(*owner);
            header.set_gid(*owner);
            tar.append_data(&mut header, path, &[][..]).unwrap();
        }
        Self::of_tar(&tar.into_inner().unwrap(), Packing::Gzip)
    }

    pub(crate) fn of_tar(tar: &[u8], packing: Packing) -> Self {
        let (blob, media_type) = match packing {
            Packing::Plain => (tar.to_vec(), "application/vnd.oci.image.layer.v1.tar"),
            Packing::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(tar).unwrap();
                (encoder.finish().unwrap(), "application/vnd.oci.image.layer.v1.tar+gzip")
            }
            Packing::Zstd => {
                (zstd::encode_all(tar, 1).unwrap(), "application/vnd.oci.image.layer.v1.tar+zstd")
            }
        };
        Self { blob, diff_id: digest(tar), media_type }
    }

    /// A layer of one file with bytes that do not compress.
    pub(crate) fn noise(name: &str, size: usize, seed: u64) -> Self {
        Self::packed_noise(name, size, seed, Packing::Gzip)
    }

    pub(crate) fn packed_noise(name: &str, size: usize, seed: u64, packing: Packing) -> Self {
        let mut state = seed | 1;
        let mut bytes = Vec::with_capacity(size + 8);
        while bytes.len() < size {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.truncate(size);
        Self::new(&[(name, &bytes)], packing)
    }
}

/// An image as it is uploaded.
#[derive(Clone)]
pub(crate) struct TestImage {
    pub(crate) layers: Vec<Layer>,
    pub(crate) config: Vec<u8>,
    pub(crate) manifest: Vec<u8>,
}

impl TestImage {
    pub(crate) fn new(layers: Vec<Layer>) -> Self {
        Self::with_config(layers, json!({"Cmd": ["/bin/true"], "User": "1000:1000"}))
    }

    pub(crate) fn with_config(layers: Vec<Layer>, process: Value) -> Self {
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": process,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        Self::assembled(layers, config.to_string().into_bytes())
    }

    pub(crate) fn assembled(layers: Vec<Layer>, config: Vec<u8>) -> Self {
        let described: Vec<Value> =
            layers.iter().map(|layer| descriptor(layer.media_type, &layer.blob)).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": descriptor(OCI_CONFIG, &config), "layers": described,
        });
        Self { layers, config, manifest: manifest.to_string().into_bytes() }
    }

    /// The same image with a manifest that names everything by SHA-512.
    pub(crate) fn with_sha512_digests(mut self) -> Self {
        let mut manifest: Value = serde_json::from_slice(&self.manifest).unwrap();
        manifest["config"]["digest"] = json!(sha512(&self.config));
        for (described, layer) in manifest["layers"].as_array_mut().unwrap().iter_mut().zip(&self.layers) {
            described["digest"] = json!(sha512(&layer.blob));
        }
        self.manifest = manifest.to_string().into_bytes();
        self
    }

    /// The digest by which its manifest names its configuration.
    pub(crate) fn id(&self) -> String {
        let manifest: Value = serde_json::from_slice(&self.manifest).unwrap();
        manifest["config"]["digest"].as_str().unwrap().to_owned()
    }

    pub(crate) fn blobs(&self) -> Vec<&[u8]> {
        let layers = self.layers.iter().map(|layer| layer.blob.as_slice());
        std::iter::once(self.config.as_slice()).chain(layers).collect()
    }
}

pub(crate) fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len()})
}

/// An index of manifests with their platforms, `os/architecture`.
pub(crate) fn index(entries: &[(&[u8], &str, Option<&str>)]) -> Vec<u8> {
    let manifests: Vec<Value> = entries
        .iter()
        .map(|(manifest, media_type, platform)| {
            let mut entry = descriptor(media_type, manifest);
            if let Some((os, architecture)) = platform.and_then(|platform| platform.split_once('/')) {
                entry["platform"] = json!({"os": os, "architecture": architecture});
            }
            entry
        })
        .collect();
    json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}).to_string().into_bytes()
}
