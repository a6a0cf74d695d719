//! The file of classes, and what a class comes to.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::devices::Device;
use crate::yaml;

/// Longest file in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Devices of one class; the agent takes as many lines of one file.
const MAX_DEVICES: usize = 256;
/// Weights as the OCI and goresctrl count them.
const WEIGHTS: std::ops::RangeInclusive<u64> = 10..=1000;

/// What is to be on some devices, or with no device named on all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "PascalCase")]
pub(super) struct Rule {
    devices: Vec<String>,
    #[serde(deserialize_with = "amount")]
    weight: Option<u64>,
    #[serde(deserialize_with = "amount")]
    throttle_read_bps: Option<u64>,
    #[serde(deserialize_with = "amount")]
    throttle_write_bps: Option<u64>,
    #[serde(rename = "ThrottleReadIOPS", deserialize_with = "amount")]
    throttle_read_iops: Option<u64>,
    #[serde(rename = "ThrottleWriteIOPS", deserialize_with = "amount")]
    throttle_write_iops: Option<u64>,
}

impl Rule {
    /// The limits that a line of io.max names.
    fn throttles(&self) -> [(&'static str, Option<u64>); 4] {
        [
            ("rbps", self.throttle_read_bps),
            ("wbps", self.throttle_write_bps),
            ("riops", self.throttle_read_iops),
            ("wiops", self.throttle_write_iops),
        ]
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "PascalCase")]
struct Classes {
    classes: BTreeMap<String, Vec<Rule>>,
}

/// A number, or one with a unit of Kubernetes' quantities: `50M`, `10k`, `1Gi`.
fn amount<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u64>, D::Error> {
    let value = Value::deserialize(input)?;
    let number = match &value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => quantity(text),
        _ => None,
    };
    number.map(Some).ok_or_else(|| serde::de::Error::custom(format!("{value} is not an amount such as 50M")))
}

fn quantity(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 9] = [
        ("", 1),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
    ];
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let (_, scale) = UNITS.into_iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(scale)
}

/// The classes of a file, by name.
pub(super) fn read(path: &Path) -> Result<BTreeMap<String, Vec<Rule>>, String> {
    let mut text = String::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    let length = file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if length as u64 > MAX_FILE {
        return Err(format!("it is longer than {MAX_FILE} bytes"));
    }
    let value = yaml::parse(&text)?;
    if value.is_null() {
        return Ok(BTreeMap::new());
    }
    let classes: Classes = serde_json::from_value(value).map_err(|error| error.to_string())?;
    Ok(classes.classes)
}

/// Files of cgroup v2 and their values. Where rules speak of the same device, the later one counts.
pub(super) fn to_cgroup(
    rules: &[Rule],
    weights: &str,
    devices_of: impl Fn(&str) -> Result<Vec<Device>, String>,
) -> Result<BTreeMap<String, String>, String> {
    let mut default = None;
    let mut weight_of: BTreeMap<Device, u64> = BTreeMap::new();
    let mut throttle_of: BTreeMap<Device, BTreeMap<&str, u64>> = BTreeMap::new();
    for rule in rules {
        if let Some(weight) = rule.weight.filter(|weight| !WEIGHTS.contains(weight)) {
            return Err(format!("the weight {weight} is not between 10 and 1000"));
        }
        let throttles = rule.throttles().into_iter().filter_map(|(name, limit)| Some((name, limit?)));
        if rule.devices.is_empty() {
            if throttles.count() > 0 {
                return Err("a rule without Devices can only have a Weight".into());
            }
            default = rule.weight.or(default);
            continue;
        }
        let throttles: Vec<_> = throttles.collect();
        for pattern in &rule.devices {
            for device in devices_of(pattern)? {
                if let Some(weight) = rule.weight {
                    weight_of.insert(device, weight);
                }
                if !throttles.is_empty() {
                    throttle_of.entry(device).or_default().extend(throttles.iter().copied());
                }
            }
        }
    }
    if weight_of.len().max(throttle_of.len()) > MAX_DEVICES {
        return Err(format!("a class speaks of more than {MAX_DEVICES} devices"));
    }
    let mut files = BTreeMap::new();
    let default = default.map(|weight| format!("default {}", in_file(weights, weight)));
    let of_devices =
        weight_of.iter().map(|(device, weight)| format!("{device} {}", in_file(weights, *weight)));
    let lines: Vec<String> = default.into_iter().chain(of_devices).collect();
    if !lines.is_empty() {
        files.insert(weights.to_owned(), lines.join("\n"));
    }
    let line = |(device, limits): (&Device, &BTreeMap<&str, u64>)| {
        // The kernel has "max" for none, and goresctrl 0.
        let limit = |(name, limit): (&&str, &u64)| match limit {
            0 => format!(" {name}=max"),
            limit => format!(" {name}={limit}"),
        };
        format!("{device}{}", limits.iter().map(limit).collect::<String>())
    };
    let lines: Vec<String> = throttle_of.iter().map(line).collect();
    if !lines.is_empty() {
        files.insert("io.max".into(), lines.join("\n"));
    }
    Ok(files)
}

/// io.weight counts from 1 to 10000, the others from 1 to 1000 (as runc and crun convert).
fn in_file(file: &str, weight: u64) -> u64 {
    match file {
        "io.weight" => 1 + (weight - 10) * 9999 / 990,
        _ => weight,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Result<Vec<Rule>, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("classes");
        std::fs::write(&path, text).unwrap();
        Ok(read(&path)?.remove("c").unwrap_or_default())
    }

    fn made(text: &str) -> Result<Vec<(String, String)>, String> {
        let devices = |pattern: &str| match pattern {
            "/dev/a" => Ok(vec![Device { major: 8, minor: 0 }]),
            "/dev/*" => Ok(vec![Device { major: 8, minor: 0 }, Device { major: 8, minor: 16 }]),
            _ => Err(format!("nothing is at {pattern}")),
        };
        Ok(to_cgroup(&rules(text)?, "io.weight", devices)?.into_iter().collect())
    }

    #[test]
    fn a_class_is_weights_and_limits_of_devices() {
        let text = "Classes:\n  c:\n  - Weight: 10\n  - Devices: ['/dev/*']\n    ThrottleReadBps: 50M\n    \
                    ThrottleWriteIOPS: 10k\n  - Devices: [/dev/a]\n    Weight: 1000\n    ThrottleReadBps: 1Mi\n    \
                    ThrottleWriteBps: \"0\"\n";
        let wanted = [
            ("io.max", "8:0 rbps=1048576 wbps=max wiops=10000\n8:16 rbps=50000000 wiops=10000"),
            ("io.weight", "default 1\n8:0 10000"),
        ];
        assert_eq!(made(text).unwrap(), wanted.map(|(file, value)| (file.to_owned(), value.to_owned())));
    }

    #[test]
    fn what_makes_no_sense_is_told() {
        for (text, reason) in [
            ("Classes: {c: [{Weight: 9}]}", "not between 10 and 1000"),
            ("Classes: {c: [{ThrottleReadBps: 5}]}", "without Devices"),
            ("Classes: {c: [{Devices: [/dev/b], Weight: 20}]}", "nothing is at /dev/b"),
            ("Classes: {c: [{Weight: -1}]}", "not an amount"),
            ("Classes: {c: [{Weight: 1Q}]}", "not an amount"),
            ("Classes: {c: [{Wait: 1}]}", "unknown field"),
            ("Class: {}", "unknown field"),
            ("Classes: [", ""),
        ] {
            let error = made(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert_eq!(made("").unwrap(), []);
    }
}
