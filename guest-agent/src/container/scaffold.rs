//! Mount points that an image lacks, as the lowest layer of the root filesystem.
//!
//! Missing ones would be made in the writable directory, each through overlayfs and with an entry in the journal of the
//! filesystem below; /etc would be copied up first. And they would count as changes of the container. An image that has
//! something else in these places covers the layer, and what is missing then is made as before.

use rustix::fs::{CWD, FileType, Mode};
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
    let layer = format!("{}/{name}", layout::SCAFFOLDS);
    match rustix::fs::mkdir(&layer, Mode::from_raw_mode(0o755)) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Some(layer),
        Err(_) => return None,
    }
    for ((path, kind), _) in POINTS.iter().zip(wanted).filter(|(_, wanted)| *wanted) {
        make(&format!("{layer}{path}"), *kind).ok()?;
    }
    Some(layer)
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

fn make(path: &str, kind: Kind) -> rustix::io::Result<()> {
    let mode = Mode::from_raw_mode;
    if kind == Kind::Directory {
        return rustix::fs::mkdir(path, mode(0o755));
    }
    if let Some((parent, _)) = path.rsplit_once('/') {
        match rustix::fs::mkdir(parent, mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
    }
    rustix::fs::mknodat(CWD, path, FileType::RegularFile, mode(0o644), 0)
}
