//! Images as volumes: which image a mount means, and whether it has what is to be mounted.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use hull_images::LayerId;
use rustix::fs::{AtFlags, FileType};
use rustix::io::Errno;

use super::volumes::{is_opaque, open_directory};
use super::{Error, Result, Runtime, blocking};
use crate::api::runtime::ContainerConfig;
use crate::store::record::ImageVolume;

/// Symbolic links followed in one path, as in the kernel.
const MAX_LINKS: usize = 40;
/// Components of a path with its links, far more than PATH_MAX allows in one.
const MAX_STEPS: usize = 10_000;

impl Runtime {
    /// The images that the container's mounts name.
    pub(super) fn image_volumes(&self, config: &ContainerConfig) -> Result<Vec<ImageVolume>> {
        let mut volumes = Vec::new();
        for mount in &config.mounts {
            let Some(image) = &mount.image else { continue };
            if image.image.is_empty() {
                let path = &mount.container_path;
                return Err(Error::Invalid(format!("the image volume at {path} names no image")));
            }
            let missing = || Error::NotFound { what: "image", id: image.image.clone() };
            let found = self.images.find(&image.image)?.ok_or_else(missing)?;
            self.accept_for_container(&found, &[&image.image, &image.user_specified_image])?;
            volumes.push(ImageVolume {
                container_path: mount.container_path.clone(),
                image_id: found.id,
                layers: found.layers.iter().map(ToString::to_string).collect(),
            });
        }
        Ok(volumes)
    }

    /// Refuses sub paths that the images do not have. Their layers are held.
    pub(super) async fn check_sub_paths(
        &self,
        config: &ContainerConfig,
        volumes: &[ImageVolume],
    ) -> Result<()> {
        let asked = config.mounts.iter().filter(|mount| mount.image.is_some()).zip(volumes);
        for (mount, volume) in asked.filter(|(mount, _)| !mount.image_sub_path.is_empty()) {
            let layers: Vec<LayerId> = volume.layers.iter().filter_map(|id| id.parse().ok()).collect();
            let (images, path) = (self.images.clone(), mount.image_sub_path.clone());
            let check = move || {
                let trees = images.layer_trees(&layers).map_err(|error| {
                    Error::Internal(format!("cannot mount the layers of an image volume: {error}"))
                })?;
                check_exists(&trees, &path).map_err(|error| {
                    Error::Invalid(format!("the image volume has nothing usable at {path:?}: {error}"))
                })
            };
            blocking(check).await??;
        }
        Ok(())
    }
}

/// A directory as the stacked layers show it: that of each layer that counts, the uppermost first.
type View = Vec<OwnedFd>;

enum Entry {
    Directory(View),
    Link(Vec<u8>),
    Other,
}

/// Follows `path` in the stacked layers (the lowest first), links inside the image only. Nothing is mounted for it, and
/// nothing outside of the layers can be reached: each component is looked up by name in the directory before it.
fn check_exists(trees: &[OwnedFd], path: &str) -> io::Result<()> {
    let root = || trees.iter().rev().map(OwnedFd::try_clone).collect::<io::Result<View>>();
    let mut way = vec![root()?];
    let mut todo = Vec::new();
    push(&mut todo, path.as_bytes());
    let (mut links, mut steps) = (0, 0);
    while let Some(name) = todo.pop() {
        steps += 1;
        if steps > MAX_STEPS {
            return Err(Errno::NAMETOOLONG.into());
        }
        if name == b".." {
            if way.len() > 1 {
                way.pop();
            }
            continue;
        }
        let here = way.last().ok_or(Errno::NOENT)?;
        match look_up(here, &name)? {
            Entry::Directory(view) => way.push(view),
            Entry::Other if todo.is_empty() => return Ok(()),
            Entry::Other => return Err(Errno::NOTDIR.into()),
            Entry::Link(target) => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP.into());
                }
                if target.starts_with(b"/") {
                    way.truncate(1);
                }
                push(&mut todo, &target);
            }
        }
    }
    Ok(())
}

/// Components in reverse, so that the next one is at the end.
fn push(todo: &mut Vec<Vec<u8>>, path: &[u8]) {
    let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    todo.extend(parts.rev().map(<[u8]>::to_vec));
}

/// What overlayfs shows at `name`: directories of several layers become one; a whiteout, an opaque directory or anything
/// that is no directory hides the layers below.
fn look_up(view: &View, name: &[u8]) -> io::Result<Entry> {
    let mut directories = View::new();
    for layer in view {
        let status = match rustix::fs::statat(layer, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(status) => status,
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(errno.into()),
        };
        match FileType::from_raw_mode(status.st_mode) {
            FileType::Directory => {
                let directory = open_directory(layer.as_fd(), name)?;
                let hides = is_opaque(directory.as_fd());
                directories.push(directory);
                if hides {
                    break;
                }
            }
            _ if !directories.is_empty() => break,
            FileType::CharacterDevice if status.st_rdev == 0 => return Err(Errno::NOENT.into()),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(layer, name, Vec::new())?;
                return Ok(Entry::Link(target.into_bytes()));
            }
            _ => return Ok(Entry::Other),
        }
    }
    if directories.is_empty() { Err(Errno::NOENT.into()) } else { Ok(Entry::Directory(directories)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, XattrFlags};
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    #[test]
    fn a_sub_path_is_looked_for_in_the_stacked_layers() {
        let directory = tempfile::tempdir().unwrap();
        let layer = |number: usize| directory.path().join(number.to_string());
        fs::create_dir_all(layer(0).join("etc/deep")).unwrap();
        fs::write(layer(0).join("etc/passwd"), "").unwrap();
        fs::write(layer(0).join("etc/gone"), "").unwrap();
        fs::create_dir_all(layer(0).join("opaque/below")).unwrap();
        fs::create_dir_all(layer(0).join("file")).unwrap();
        fs::create_dir_all(layer(1).join("etc")).unwrap();
        fs::create_dir_all(layer(1).join("opaque/above")).unwrap();
        fs::write(layer(1).join("file"), "").unwrap();
        let etc = File::open(layer(1).join("etc")).unwrap();
        rustix::fs::mknodat(&etc, "gone", FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        let opaque = File::open(layer(1).join("opaque")).unwrap();
        rustix::fs::fsetxattr(&opaque, c"trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
        symlink("/etc/deep", layer(1).join("link")).unwrap();
        symlink("../../../../../etc/shadow", layer(1).join("out")).unwrap();
        symlink("ring", layer(1).join("ring")).unwrap();
        let trees: Vec<OwnedFd> = (0..2).map(|number| File::open(layer(number)).unwrap().into()).collect();
        for path in
            ["etc", "/etc/", "etc/passwd", "etc/deep", "opaque/above", "link", "link/../passwd", ".", ""]
        {
            check_exists(&trees, path).unwrap_or_else(|error| panic!("{path}: {error}"));
        }
        for path in [
            "missing",
            "etc/gone",
            "opaque/below",
            "file/x",
            "etc/passwd/x",
            "out",
            "ring",
            "../../etc/shadow",
        ] {
            assert!(check_exists(&trees, path).is_err(), "{path}");
        }
    }
}
