//! Device mapper: block devices that are a part of another one (linux/dm-ioctl.h).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Bytes of a sector, the unit of tables.
pub const SECTOR: u64 = 512;

const VERSION: [u32; 3] = [4, 0, 0];
const NAME: usize = 128;
const READONLY: u32 = 1;
/// No freezing of a filesystem on it, no waiting for its transfers.
const SKIP_LOCKFS: u32 = 1 << 10;
const NOFLUSH: u32 = 1 << 11;

// _IOWR(0xfd, number, struct dm_ioctl), whose size is 312.
const DEV_CREATE: libc::Ioctl = 0xc138_fd03;
const DEV_REMOVE: libc::Ioctl = 0xc138_fd04;
const DEV_SUSPEND: libc::Ioctl = 0xc138_fd06;
const TABLE_LOAD: libc::Ioctl = 0xc138_fd09;

/// `struct dm_ioctl`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_number: u32,
    padding: u32,
    device: u64,
    name: [u8; NAME],
    uuid: [u8; 129],
    data: [u8; 7],
}

/// `struct dm_target_spec` with the parameters of one `linear` target after it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Target {
    sector_start: u64,
    length: u64,
    status: i32,
    next: u32,
    target_type: [u8; 16],
    parameters: [u8; 64],
}

/// A request with the target that a table load needs.
#[repr(C)]
struct Request {
    header: Header,
    target: Target,
}

const _: () = assert!(size_of::<Header>() == 312 && size_of::<Request>() == 312 + 40 + 64);

/// A device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number {
    /// Major.
    pub major: u32,
    /// Minor; the node that devtmpfs makes is `/dev/dm-MINOR`.
    pub minor: u32,
}

/// The control device.
#[derive(Debug)]
pub struct Control(File);

impl Control {
    /// Opens /dev/mapper/control.
    pub fn open() -> io::Result<Self> {
        Ok(Self(File::options().read(true).write(true).open("/dev/mapper/control")?))
    }

    /// Makes the device `name` (1 to 127 bytes): `length` sectors of the device `of`, from sector `start` on. If it
    /// fails nothing is left.
    pub fn create_linear(
        &self,
        name: &str,
        of: Number,
        start: u64,
        length: u64,
        read_only: bool,
    ) -> io::Result<Number> {
        let created = self.call(DEV_CREATE, &mut request(name, 0)?)?;
        let load = || {
            let flags = if read_only { READONLY } else { 0 };
            let mut table = request(name, flags)?;
            table.header.target_count = 1;
            table.target = linear(of, start, length)?;
            self.call(TABLE_LOAD, &mut table)?;
            // Without the suspend flag this resumes: the table that was loaded takes effect.
            self.call(DEV_SUSPEND, &mut request(name, flags)?)
        };
        match load() {
            Ok(_) => Ok(number(created.device)),
            Err(error) => {
                // The first error tells the story.
                let _ = self.remove(name);
                Err(error)
            }
        }
    }

    /// Replaces the device's table: whoever uses it, of `length` sectors, gets errors from now on, and nothing below it
    /// is used any more.
    pub fn make_fail(&self, name: &str, length: u64) -> io::Result<()> {
        // The read-only flag of a device cannot change, and an error target needs none.
        let mut table = request(name, 0)?;
        table.header.target_count = 1;
        table.target.length = length;
        table.target.next = size_of::<Target>() as u32;
        table.target.target_type[..5].copy_from_slice(b"error");
        self.call(TABLE_LOAD, &mut table)?;
        self.call(DEV_SUSPEND, &mut request(name, SKIP_LOCKFS | NOFLUSH)?).map(|_| ())
    }

    /// Removes the device. EBUSY while it is open or mounted.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.call(DEV_REMOVE, &mut request(name, 0)?).map(|_| ())
    }

    fn call(&self, command: libc::Ioctl, request: &mut Request) -> io::Result<Header> {
        // SAFETY: every command reads and writes at most `data_size` bytes, which is the size of `request`, and keeps
        // no pointer to it.
        if unsafe { libc::ioctl(self.0.as_raw_fd(), command, &raw mut *request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(request.header)
    }
}

fn request(name: &str, flags: u32) -> io::Result<Request> {
    let mut header = Header {
        version: VERSION,
        data_size: size_of::<Request>() as u32,
        data_start: size_of::<Header>() as u32,
        target_count: 0,
        open_count: 0,
        flags,
        event_number: 0,
        padding: 0,
        device: 0,
        name: [0; NAME],
        uuid: [0; 129],
        data: [0; 7],
    };
    let sound = !name.is_empty() && name.len() < NAME && !name.contains(['/', '\0']);
    if !sound {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    header.name[..name.len()].copy_from_slice(name.as_bytes());
    let target =
        Target { sector_start: 0, length: 0, status: 0, next: 0, target_type: [0; 16], parameters: [0; 64] };
    Ok(Request { header, target })
}

fn linear(of: Number, start: u64, length: u64) -> io::Result<Target> {
    let mut target = Target {
        sector_start: 0,
        length,
        status: 0,
        next: size_of::<Target>() as u32,
        target_type: [0; 16],
        parameters: [0; 64],
    };
    target.target_type[..6].copy_from_slice(b"linear");
    let text = format!("{}:{} {start}", of.major, of.minor);
    // A zero must remain at the end.
    let room = target.parameters.get_mut(..text.len()).filter(|room| room.len() < 64);
    room.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(text.as_bytes());
    Ok(target)
}

/// The kernel's 64-bit encoding of device numbers (huge_encode_dev), as in `dev_t`.
fn number(device: u64) -> Number {
    Number { major: rustix::fs::major(device), minor: rustix::fs::minor(device) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_part_of_a_device_is_a_device_until_it_is_removed() {
        let Ok(control) = Control::open() else {
            eprintln!("skipped: no device mapper here");
            return;
        };
        let mut file = tempfile::tempfile().unwrap();
        for block in 0..16_u8 {
            file.write_all(&[block; 4096]).unwrap();
        }
        let backing = crate::loopdev::attach_read_only(file.as_fd()).unwrap();
        let device = std::fs::metadata(backing.path()).unwrap().rdev();
        let of = Number { major: rustix::fs::major(device), minor: rustix::fs::minor(device) };
        let name = format!("hull-test-{}", std::process::id());
        let made = control.create_linear(&name, of, 3 * 8, 2 * 8, true).unwrap();
        assert!(control.create_linear(&name, of, 0, 8, true).is_err(), "the name is taken");
        let path = std::env::temp_dir().join(&name);
        let node = rustix::fs::makedev(made.major, made.minor);
        let (kind, mode) = (rustix::fs::FileType::BlockDevice, rustix::fs::Mode::RUSR);
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, node).unwrap();
        let mut bytes = Vec::new();
        File::open(&path).unwrap().read_to_end(&mut bytes).unwrap();
        std::fs::remove_file(&path).unwrap();
        control.make_fail(&name, 2 * 8).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, node).unwrap();
        assert!(File::open(&path).unwrap().read_to_end(&mut Vec::new()).is_err());
        std::fs::remove_file(&path).unwrap();
        control.remove(&name).unwrap();
        assert_eq!(bytes, [[3; 4096], [4; 4096]].concat());
        assert!(control.remove(&name).is_err());
    }

    #[test]
    fn a_name_that_does_not_fit_is_refused() {
        assert!(
            request("", 0).is_err() && request("a/b", 0).is_err() && request(&"x".repeat(128), 0).is_err()
        );
        assert!(request(&"x".repeat(127), 0).is_ok());
        let most = u32::MAX;
        assert!(linear(Number { major: most, minor: most }, u64::MAX, 1).is_ok());
    }
}
