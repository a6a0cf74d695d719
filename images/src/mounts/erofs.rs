//! One layer file as a detached EROFS mount.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

use super::LayerSource;
use super::error::MountError;

/// Most of the kernel's own message that is kept.
const MAX_LOG: usize = 512;

/// Opens the layer's file as a read-only EROFS file system and returns its mount, attached nowhere.
///
/// File-backed mounts need Linux 6.12 and a file system below that can back them; where the kernel says ENOTBLK (tmpfs,
/// overlayfs, older kernels) a read-only loop device stands between, which goes with the last mount.
pub(crate) fn mount(source: &LayerSource) -> Result<OwnedFd, MountError> {
    // Opened first for a clear error, and because a loop device takes a descriptor.
    let file = File::open(&source.path).map_err(|error| MountError::Open {
        layer: source.layer.clone(),
        source: Errno::from_io_error(&error).unwrap_or(Errno::IO),
    })?;
    let file_backed = match create(&source.path, true) {
        // `directio` is younger than file-backed mounts. Without it a page is cached twice, here and for the file.
        Err(Failure { source: Errno::INVAL, .. }) => create(&source.path, false),
        other => other,
    };
    let mount = match file_backed {
        Err(Failure { source: Errno::NOTBLK, .. }) => through_loop_device(&file),
        other => other,
    };
    mount.map_err(|failure| MountError::Mount {
        layer: source.layer.clone(),
        step: failure.step,
        source: failure.source,
        log: failure.log,
    })
}

struct Failure {
    step: &'static str,
    source: Errno,
    log: String,
}

fn through_loop_device(file: &File) -> Result<OwnedFd, Failure> {
    let device = hull_sys::loopdev::attach_read_only(file.as_fd()).map_err(|error| Failure {
        step: "attaching a loop device",
        source: Errno::from_io_error(&error).unwrap_or(Errno::IO),
        log: String::new(),
    })?;
    // The device detaches itself when the mount that holds it goes; until then `device` holds it.
    create(device.path(), false)
}

fn create(source: &Path, directio: bool) -> Result<OwnedFd, Failure> {
    let plain = |step| move |source| Failure { step, source, log: String::new() };
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(plain("fsopen"))?;
    let logged = |step| {
        let context = &context;
        move |source| Failure { step, source, log: kernel_log(context) }
    };
    fsconfig_set_string(context.as_fd(), "source", source).map_err(logged("fsconfig source"))?;
    // Without it the kernel would open a loop device for writing, which a read-only one refuses.
    fsconfig_set_flag(context.as_fd(), "ro").map_err(logged("fsconfig ro"))?;
    if directio {
        fsconfig_set_flag(context.as_fd(), "directio").map_err(logged("fsconfig directio"))?;
    }
    fsconfig_create(context.as_fd()).map_err(logged("fsconfig create"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(logged("fsmount"))
}

/// What the kernel wrote about the failure, with a leading separator.
fn kernel_log(context: &OwnedFd) -> String {
    let mut log = String::new();
    let mut buffer = [0; 256];
    while let Ok(count) = rustix::io::read(context, &mut buffer) {
        if count == 0 || log.len() > MAX_LOG {
            break;
        }
        log.push_str("; ");
        log.extend(String::from_utf8_lossy(&buffer[..count]).trim().chars().filter(|c| !c.is_control()));
    }
    log
}
