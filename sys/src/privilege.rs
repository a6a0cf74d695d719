use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets};

/// Capability numbers above this do not exist in any kernel (the sets have 64 bits).
const MAX_CAPABILITY: u8 = 63;

fn prctl(option: i32, first: u64, second: u64) -> io::Result<i32> {
    // SAFETY: used below only with options whose arguments are numbers, never pointers.
    let result = unsafe { libc::prctl(option, first, second, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Sets effective, permitted and inheritable capabilities of the calling thread, as bit masks.
pub fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    let sets = CapabilitySets {
        effective: CapabilitySet::from_bits_retain(effective),
        permitted: CapabilitySet::from_bits_retain(permitted),
        inheritable: CapabilitySet::from_bits_retain(inheritable),
    };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// The calling thread's bounding set as a bit mask, limited to what the kernel knows.
pub fn bounding_set() -> io::Result<u64> {
    let mut set = 0;
    for capability in 0..=MAX_CAPABILITY {
        match prctl(libc::PR_CAPBSET_READ, capability.into(), 0) {
            Ok(1) => set |= 1 << capability,
            Ok(_) => {}
            // The first number that the kernel does not know.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(set)
}

/// Drops every capability that is not in `keep` from the calling thread's bounding set.
pub fn limit_bounding_set(keep: u64) -> io::Result<()> {
    for capability in 0..=MAX_CAPABILITY {
        if keep & (1 << capability) != 0 {
            continue;
        }
        match prctl(libc::PR_CAPBSET_DROP, capability.into(), 0) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes the calling thread's ambient set exactly `set`; each capability must be permitted and inheritable.
pub fn set_ambient(set: u64) -> io::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0)?;
    for capability in 0..=MAX_CAPABILITY {
        if set & (1 << capability) != 0 {
            prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, capability.into())?;
        }
    }
    Ok(())
}

/// Keeps permitted capabilities across the change to another user, until the next execve.
pub fn keep_capabilities(keep: bool) -> io::Result<()> {
    Ok(rustix::thread::set_keep_capabilities(keep)?)
}

/// Sets the calling thread's securebits (capabilities(7)) by number.
pub fn set_securebits(bits: u32) -> io::Result<()> {
    prctl(libc::PR_SET_SECUREBITS, bits.into(), 0).map(drop)
}

/// Sets no_new_privs for the calling thread; it cannot be unset.
pub fn set_no_new_privs() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// Makes the calling thread this user with exactly these groups: supplementary groups first, then real, effective and
/// saved group, then user. `u32::MAX` (which the kernel reads as "unchanged") is refused.
pub fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    if uid == u32::MAX || gid == u32::MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // The system calls themselves: glibc's functions would change every thread of the process.
    // SAFETY: `groups` has the length given and lives across the call; gid_t is u32.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    // SAFETY: only numbers are passed.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: only numbers are passed.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Installs a classic BPF program (an array of struct sock_filter in native byte order) as a seccomp filter for the
/// calling thread. Needs no_new_privs or CAP_SYS_ADMIN. `flags` are SECCOMP_FILTER_FLAG_*.
///
/// Refuses programs of a length that the kernel cannot take (empty, broken, more than 4096 instructions).
pub fn install_seccomp(program: &[u8], flags: u32) -> io::Result<()> {
    const INSTRUCTION: usize = size_of::<libc::sock_filter>();
    // With these two the kernel returns a descriptor, which nobody here would own.
    let refused = (libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_TSYNC) as u32;
    let length = program.len() / INSTRUCTION;
    if length == 0 || length > 4096 || !program.len().is_multiple_of(INSTRUCTION) || flags & refused != 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // The kernel copies the bytes (copy_from_user), so their alignment does not matter.
    let program = libc::sock_fprog { len: length as u16, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: `program` describes exactly the bytes given, which the kernel only reads, during the call.
    check(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    })
}

/// Securebit that keeps capabilities as they are when user ids change (SECBIT_NO_SETUID_FIXUP, capabilities(7)).
const NO_SETUID_FIXUP: u32 = 1 << 2;

/// Makes the calling thread act on files as this user and group, with the capabilities that it has: what it makes is
/// theirs. `u32::MAX` is refused.
pub fn act_on_files_as(uid: u32, gid: u32) -> io::Result<()> {
    if uid == u32::MAX || gid == u32::MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    set_securebits(NO_SETUID_FIXUP)?;
    // The calls report no error, only who it was before: asked a second time they tell whether it is so now.
    for (call, id) in [(libc::SYS_setfsgid, gid), (libc::SYS_setfsuid, uid)] {
        // SAFETY: the argument is a number; the calls always succeed or change nothing.
        let now = unsafe {
            libc::syscall(call, id);
            libc::syscall(call, u32::MAX)
        };
        if now as u32 != id {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_seccomp_program_is_refused_before_the_kernel_sees_it() {
        assert_eq!(install_seccomp(&[], 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(install_seccomp(&[0; 7], 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(install_seccomp(&[0; 8 * 4097], 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_seccomp_program_takes_effect_in_its_thread_only() {
        std::thread::spawn(|| {
            set_no_new_privs().unwrap();
            // BPF_RET | BPF_K, SECCOMP_RET_ALLOW.
            let mut program = [0_u8; 8];
            program[..2].copy_from_slice(&6_u16.to_ne_bytes());
            program[4..].copy_from_slice(&0x7fff_0000_u32.to_ne_bytes());
            install_seccomp(&program, 0).unwrap();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            assert!(status.contains("Seccomp:\t2"), "{status}");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn limits_and_ambient_set_are_exact() {
        std::thread::spawn(|| {
            let (chown, kill) = (1 << 0, 1 << 5);
            limit_bounding_set(chown | kill).unwrap();
            assert_eq!(bounding_set().unwrap(), chown | kill);
            set_capabilities(chown, chown | kill, chown).unwrap();
            set_ambient(chown).unwrap();
            assert!(set_ambient(kill).is_err(), "not inheritable");
            set_ambient(chown).unwrap();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            assert!(status.contains("CapAmb:\t0000000000000001"), "{status}");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn acting_as_another_makes_files_theirs_and_keeps_capabilities() {
        use std::os::unix::fs::MetadataExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                act_on_files_as(1234, 5678).unwrap();
                // The directory is root's, 0700: only CAP_DAC_OVERRIDE lets anybody else in.
                std::fs::write(&path, "").unwrap();
                let made = std::fs::metadata(&path).unwrap();
                (made.uid(), made.gid())
            });
            assert_eq!(made.join().unwrap(), (1234, 5678));
        });
        assert!(act_on_files_as(u32::MAX, 0).is_err());
    }

    #[test]
    fn the_user_that_means_unchanged_is_refused() {
        assert!(become_user(u32::MAX, 0, &[]).is_err());
        assert!(become_user(0, u32::MAX, &[]).is_err());
    }
}
