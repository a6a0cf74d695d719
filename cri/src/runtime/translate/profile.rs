//! Which seccomp and AppArmor profile a container gets.

use std::path::{Path, PathBuf};

use super::invalid;
use crate::api::runtime::{LinuxContainerSecurityContext, SecurityProfile, security_profile::ProfileType};
use crate::runtime::Error;

/// A security profile by its kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Profile {
    /// The runtime's own.
    RuntimeDefault,
    /// None.
    Unconfined,
    /// One of the node's, by path (seccomp) or name (AppArmor).
    Localhost(String),
}

impl Profile {
    fn from_cri(what: &str, profile: &SecurityProfile) -> Result<Self, Error> {
        match ProfileType::try_from(profile.profile_type) {
            Ok(ProfileType::RuntimeDefault) => Ok(Self::RuntimeDefault),
            Ok(ProfileType::Unconfined) => Ok(Self::Unconfined),
            Ok(ProfileType::Localhost) => Ok(Self::Localhost(profile.localhost_ref.clone())),
            Err(_) => Err(invalid(format!("{} is no kind of {what} profile", profile.profile_type))),
        }
    }

    /// The older form, a text: `runtime/default`, `unconfined`, `localhost/NAME`, empty.
    fn from_text(what: &str, text: &str) -> Result<Self, Error> {
        match text {
            "" | "unconfined" => Ok(Self::Unconfined),
            "runtime/default" | "docker/default" => Ok(Self::RuntimeDefault),
            _ => match text.strip_prefix("localhost/") {
                Some(name) => Ok(Self::Localhost(name.to_owned())),
                None => Err(invalid(format!("{text:?} is no {what} profile"))),
            },
        }
    }
}

/// The seccomp profile. Privileged containers have none; a request that says nothing means none, as with other
/// runtimes (kubelet always says).
pub fn seccomp(context: &LinuxContainerSecurityContext) -> Result<Profile, Error> {
    if context.privileged {
        return Ok(Profile::Unconfined);
    }
    #[allow(deprecated)]
    let profile = match &context.seccomp {
        Some(profile) => Profile::from_cri("seccomp", profile)?,
        None => Profile::from_text("seccomp", &context.seccomp_profile_path)?,
    };
    if let Profile::Localhost(path) = &profile {
        // kubelet sends the absolute path of a file below its own directory.
        if !Path::new(path).is_absolute() {
            return Err(invalid(format!("the seccomp profile {path:?} is not an absolute path")));
        }
    }
    Ok(profile)
}

/// The path of a seccomp profile that the node has.
pub fn seccomp_path(profile: &Profile) -> Option<PathBuf> {
    match profile {
        Profile::Localhost(path) => Some(PathBuf::from(path)),
        _ => None,
    }
}

/// Name of the AppArmor profile to enter, empty for none. hull loads no profile of its own, so the runtime's default is
/// no confinement; a named profile on a node without AppArmor is an error rather than silence.
pub fn apparmor(context: &LinuxContainerSecurityContext, enabled: bool) -> Result<String, Error> {
    if context.privileged {
        return Ok(String::new());
    }
    #[allow(deprecated)]
    let profile = match &context.apparmor {
        Some(profile) => Profile::from_cri("AppArmor", profile)?,
        None => Profile::from_text("AppArmor", &context.apparmor_profile)?,
    };
    match profile {
        Profile::RuntimeDefault => Ok(String::new()),
        Profile::Unconfined => Ok(if enabled { "unconfined".to_owned() } else { String::new() }),
        Profile::Localhost(name) if !enabled => {
            Err(invalid(format!("the AppArmor profile {name:?} is asked for, but this node has no AppArmor")))
        }
        Profile::Localhost(name) => {
            super::check_text("the AppArmor profile", &name)?;
            Ok(name)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(kind: ProfileType, reference: &str) -> LinuxContainerSecurityContext {
        let profile = SecurityProfile { profile_type: kind.into(), localhost_ref: reference.into() };
        LinuxContainerSecurityContext {
            seccomp: Some(profile.clone()),
            apparmor: Some(profile),
            ..Default::default()
        }
    }

    #[test]
    fn seccomp_follows_the_request() {
        assert_eq!(seccomp(&context(ProfileType::RuntimeDefault, "")).unwrap(), Profile::RuntimeDefault);
        assert_eq!(seccomp(&context(ProfileType::Unconfined, "")).unwrap(), Profile::Unconfined);
        let localhost = seccomp(&context(ProfileType::Localhost, "/p.json")).unwrap();
        assert_eq!(seccomp_path(&localhost), Some("/p.json".into()));
        assert!(seccomp(&context(ProfileType::Localhost, "p.json")).is_err());
        let privileged =
            LinuxContainerSecurityContext { privileged: true, ..context(ProfileType::RuntimeDefault, "") };
        assert_eq!(seccomp(&privileged).unwrap(), Profile::Unconfined);
    }

    #[test]
    #[allow(deprecated)]
    fn the_older_text_form_is_understood() {
        let of = |text: &str| {
            seccomp(&LinuxContainerSecurityContext {
                seccomp_profile_path: text.into(),
                ..Default::default()
            })
        };
        assert_eq!(of("").unwrap(), Profile::Unconfined);
        assert_eq!(of("runtime/default").unwrap(), Profile::RuntimeDefault);
        assert_eq!(of("localhost//p.json").unwrap(), Profile::Localhost("/p.json".into()));
        assert!(of("something").is_err());
    }

    #[test]
    fn a_named_apparmor_profile_needs_apparmor() {
        let named = context(ProfileType::Localhost, "web");
        assert!(apparmor(&named, false).is_err());
        assert_eq!(apparmor(&named, true).unwrap(), "web");
        assert_eq!(apparmor(&context(ProfileType::RuntimeDefault, ""), true).unwrap(), "");
        assert_eq!(apparmor(&LinuxContainerSecurityContext::default(), false).unwrap(), "");
    }
}
