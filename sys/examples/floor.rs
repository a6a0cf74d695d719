//! What the kernel alone takes for a container: the floor below every runtime's start. Prints medians and least values
//! in milliseconds. `hack/bench floor` runs it.
//!
//!     floor BUSYBOX DIRECTORY [ROUNDS]
//!
//! BUSYBOX is a static program that is `true` by that name; DIRECTORY is on a real file system and empty.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::convert::Infallible;
use std::error::Error;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use hull_sys::mount::{
    self, Attributes, FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, Propagation,
};
use hull_sys::namespace::Namespaces;
use hull_sys::process::{CStringArray, Clone3, Cloned, clone3, execve, exit_now, wait};
use rustix::fs::CWD;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, busybox, directory, rounds @ ..] = arguments.as_slice() else {
        return Err("usage: floor BUSYBOX DIRECTORY [ROUNDS]".into());
    };
    let rounds = rounds.first().map_or(Ok(100), |rounds| rounds.parse())?;
    let place = Place::make(Path::new(busybox), Path::new(directory))?;
    let own_network =
        Namespaces::MOUNT | Namespaces::PID | Namespaces::IPC | Namespaces::UTS | Namespaces::NET;
    let hosts_network = Namespaces::MOUNT | Namespaces::PID | Namespaces::IPC | Namespaces::UTS;
    let cases = [
        ("clone3, execve, wait", Namespaces::NONE, false),
        (
            "the same in new mount, PID, IPC, UTS namespaces with overlayfs and pivot_root",
            hosts_network,
            true,
        ),
        ("the same with a network namespace", own_network, true),
    ];
    let mut taken = cases.map(|_| Vec::new());
    for _ in 0..rounds {
        for ((_, namespaces, root), taken) in cases.iter().zip(&mut taken) {
            let begun = Instant::now();
            place.run(*namespaces, *root)?;
            taken.push(begun.elapsed().as_secs_f64() * 1e3);
            place.clear()?;
        }
    }
    for ((name, _, _), taken) in cases.iter().zip(&mut taken) {
        taken.sort_by(f64::total_cmp);
        println!("{name:<78} median {:6.2}  least {:6.2}", taken[taken.len() / 2], taken[0]);
    }
    Ok(())
}

/// A layer with one program in it.
struct Place {
    program: PathBuf,
    directory: PathBuf,
}

impl Place {
    fn make(busybox: &Path, directory: &Path) -> io::Result<Self> {
        let place = Self { program: directory.join("lower/bin/true"), directory: directory.to_owned() };
        fs::create_dir_all(directory.join("lower/bin"))?;
        fs::copy(busybox, &place.program)?;
        fs::create_dir_all(directory.join("root"))?;
        place.clear()?;
        Ok(place)
    }

    /// Empty writable directories for the next container.
    fn clear(&self) -> io::Result<()> {
        for name in ["upper", "work"] {
            let path = self.directory.join(name);
            if path.exists() {
                fs::remove_dir_all(&path)?;
            }
            fs::create_dir(&path)?;
        }
        Ok(())
    }

    fn run(&self, namespaces: Namespaces, root: bool) -> io::Result<()> {
        match clone3(&Clone3 { namespaces, ..Clone3::default() })? {
            Cloned::Child => {
                match self.inside(root) {
                    Ok(never) => match never {},
                    Err(error) => eprintln!("floor: {error}"),
                }
                exit_now(127)
            }
            Cloned::Parent { pidfd, .. } => match wait(pidfd.as_fd())?.exit_code() {
                0 => Ok(()),
                code => Err(io::Error::other(format!("the program ended with {code}"))),
            },
        }
    }

    fn inside(&self, root: bool) -> io::Result<Infallible> {
        let path = if root { Path::new("/bin/true") } else { &self.program };
        let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
        if root {
            self.change_root()?;
        }
        let arguments = CStringArray::new(["true"])?;
        Err(execve(&path, &arguments, &CStringArray::new(Vec::<String>::new())?))
    }

    fn change_root(&self) -> io::Result<()> {
        let private = Attributes { propagation: Some(Propagation::Private), ..Attributes::default() };
        mount::set_attributes_at(CWD, c"/", true, &private)?;
        let context = mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, name) in [("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work")] {
            mount::fsconfig_set_string(&context, key, self.directory.join(name))?;
        }
        mount::fsconfig_set_flag(&context, "volatile")?;
        mount::fsconfig_create(&context)?;
        let overlay = mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        mount::move_mount(&overlay, "", CWD, self.directory.join("root"), flags)?;
        rustix::process::fchdir(&overlay)?;
        mount::pivot_root(".", ".")?;
        mount::unmount(".", mount::UnmountFlags::DETACH)?;
        Ok(rustix::process::chdir("/")?)
    }
}
