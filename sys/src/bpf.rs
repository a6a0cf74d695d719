//! bpf(2), as far as it is needed to restrict the devices of a cgroup: load a program of type
//! `BPF_PROG_TYPE_CGROUP_DEVICE`, attach it, find and replace it later. See bpf(2) and linux/bpf.h.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const PROG_QUERY: libc::c_int = 16;

const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const F_ALLOW_MULTI: u32 = 2;
const F_REPLACE: u32 = 4;

/// Most programs on one cgroup (`BPF_CGROUP_MAX_PROGS`).
const MAX_PROGRAMS: usize = 64;

/// Longest name of a program, without its terminating NUL (`BPF_OBJ_NAME_LEN`).
const MAX_NAME: usize = 15;

/// `union bpf_attr`, by offsets; long enough for every field used here, and zero elsewhere, as the kernel demands.
#[repr(C, align(8))]
struct Attributes([u8; 72]);

impl Attributes {
    fn new() -> Self {
        Self([0; 72])
    }

    fn u32(mut self, offset: usize, value: u32) -> Self {
        self.0[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn fd(self, offset: usize, fd: BorrowedFd<'_>) -> Self {
        self.u32(offset, fd.as_raw_fd() as u32)
    }

    fn address<T: ?Sized>(mut self, offset: usize, pointer: *const T) -> Self {
        let address = pointer.cast::<u8>() as usize as u64;
        self.0[offset..offset + 8].copy_from_slice(&address.to_ne_bytes());
        self
    }

    fn read_u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[offset..offset + 4]);
        u32::from_ne_bytes(bytes)
    }

    /// # Safety
    /// Every address put into the attributes must be valid for what `command` does with it until this returns.
    unsafe fn call(&mut self, command: libc::c_int) -> io::Result<libc::c_long> {
        // SAFETY: the attributes are a live, aligned buffer of the size that is passed; addresses within are the
        // caller's promise.
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, command, self.0.as_mut_ptr(), self.0.len() as libc::c_uint)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    }
}

/// Takes the descriptor that a command returned.
fn owned(result: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor (close-on-exec, as all of bpf(2)) for us and for nobody else.
    unsafe { OwnedFd::from_raw_fd(result as RawFd) }
}

/// Loads a program that decides about device accesses in a cgroup. `instructions` are `struct bpf_insn`, 8 bytes
/// each, in native byte order; `name` (at most 15 letters, digits, `_` or `.`) is how [`device_programs`] shows it.
///
/// # Errors
/// EINVAL or EACCES if the verifier refuses the program, EPERM without CAP_BPF or CAP_SYS_ADMIN.
pub fn load_device_program(instructions: &[u64], name: &str) -> io::Result<OwnedFd> {
    if name.len() > MAX_NAME {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut attributes = Attributes::new()
        .u32(0, PROG_TYPE_CGROUP_DEVICE)
        .u32(4, u32::try_from(instructions.len()).map_err(|_| io::ErrorKind::InvalidInput)?)
        .address(8, instructions.as_ptr())
        .address(16, c"Apache-2.0".as_ptr())
        .u32(68, ATTACH_CGROUP_DEVICE);
    attributes.0[48..48 + name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the instructions and the licence outlive the call and are only read; their lengths are as stated.
    unsafe { attributes.call(PROG_LOAD) }.map(owned)
}

/// One device program on a cgroup.
#[derive(Debug)]
pub struct AttachedProgram {
    /// The program.
    pub program: OwnedFd,
    /// The name it was loaded with.
    pub name: String,
}

/// The device programs attached to the cgroup itself (not those of its ancestors).
pub fn device_programs(cgroup: BorrowedFd<'_>) -> io::Result<Vec<AttachedProgram>> {
    let mut ids = [0_u32; MAX_PROGRAMS];
    let mut attributes = Attributes::new()
        .fd(0, cgroup)
        .u32(4, ATTACH_CGROUP_DEVICE)
        .address(16, ids.as_mut_ptr())
        .u32(24, MAX_PROGRAMS as u32);
    // SAFETY: `ids` has room for the number of entries stated and outlives the call.
    unsafe { attributes.call(PROG_QUERY) }?;
    let count = (attributes.read_u32(24) as usize).min(MAX_PROGRAMS);

    let mut programs = Vec::with_capacity(count);
    for id in &ids[..count] {
        // SAFETY: the attributes hold no address.
        let program = match unsafe { Attributes::new().u32(0, *id).call(PROG_GET_FD_BY_ID) } {
            Ok(fd) => owned(fd),
            // Detached meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            Err(error) => return Err(error),
        };
        let name = name_of(program.as_fd())?;
        programs.push(AttachedProgram { program, name });
    }
    Ok(programs)
}

/// `name` of `struct bpf_prog_info`.
fn name_of(program: BorrowedFd<'_>) -> io::Result<String> {
    #[repr(C, align(8))]
    struct Info([u8; 80]);
    let mut info = Info([0; 80]);
    let mut attributes =
        Attributes::new().fd(0, program).u32(4, info.0.len() as u32).address(8, info.0.as_mut_ptr());
    // SAFETY: `info` is writable for the length stated and outlives the call; the lengths and addresses inside it are
    // zero, so the kernel writes nowhere else.
    unsafe { attributes.call(OBJ_GET_INFO_BY_FD) }?;
    let name = &info.0[64..80];
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..end]).into_owned())
}

/// Attaches a device program to a cgroup, beside those of its ancestors (all of which must agree to an access), or in
/// place of `replace`, in one step.
pub fn attach_device_program(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    replace: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut flags = F_ALLOW_MULTI;
    let mut attributes = Attributes::new().fd(0, cgroup).fd(4, program).u32(8, ATTACH_CGROUP_DEVICE);
    if let Some(old) = replace {
        flags |= F_REPLACE;
        attributes = attributes.fd(16, old);
    }
    // SAFETY: the attributes hold no address.
    unsafe { attributes.u32(12, flags).call(PROG_ATTACH) }.map(drop)
}

/// Takes a device program off a cgroup.
pub fn detach_device_program(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = Attributes::new().fd(0, cgroup).fd(4, program).u32(8, ATTACH_CGROUP_DEVICE);
    // SAFETY: the attributes hold no address.
    unsafe { attributes.call(PROG_DETACH) }.map(drop)
}
