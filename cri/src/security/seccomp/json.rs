//! Profiles in files: the format of runtime-spec's config-linux.md ("Seccomp"), and Docker's extension of it (archMap,
//! includes, excludes), in which most profiles are written.

use libseccomp::ScmpArch;
use serde::Deserialize;

use super::SeccompError;
use super::profile::{Action, Argument, Comparison, FLAG_LOG, FLAG_SPEC_ALLOW, Profile, Rule};
use crate::security::capabilities;

/// Fields that say nothing about what is filtered (comments) may be there; hence no `deny_unknown_fields`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    default_action: String,
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Option<Vec<String>>,
    #[serde(default)]
    arch_map: Option<Vec<ArchEntry>>,
    #[serde(default)]
    flags: Option<Vec<String>>,
    #[serde(default)]
    listener_path: Option<String>,
    #[serde(default)]
    syscalls: Option<Vec<Entry>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchEntry {
    architecture: String,
    #[serde(default)]
    sub_architectures: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    /// Docker's older form of `names`.
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    names: Option<Vec<String>>,
    action: String,
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<Arg>>,
    #[serde(default)]
    includes: Option<Filter>,
    #[serde(default)]
    excludes: Option<Filter>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Arg {
    index: u32,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Filter {
    #[serde(default)]
    caps: Option<Vec<String>>,
    #[serde(default)]
    arches: Option<Vec<String>>,
    #[serde(default)]
    min_kernel: Option<String>,
}

/// What the conditions of rules are held against.
pub(super) struct Circumstances {
    /// The container's bounding set.
    pub(super) caps: u64,
    /// As Docker's profiles name it, e.g. `amd64`.
    pub(super) architecture: &'static str,
    /// The kernel's version.
    pub(super) kernel: (u32, u32),
}

impl Circumstances {
    /// Of this machine.
    pub(super) fn here(caps: u64) -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let release = rustix::system::uname();
        let kernel = version(release.release().to_str().unwrap_or_default()).unwrap_or((0, 0));
        Self { caps, architecture, kernel }
    }
}

/// Reads a profile. Rules that the circumstances exclude are left out.
pub(super) fn parse(text: &[u8], circumstances: &Circumstances) -> Result<Profile, SeccompError> {
    let file: File = serde_json::from_slice(text).map_err(|error| SeccompError::Format(error.to_string()))?;
    if file.listener_path.is_some_and(|path| !path.is_empty()) {
        return Err(SeccompError::Notify);
    }
    let mut rules = Vec::new();
    for entry in file.syscalls.unwrap_or_default() {
        if applies(&entry, circumstances)? {
            rules.push(rule(entry)?);
        }
    }
    Ok(Profile {
        default: action(&file.default_action, file.default_errno_ret)?,
        architectures: architectures(file.architectures, file.arch_map)?,
        rules,
        flags: flags(file.flags)?,
    })
}

fn rule(entry: Entry) -> Result<Rule, SeccompError> {
    let mut names = entry.names.unwrap_or_default();
    names.extend(entry.name);
    if names.is_empty() {
        return Err(SeccompError::Format("a rule names no system call".into()));
    }
    let arguments = entry.args.unwrap_or_default().iter().map(argument).collect::<Result<_, _>>()?;
    Ok(Rule::new(names, action(&entry.action, entry.errno_ret)?, arguments))
}

fn action(name: &str, errno: Option<u32>) -> Result<Action, SeccompError> {
    const EPERM: u32 = 1;
    let value = || {
        u16::try_from(errno.unwrap_or(EPERM)).map_err(|_| {
            SeccompError::Format(format!("the errno {} does not fit 16 bits", errno.unwrap_or(EPERM)))
        })
    };
    Ok(match name {
        "SCMP_ACT_ALLOW" => Action::Allow,
        "SCMP_ACT_LOG" => Action::Log,
        "SCMP_ACT_ERRNO" => Action::Errno(value()?),
        "SCMP_ACT_TRACE" => Action::Trace(value()?),
        "SCMP_ACT_TRAP" => Action::Trap,
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Action::KillThread,
        "SCMP_ACT_KILL_PROCESS" => Action::KillProcess,
        "SCMP_ACT_NOTIFY" => return Err(SeccompError::Notify),
        other => return Err(unknown("action", other)),
    })
}

fn argument(arg: &Arg) -> Result<Argument, SeccompError> {
    if arg.index > 5 {
        return Err(SeccompError::Format(format!("a system call has no argument number {}", arg.index)));
    }
    let comparison = match arg.op.as_str() {
        "SCMP_CMP_NE" => Comparison::NotEqual(arg.value),
        "SCMP_CMP_LT" => Comparison::Less(arg.value),
        "SCMP_CMP_LE" => Comparison::LessOrEqual(arg.value),
        "SCMP_CMP_EQ" => Comparison::Equal(arg.value),
        "SCMP_CMP_GE" => Comparison::GreaterOrEqual(arg.value),
        "SCMP_CMP_GT" => Comparison::Greater(arg.value),
        "SCMP_CMP_MASKED_EQ" => Comparison::MaskedEqual { mask: arg.value, value: arg.value_two },
        other => return Err(unknown("comparison", other)),
    };
    Ok(Argument { index: arg.index, comparison })
}

fn applies(entry: &Entry, here: &Circumstances) -> Result<bool, SeccompError> {
    let held = |name: &String| -> Result<bool, SeccompError> {
        let number = capabilities::parse(name).map_err(|error| SeccompError::Format(error.to_string()))?;
        Ok(here.caps >> number & 1 == 1)
    };
    let is_here = |arches: &Vec<String>| arches.iter().any(|arch| arch == here.architecture);
    if let Some(excludes) = &entry.excludes {
        for cap in excludes.caps.iter().flatten() {
            if held(cap)? {
                return Ok(false);
            }
        }
        if excludes.arches.as_ref().is_some_and(is_here) {
            return Ok(false);
        }
        if excludes
            .min_kernel
            .as_deref()
            .is_some_and(|least| version(least).is_some_and(|least| here.kernel >= least))
        {
            return Ok(false);
        }
    }
    if let Some(includes) = &entry.includes {
        for cap in includes.caps.iter().flatten() {
            if !held(cap)? {
                return Ok(false);
            }
        }
        if includes.arches.as_ref().is_some_and(|arches| !arches.is_empty() && !is_here(arches)) {
            return Ok(false);
        }
        if let Some(least) = &includes.min_kernel {
            let least = version(least).ok_or_else(|| unknown("kernel version", least))?;
            return Ok(here.kernel >= least);
        }
    }
    Ok(true)
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn architectures(
    list: Option<Vec<String>>,
    map: Option<Vec<ArchEntry>>,
) -> Result<Vec<ScmpArch>, SeccompError> {
    let list = list.unwrap_or_default();
    let map = map.unwrap_or_default();
    if !list.is_empty() && !map.is_empty() {
        return Err(SeccompError::Format("architectures and archMap cannot both be given".into()));
    }
    let mut found: Vec<ScmpArch> = list.iter().map(|name| architecture(name)).collect::<Result<_, _>>()?;
    for entry in map {
        if architecture(&entry.architecture)? == ScmpArch::native() {
            for name in entry.sub_architectures.unwrap_or_default() {
                found.push(architecture(&name)?);
            }
            break;
        }
    }
    Ok(found)
}

fn architecture(name: &str) -> Result<ScmpArch, SeccompError> {
    name.parse().map_err(|_| unknown("architecture", name))
}

fn flags(names: Option<Vec<String>>) -> Result<u32, SeccompError> {
    let Some(names) = names else { return Ok(FLAG_SPEC_ALLOW) };
    let mut flags = 0;
    for name in names {
        flags |= match name.as_str() {
            "SECCOMP_FILTER_FLAG_LOG" => FLAG_LOG,
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => FLAG_SPEC_ALLOW,
            // A process has one thread when it gets its filter, and nobody waits for notifications.
            "SECCOMP_FILTER_FLAG_TSYNC" | "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => 0,
            other => return Err(unknown("flag", other)),
        };
    }
    Ok(flags)
}

fn unknown(what: &str, name: &str) -> SeccompError {
    let name: String = name.chars().take(60).collect();
    SeccompError::Format(format!("there is no {what} called {name:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Circumstances = Circumstances { caps: 1 << 21, architecture: "amd64", kernel: (6, 12) };

    fn parsed(text: &str) -> Result<Profile, SeccompError> {
        parse(text.as_bytes(), &HERE)
    }

    #[test]
    fn a_profile_of_the_runtime_specification_is_read() {
        let profile = parsed(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],
            "flags":["SECCOMP_FILTER_FLAG_LOG"],"syscalls":[
            {"names":["read","write"],"action":"SCMP_ACT_ALLOW"},
            {"names":["clone"],"action":"SCMP_ACT_ALLOW","comment":"x","args":[{"index":0,"value":8,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]},
            {"name":"mkdir","action":"SCMP_ACT_KILL_PROCESS"}]}"#,
        )
        .unwrap();
        assert_eq!(profile.default, Action::Errno(38));
        assert_eq!(profile.architectures, [ScmpArch::X8664, ScmpArch::X86]);
        assert_eq!(profile.flags, FLAG_LOG);
        assert_eq!(profile.rules[0].names, ["read", "write"]);
        assert_eq!(profile.rules[1].arguments[0].comparison, Comparison::MaskedEqual { mask: 8, value: 0 });
        assert_eq!(profile.rules[2].names, ["mkdir"]);
        assert_eq!(profile.rules[2].action, Action::KillProcess);
    }

    #[test]
    fn includes_and_excludes_are_held_against_capabilities_architecture_and_kernel() {
        let count = |filter: &str| {
            let text = format!(
                r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["mount"],"action":"SCMP_ACT_ALLOW",{filter}}}]}}"#
            );
            parsed(&text).unwrap().rules.len()
        };
        assert_eq!(count(r#""includes":{"caps":["CAP_SYS_ADMIN"]}"#), 1);
        assert_eq!(count(r#""includes":{"caps":["CAP_SYS_ADMIN","CAP_CHOWN"]}"#), 0);
        assert_eq!(count(r#""excludes":{"caps":["CAP_SYS_ADMIN"]}"#), 0);
        assert_eq!(count(r#""includes":{"arches":["amd64","x32"]}"#), 1);
        assert_eq!(count(r#""includes":{"arches":["s390"]}"#), 0);
        assert_eq!(count(r#""excludes":{"arches":["amd64"]}"#), 0);
        assert_eq!(count(r#""includes":{"minKernel":"4.8"}"#), 1);
        assert_eq!(count(r#""includes":{"minKernel":"6.13"}"#), 0);
        assert_eq!(count(r#""includes":{},"excludes":{}"#), 1);
    }

    #[test]
    fn the_machines_own_entry_of_an_architecture_map_is_taken() {
        let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","archMap":[
            {"architecture":"SCMP_ARCH_S390X","subArchitectures":["SCMP_ARCH_S390"]},
            {"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86","SCMP_ARCH_X32"]}]}"#;
        if ScmpArch::native() == ScmpArch::X8664 {
            assert_eq!(parsed(text).unwrap().architectures, [ScmpArch::X86, ScmpArch::X32]);
        }
        let both = r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],
            "archMap":[{"architecture":"SCMP_ARCH_X86_64"}]}"#;
        assert!(parsed(both).is_err());
    }

    #[test]
    fn notifications_are_refused_by_name() {
        for text in [
            r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]}"#,
            r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/run/x.sock"}"#,
        ] {
            assert!(matches!(parsed(text), Err(SeccompError::Notify)), "{text}");
        }
    }

    #[test]
    fn what_is_misspelt_is_named() {
        for (text, name) in [
            (r#"{"defaultAction":"SCMP_ACT_PERMIT"}"#, "SCMP_ACT_PERMIT"),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["PDP11"]}"#, "PDP11"),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["FAST"]}"#, "FAST"),
            (r#"{"syscalls":[]}"#, "defaultAction"),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"action":"SCMP_ACT_LOG"}]}"#,
                "names no system call",
            ),
            ("[]", "struct File"),
            ("{", "EOF"),
        ] {
            let error = parsed(text).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
