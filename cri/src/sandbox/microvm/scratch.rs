//! A machine's scratch disk: a sparse file, with a small ext4 on a range of it for each container and volume.
//!
//! A filesystem is made on the host before the guest may see its range: a copy of a template (mke2fs, once for each
//! size) that takes a few hundred kilobytes, or, where it is to begin with files, by mke2fs itself. A range that is
//! given up is a hole again.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::sandbox::SandboxError;
use crate::stats::disk::Occupied;

/// Name of the file in a machine's directory.
const FILE: &str = "scratch";
/// Size of the disk as the guest sees it; an address space, not space.
pub(super) const CAPACITY: u64 = 1 << 40;
/// Ranges begin and end at multiples of this.
const ALIGNMENT: u64 = 2 << 20;
/// What one step of a copy takes.
const CHUNK: usize = 64 << 10;
/// Directory, in each filesystem for a volume, that is the volume: `lost+found` is nobody's business.
pub(super) const VOLUME_ROOT: &str = "data";

/// Bytes of a range that holds a filesystem of about `size` bytes.
pub(super) fn range_length(size: u64) -> u64 {
    size.clamp(16 << 20, CAPACITY / 8).div_ceil(ALIGNMENT) * ALIGNMENT
}

/// Makes the disk of a machine and opens it for the VMM.
pub(super) fn make(directory: &Path) -> Result<File, SandboxError> {
    let path = directory.join(FILE);
    let failed = SandboxError::host("make the scratch disk", &path);
    let open = || {
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        file.set_len(CAPACITY)?;
        Ok(file)
    };
    open().map_err(failed)
}

/// The scratch disk of a machine.
#[derive(Clone, Debug)]
pub(super) struct Scratch {
    path: PathBuf,
    templates: PathBuf,
}

impl Scratch {
    /// In the machine's directory; templates are kept in `templates`.
    pub(super) fn of(directory: &Path, templates: PathBuf) -> Self {
        Self { path: directory.join(FILE), templates }
    }

    fn open(&self) -> Result<File, SandboxError> {
        let opened = OpenOptions::new().read(true).write(true).open(&self.path);
        opened.map_err(SandboxError::host("open the scratch disk", &self.path))
    }

    /// Puts a filesystem on the range, with what is in `seed` if there is one. Blocks.
    pub(super) fn format(&self, offset: u64, length: u64, seed: Option<&Path>) -> Result<(), SandboxError> {
        let put = |image: &File| {
            let failed = SandboxError::host("format the scratch disk", &self.path);
            copy(image, &self.open()?, offset).map_err(failed)
        };
        let Some(seed) = seed else { return put(&self.template(length)?) };
        // Beside the disk, of which the guest has other parts in use.
        let temporary = temporary_in(self.path.parent().unwrap_or(Path::new("/")));
        let made = make_image(&temporary, length, Some(seed)).and_then(|image| put(&image));
        let _ = fs::remove_file(&temporary);
        made
    }

    /// The template of this size, made if it is missing.
    fn template(&self, length: u64) -> Result<File, SandboxError> {
        let path = self.templates.join(format!("ext4-{}m", length >> 20));
        if let Some(template) = File::open(&path).ok().filter(is_ext4) {
            return Ok(template);
        }
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.templates);
        made.map_err(SandboxError::host("make the directory", &self.templates))?;
        // Two threads may make the same one: each makes its own, and the last name wins.
        let temporary = temporary_in(&self.templates);
        let named = make_image(&temporary, length, None).and_then(|image| {
            // It is for all machines to come: a name must not outlive a power cut that the content does not.
            image.sync_all().map_err(SandboxError::host("make the template", &path))?;
            fs::rename(&temporary, &path).map_err(SandboxError::host("make the template", &path))?;
            Ok(image)
        });
        if named.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        named
    }

    /// The range is a hole again. Nobody uses it any more.
    pub(super) fn punch(&self, offset: u64, length: u64) -> Result<(), SandboxError> {
        let file = self.open()?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, flags, offset, length)
            .map_err(|errno| SandboxError::host("give back space of", &self.path)(errno.into()))
    }

    /// What the range occupies on the host's disk.
    pub(super) fn occupied(&self, offset: u64, length: u64) -> io::Result<Occupied> {
        let file = File::open(&self.path)?;
        let bytes = data(&file, offset, offset.saturating_add(length)).map(|(start, end)| end - start).sum();
        Ok(Occupied { bytes, inodes: 0, complete: true })
    }
}

/// Whether there is a filesystem in the file (Documentation/filesystems/ext4, "Super Block": 0xEF53 at 0x38).
fn is_ext4(file: &File) -> bool {
    let mut magic = [0; 2];
    file.read_exact_at(&mut magic, 1024 + 0x38).is_ok_and(|()| magic == [0x53, 0xEF])
}

fn temporary_in(directory: &Path) -> PathBuf {
    directory.join(format!(".new-{:016x}", rand::random::<u64>()))
}

/// A sparse file with an ext4 without a journal: it ends with its machine, so there is nothing to recover.
fn make_image(path: &Path, length: u64, seed: Option<&Path>) -> Result<File, SandboxError> {
    let opened = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    let sized = opened.and_then(|file| file.set_len(length).map(|()| file));
    let file = sized.map_err(SandboxError::host("make", path))?;
    let mut command = Command::new("mke2fs");
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.args(["-t", "ext4", "-F", "-q", "-b", "4096", "-m", "0", "-O", "^has_journal,^resize_inode"]);
    // The file is a hole, so its inode tables are zeroed already; the guest must not begin to do that.
    command.args(["-E", "lazy_itable_init=1,root_owner=0:0"]);
    if let Some(seed) = seed {
        command.arg("-d").arg(seed);
    }
    let failed = |reason: String| SandboxError::Machine { action: "make a filesystem for", reason };
    let output = command.arg(path).stdin(Stdio::null()).output();
    let output =
        output.map_err(|error| failed(format!("mke2fs (package e2fsprogs) cannot be started: {error}")))?;
    if output.status.success() {
        return Ok(file);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(failed(format!("mke2fs failed ({}): {}", output.status, said.trim())))
}

/// The parts of a file between `start` and `end` that are no holes.
fn data(file: &File, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut position = start;
    std::iter::from_fn(move || {
        let from = match rustix::fs::seek(file, SeekFrom::Data(position)) {
            Ok(from) if from < end => from,
            // ENXIO: no more data.
            _ => return None,
        };
        let to = rustix::fs::seek(file, SeekFrom::Hole(from)).unwrap_or(end).min(end);
        position = to;
        (to > from).then_some((from, to))
    })
}

/// Copies what is in `from` to `offset` in `to`, which has holes there.
fn copy(from: &File, to: &File, offset: u64) -> io::Result<()> {
    let length = from.metadata()?.len();
    let mut buffer = vec![0; CHUNK];
    for (start, end) in data(from, 0, length) {
        let (mut source, mut target) = (start, offset + start);
        while source < end {
            let wanted = (end - source).min(1 << 30) as usize;
            match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), wanted) {
                Ok(copied) if copied > 0 => {}
                Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {
                    let piece = &mut buffer[..wanted.min(CHUNK)];
                    from.read_exact_at(piece, source)?;
                    to.write_all_at(piece, target)?;
                    source += piece.len() as u64;
                    target += piece.len() as u64;
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn check(scratch: &Scratch, offset: u64) -> String {
        let device = format!("{}?offset={offset}", scratch.path.display());
        let output = Command::new("e2fsck").args(["-fn", &device]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        let output = Command::new("debugfs").args(["-R", "stat /data", &device]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    #[test]
    fn filesystems_lie_side_by_side_and_go_without_a_trace() {
        let directory = tempfile::tempdir().unwrap();
        let length = range_length(64 << 20);
        drop(make(directory.path()).unwrap());
        let scratch = Scratch::of(directory.path(), directory.path().join("templates"));
        let seed = directory.path().join("seed");
        fs::create_dir_all(seed.join(VOLUME_ROOT)).unwrap();
        fs::set_permissions(seed.join(VOLUME_ROOT), fs::Permissions::from_mode(0o1777)).unwrap();
        std::os::unix::fs::chown(seed.join(VOLUME_ROOT), Some(5), Some(6)).unwrap();
        scratch.format(0, length, None).unwrap();
        scratch.format(length, length, Some(&seed)).unwrap();
        scratch.format(2 * length, length, None).unwrap();
        check(&scratch, 0);
        check(&scratch, 2 * length);
        let volume = check(&scratch, length);
        assert!(volume.contains("Mode:  01777") && volume.contains("User:     5   Group:     6"), "{volume}");
        let occupied = scratch.occupied(0, length).unwrap().bytes;
        assert!((1..4 << 20).contains(&occupied), "{occupied}");
        scratch.punch(0, length).unwrap();
        assert_eq!(scratch.occupied(0, length).unwrap().bytes, 0);
        assert!(scratch.occupied(length, length).unwrap().bytes > 0, "the neighbour is untouched");
    }

    #[test]
    fn a_template_whose_content_a_power_cut_took_is_made_again() {
        let directory = tempfile::tempdir().unwrap();
        let length = range_length(64 << 20);
        drop(make(directory.path()).unwrap());
        let templates = directory.path().join("templates");
        let scratch = Scratch::of(directory.path(), templates.clone());
        scratch.format(0, length, None).unwrap();
        let template = fs::read_dir(&templates).unwrap().next().unwrap().unwrap().path();
        for size in [0, length] {
            // Its name is there, and nothing else, or its size as well.
            File::create(&template).unwrap().set_len(size).unwrap();
            scratch.punch(0, length).unwrap();
            scratch.format(0, length, None).unwrap();
            check(&scratch, 0);
        }
        assert_eq!(fs::read_dir(&templates).unwrap().count(), 1);
    }
}
