//! What hull needs of the machine, requirement by requirement: whether it is there, and what to do if not.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use hull_agent::cgroup;

use crate::cli::output::Table;
use crate::config::{Config, MachineConfig, SandboxKind};
use crate::sandbox::microvm::artifacts::Artifacts;

/// How much depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weight {
    /// No pod can run without it.
    Pods,
    /// No microVM pod can run without it.
    Machines,
    /// Something else is missing then.
    Extra,
}

/// One requirement, looked at.
#[derive(Debug)]
pub(super) struct Requirement {
    /// What, in a few words.
    pub(super) name: &'static str,
    /// See [`Weight`].
    pub(super) weight: Weight,
    /// What was found; or what is wrong, and what to do about it.
    pub(super) found: Result<String, String>,
}

/// Looks at everything. Blocks, for some seconds at most.
pub(super) fn look(config: &Config) -> Vec<Requirement> {
    use Weight::{Extra, Machines, Pods};
    let one = |name, weight, found| Requirement { name, weight, found };
    let machine = config.runtimes.handlers.values().find(|handler| handler.kind == SandboxKind::Microvm);
    let machine = machine.map(|handler| handler.machine.clone().unwrap_or_default());
    let mut all = vec![
        one("root", Pods, root()),
        one("kernel", Pods, kernel()),
        one("overlayfs", Pods, filesystem("overlay")),
        one("EROFS", Pods, filesystem("erofs")),
        one("cgroups", Pods, cgroups()),
        one("namespaces", Pods, namespaces(&["mnt", "net", "ipc", "uts", "pid"])),
        one("user namespaces", Extra, namespaces(&["user"])),
        one("nftables", Extra, nftables()),
        one("CNI", Extra, cni(config)),
    ];
    match machine {
        Some(machine) => {
            all.push(one("KVM", Machines, kvm()));
            all.push(one("microVM files", Machines, files(&machine)));
            all.push(one("mke2fs", Machines, program("mke2fs", "e2fsprogs")));
            all.push(one("tap devices", Machines, device("/dev/net/tun", "tun")));
        }
        None => all.push(one("microVMs", Extra, Ok("no runtime handler is of this kind".into()))),
    }
    all
}

/// For people.
pub(super) fn table(requirements: &[Requirement]) -> Table {
    let mut table = Table::new(&["REQUIREMENT", "", "FOUND"]);
    for one in requirements {
        let (Ok(text) | Err(text)) = &one.found;
        table.row([one.name.into(), word(one).into(), text.clone()]);
    }
    table
}

/// For programs.
pub(super) fn json(requirements: &[Requirement]) -> Vec<serde_json::Value> {
    let one = |one: &Requirement| {
        let (Ok(text) | Err(text)) = &one.found;
        let needed_by = match one.weight {
            Weight::Pods => "pods",
            Weight::Machines => "microvm",
            Weight::Extra => "",
        };
        serde_json::json!({"name": one.name, "ok": one.found.is_ok(), "neededBy": needed_by, "text": text})
    };
    requirements.iter().map(one).collect()
}

fn word(requirement: &Requirement) -> &'static str {
    match (&requirement.found, requirement.weight) {
        (Ok(_), _) => "ok",
        (Err(_), Weight::Pods) => "MISSING",
        (Err(_), Weight::Machines) => "no microVMs",
        (Err(_), Weight::Extra) => "missing",
    }
}

fn root() -> Result<String, String> {
    if rustix::process::geteuid().is_root() {
        return Ok("running as root".into());
    }
    Err("not root: hulld makes namespaces, mounts and cgroups, and this check cannot see all".into())
}

/// File-backed EROFS mounts need 6.12; before it, layers are mounted by loop devices.
fn kernel() -> Result<String, String> {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (5, 15) {
        return Err(format!("Linux {release} is too old: hull needs 5.15, and likes 6.12"));
    }
    Ok(if version < (6, 12) {
        format!("Linux {release}: layers are mounted by loop devices (without them from 6.12 on)")
    } else {
        format!("Linux {release}")
    })
}

/// Known now, or as a module that is loaded when it is needed.
fn filesystem(name: &str) -> Result<String, String> {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.split_whitespace().last() == Some(name)) {
        return Ok("in the kernel".into());
    }
    match module(name) {
        true => Ok("a module, loaded when it is needed".into()),
        false => {
            Err(format!("this kernel has no {name}: install a kernel with CONFIG_{}_FS", name.to_uppercase()))
        }
    }
}

/// Whether modprobe would find it.
fn module(name: &str) -> bool {
    let dry = Command::new("modprobe").args(["--dry-run", "--quiet", name]).stdin(Stdio::null()).status();
    dry.is_ok_and(|status| status.success())
}

fn cgroups() -> Result<String, String> {
    let layout = cgroup::discover().map_err(|error| format!("{error}: mount cgroup2 at /sys/fs/cgroup"))?;
    let wanted = ["cpu", "memory", "pids"];
    let offered: Vec<String> = if layout.unified_controllers {
        let path = Path::new(&layout.unified).join("cgroup.controllers");
        let text = fs::read_to_string(path).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    } else {
        layout.v1.iter().flat_map(|one| one.controllers.clone()).collect()
    };
    let kind = match (layout.unified_controllers, layout.unified.is_empty()) {
        (true, _) => "v2",
        (false, false) => "v1 beside v2",
        (false, true) => "v1",
    };
    let missing: Vec<_> =
        wanted.iter().filter(|one| !offered.iter().any(|have| have == *one)).copied().collect();
    if missing.is_empty() {
        return Ok(format!("{kind}, with {}", offered.join(" ")));
    }
    Err(format!(
        "{kind}, but without the controllers {}: boot with cgroup_enable={} or use a kernel that has them",
        missing.join(", "),
        missing.join(",")
    ))
}

fn namespaces(kinds: &[&str]) -> Result<String, String> {
    for kind in kinds {
        if !Path::new("/proc/self/ns").join(kind).exists() {
            return Err(format!("this kernel has no {kind} namespaces"));
        }
    }
    let limit =
        |kind: &str| fs::read_to_string(format!("/proc/sys/user/max_{kind}_namespaces")).unwrap_or_default();
    match kinds.iter().find(|kind| limit(kind).trim() == "0") {
        Some(kind) => {
            Err(format!("{kind} namespaces are switched off: set the sysctl user.max_{kind}_namespaces"))
        }
        None => Ok(kinds.join(" ")),
    }
}

fn nftables() -> Result<String, String> {
    let in_use = Path::new("/proc/net/netfilter/nfnetlink_log").exists()
        || Path::new("/sys/module/nf_tables").exists();
    if in_use || module("nf_tables") {
        return Ok("the built-in network can masquerade and map ports".into());
    }
    Err("this kernel has no nf_tables: the built-in network cannot work; CNI plugins may".into())
}

fn cni(config: &Config) -> Result<String, String> {
    let directory = &config.network.cni_conf_dir;
    let is_list = |name: &str| [".conflist", ".conf", ".json"].iter().any(|end| name.ends_with(end));
    let mut names: Vec<String> = fs::read_dir(directory)
        .map(|entries| entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    names.retain(|name| is_list(name));
    names.sort();
    match names.first() {
        Some(name) => Ok(format!("{} is used", directory.join(name).display())),
        None if config.network.mode == crate::config::NetworkMode::Cni => {
            Err(format!("there is no configuration in {}: install a network plugin", directory.display()))
        }
        None => Ok(format!("no configuration in {}: the built-in network is used", directory.display())),
    }
}

fn kvm() -> Result<String, String> {
    let kvm = hull_vmm::probe::open().map_err(|reason| reason.to_string())?;
    hull_vmm::probe::probe(std::os::fd::AsFd::as_fd(&kvm), hull_vmm::probe::LIMIT)
        .map_err(|reason| reason.to_string())?;
    Ok("runs a guest's kernel".into())
}

fn files(machine: &MachineConfig) -> Result<String, String> {
    let found = Artifacts::find(machine).map_err(|reason| {
        format!("{reason}; hack/build and hack/guest-kernel make them, runtimes.handlers.microvm.machine names them")
    })?;
    Ok(format!("{}, {}", found.vmm.display(), found.kernel.display()))
}

fn program(name: &str, package: &str) -> Result<String, String> {
    let directories = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let found =
        directories.iter().map(|directory| Path::new(directory).join(name)).find(|path| path.is_file());
    found
        .map(|path| path.display().to_string())
        .ok_or_else(|| format!("there is no {name}: install {package}"))
}

fn device(path: &str, module_name: &str) -> Result<String, String> {
    if Path::new(path).exists() {
        return Ok(path.to_owned());
    }
    if module(module_name) {
        return Ok(format!("the module {module_name}, loaded when it is needed"));
    }
    Err(format!("there is no {path}: load the module {module_name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_requirement_has_an_answer_for_people() {
        for requirement in look(&Config::default()) {
            let (Ok(text) | Err(text)) = &requirement.found;
            assert!(!text.is_empty() && !text.contains('\n'), "{requirement:?}");
        }
    }

    #[test]
    fn a_kernel_that_lacks_a_filesystem_says_what_to_install() {
        assert!(filesystem("no-such-filesystem").unwrap_err().contains("CONFIG_NO-SUCH-FILESYSTEM_FS"));
        assert!(filesystem("proc").is_ok());
    }
}
