//! How many descriptors the daemon may have, which is not how many its pods should have.

use std::sync::OnceLock;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

static INHERITED: OnceLock<Rlimit> = OnceLock::new();

/// Raises the daemon's own soft limit to the hard one: each pod, container and connection costs some.
pub fn raise_limit() {
    let limit = inherited();
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// RLIMIT_NOFILE as the daemon was started with.
fn inherited() -> Rlimit {
    *INHERITED.get_or_init(|| getrlimit(Resource::Nofile))
}

/// Gives a child what the daemon was started with, and with it the programs in its pod: some close or poll everything
/// up to their soft limit, and take minutes for it when that is a million or more. A child that is gone needs nothing.
pub fn restore_for(child: Option<u32>) {
    let Some(pid) = child.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) else { return };
    if let Err(error) = prlimit(Some(pid), Resource::Nofile, inherited()) {
        tracing::warn!(pid = %pid, %error, "cannot restore the limit of open files");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one_and_the_old_one_is_remembered() {
        let before = getrlimit(Resource::Nofile);
        raise_limit();
        let now = getrlimit(Resource::Nofile);
        assert_eq!((now.current, now.maximum), (before.maximum, before.maximum));
        assert_eq!(inherited().current, before.current);

        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        restore_for(Some(child.id()));
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        let soft = before.current.map_or("unlimited".into(), |limit| limit.to_string());
        assert_eq!(line.split_whitespace().nth(3), Some(soft.as_str()));
    }
}
