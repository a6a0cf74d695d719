//! Mount points that an image lacks, as the lowest layer of the root filesystem.
//!
//! Missing ones would be made in the writable directory, each through overlayfs and with an entry in the journal of the
//! filesystem below; /etc would be copied up first. And they would count as changes of the container. An image that has
//! something else in these places covers the layer, and what is missing then is made as before.

use rustix::fs::{Access, CWD, FileType, Mode};
use rustix::io::Errno;

use crate::sandbox::layout;

use super::Slots;
use super::inside::{Kind, file_type};
use super::mount_plan::{Missing, MountStep, Source};
use super::plan::{ContainerPlan, MAX_LAYERS};

/// What nearly every container has mounted.
const POINTS: [(&str, Kind); 6] = [
    ("/proc", Kind::Directory),
    ("/sys", Kind::Directory),
    ("/dev", Kind::Directory),
    ("/etc/hostname", Kind::File),
    ("/etc/hosts", Kind::File),
    ("/etc/resolv.conf", Kind::File),
];

/// The layer with those mount points that the plan needs, made if no earlier container of the pod needed the same.
/// `None`: there is none, and nothing is lost but time.
pub(super) fn layer(plan: &ContainerPlan, slots: &Slots<'_>) -> Option<String> {
    // Ids in a user namespace's root filesystem are not those of the agent's.
    if plan.user_namespace.is_some() || plan.rootfs.layers.len() >= MAX_LAYERS {
        return None;
    }
    let wanted: Vec<bool> = POINTS.iter().map(|(path, kind)| is_wanted(plan, slots, path, *kind)).collect();
    let name: String = wanted.iter().map(|wanted| if *wanted { '1' } else { '0' }).collect();
    let points = POINTS.iter().zip(wanted).filter(|(_, wanted)| *wanted).map(|(point, _)| *point);
    whole(layout::SCAFFOLDS, &name, points).ok()
}

/// The directory of this name with all `points`. It has its name only when all are there: whoever makes it is a container
/// that starts, and may be killed at any moment.
fn whole(
    place: &str,
    name: &str,
    points: impl Iterator<Item = (&'static str, Kind)>,
) -> rustix::io::Result<String> {
    let layer = format!("{place}/{name}");
    match rustix::fs::access(&layer, Access::EXISTS) {
        Err(Errno::NOENT) => {}
        looked => return looked.map(|()| layer),
    }
    let unfinished = format!("{layer}.new");
    directory(&unfinished)?;
    for (path, kind) in points {
        make(&format!("{unfinished}{path}"), kind)?;
    }
    rustix::fs::rename(&unfinished, &layer)?;
    Ok(layer)
}

fn is_wanted(plan: &ContainerPlan, slots: &Slots<'_>, path: &str, kind: Kind) -> bool {
    let is_of_kind = |step: &MountStep| match &step.source {
        Source::Slot(slot) => {
            let brought = slots.get(*slot).and_then(|tree| file_type(tree).ok());
            brought.is_some_and(|found| (found == FileType::Directory) == (kind == Kind::Directory))
        }
        _ => true,
    };
    plan.mounts
        .iter()
        .any(|step| step.destination == path && step.missing == Missing::Create && is_of_kind(step))
}

/// One that is there already was left by somebody who did not come to the end.
fn make(path: &str, kind: Kind) -> rustix::io::Result<()> {
    if kind == Kind::Directory {
        return directory(path);
    }
    if let Some((parent, _)) = path.rsplit_once('/') {
        directory(parent)?;
    }
    there(rustix::fs::mknodat(CWD, path, FileType::RegularFile, Mode::from_raw_mode(0o644), 0))
}

fn directory(path: &str) -> rustix::io::Result<()> {
    there(rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)))
}

fn there(made: rustix::io::Result<()>) -> rustix::io::Result<()> {
    if made == Err(Errno::EXIST) { Ok(()) } else { made }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_that_was_left_half_made_is_no_layer_and_the_next_container_completes_it() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().to_str().unwrap();
        let points = || POINTS.into_iter().filter(|(path, _)| *path != "/sys");
        // Given a container that was killed, or found no memory, after the first points
        std::fs::create_dir_all(directory.path().join("set.new/proc")).unwrap();
        std::fs::create_dir_all(directory.path().join("set.new/etc")).unwrap();
        std::fs::write(directory.path().join("set.new/etc/hostname"), "").unwrap();
        // When the next one needs the same
        let layer = whole(place, "set", points()).unwrap();
        // Then it has all of them, and the one after it as well
        for again in [layer.clone(), whole(place, "set", points()).unwrap()] {
            assert_eq!(again, layer);
            for (path, kind) in points() {
                let found = std::fs::metadata(format!("{layer}{path}")).unwrap();
                assert_eq!(found.is_dir(), kind == Kind::Directory, "{path}");
            }
        }
        assert!(!directory.path().join("set.new").exists() && !directory.path().join("set/sys").exists());
        // And one that cannot be made is none
        let nowhere = format!("{place}/nowhere");
        assert_eq!(whole(&nowhere, "set", points()), Err(Errno::NOENT));
    }
}
