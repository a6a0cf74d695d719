//! System calls that are younger than the installed libseccomp.
//!
//! Debian 12's libseccomp ends with Linux 5.17. A profile that allows a younger call by name would lose the name, and
//! the call would fail with EPERM, which libraries do not take as "use the older one" (fchmodat2 in glibc 2.39 did
//! just that). All calls since number 424 have the same number on every architecture, so this table serves all.

/// Number and name, by number (include/uapi/asm-generic/unistd.h).
const RECENT: [(u32, &str); 21] = [
    (450, "set_mempolicy_home_node"),
    (451, "cachestat"),
    (452, "fchmodat2"),
    (453, "map_shadow_stack"),
    (454, "futex_wake"),
    (455, "futex_wait"),
    (456, "futex_requeue"),
    (457, "statmount"),
    (458, "listmount"),
    (459, "lsm_get_self_attr"),
    (460, "lsm_set_self_attr"),
    (461, "lsm_list_modules"),
    (462, "mseal"),
    (463, "setxattrat"),
    (464, "getxattrat"),
    (465, "listxattrat"),
    (466, "removexattrat"),
    (467, "open_tree_attr"),
    (468, "file_getattr"),
    (469, "file_setattr"),
    (470, "listns"),
];

/// The number of a call by name.
pub(super) fn number_of(name: &str) -> Option<u32> {
    RECENT.iter().find(|(_, known)| *known == name).map(|(number, _)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_agrees_with_libseccomp_where_both_know() {
        assert!(RECENT.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for (number, name) in RECENT {
            if let Ok(known) = libseccomp::ScmpSyscall::from_name(name) {
                // Negative numbers are libseccomp's own, for calls that this architecture does not have.
                let known = known.as_raw_syscall();
                assert!(known < 0 || known as u32 == number, "{name}");
            }
        }
    }
}
