//! What a confined process gives up for good, between its empty root and its first work.

use hull_sys::{confine, privilege};
use rustix::process::{DumpableBehavior, Resource, Rlimit};

use super::error::{Doing, JailError};

/// The user and group of hull-vmm inside the pod's user namespace: nobody's in particular, and never root's.
pub const VMM_ID: u32 = 65533;

/// The capabilities that hull-virtiofsd keeps, in the pod's user namespace, to act on files for any of its users. No file
/// outside of idmapped volumes belongs to an id of that namespace.
///
/// CHOWN and FOWNER: chown, chmod and utimens of the guest's root. DAC_OVERRIDE: the guest has checked permissions
/// already. FSETID: chmod g+s. SETUID, SETGID: what a user makes is that user's. Numbers as in linux/capability.h.
pub const VOLUME_CAPABILITIES: u64 =
    1 << CHOWN | 1 << DAC_OVERRIDE | 1 << FOWNER | 1 << FSETID | 1 << SETGID | 1 << SETUID;
const CHOWN: u32 = 0;
const DAC_OVERRIDE: u32 = 1;
const FOWNER: u32 = 3;
const FSETID: u32 = 4;
const SETGID: u32 = 6;
const SETUID: u32 = 7;

/// Descriptors if the request does not say.
const DESCRIPTORS: u64 = 1024;
/// Threads and processes of the pod's user id together.
const PROCESSES: u64 = 512;
/// Bytes that may be locked; none are.
const LOCKED: u64 = 64 << 10;

// linux/securebits.h. Each has a lock in the next higher bit.
const NOROOT: u32 = 1 << 0;
const NO_SETUID_FIXUP: u32 = 1 << 2;
const KEEP_CAPS: u32 = 1 << 4;
const NO_AMBIENT_RAISE: u32 = 1 << 6;
const fn locked(bits: u32) -> u32 {
    bits << 1
}

/// Becomes the user `id` with exactly these capabilities, permitted and effective, and no way to more.
pub(super) fn give_up(id: u32, capabilities: u64) -> Result<(), JailError> {
    confine::leave_session_keyring().doing("leave the session keyring")?;
    privilege::limit_bounding_set(capabilities).doing("empty the bounding set")?;
    privilege::set_ambient(0).doing("empty the ambient set")?;
    // A process without capabilities has no use for the fixup; one that changes its user for each request needs it: the
    // effective set comes back with user 0.
    let fixup = if capabilities == 0 { NO_SETUID_FIXUP } else { 0 };
    let locks = locked(NOROOT) | locked(NO_SETUID_FIXUP) | locked(KEEP_CAPS) | locked(NO_AMBIENT_RAISE);
    privilege::set_securebits(NOROOT | NO_AMBIENT_RAISE | fixup | locks).doing("lock the securebits")?;
    privilege::become_user(id, id, &[]).doing("become the pod's user")?;
    privilege::set_capabilities(capabilities, capabilities, 0).doing("give up capabilities")?;
    privilege::set_no_new_privs().doing("set no_new_privs")?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).doing("forbid core dumps")
}

/// Sets the limits of the process, none above what the machine allows; returns how many descriptors there may be.
pub(super) fn limit(descriptors: u64) -> Result<u64, JailError> {
    let descriptors = if descriptors == 0 { DESCRIPTORS } else { descriptors };
    let limits = [
        (Resource::Nofile, descriptors),
        (Resource::Core, 0),
        (Resource::Nproc, PROCESSES),
        (Resource::Memlock, LOCKED),
    ];
    for (resource, wanted) in limits {
        let most = rustix::process::getrlimit(resource).maximum.map_or(wanted, |maximum| wanted.min(maximum));
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(resource, limit).doing("set resource limits")?;
    }
    Ok(rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(descriptors))
}
