//! Names of cgroups and paths of them, checked before they reach the kernel.

use super::CgroupError;

/// Longest name of one directory (NAME_MAX).
const MAX_NAME: usize = 255;
/// Most levels of a parent path; kubelet's deepest has four, a nested node a dozen.
const MAX_LEVELS: usize = 64;

/// Checks that `name` is one path component and nothing else.
pub(super) fn check_name(name: &str) -> Result<(), CgroupError> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_NAME {
        "it is longer than 255 bytes"
    } else if name == "." || name == ".." {
        "it would name another directory"
    } else if name.contains('/') {
        "it contains a slash"
    } else if name.chars().any(char::is_control) {
        "it contains a control character"
    } else {
        return Ok(());
    };
    Err(CgroupError::Name { name: name.chars().take(80).collect(), reason })
}

/// The levels of a parent path below a hierarchy's root: slashes at the ends and doubled ones, and `.`, mean nothing;
/// `..` is refused. The empty list is the root itself.
pub(super) fn levels(parent: &str) -> Result<Vec<&str>, CgroupError> {
    let levels: Vec<&str> = parent.split('/').filter(|level| !level.is_empty() && *level != ".").collect();
    if levels.len() > MAX_LEVELS {
        return Err(CgroupError::Name {
            name: parent.chars().take(80).collect(),
            reason: "it has more than 64 levels",
        });
    }
    levels.iter().try_for_each(|level| check_name(level))?;
    Ok(levels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_path_is_normalised() {
        assert_eq!(levels("/kubepods//burstable/./pod1/").unwrap(), ["kubepods", "burstable", "pod1"]);
        assert!(levels("/").unwrap().is_empty());
        assert!(levels("").unwrap().is_empty());
    }

    #[test]
    fn a_path_that_climbs_out_is_refused() {
        for bad in ["..", "/a/../b", "a/..", "/a\nb", "a/b\0c"] {
            assert!(levels(bad).is_err(), "{bad:?}");
        }
        assert!(levels(&"a/".repeat(65)).is_err());
    }

    #[test]
    fn a_leaf_is_one_component() {
        for bad in ["", ".", "..", "a/b", "/a", "a\n", &"x".repeat(256)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_name("hull-agent.0").is_ok());
    }
}
