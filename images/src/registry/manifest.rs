//! Manifests and indexes, OCI and Docker forms (image-spec manifest.md and image-index.md).

use serde::Deserialize;

use crate::digest::Digest;
use crate::image::{MAX_CONFIG, MAX_LAYERS};

use super::error::RegistryError;
use super::platform::Platform;

/// Largest manifest or index, in bytes (distribution-spec: registries accept at least 4 MiB, clients may refuse more).
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// How deep indexes may nest.
pub(crate) const MAX_INDEX_DEPTH: usize = 4;
/// Most entries of one index.
const MAX_INDEX_ENTRIES: usize = 1024;
/// Largest compressed layer: more than any node's disk.
const MAX_BLOB: u64 = 1 << 40;

/// What a client accepts when it asks for a manifest.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// A reference from one document to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// A document that a reference resolves to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Document {
    /// One image.
    Manifest(Manifest),
    /// Several images for several platforms, or further indexes.
    Index(Vec<IndexEntry>),
}

/// One image: its configuration and its layers, lowest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

/// One entry of an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IndexEntry {
    pub(crate) descriptor: Descriptor,
    pub(crate) platform: Option<Platform>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: u64,
    media_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: i64,
    platform: Option<RawPlatform>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
}

impl Document {
    /// Reads a document whose digest was verified. `served_as` is the media type in the HTTP answer, which counts only
    /// where the document does not name its own.
    pub(crate) fn parse(digest: &Digest, served_as: &str, bytes: &[u8]) -> Result<Self, RegistryError> {
        let wrong = |reason: String| RegistryError::Manifest { what: format!("manifest {digest}"), reason };
        let raw: RawDocument = serde_json::from_slice(bytes).map_err(|error| match schema_of(bytes) {
            Some(1) => wrong(SCHEMA_1.to_owned()),
            _ => wrong(format!("not a manifest: {error}")),
        })?;
        match raw.schema_version {
            2 => {}
            1 => return Err(wrong(SCHEMA_1.to_owned())),
            other => return Err(wrong(format!("schema version {other} is not supported"))),
        }
        let media_type = raw.media_type.as_deref().unwrap_or(served_as);
        let is_index = match media_type {
            OCI_INDEX | DOCKER_LIST => true,
            OCI_MANIFEST | DOCKER_MANIFEST => false,
            // The media type inside is optional and some servers say text/plain: the form decides. A document that
            // could be read both ways is refused (image-spec manifest.md, "mediaType").
            _ => raw.manifests.is_some(),
        };
        match (is_index, raw.manifests, raw.config, raw.layers) {
            (true, Some(entries), None, None) => index(entries).map_err(wrong),
            (false, None, Some(config), Some(layers)) => manifest(config, layers).map_err(wrong),
            (true, ..) => Err(wrong("an index must have manifests and neither config nor layers".to_owned())),
            (false, ..) => Err(wrong("a manifest must have config and layers and no manifests".to_owned())),
        }
    }
}

const SCHEMA_1: &str = "the image has the Docker schema 1 format, which is not supported (convert it by pushing it again \
    with a current tool)";

fn schema_of(bytes: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Version {
        schema_version: u64,
    }
    serde_json::from_slice::<Version>(bytes).ok().map(|version| version.schema_version)
}

fn index(entries: Vec<RawDescriptor>) -> Result<Document, String> {
    if entries.len() > MAX_INDEX_ENTRIES {
        return Err(format!("the index has {} entries, more than {MAX_INDEX_ENTRIES}", entries.len()));
    }
    let mut known = Vec::new();
    for entry in entries {
        // Entries that are no image (signatures, attestations, other artifacts) have their own types; skip them.
        if !matches!(entry.media_type.as_str(), OCI_INDEX | OCI_MANIFEST | DOCKER_LIST | DOCKER_MANIFEST | "")
        {
            continue;
        }
        let platform = entry.platform.as_ref().map(|platform| Platform {
            os: platform.os.clone(),
            architecture: platform.architecture.clone(),
            variant: platform.variant.clone().unwrap_or_default(),
        });
        known.push(IndexEntry { descriptor: descriptor(entry, MAX_MANIFEST)?, platform });
    }
    Ok(Document::Index(known))
}

fn manifest(config: RawDescriptor, layers: Vec<RawDescriptor>) -> Result<Document, String> {
    if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
        let found: String = config.media_type.chars().filter(|c| !c.is_control()).take(100).collect();
        return Err(format!("it is not a container image: its configuration has the media type {found:?}"));
    }
    if layers.len() > MAX_LAYERS {
        return Err(format!("the image has {} layers, more than {MAX_LAYERS}", layers.len()));
    }
    let config = descriptor(config, MAX_CONFIG)?;
    let layers = layers.into_iter().map(|layer| descriptor(layer, MAX_BLOB)).collect::<Result<_, _>>()?;
    Ok(Document::Manifest(Manifest { config, layers }))
}

fn descriptor(raw: RawDescriptor, limit: u64) -> Result<Descriptor, String> {
    let digest: Digest = raw.digest.parse().map_err(|error| format!("{error}"))?;
    let size = u64::try_from(raw.size).ok().filter(|size| *size <= limit);
    let size = size.ok_or_else(|| format!("{digest} has size {}, expected 0 to {limit}", raw.size))?;
    if raw.media_type.len() > 255 || raw.media_type.chars().any(char::is_control) {
        return Err(format!("{digest} has an invalid media type"));
    }
    Ok(Descriptor { media_type: raw.media_type, digest, size })
}

/// The entries of an index worth trying for `host`, best first: those that fit by their platform, then those that name
/// none (nested indexes usually do not).
pub(crate) fn candidates(entries: &[IndexEntry], host: &Platform) -> Result<Vec<Descriptor>, RegistryError> {
    let mut fitting: Vec<(u32, &IndexEntry)> = Vec::new();
    for entry in entries {
        match &entry.platform {
            Some(platform) => fitting.extend(host.fit(platform).map(|fit| (fit, entry))),
            None => fitting.push((0, entry)),
        }
    }
    // Stable: of equals the first one in the index wins, as everywhere.
    fitting.sort_by_key(|(fit, _)| std::cmp::Reverse(*fit));
    if fitting.is_empty() {
        let mut available: Vec<String> =
            entries.iter().filter_map(|entry| entry.platform.as_ref().map(printable)).take(16).collect();
        if available.is_empty() {
            available.push("none".to_owned());
        }
        return Err(RegistryError::Platform { wanted: host.to_string(), available: available.join(", ") });
    }
    Ok(fitting.into_iter().map(|(_, entry)| entry.descriptor.clone()).collect())
}

fn printable(platform: &Platform) -> String {
    platform.to_string().chars().filter(|c| !c.is_control()).take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn parse(json: &str) -> Result<Document, RegistryError> {
        Document::parse(&A.parse().unwrap(), "application/json", json.as_bytes())
    }

    fn reason(json: &str) -> String {
        parse(json).unwrap_err().to_string()
    }

    fn image(config_type: &str, layer: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"{config_type}","digest":"{A}","size":2}},"layers":[{layer}]}}"#
        )
    }

    #[test]
    fn both_manifest_families_are_read() {
        for config in [OCI_CONFIG, DOCKER_CONFIG] {
            let layer = format!(r#"{{"mediaType":"x","digest":"{B}","size":7}}"#);
            let Document::Manifest(manifest) = parse(&image(config, &layer)).unwrap() else { panic!() };
            assert_eq!(manifest.layers.len(), 1);
            assert_eq!(manifest.layers[0].size, 7);
        }
    }

    #[test]
    fn the_index_entry_for_this_machine_comes_first() {
        let entry = |digest: &str, platform: &str| {
            format!(r#"{{"mediaType":"{OCI_MANIFEST}","digest":"{digest}","size":9{platform}}}"#)
        };
        let json = format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[{},{},{}]}}"#,
            entry(A, r#","platform":{"os":"linux","architecture":"arm64"}"#),
            entry(A, ""),
            entry(B, r#","platform":{"os":"linux","architecture":"amd64"}"#),
        );
        let Document::Index(entries) = parse(&json).unwrap() else { panic!() };
        let host = Platform { os: "linux".into(), architecture: "amd64".into(), variant: "v2".into() };
        let found: Vec<_> =
            candidates(&entries, &host).unwrap().iter().map(|entry| entry.digest.to_string()).collect();
        assert_eq!(found, [B, A]);
        let error = candidates(&entries[..1], &host).unwrap_err().to_string();
        assert!(error.contains("linux/amd64/v2") && error.contains("linux/arm64"), "{error}");
    }

    #[test]
    fn what_is_no_image_is_refused_clearly() {
        assert!(reason(r#"{"schemaVersion":1,"name":"a","fsLayers":[]}"#).contains("schema 1"));
        assert!(
            reason(&image("application/vnd.cncf.helm.config.v1+json", "")).contains("not a container image")
        );
        assert!(reason("{}").contains("not a manifest"));
        assert!(reason(r#"{"schemaVersion":2}"#).contains("must have config"));
        let negative = format!(r#"{{"mediaType":"x","digest":"{B}","size":-1}}"#);
        assert!(reason(&image(OCI_CONFIG, &negative)).contains("size -1"));
        let climbing = r#"{"mediaType":"x","digest":"sha256:../../etc","size":1}"#;
        assert!(reason(&image(OCI_CONFIG, climbing)).contains("digest"));
        let many = vec![format!(r#"{{"mediaType":"x","digest":"{B}","size":1}}"#); 501].join(",");
        assert!(reason(&image(OCI_CONFIG, &many)).contains("501 layers"));
    }

    #[test]
    fn a_document_that_is_both_manifest_and_index_is_refused() {
        let both = image(OCI_CONFIG, "").replace("\"layers\"", "\"manifests\":[],\"layers\"");
        assert!(parse(&both).is_err());
    }
}
