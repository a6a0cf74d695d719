//! AppArmor: hull's own profile, and those that the node has loaded.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, Once, PoisonError};

/// Name of hull's own profile.
pub const DEFAULT: &str = "hull-default";
const DEFAULT_TEXT: &str = include_str!("hull-default.profile");
/// Every loaded profile, one in a line: `NAME (MODE)`.
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";
/// The compiler that also loads what it compiled.
const PARSERS: [&str; 2] = ["/usr/sbin/apparmor_parser", "/sbin/apparmor_parser"];
/// Bytes of its complaints that are passed on.
const MAX_COMPLAINT: usize = 1000;

/// Which profile a container asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// It does not say: hull's own, if the node can have it.
    Unspecified,
    /// Hull's own.
    Default,
    /// None.
    Unconfined,
    /// One that the node has loaded, by name.
    Localhost(String),
}

/// Why a profile cannot be entered.
#[derive(Debug, thiserror::Error)]
pub enum AppArmorError {
    /// A named profile on a kernel without AppArmor.
    #[error("the AppArmor profile {0:?} is asked for, but this node has no AppArmor")]
    Missing(String),
    /// The node has no such profile.
    #[error("the AppArmor profile {0:?} is not loaded on this node")]
    NotLoaded(String),
    /// Hull's own profile could not be loaded.
    #[error("cannot load the AppArmor profile {DEFAULT}: {0}")]
    Load(String),
    /// The list of profiles is not readable.
    #[error("cannot read the list of loaded AppArmor profiles: {0}")]
    List(io::Error),
}

/// The profile to enter, empty for none. Loads hull's own if it is asked for and not there. Blocks for a little while.
///
/// A node without AppArmor has nothing to confine with: the default is then none, and only a profile that was asked for
/// by name is an error.
pub fn resolve(wanted: &Wanted, enabled: bool) -> Result<String, AppArmorError> {
    match wanted {
        Wanted::Localhost(name) if !enabled => Err(AppArmorError::Missing(name.clone())),
        _ if !enabled => Ok(String::new()),
        Wanted::Unconfined => Ok("unconfined".to_owned()),
        Wanted::Localhost(name) if name == "unconfined" => Ok(name.clone()),
        Wanted::Localhost(name) if is_loaded(name)? => Ok(name.clone()),
        Wanted::Localhost(name) => Err(AppArmorError::NotLoaded(name.clone())),
        Wanted::Default => ensure_default().map(|()| DEFAULT.to_owned()),
        Wanted::Unspecified => match ensure_default() {
            Ok(()) => Ok(DEFAULT.to_owned()),
            Err(error) => {
                static ONCE: Once = Once::new();
                ONCE.call_once(|| {
                    tracing::warn!(%error, "containers that ask for no AppArmor profile run without one");
                });
                Ok(String::new())
            }
        },
    }
}

/// Loads hull's own profile, or replaces the one that an older hulld loaded. For the start of hulld.
pub fn load_default() -> Result<(), AppArmorError> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(parser) = PARSERS.into_iter().find(|path| Path::new(path).exists()) else {
        return Err(AppArmorError::Load("there is no apparmor_parser; install the package apparmor".into()));
    };
    compile_and_load(parser).map_err(|error| AppArmorError::Load(error.to_string()))
}

fn ensure_default() -> Result<(), AppArmorError> {
    if is_loaded(DEFAULT)? { Ok(()) } else { load_default() }
}

fn compile_and_load(parser: &str) -> io::Result<()> {
    let mut child = Command::new(parser)
        // No cache: the profile is hull's, and small.
        .args(["--replace", "--skip-cache"])
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // If it does not read, it says why.
        let _ = stdin.write_all(DEFAULT_TEXT.as_bytes());
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    let complaint: String =
        String::from_utf8_lossy(&output.stderr).trim().chars().take(MAX_COMPLAINT).collect();
    Err(io::Error::other(format!("apparmor_parser failed ({}): {complaint}", output.status)))
}

fn is_loaded(name: &str) -> Result<bool, AppArmorError> {
    let list = fs::read_to_string(LOADED).map_err(AppArmorError::List)?;
    Ok(names(&list).any(|loaded| loaded == name))
}

/// A name may have spaces, so the mode is what follows the last one.
fn names(list: &str) -> impl Iterator<Item = &str> {
    list.lines().filter_map(|line| line.rsplit_once(" (").map(|(name, _)| name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loaded_profiles_are_known_by_their_whole_name() {
        let list =
            "hull-default (enforce)\n/usr/bin/man (complain)\nwith space (enforce)\nparent//child (kill)\n";
        let found: Vec<_> = names(list).collect();
        assert_eq!(found, ["hull-default", "/usr/bin/man", "with space", "parent//child"]);
    }

    #[test]
    fn without_apparmor_only_a_named_profile_is_an_error() {
        for wanted in [Wanted::Unspecified, Wanted::Default, Wanted::Unconfined] {
            assert_eq!(resolve(&wanted, false).unwrap(), "");
        }
        let error = resolve(&Wanted::Localhost("web".into()), false).unwrap_err();
        assert!(matches!(error, AppArmorError::Missing(_)), "{error}");
    }

    #[test]
    fn the_profile_has_the_name_that_is_entered() {
        assert!(DEFAULT_TEXT.contains(&format!("profile {DEFAULT} flags=(")));
        assert!(DEFAULT_TEXT.contains(&format!("signal (send,receive) peer={DEFAULT},")));
    }

    #[test]
    fn the_profile_compiles() {
        let Some(parser) = PARSERS.into_iter().find(|path| Path::new(path).exists()) else { return };
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), DEFAULT_TEXT).unwrap();
        let output = Command::new(parser)
            .args(["--skip-kernel-load", "--skip-cache", "--abort-on-error"])
            .arg(file.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
