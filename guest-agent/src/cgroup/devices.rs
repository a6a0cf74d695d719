//! Which devices a cgroup's processes may use: files on v1, a BPF program on v2.

use std::collections::BTreeMap;
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
    /// On v1 a rule cannot take away a part of what another rule gives.
    #[error("cgroup v1 cannot express the device rule \"{0}\", which cuts a part out of a rule before it")]
    Inexpressible(String),
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

    /// Whether `later`, a rule of the opposite kind, concerns some but not all of the devices that this one does: v1
    /// ignores such a rule silently.
    fn is_cut_by(&self, later: &Self) -> bool {
        let meets = |a: Option<u32>, b: Option<u32>| a.is_none() || b.is_none() || a == b;
        let overlaps = (self.kind == later.kind || self.kind == Kind::Any || later.kind == Kind::Any)
            && meets(self.major, later.major)
            && meets(self.minor, later.minor)
            && self.access.0 & later.access.0 != 0;
        let same = (self.kind, self.major, self.minor) == (later.kind, later.major, later.minor);
        self.allow != later.allow && overlaps && !same
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

/// Joins what several rules allow of the same device into one, so that opening for reading and writing matches where
/// reading and writing are allowed by two rules, and repeated rules cost nothing. Only where no rule denies, since
/// then the order means nothing.
fn merged(rules: &[Rule]) -> Vec<Rule> {
    if rules.iter().any(|rule| !rule.allow) {
        return rules.to_vec();
    }
    let mut merged: BTreeMap<(Kind, Option<u32>, Option<u32>), u32> = BTreeMap::new();
    for rule in rules {
        *merged.entry((rule.kind, rule.major, rule.minor)).or_default() |= rule.access.0;
    }
    let rule =
        |((kind, major, minor), access)| Rule { allow: true, kind, major, minor, access: Access(access) };
    merged.into_iter().map(rule).collect()
}

pub(super) fn restrict(control: &Control, rules: &[DeviceRule]) -> Result<(), CgroupError> {
    if rules.len() > MAX_RULES {
        return Err(DeviceRuleError::TooMany(rules.len()).into());
    }
    let rules = rules.iter().map(Rule::parse).collect::<Result<Vec<Rule>, _>>()?;
    // What precedes a total rule has no effect.
    let start = rules.iter().rposition(Rule::is_total).unwrap_or(0);
    let rules = &merged(&rules[start..])[..];
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
        files::open_for_writing(base, &control.path_of(version, file))
            .map_err(|error| control.failed(format!("open {file}"), error))
    };
    let (allow, deny) = (open("devices.allow")?, open("devices.deny")?);
    for (index, rule) in rest.iter().enumerate() {
        if rule.allow == everything && rest[..index].iter().any(|earlier| earlier.is_cut_by(rule)) {
            return Err(DeviceRuleError::Inexpressible(rule.line_v1('a')).into());
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

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(allow: bool, kind: &str, major: i64, minor: i64, access: &str) -> Rule {
        let (r#type, access) = (kind.to_owned(), access.to_owned());
        Rule::parse(&DeviceRule { allow, r#type, major, minor, access }).unwrap()
    }

    #[test]
    fn odd_rules_are_refused() {
        let parse = |kind: &str, major, access: &str| {
            let (r#type, access) = (kind.to_owned(), access.to_owned());
            Rule::parse(&DeviceRule { allow: true, r#type, major, minor: 0, access })
        };
        assert!(parse("c", 1, "rwm").is_ok());
        assert!(parse("x", 1, "rwm").is_err());
        assert!(parse("c", 1, "").is_err());
        assert!(parse("c", 1, "rr").is_err());
        assert!(parse("c", 1, "rx").is_err());
        assert!(parse("c", -2, "r").is_err());
        assert!(parse("c", 1 << 32, "r").is_err());
    }

    #[test]
    fn rules_of_one_device_become_one() {
        let rules =
            merged(&[rule(true, "c", 1, 3, "r"), rule(true, "b", 8, 0, "r"), rule(true, "c", 1, 3, "w")]);
        assert_eq!(rules, [rule(true, "b", 8, 0, "r"), rule(true, "c", 1, 3, "rw")]);
    }

    #[test]
    fn a_rule_that_v1_would_ignore_is_seen() {
        let all_terminals = rule(true, "c", 136, -1, "rw");
        assert!(all_terminals.is_cut_by(&rule(false, "c", 136, 5, "rw")));
        assert!(!all_terminals.is_cut_by(&rule(false, "c", 136, -1, "w")));
        assert!(!all_terminals.is_cut_by(&rule(false, "c", 10, 5, "rw")));
    }

    #[test]
    fn a_rule_is_written_as_v1_expects() {
        assert_eq!(rule(true, "c", 136, -1, "mrw").line_v1('c'), "c 136:* rwm");
    }
}
