//! From flags to what CRI is asked for. Nothing here speaks to anybody.

use std::collections::BTreeMap;
use std::path::Path;

use super::values::User;
use super::{Run, Scope};
use crate::api::hull::RUN_LABEL;
use crate::api::runtime::security_profile::ProfileType;
use crate::api::runtime::{
    Capability, ContainerConfig, ContainerMetadata, ImageSpec, Int64Value, KeyValue, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    SecurityProfile,
};
use crate::cli::error::CliError;
use crate::security::paths;

/// Kubernetes namespace of these pods, so that they are easy to tell from kubelet's.
const NAMESPACE: &str = "hull";
/// Microseconds over which processor time is counted, as Kubernetes does.
const CPU_PERIOD: i64 = 100_000;
/// Longest label of a host name (RFC 1123).
const MAX_HOSTNAME: usize = 63;

impl Run {
    pub(super) fn pod_config(&self, name: &str, uid: &str, logs: &Path) -> PodSandboxConfig {
        let metadata = PodSandboxMetadata {
            name: name.into(),
            uid: uid.into(),
            namespace: NAMESPACE.into(),
            attempt: 0,
        };
        let security_context = LinuxSandboxSecurityContext {
            namespace_options: Some(self.namespaces()),
            privileged: self.privileged,
            seccomp: Some(self.seccomp_profile()),
            ..Default::default()
        };
        let hostname = self.hostname.clone().unwrap_or_else(|| hostname(name));
        PodSandboxConfig {
            metadata: Some(metadata),
            hostname: if self.network == Scope::Host { String::new() } else { hostname },
            log_directory: logs.to_string_lossy().into_owned(),
            port_mappings: self.publish.iter().map(|port| port.0.clone()).collect(),
            labels: self.labels(name, uid),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(security_context),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub(super) fn container_config(&self, name: &str, image: String) -> Result<ContainerConfig, CliError> {
        let image = ImageSpec { image, user_specified_image: self.image().into(), ..Default::default() };
        let mut labels = BTreeMap::from([("io.kubernetes.container.name".into(), name.into())]);
        labels.extend(self.label.iter().cloned());
        Ok(ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(image),
            command: self.entrypoint.iter().cloned().collect(),
            args: self.command().to_vec(),
            working_dir: self.workdir.clone().unwrap_or_default(),
            envs: self.environment()?,
            mounts: self.volume.iter().map(|volume| volume.0.clone()).collect(),
            labels,
            log_path: "0.log".into(),
            stdin: self.interactive,
            // The end of the input here is the end of the command's.
            stdin_once: self.interactive && !self.detach,
            tty: self.tty,
            linux: Some(LinuxContainerConfig {
                resources: Some(self.resources()),
                security_context: Some(self.security_context()),
            }),
            ..Default::default()
        })
    }

    /// The labels that Kubernetes tools look for, and our own.
    fn labels(&self, name: &str, uid: &str) -> BTreeMap<String, String> {
        [
            (RUN_LABEL, "true"),
            ("io.kubernetes.pod.name", name),
            ("io.kubernetes.pod.namespace", NAMESPACE),
            ("io.kubernetes.pod.uid", uid),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
    }

    fn namespaces(&self) -> NamespaceOption {
        let mode = |scope, own: NamespaceMode| match scope {
            Scope::Pod => own as i32,
            Scope::Host => NamespaceMode::Node as i32,
        };
        NamespaceOption {
            network: mode(self.network, NamespaceMode::Pod),
            pid: mode(self.pid, NamespaceMode::Container),
            ipc: NamespaceMode::Pod as i32,
            ..Default::default()
        }
    }

    fn seccomp_profile(&self) -> SecurityProfile {
        let (kind, path) = match self.seccomp.as_str() {
            _ if self.privileged => (ProfileType::Unconfined, ""),
            "default" => (ProfileType::RuntimeDefault, ""),
            "unconfined" => (ProfileType::Unconfined, ""),
            path => (ProfileType::Localhost, path),
        };
        SecurityProfile { profile_type: kind as i32, localhost_ref: path.into() }
    }

    fn security_context(&self) -> LinuxContainerSecurityContext {
        let (uid, gid, username) = match &self.user {
            None => (None, None, String::new()),
            Some(User::Id { uid, gid }) => (Some(*uid), *gid, String::new()),
            Some(User::Name { name, gid }) => (None, *gid, name.clone()),
        };
        let id = |id: Option<u32>| id.map(|id| Int64Value { value: i64::from(id) });
        // CRI's runtimes hide what they are told to; kubelet says it for each container.
        let hidden = |paths: Vec<String>| if self.privileged { Vec::new() } else { paths };
        LinuxContainerSecurityContext {
            capabilities: Some(Capability {
                add_capabilities: self.cap_add.clone(),
                drop_capabilities: self.cap_drop.clone(),
                ..Default::default()
            }),
            privileged: self.privileged,
            namespace_options: Some(self.namespaces()),
            run_as_user: id(uid),
            run_as_group: id(gid),
            run_as_username: username,
            readonly_rootfs: self.read_only,
            masked_paths: hidden(paths::masked()),
            readonly_paths: hidden(paths::READONLY.iter().map(|path| (*path).to_owned()).collect()),
            seccomp: Some(self.seccomp_profile()),
            ..Default::default()
        }
    }

    fn resources(&self) -> LinuxContainerResources {
        let mut resources = LinuxContainerResources::default();
        if let Some(bytes) = self.memory {
            resources.memory_limit_in_bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        }
        if let Some(cpus) = self.cpus {
            resources.cpu_period = CPU_PERIOD;
            resources.cpu_quota = (cpus * CPU_PERIOD as f64) as i64;
        }
        resources
    }

    fn environment(&self) -> Result<Vec<KeyValue>, CliError> {
        let variable = |text: &String| {
            let (key, value) = match text.split_once('=') {
                Some((key, value)) => (key, value.to_owned().into_bytes()),
                None => match std::env::var_os(text) {
                    Some(value) => (text.as_str(), std::os::unix::ffi::OsStringExt::into_vec(value)),
                    None => return None,
                },
            };
            Some(if key.is_empty() { Err(text.clone()) } else { Ok(KeyValue { key: key.into(), value }) })
        };
        let variables: Result<Vec<KeyValue>, String> = self.env.iter().filter_map(variable).collect();
        variables.map_err(|text| CliError::Refused(format!("-e {text}: a variable needs a name")))
    }
}

/// So many random bytes in hex.
pub(super) fn random_hex(bytes: usize) -> String {
    let mut random = vec![0u8; bytes];
    rand::fill(random.as_mut_slice());
    hex::encode(random)
}

/// A name for a pod of this image: `busybox-1f09ab`.
pub(super) fn name_for(image: &str) -> String {
    let base = image.split('@').next().unwrap_or(image).rsplit('/').next().unwrap_or(image);
    let base = base.split(':').next().unwrap_or(base);
    format!("{}-{}", hostname(base), random_hex(3))
}

/// What of a name can be a host name.
fn hostname(name: &str) -> String {
    let legal = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = name.chars().map(legal).take(MAX_HOSTNAME).collect();
    match name.trim_matches('-') {
        "" => "pod".into(),
        name => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{FromArgMatches, Parser};

    fn run(args: &[&str]) -> Run {
        let command = <Run as clap::Args>::augment_args(clap::Command::new("run"));
        let matches = command.try_get_matches_from([&["run"], args].concat()).unwrap();
        Run::from_arg_matches(&matches).unwrap()
    }

    #[test]
    fn a_plain_run_asks_for_what_kubelet_would() {
        let config = run(&["busybox", "echo", "hello"]).container_config("b", "sha256:aa".into()).unwrap();
        assert_eq!(config.args, ["echo", "hello"]);
        assert!(config.command.is_empty());
        let image = config.image.unwrap();
        assert_eq!((image.image.as_str(), image.user_specified_image.as_str()), ("sha256:aa", "busybox"));
        let security = config.linux.unwrap().security_context.unwrap();
        assert_eq!(security.seccomp.unwrap().profile_type, ProfileType::RuntimeDefault as i32);
        assert!(security.masked_paths.contains(&"/proc/kcore".to_owned()));
        assert!(security.readonly_paths.contains(&"/proc/sys".to_owned()));
    }

    #[test]
    fn a_privileged_run_hides_nothing() {
        let run = run(&["--privileged", "--pid", "host", "--network", "host", "busybox"]);
        let security =
            run.container_config("b", "i".into()).unwrap().linux.unwrap().security_context.unwrap();
        assert!(
            security.privileged && security.masked_paths.is_empty() && security.readonly_paths.is_empty()
        );
        assert_eq!(security.seccomp.unwrap().profile_type, ProfileType::Unconfined as i32);
        let namespaces = security.namespace_options.unwrap();
        assert_eq!(namespaces.network(), NamespaceMode::Node);
        assert_eq!(namespaces.pid(), NamespaceMode::Node);
        let pod = run.pod_config("b", "u", Path::new("/logs"));
        assert_eq!(pod.hostname, "");
    }

    #[test]
    fn limits_users_and_variables_arrive_as_given() {
        let run = run(&[
            "-m",
            "256MiB",
            "--cpus",
            "0.5",
            "-u",
            "1000:50",
            "-e",
            "A=b=c",
            "-e",
            "HULL_TEST_UNSET",
            "i",
        ]);
        let config = run.container_config("b", "i".into()).unwrap();
        let linux = config.linux.unwrap();
        let resources = linux.resources.unwrap();
        assert_eq!(resources.memory_limit_in_bytes, 256 << 20);
        assert_eq!((resources.cpu_quota, resources.cpu_period), (50_000, 100_000));
        let security = linux.security_context.unwrap();
        assert_eq!((security.run_as_user.unwrap().value, security.run_as_group.unwrap().value), (1000, 50));
        assert_eq!(config.envs.len(), 1);
        assert_eq!((config.envs[0].key.as_str(), config.envs[0].value.as_slice()), ("A", &b"b=c"[..]));
    }

    #[test]
    fn a_name_comes_from_the_image() {
        let name = name_for("127.0.0.1:5000/team/My_App:1.2@sha256:aa");
        assert!(name.starts_with("my-app-") && name.len() == "my-app-".len() + 6, "{name}");
        assert_eq!(hostname("___"), "pod");
    }

    #[test]
    fn the_flags_are_consistent() {
        #[derive(Debug, Parser)]
        struct Alone {
            #[command(flatten)]
            _run: Run,
        }
        <Alone as clap::CommandFactory>::command().debug_assert();
    }
}
