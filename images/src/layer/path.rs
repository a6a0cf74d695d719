//! Paths of entries: split, checked, and read for OCI whiteouts (image-spec layer.md, "Whiteouts").

use super::error::{EntryProblem, LayerError};
use super::limits::Limits;

const MAX_COMPONENT: usize = 255;

/// What an entry's path asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target<'p> {
    /// The entry itself, under this path; empty for the root.
    Entry(Vec<&'p [u8]>),
    /// Hide this path of the lower layers.
    Whiteout(Vec<&'p [u8]>),
    /// Hide everything that lower layers have in this directory.
    Opaque(Vec<&'p [u8]>),
    /// Leftovers of AUFS that mean nothing.
    Ignored,
}

impl<'p> Target<'p> {
    pub(super) fn of(path: &'p [u8], limits: &Limits) -> Result<Self, LayerError> {
        let refuse = |problem| LayerError::entry(path, problem);
        let mut components = split(path, limits).map_err(refuse)?;
        let Some(last) = components.last().copied() else {
            // "." and "/" are the root; nothing at all is an error.
            return if path.is_empty() {
                Err(refuse(EntryProblem::EmptyPath))
            } else {
                Ok(Self::Entry(components))
            };
        };
        if last == b".wh..wh..opq" {
            components.pop();
            return Self::without_marks(components, Self::Opaque).map_err(refuse);
        }
        if components.iter().any(|component| component.starts_with(b".wh..wh.")) {
            return Ok(Self::Ignored);
        }
        let Some(hidden) = last.strip_prefix(b".wh.") else {
            return Self::without_marks(components, Self::Entry).map_err(refuse);
        };
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(refuse(EntryProblem::BadWhiteout));
        }
        components.pop();
        components.push(&last[4..]);
        Self::without_marks(components, Self::Whiteout).map_err(refuse)
    }

    // No directory on the way may be called like a whiteout: it could be hidden from those who look for files.
    fn without_marks(
        components: Vec<&'p [u8]>,
        make: impl FnOnce(Vec<&'p [u8]>) -> Self,
    ) -> Result<Self, EntryProblem> {
        if components.iter().any(|component| component.starts_with(b".wh.")) {
            return Err(EntryProblem::BadWhiteout);
        }
        Ok(make(components))
    }
}

/// The components of a path. Leading and doubled slashes and `.` mean nothing; `..` is refused wherever it stands.
pub(super) fn split<'p>(path: &'p [u8], limits: &Limits) -> Result<Vec<&'p [u8]>, EntryProblem> {
    if path.len() as u64 > limits.max_path {
        return Err(EntryProblem::PathTooLong(limits.max_path));
    }
    let mut components = Vec::new();
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err(EntryProblem::ClimbsOut),
            _ if component.len() > MAX_COMPONENT => return Err(EntryProblem::NameTooLong),
            _ => components.push(component),
        }
    }
    Ok(components)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(path: &str) -> Result<Target<'_>, LayerError> {
        Target::of(path.as_bytes(), &Limits { max_path: 4096, ..Limits::default() })
    }

    fn components(path: &[&'static str]) -> Vec<&'static [u8]> {
        path.iter().map(|component| component.as_bytes()).collect()
    }

    #[test]
    fn paths_are_taken_relative_to_the_root() {
        for path in ["a/b", "./a/b", "/a/b", "//a/./b/", "a//b/"] {
            assert_eq!(target(path).unwrap(), Target::Entry(components(&["a", "b"])), "{path}");
        }
        for path in [".", "./", "/"] {
            assert_eq!(target(path).unwrap(), Target::Entry(vec![]), "{path}");
        }
    }

    #[test]
    fn paths_that_climb_or_are_too_long_are_refused() {
        let long = "x".repeat(256);
        let deep = "x/".repeat(2049);
        for path in ["", "..", "../a", "a/../b", "/..", "a/..", &long, &deep] {
            assert!(target(path).is_err(), "{path}");
        }
        assert!(target(&long[1..]).is_ok());
    }

    #[test]
    fn whiteouts_are_told_from_entries() {
        assert_eq!(target("a/.wh.b").unwrap(), Target::Whiteout(components(&["a", "b"])));
        assert_eq!(target("a/.wh..wh..opq").unwrap(), Target::Opaque(components(&["a"])));
        assert_eq!(target(".wh..wh..opq").unwrap(), Target::Opaque(vec![]));
        assert_eq!(target("a/.wh..hidden").unwrap(), Target::Whiteout(components(&["a", ".hidden"])));
        for ignored in [".wh..wh.plnk", ".wh..wh.plnk/1.2", "a/.wh..wh.aufs"] {
            assert_eq!(target(ignored).unwrap(), Target::Ignored, "{ignored}");
        }
        for bad in ["a/.wh.", ".wh..", ".wh...", ".wh.a/b", ".wh.a/.wh.b", "a/.wh..wh..opq/b/.wh.c/../d"] {
            assert!(target(bad).is_err(), "{bad}");
        }
    }
}
