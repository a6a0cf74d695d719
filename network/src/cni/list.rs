//! Network configuration lists and what each plugin of one is given (CNI SPEC.md, sections 1 and 2).

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

/// Longest configuration that is read, in bytes.
const LONGEST: u64 = 1 << 20;
const MOST_PLUGINS: usize = 64;

/// Versions of the specification, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Version {
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "0.3.0" => Self::V0_3_0,
            "0.3.1" => Self::V0_3_1,
            "0.4.0" => Self::V0_4_0,
            "1.0.0" => Self::V1_0_0,
            "1.1.0" => Self::V1_1_0,
            _ => return None,
        })
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// CHECK, and the previous result for DEL.
    pub(super) fn has_check(self) -> bool {
        self >= Self::V0_4_0
    }

    /// STATUS and GC.
    pub(super) fn has_status(self) -> bool {
        self >= Self::V1_1_0
    }
}

/// A network: plugins that are run one after the other.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct NetworkList {
    pub(super) name: String,
    pub(super) version: Version,
    pub(super) disable_check: bool,
    pub(super) disable_gc: bool,
    pub(super) plugins: Vec<Plugin>,
    /// The list as it was read; a single plugin's configuration as a list of one.
    pub(super) raw: Value,
}

/// One plugin's part of a list.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plugin {
    /// File name of the executable.
    pub(super) kind: String,
    config: Map<String, Value>,
}

impl NetworkList {
    /// The lexicographically first configuration in `directory` that loads: *.conflist, *.conf or *.json.
    ///
    /// # Errors
    /// A sentence that says why none loads.
    pub(super) fn load_first(directory: &Path) -> Result<Self, String> {
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) => return Err(format!("no CNI configuration: {}: {error}", directory.display())),
        };
        let is_config = |path: &Path| {
            path.extension().is_some_and(|ext| ext == "conflist" || ext == "conf" || ext == "json")
        };
        let mut paths: Vec<_> =
            entries.flatten().map(|entry| entry.path()).filter(|path| is_config(path)).collect();
        paths.sort();
        let mut first_error = None;
        for path in paths {
            match Self::load(&path) {
                Ok(list) => return Ok(list),
                Err(reason) => {
                    first_error
                        .get_or_insert_with(|| format!("CNI configuration {}: {reason}", path.display()));
                }
            }
        }
        Err(first_error.unwrap_or_else(|| format!("no CNI configuration in {}", directory.display())))
    }

    fn load(path: &Path) -> Result<Self, String> {
        let facts = fs::metadata(path).map_err(|error| error.to_string())?;
        if !facts.is_file() {
            return Err("it is not a file".into());
        }
        if facts.len() > LONGEST {
            return Err(format!("{} bytes are more than {LONGEST}", facts.len()));
        }
        let text = fs::read(path).map_err(|error| error.to_string())?;
        let value: Value = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
        let is_list = path.extension().is_some_and(|extension| extension == "conflist");
        Self::parse(if is_list || value.get("plugins").is_some() { value } else { list_of_one(value)? })
    }

    /// Reads a configuration list; the error is a sentence.
    pub(super) fn parse(raw: Value) -> Result<Self, String> {
        let flag = |key: &str| match raw.get(key) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            // Older configurations have it as a string.
            Some(Value::String(text)) if text == "true" || text == "false" => Ok(text == "true"),
            Some(other) => Err(format!("{key} is {other}, not true or false")),
        };
        let name = raw.get("name").and_then(Value::as_str).unwrap_or_default();
        check_name(name)?;
        let plugins = raw.get("plugins").and_then(Value::as_array).ok_or("it has no list of plugins")?;
        if plugins.is_empty() || plugins.len() > MOST_PLUGINS {
            return Err(format!("it has {} plugins; 1 to {MOST_PLUGINS} are allowed", plugins.len()));
        }
        Ok(Self {
            name: name.to_owned(),
            version: version(&raw)?,
            disable_check: flag("disableCheck")?,
            disable_gc: flag("disableGC")?,
            plugins: plugins.iter().map(Plugin::parse).collect::<Result<_, _>>()?,
            raw: raw.clone(),
        })
    }
}

/// The newest version that both the list and this runtime speak.
fn version(raw: &Value) -> Result<Version, String> {
    let single = raw.get("cniVersion").and_then(Value::as_str);
    let several =
        raw.get("cniVersions").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let given: Vec<&str> = several.chain(single).collect();
    let newest = given.iter().filter_map(|text| Version::parse(text)).max();
    newest.ok_or_else(|| match given.as_slice() {
        [] => "it has no cniVersion".into(),
        given => format!("cniVersion {} is not supported (0.3.0 to 1.1.0 are)", given.join(", ")),
    })
}

fn check_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if name.len() <= 255 && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(allowed)
    {
        return Ok(());
    }
    Err(format!("{name:.80?} cannot be a network's name"))
}

fn list_of_one(plugin: Value) -> Result<Value, String> {
    let mut list = Map::new();
    for key in ["cniVersion", "name"] {
        if let Some(value) = plugin.get(key) {
            list.insert(key.into(), value.clone());
        }
    }
    if plugin.get("type").is_none() {
        return Err("it has neither a type nor plugins".into());
    }
    list.insert("plugins".into(), Value::Array(vec![plugin]));
    Ok(list.into())
}

impl Plugin {
    fn parse(value: &Value) -> Result<Self, String> {
        let config = value.as_object().ok_or("a plugin is not an object")?.clone();
        let kind = config.get("type").and_then(Value::as_str).ok_or("a plugin has no type")?;
        if kind.is_empty() || kind.contains(['/', '\0']) || kind == "." || kind == ".." {
            return Err(format!("{kind:.80?} cannot be a plugin's type"));
        }
        Ok(Self { kind: kind.to_owned(), config })
    }

    /// What the plugin gets on its standard input: SPEC.md, "Deriving execution configuration from plugin
    /// configuration".
    pub(super) fn execution_config(
        &self,
        list: &NetworkList,
        runtime: &Map<String, Value>,
        previous: Option<&Value>,
    ) -> Map<String, Value> {
        let reserved = |key: &str| {
            key.starts_with("cni.dev/") || matches!(key, "capabilities" | "runtimeConfig" | "prevResult")
        };
        let mut config = self.config.clone();
        config.retain(|key, _| !reserved(key));
        config.insert("cniVersion".into(), list.version.as_str().into());
        config.insert("name".into(), list.name.clone().into());
        let declared = self.config.get("capabilities").and_then(Value::as_object);
        let wants =
            |name: &str| declared.and_then(|all| all.get(name)).and_then(Value::as_bool).unwrap_or(false);
        let wanted: Map<String, Value> = runtime
            .iter()
            .filter(|(name, _)| wants(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !wanted.is_empty() {
            config.insert("runtimeConfig".into(), wanted.into());
        }
        if let Some(previous) = previous {
            config.insert("prevResult".into(), previous.clone());
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in files {
            fs::write(directory.path().join(name), content).unwrap();
        }
        directory
    }

    const LIST: &str =
        r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge"},{"type":"portmap"}]}"#;

    #[test]
    fn the_first_configuration_that_loads_is_used() {
        let files = directory(&[
            ("05-readme.txt", LIST),
            ("10-broken.conflist", "{"),
            ("20-single.conf", r#"{"cniVersion":"0.3.1","name":"one","type":"ptp","mtu":9000}"#),
            ("30-list.conflist", LIST),
        ]);
        let list = NetworkList::load_first(files.path()).unwrap();
        assert_eq!((list.name.as_str(), list.version, list.plugins.len()), ("one", Version::V0_3_1, 1));
        assert_eq!(NetworkList::parse(list.raw.clone()).unwrap(), list);
    }

    #[test]
    fn when_none_loads_the_reason_names_the_file() {
        let reason = NetworkList::load_first(directory(&[("10-x.conflist", "{}")]).path()).unwrap_err();
        assert!(reason.contains("10-x.conflist"), "{reason}");
        let empty = directory(&[]);
        assert!(NetworkList::load_first(empty.path()).unwrap_err().contains("no CNI configuration"));
        assert!(
            NetworkList::load_first(&empty.path().join("none")).unwrap_err().contains("no CNI configuration")
        );
    }

    #[test]
    fn hostile_configurations_are_refused() {
        for (raw, why) in [
            (json!({ "cniVersion": "1.0.0", "name": "n" }), "plugins"),
            (json!({ "cniVersion": "1.0.0", "name": "n", "plugins": [] }), "0 plugins"),
            (json!({ "cniVersion": "1.0.0", "name": "n", "plugins": [{}] }), "no type"),
            (json!({ "cniVersion": "1.0.0", "name": "n", "plugins": [{ "type": "../sh" }] }), "type"),
            (json!({ "cniVersion": "1.0.0", "name": "../n", "plugins": [{ "type": "a" }] }), "name"),
            (json!({ "cniVersion": "2.0.0", "name": "n", "plugins": [{ "type": "a" }] }), "2.0.0"),
            (json!({ "name": "n", "plugins": [{ "type": "a" }] }), "cniVersion"),
            (
                json!({ "cniVersion": "1.0.0", "name": "n", "disableCheck": 7, "plugins": [{ "type": "a" }] }),
                "disable",
            ),
        ] {
            let reason = NetworkList::parse(raw).unwrap_err();
            assert!(reason.contains(why), "{reason}");
        }
    }

    #[test]
    fn the_newest_common_version_is_spoken() {
        let versions = json!(["0.4.0", "1.1.0", "9.0.0"]);
        let raw = json!({ "cniVersion": "1.0.0", "cniVersions": versions, "name": "n", "plugins": [{ "type": "a" }] });
        assert_eq!(NetworkList::parse(raw).unwrap().version, Version::V1_1_0);
    }

    #[test]
    fn a_plugin_gets_only_the_capabilities_it_declares() {
        let plugin = json!({
            "type": "portmap",
            "snat": true,
            "capabilities": { "portMappings": true, "dns": false },
            "cni.dev/valid-attachments": 1,
            "runtimeConfig": { "forged": 1 },
        });
        let raw = json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [plugin] });
        let list = NetworkList::parse(raw).unwrap();
        let runtime = json!({ "portMappings": [1], "dns": {}, "bandwidth": {} });
        let config = list.plugins[0].execution_config(
            &list,
            runtime.as_object().unwrap(),
            Some(&json!({ "ips": [] })),
        );
        assert_eq!(
            Value::from(config),
            json!({
                "type": "portmap", "snat": true, "cniVersion": "1.0.0", "name": "net",
                "runtimeConfig": { "portMappings": [1] }, "prevResult": { "ips": [] },
            })
        );
    }
}
