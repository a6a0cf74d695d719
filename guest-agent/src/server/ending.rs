//! Whether a process still has what another one could join.

use std::fs;

use super::SIGKILL;

/// The kernel's PF_EXITING: the process gives up its memory and namespaces, which is long before it can be waited for.
const EXITING: u64 = 0x4;

/// True if the process, which has not been waited for, has ended, is ending, or has been killed and is about to.
///
/// From there on its namespaces cannot be joined (ESRCH), a process in its PID namespace cannot be cloned (ENOMEM) or is
/// killed at once, and its cgroup may be gone: none of that is anybody's fault.
pub(super) fn is_ending(pid: i32) -> bool {
    // Nothing to read: it is gone.
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| says_ending(&stat))
}

/// proc_pid_stat(5): "flags" is the ninth field, "signal" the 31st. A signal that ends a process is noted as SIGKILL in
/// each of its threads when it is sent.
fn says_ending(stat: &str) -> bool {
    // A name may hold anything, brackets and blanks too.
    let Some((_, from_third)) = stat.rsplit_once(") ") else { return false };
    let field = |number: usize| from_third.split(' ').nth(number - 3)?.parse::<u64>().ok();
    let killed = 1 << (SIGKILL - 1);
    field(9).is_some_and(|flags| flags & EXITING != 0) || field(31).is_some_and(|sent| sent & killed != 0)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_that_lives_is_not_ending_and_one_that_nobody_has_waited_for_is() {
        assert!(!is_ending(std::process::id().cast_signed()));
        let mut child = Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        assert!(!is_ending(pid));
        child.kill().unwrap();
        // No waiting in between: a signal that has been sent is enough.
        assert!(is_ending(pid));
        child.wait().unwrap();
        assert!(is_ending(pid));
    }

    #[test]
    fn a_name_with_brackets_hides_nothing() {
        let stat = |name: &str, flags: u64, signal: u64| {
            format!("7 ({name}) S 1 7 7 0 -1 {flags} 0 0 0 0 0 0 0 0 20 0 1 0 5 0 0 1 0 0 0 0 0 {signal} 0 0")
        };
        assert!(!says_ending(&stat("a) S (b", 0x0040_0100, 0)));
        assert!(says_ending(&stat("a) S 1 (b", 0x0040_0104, 0)));
        assert!(says_ending(&stat("sh", 0x0040_0100, 0x100)));
    }
}
