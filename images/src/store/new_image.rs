//! A container becomes an image: its writable layer as one more layer, its configuration changed by what was asked for.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::digest::Digest;
use crate::image::{ConfigError, Image, ImageConfig, MAX_LAYERS};
use crate::layer::LayerError;
use crate::mounts::MountError;
use crate::reference::Reference;

use super::ImageStore;
use super::arrival::Arrival;
use super::error::StoreError;
use super::staged::StageError;

/// What is said of the new image beyond what its base says.
#[derive(Clone, Debug, Default)]
pub struct NewImage {
    /// When it was made, RFC 3339.
    pub created: String,
    /// What made it, for its history.
    pub created_by: String,
    /// Who made it; empty: not said.
    pub author: String,
    /// A remark for its history; empty: none.
    pub comment: String,
    /// Instructions that change its configuration.
    pub changes: Vec<ImageChange>,
}

/// One change of a configuration (image-spec config.md).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageChange {
    /// The command, or arguments for the entrypoint.
    Cmd(Vec<String>),
    /// The program and its first arguments.
    Entrypoint(Vec<String>),
    /// A variable, set or set anew.
    Env(String, String),
    /// A port that the image listens on, `80/tcp`.
    Expose(String),
    /// A label, set or set anew.
    Label(String, String),
    /// The signal that asks it to stop.
    StopSignal(String),
    /// Its user.
    User(String),
    /// A path that is a volume.
    Volume(String),
    /// Its working directory.
    WorkingDir(String),
}

/// Why a container did not become an image. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum NewImageError {
    /// Its base is gone.
    #[error("the image {0}, which the container was made from, is not here any more")]
    NoBase(String),
    /// The base's configuration cannot be continued.
    #[error("the configuration of image {image} cannot be changed: {reason}")]
    Base {
        /// The base.
        image: String,
        /// What is wrong.
        reason: String,
    },
    /// The new configuration would be refused when pulled.
    #[error("the new image's configuration: {0}")]
    Config(#[source] ConfigError),
    /// The layer cannot be made.
    #[error("the new layer: {0}")]
    Layer(#[source] Box<LayerError>),
    /// The store cannot keep it.
    #[error("cannot store the new image: {0}")]
    Store(#[from] StoreError),
    /// The layer's tree cannot be had.
    #[error(transparent)]
    Mount(#[from] MountError),
}

impl ImageStore {
    /// The tree of an archive that is nobody's layer, as a detached read-only mount: the archive is converted into a file
    /// that lasts as long as the mount. Whiteouts are overlayfs' marks in it. Blocking.
    pub fn archive_tree(&self, archive: impl Read) -> Result<OwnedFd, NewImageError> {
        let staged = self.stage_archive(archive).map_err(|error| match error {
            StageError::Content(error) => NewImageError::Layer(Box::new(error)),
            StageError::Store(error) => NewImageError::Store(error),
        })?;
        Ok(staged.tree()?)
    }

    /// Makes an image of `base` (an image's id) and one more layer, the archive that `layer` gives, and names it, if
    /// `name` does. Blocking.
    pub fn make_image(
        &self,
        base: &str,
        layer: impl Read,
        new: &NewImage,
        name: Option<&Reference>,
    ) -> Result<Image, NewImageError> {
        let base = self.find(base)?.ok_or_else(|| NewImageError::NoBase(base.to_owned()))?;
        let hold = self.hold(&base.config.diff_ids);
        let staged = self.stage_archive(layer).map_err(|error| match error {
            StageError::Content(error) => NewImageError::Layer(Box::new(error)),
            StageError::Store(error) => NewImageError::Store(error),
        })?;
        let refused =
            |reason: &str| NewImageError::Base { image: base.id.clone(), reason: reason.to_owned() };
        if base.config.diff_ids.len() >= MAX_LAYERS {
            return Err(refused(&format!("it has {MAX_LAYERS} layers already")));
        }
        let raw = changed(&base.config.raw, staged.layer.as_str(), new)
            .ok_or_else(|| refused("it is not of the specified form"))?;
        let raw = Bytes::from(raw);
        let config = ImageConfig::parse(raw.clone()).map_err(NewImageError::Config)?;
        let arrival = Arrival {
            id: Digest::sha256(&raw),
            config,
            documents: Vec::new(),
            names: name.map(Reference::name).into_iter().collect(),
            staged: vec![Arc::clone(&staged)],
        };
        let committed = self.commit(&arrival)?;
        drop(hold);
        Ok(committed)
    }
}

/// The configuration with one more layer. None if the old one does not have the form.
fn changed(raw: &[u8], layer: &str, new: &NewImage) -> Option<Vec<u8>> {
    let mut config: Value = serde_json::from_slice(raw).ok()?;
    let root = config.as_object_mut()?;
    root.insert("created".to_owned(), json!(new.created));
    if !new.author.is_empty() {
        root.insert("author".to_owned(), json!(new.author));
    }
    object(root, "rootfs")?.get_mut("diff_ids")?.as_array_mut()?.push(json!(layer));
    let mut step = json!({"created": new.created, "created_by": new.created_by});
    for (key, value) in [("author", &new.author), ("comment", &new.comment)] {
        if !value.is_empty() {
            step[key] = json!(value);
        }
    }
    root.entry("history").or_insert_with(|| json!([])).as_array_mut()?.push(step);
    let process = object(root, "config")?;
    for change in &new.changes {
        apply(process, change)?;
    }
    serde_json::to_vec(&config).ok()
}

fn apply(process: &mut Map<String, Value>, change: &ImageChange) -> Option<()> {
    let mut set = |key: &str, value: Value| {
        process.insert(key.to_owned(), value);
        Some(())
    };
    match change {
        ImageChange::Cmd(arguments) => set("Cmd", json!(arguments)),
        ImageChange::Entrypoint(arguments) => set("Entrypoint", json!(arguments)),
        ImageChange::StopSignal(signal) => set("StopSignal", json!(signal)),
        ImageChange::User(user) => set("User", json!(user)),
        ImageChange::WorkingDir(path) => set("WorkingDir", json!(path)),
        ImageChange::Label(key, value) => {
            object(process, "Labels")?.insert(key.clone(), json!(value));
            Some(())
        }
        ImageChange::Expose(port) => {
            object(process, "ExposedPorts")?.insert(port.clone(), json!({}));
            Some(())
        }
        ImageChange::Volume(path) => {
            object(process, "Volumes")?.insert(path.clone(), json!({}));
            Some(())
        }
        ImageChange::Env(name, value) => {
            let entry = process.entry("Env").or_insert(Value::Null);
            if entry.is_null() {
                *entry = json!([]);
            }
            let all = entry.as_array_mut()?;
            let line = json!(format!("{name}={value}"));
            let prefix = format!("{name}=");
            match all.iter_mut().find(|line| line.as_str().is_some_and(|line| line.starts_with(&prefix))) {
                Some(old) => *old = line,
                None => all.push(line),
            }
            Some(())
        }
    }
}

/// The object with this key, made if it is missing or null.
fn object<'v>(parent: &'v mut Map<String, Value>, key: &str) -> Option<&'v mut Map<String, Value>> {
    let value = parent.entry(key).or_insert(Value::Null);
    if value.is_null() {
        *value = json!({});
    }
    value.as_object_mut()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(changes: Vec<ImageChange>) -> NewImage {
        NewImage {
            created: "2026-01-01T00:00:00Z".into(),
            created_by: "sh".into(),
            changes,
            ..NewImage::default()
        }
    }

    #[test]
    fn a_configuration_grows_by_a_layer_and_keeps_what_it_does_not_know() {
        let base = br#"{"architecture":"amd64","os":"linux","x":{"y":1},"config":{"Env":["A=1","B=2"],"Labels":null},
            "rootfs":{"type":"layers","diff_ids":["sha256:aa"]}}"#;
        let changes = vec![
            ImageChange::Env("A".into(), "3".into()),
            ImageChange::Env("C".into(), "4".into()),
            ImageChange::Label("k".into(), "v".into()),
            ImageChange::Cmd(vec!["/bin/x".into()]),
        ];
        let bytes = changed(base, "sha256:bb", &new(changes)).unwrap();
        let value: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(value["x"]["y"], 1);
        assert_eq!(value["rootfs"]["diff_ids"], json!(["sha256:aa", "sha256:bb"]));
        assert_eq!(value["config"]["Env"], json!(["A=3", "B=2", "C=4"]));
        assert_eq!(value["config"]["Labels"], json!({"k": "v"}));
        assert_eq!(value["history"].as_array().unwrap().len(), 1);
        assert_eq!(value["created"], "2026-01-01T00:00:00Z");
    }

    #[test]
    fn what_is_no_configuration_is_not_continued() {
        for bad in ["[]", "{}", r#"{"rootfs":{"diff_ids":{}}}"#, r#"{"rootfs":{"diff_ids":[]},"history":1}"#]
        {
            assert!(changed(bad.as_bytes(), "sha256:bb", &new(Vec::new())).is_none(), "{bad}");
        }
    }
}
