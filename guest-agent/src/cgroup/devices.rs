//! Which devices a cgroup's processes may use: files on v1, a BPF program on v2.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use super::control::Control;
use super::hierarchies::Version;
use super::{CgroupError, device_filter, files};
use crate::protocol::messages::DeviceRule;

/// Most rules for one container: a privileged one is given every device of the host, some thousands at worst.
const MAX_RULES: usize = 8192;

/// Why a device rule was refused.
#[derive(Debug, thiserror::Error)]
pub enum DeviceRuleError {
    /// The type is not one of `a`, `b`, `c`.
    #[error("a device rule has the type {0:?}; it must be a, b or c")]
    Type(String),
    /// The access is not made of `r`, `w`, `m`.
    #[error("a device rule has the access {0:?}; it must consist of r, w and m, each at most once")]
    Access(String),
    /// A number is neither a device number nor -1.
    #[error("a device rule has the device number {0}; it must be -1 for any, or fit 32 bits")]
    Number(i64),
    /// More rules than are ever needed.
    #[error("there are {0} device rules; at most 8192 are taken")]
    TooMany(usize),
}

/// One rule, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rule {
    pub(super) allow: bool,
    pub(super) kind: Kind,
    /// `None` is any.
    pub(super) major: Option<u32>,
    pub(super) minor: Option<u32>,
    pub(super) access: Access,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Any,
    Block,
    Character,
}

/// Bits as in linux/bpf.h: BPF_DEVCG_ACC_MKNOD, READ, WRITE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Access(pub(super) u32);

impl Access {
    pub(super) const MKNOD: u32 = 1;
    pub(super) const READ: u32 = 2;
    pub(super) const WRITE: u32 = 4;
    pub(super) const ALL: Self = Self(7);
}

impl Rule {
    fn parse(rule: &DeviceRule) -> Result<Self, DeviceRuleError> {
        let kind = match rule.r#type.as_str() {
            "a" => Kind::Any,
            "b" => Kind::Block,
            "c" => Kind::Character,
            _ => return Err(DeviceRuleError::Type(rule.r#type.chars().take(20).collect())),
        };
        let number = |number: i64| match number {
            -1 => Ok(None),
            _ => u32::try_from(number).map(Some).map_err(|_| DeviceRuleError::Number(number)),
        };
        // "a" means everything, whatever else the rule says, as in the v1 files.
        let access =
            if kind == Kind::Any && rule.access.is_empty() { Ok(7) } else { access_bits(&rule.access) };
        Ok(Self {
            allow: rule.allow,
            kind,
            major: number(rule.major)?,
            minor: number(rule.minor)?,
            access: Access(access?),
        })
    }

    /// Whether it speaks of every device and every access.
    pub(super) fn is_total(&self) -> bool {
        self.kind == Kind::Any && self.major.is_none() && self.minor.is_none() && self.access == Access::ALL
    }

    /// A line for devices.allow and devices.deny (cgroup-v1/devices.rst).
    fn line_v1(&self, kind: char) -> String {
        let number = |number: Option<u32>| number.map_or_else(|| "*".to_owned(), |number| number.to_string());
        let mut access = String::new();
        for (bit, letter) in [(Access::READ, 'r'), (Access::WRITE, 'w'), (Access::MKNOD, 'm')] {
            if self.access.0 & bit != 0 {
                access.push(letter);
            }
        }
        format!("{kind} {}:{} {access}", number(self.major), number(self.minor))
    }
}

fn access_bits(text: &str) -> Result<u32, DeviceRuleError> {
    let refuse = || DeviceRuleError::Access(text.chars().take(20).collect());
    let mut bits = 0;
    for letter in text.chars() {
        let bit = match letter {
            'r' => Access::READ,
            'w' => Access::WRITE,
            'm' => Access::MKNOD,
            _ => return Err(refuse()),
        };
        if bits & bit != 0 {
            return Err(refuse());
        }
        bits |= bit;
    }
    if bits == 0 { Err(refuse()) } else { Ok(bits) }
}

/// The rules every container starts with: any device node may be made (using it is another matter), and the devices
/// of runtime-spec config-linux.md "Default Devices", terminals included, may be used.
pub fn default_device_rules() -> Vec<DeviceRule> {
    let rule = |kind: &str, major, minor, access: &str| DeviceRule {
        allow: true,
        r#type: kind.to_owned(),
        major,
        minor,
        access: access.to_owned(),
    };
    vec![
        rule("c", -1, -1, "m"),
        rule("b", -1, -1, "m"),
        rule("c", 1, 3, "rwm"),    // null
        rule("c", 1, 5, "rwm"),    // zero
        rule("c", 1, 7, "rwm"),    // full
        rule("c", 1, 8, "rwm"),    // random
        rule("c", 1, 9, "rwm"),    // urandom
        rule("c", 5, 0, "rwm"),    // tty
        rule("c", 5, 1, "rwm"),    // console
        rule("c", 5, 2, "rwm"),    // ptmx
        rule("c", 136, -1, "rwm"), // pts/*
    ]
}

pub(super) fn restrict(control: &Control, rules: &[DeviceRule]) -> Result<(), CgroupError> {
    if rules.len() > MAX_RULES {
        return Err(DeviceRuleError::TooMany(rules.len()).into());
    }
    let rules = rules.iter().map(Rule::parse).collect::<Result<Vec<Rule>, _>>()?;
    // What precedes a total rule has no effect.
    let start = rules.iter().rposition(Rule::is_total).unwrap_or(0);
    let rules = &rules[start..];
    let directories = &control.directories;
    let v1 = directories
        .hierarchies
        .v1
        .iter()
        .position(|one| one.controllers.iter().any(|name| name == "devices"));
    match v1 {
        Some(index) => restrict_v1(control, Version::V1(index), rules),
        None if directories.unified.is_some() => device_filter::attach(control, rules),
        None => Err(control.missing("devices", "the device rules")),
    }
}

/// The v1 files are changed one rule at a time. On a container that runs, what both the old and the new rules allow is
/// refused for the microseconds between, which is the interface's own limit.
fn restrict_v1(control: &Control, version: Version, rules: &[Rule]) -> Result<(), CgroupError> {
    let everything = matches!(rules.first(), Some(rule) if rule.is_total() && rule.allow);
    let rest = if matches!(rules.first(), Some(rule) if rule.is_total()) { &rules[1..] } else { rules };
    if everything && rest.is_empty() && is_unrestricted(control, version) {
        return Ok(());
    }
    control.set("devices", version, if everything { "devices.allow" } else { "devices.deny" }, "a")?;

    let base = control.directory(version)?;
    let open = |file: &str| {
        files::open_for_writing(base, &control.path_of(file))
            .map_err(|error| control.failed(format!("open {file}"), error))
    };
    let (allow, deny) = (open("devices.allow")?, open("devices.deny")?);
    // Repeated rules cost a walk of the kernel's list each.
    let mut written = BTreeSet::new();
    for rule in rest {
        if !written.insert(*rule) {
            continue;
        }
        let (file, name) = if rule.allow { (&allow, "devices.allow") } else { (&deny, "devices.deny") };
        let kinds: &[char] = match rule.kind {
            Kind::Any => &['b', 'c'],
            Kind::Block => &['b'],
            Kind::Character => &['c'],
        };
        for kind in kinds {
            let line = rule.line_v1(*kind);
            files::write_to(file.as_fd(), &line).map_err(|error| control.failed_write(name, &line, error))?;
        }
    }
    Ok(())
}

fn is_unrestricted(control: &Control, version: Version) -> bool {
    control.try_read(version, "devices.list").is_ok_and(|list| list.trim() == "a *:* rwm")
}
