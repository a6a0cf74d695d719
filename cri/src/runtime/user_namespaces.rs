//! Whether pods can have user namespaces on this machine.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use hull_agent::sandbox::IdMap;
use hull_sys::mount::{self, Attributes, OpenTreeFlags};
use rustix::fs::CWD;

use super::blocking;
use crate::sandbox::Launcher;

/// Makes one, and maps the ids of the file system that writable layers are on. The error is a sentence for those who ask
/// for a user namespace all the same.
///
/// overlayfs and EROFS know mapped ids since Linux 5.19; whoever has the system calls below and these is new enough.
pub(super) async fn probe(launcher: &dyn Launcher, root: &Path) -> Result<(), String> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    if !is_new_enough(&release) {
        return Err(format!("user namespaces need Linux 5.19 or newer; this is {release}"));
    }
    let map = IdMap::new(0, 65_536, 65_536).ok_or("there is no such mapping")?;
    let namespaces = launcher.user_namespace(map, map).await.map_err(|error| error.to_string())?;
    let root = root.to_owned();
    let mapped = blocking(move || map_ids(&root, namespaces.user.into())).await;
    mapped.map_err(|error| error.to_string())?
}

fn map_ids(root: &Path, namespace: File) -> Result<(), String> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let map = || -> std::io::Result<()> {
        let tree = mount::open_tree(CWD, root, flags)?;
        let attributes = Attributes { user_namespace: Some(namespace.as_fd()), ..Attributes::default() };
        mount::set_attributes(tree.as_fd(), false, &attributes)
    };
    map().map_err(|error| {
        format!("the file system at {} cannot map ids, as user namespaces need it: {error}", root.display())
    })
}

fn is_new_enough(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(5), Some(19))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_release_is_understood() {
        for (release, enough) in [
            ("5.19.0", true),
            ("6.1.0-13-amd64", true),
            ("5.15.0-generic", false),
            ("4.19", false),
            ("x", false),
        ] {
            assert_eq!(is_new_enough(release), enough, "{release}");
        }
    }
}
