use std::fs;
use std::path::{Path, PathBuf};

/// The cgroup above pods, made before any of them as kubelet makes it, in every hierarchy. Dropped, it goes.
#[derive(Debug)]
pub struct PodCgroup(Vec<PathBuf>);

impl PodCgroup {
    /// `name` without the slash.
    pub fn make(name: &str) -> Self {
        let table = fs::read_to_string("/proc/self/mountinfo").expect("/proc/self/mountinfo");
        let hierarchies = table.lines().filter_map(hierarchy).map(|mount| mount.join(name));
        let made = hierarchies.inspect(|directory| {
            fs::create_dir_all(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
            fill(directory);
        });
        Self(made.collect())
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        // One that is still in use is the script's to remove.
        self.0.iter().for_each(|directory| drop(fs::remove_dir(directory)));
    }
}

/// The mount point of a line of mountinfo (proc(5)) that is a cgroup hierarchy.
fn hierarchy(line: &str) -> Option<PathBuf> {
    let (before, after) = line.split_once(" - ")?;
    let at = before.split(' ').nth(4)?;
    (after.starts_with("cgroup") && at.starts_with("/sys/fs/cgroup")).then(|| at.into())
}

/// What a hierarchy wants before processes can be below: of v1 CPUs and memory nodes, of v2 controllers.
fn fill(directory: &Path) {
    let parent = directory.parent().unwrap_or(directory);
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if let Ok(value) = fs::read_to_string(parent.join(file))
            && !directory.join("cgroup.controllers").exists()
        {
            let _ = fs::write(directory.join(file), value);
        }
    }
    let controllers = fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        for level in [parent, directory] {
            // One that cannot be had nobody has.
            let _ = fs::write(level.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
}
