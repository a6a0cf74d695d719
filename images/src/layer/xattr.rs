//! Which extended attributes of an image are kept.

use super::erofs::{MAX_NAME, MAX_VALUE, suffix_length};
use super::error::{EntryProblem, LayerError, printable};
use super::limits::Limits;
use super::tar::pax::Xattrs;

/// The attributes that mean the same in a container as where the image was made: `user.*`, file capabilities and ACLs.
///
/// Others are dropped. `trusted.overlay.*` and `user.overlay.*` steer overlayfs (redirects, metacopy: an image could name
/// files it does not hold), other `trusted.*` is for the host's root, and `security.selinux`, `security.ima` and their
/// like belong to the host's policy.
pub(super) fn accept(xattrs: &Xattrs, limits: &Limits, path: &[u8]) -> Result<Xattrs, LayerError> {
    let mut accepted = Vec::new();
    let mut bytes = 0;
    for (name, value) in xattrs.iter().filter(|(name, _)| is_kept(name)) {
        // Name, value and the format's own 4 bytes with padding.
        bytes += (name.len() + value.len() + 8) as u64;
        let suffix = suffix_length(name).unwrap_or(usize::MAX);
        if suffix > MAX_NAME - "security.".len() || value.len() > MAX_VALUE {
            return Err(LayerError::entry(path, EntryProblem::XattrTooLarge(printable(name))));
        }
        accepted.push((name.clone(), value.clone()));
    }
    if bytes > limits.max_xattr_bytes.min(200 << 10) {
        return Err(LayerError::entry(path, EntryProblem::TooManyXattrs(limits.max_xattr_bytes)));
    }
    // Order in the archive means nothing: equal sets give equal bytes.
    accepted.sort();
    Ok(accepted)
}

fn is_kept(name: &[u8]) -> bool {
    match name {
        b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        _ => name.starts_with(b"user.") && name != b"user." && !name.starts_with(b"user.overlay."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepted(names: &[&str]) -> Vec<String> {
        let xattrs = names.iter().map(|name| (name.as_bytes().to_vec(), b"v".to_vec())).collect();
        let kept = accept(&xattrs, &Limits::default(), b"f").unwrap();
        kept.into_iter().map(|(name, _)| String::from_utf8(name).unwrap()).collect()
    }

    #[test]
    fn attributes_that_steer_the_host_are_dropped() {
        let kept = ["security.capability", "system.posix_acl_access", "system.posix_acl_default", "user.a"];
        assert_eq!(accepted(&kept), kept);
        let dropped = [
            "trusted.overlay.opaque",
            "trusted.overlay.redirect",
            "user.overlay.opaque",
            "trusted.x",
            "security.selinux",
            "system.other",
            "user.",
        ];
        assert!(accepted(&dropped).is_empty());
    }

    #[test]
    fn attributes_are_bounded() {
        let refused = |name: Vec<u8>, value: usize| {
            accept(&vec![(name, vec![0; value])], &Limits::default(), b"f").is_err()
        };
        assert!(refused([&b"user."[..], &[b'x'; 251]].concat(), 1));
        assert!(refused(b"user.x".to_vec(), 65_536));
        assert!(!refused(b"user.x".to_vec(), 60_000));
    }
}
