//! Which seccomp and AppArmor profile a container gets.

use std::path::{Path, PathBuf};

use super::invalid;
use crate::api::runtime::{LinuxContainerSecurityContext, SecurityProfile, security_profile::ProfileType};
use crate::runtime::Error;
use crate::security::apparmor::Wanted;

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
    let profile = match profile {
        Profile::Localhost(path) => {
            Profile::Localhost(path.strip_prefix("localhost/").unwrap_or(&path).to_owned())
        }
        other => other,
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

/// The AppArmor profile that is asked for. A privileged container has none, unless it names one. In either form a name
/// may have the prefix `localhost/`.
pub fn apparmor(context: &LinuxContainerSecurityContext) -> Result<Wanted, Error> {
    #[allow(deprecated)]
    let profile = match (&context.apparmor, context.apparmor_profile.as_str()) {
        (Some(profile), _) => Some(Profile::from_cri("AppArmor", profile)?),
        (None, "") => None,
        (None, text) => Some(Profile::from_text("AppArmor", text)?),
    };
    Ok(match profile {
        Some(Profile::Localhost(name)) => {
            let name = name.strip_prefix("localhost/").unwrap_or(&name).to_owned();
            super::check_text("the AppArmor profile", &name)?;
            if name.is_empty() {
                return Err(invalid("an AppArmor profile of the node is asked for, but not which"));
            }
            Wanted::Localhost(name)
        }
        _ if context.privileged => Wanted::Unconfined,
        Some(Profile::Unconfined) => Wanted::Unconfined,
        Some(Profile::RuntimeDefault) => Wanted::Default,
        None => Wanted::Unspecified,
    })
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
        // As the older form has it; other runtimes take it here, too.
        let prefixed = seccomp(&context(ProfileType::Localhost, "localhost//p.json")).unwrap();
        assert_eq!(prefixed, localhost);
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
    fn an_apparmor_profile_is_named_with_or_without_its_prefix() {
        for name in ["web", "localhost/web"] {
            assert_eq!(
                apparmor(&context(ProfileType::Localhost, name)).unwrap(),
                Wanted::Localhost("web".into())
            );
        }
        assert_eq!(apparmor(&context(ProfileType::RuntimeDefault, "")).unwrap(), Wanted::Default);
        assert_eq!(apparmor(&context(ProfileType::Unconfined, "")).unwrap(), Wanted::Unconfined);
        assert_eq!(apparmor(&LinuxContainerSecurityContext::default()).unwrap(), Wanted::Unspecified);
        for name in ["", "localhost/", "a\nb"] {
            assert!(apparmor(&context(ProfileType::Localhost, name)).is_err(), "{name:?}");
        }
    }

    #[test]
    #[allow(deprecated)]
    fn the_older_apparmor_field_counts_if_the_newer_is_not_there() {
        let old = |text: &str, newer: Option<SecurityProfile>| {
            apparmor(&LinuxContainerSecurityContext {
                apparmor: newer,
                apparmor_profile: text.into(),
                ..Default::default()
            })
        };
        assert_eq!(old("localhost/web", None).unwrap(), Wanted::Localhost("web".into()));
        assert_eq!(old("runtime/default", None).unwrap(), Wanted::Default);
        assert_eq!(old("unconfined", None).unwrap(), Wanted::Unconfined);
        assert!(old("web", None).is_err());
        let newer = context(ProfileType::Unconfined, "").apparmor;
        assert_eq!(old("localhost/web", newer).unwrap(), Wanted::Unconfined);
    }

    #[test]
    fn a_privileged_container_is_confined_only_by_name() {
        let privileged = |kind, name| {
            apparmor(&LinuxContainerSecurityContext { privileged: true, ..context(kind, name) }).unwrap()
        };
        assert_eq!(privileged(ProfileType::RuntimeDefault, ""), Wanted::Unconfined);
        assert_eq!(privileged(ProfileType::Localhost, "web"), Wanted::Localhost("web".into()));
    }
}
