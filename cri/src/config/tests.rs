use std::collections::BTreeSet;

use super::*;

const EXAMPLE: &str = include_str!("../../../hack/config/hull.toml");

fn read(text: &str) -> Result<Config, String> {
    parse(Path::new("hull.toml"), text, &Overrides::default()).map_err(|error| error.to_string())
}

/// The example with its commented-out keys put in force.
fn example_with_everything() -> String {
    let is_key = |line: &&str| {
        let key = line.strip_prefix("# ").and_then(|line| line.split_once(" = ")).map(|(key, _)| key);
        key.is_some_and(|key| key.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
    };
    EXAMPLE.lines().map(|line| if is_key(&line) { &line[2..] } else { line }).collect::<Vec<_>>().join("\n")
}

fn keys(prefix: &str, table: &toml::Table, found: &mut BTreeSet<String>) {
    for (name, value) in table {
        let name = format!("{prefix}{name}");
        match value {
            toml::Value::Table(inner) => keys(&format!("{name}."), inner, found),
            _ => drop(found.insert(name)),
        }
    }
}

#[test]
fn the_example_is_the_default() {
    assert_eq!(read(EXAMPLE).unwrap(), Config::default());
    assert_eq!(read("").unwrap(), Config::default());
}

#[test]
fn the_example_explains_every_key() {
    // Given a configuration with every key set (a new optional one belongs here)
    let mut everything = Config::default();
    everything.agent.path = Some("/usr/libexec/hull/hull-agent".into());
    everything.network.mtu = Some(1500);
    everything.streaming.certificate = Some("/etc/hull/streaming.crt".into());
    everything.streaming.key = Some("/etc/hull/streaming.key".into());
    everything.blockio.classes = Some("/etc/hull/blockio.yaml".into());
    everything.rdt.resctrl = Some("/sys/fs/resctrl".into());
    everything.image.policy = Some("/etc/hull/image-policy.toml".into());
    let microvm = everything.runtimes.handlers.get_mut("microvm").unwrap();
    microvm.machine = Some(MachineConfig {
        vmm: Some("/usr/libexec/hull/hull-vmm".into()),
        virtiofsd: Some("/usr/libexec/hull/hull-virtiofsd".into()),
        kernel: Some("/usr/lib/hull/vmlinux".into()),
        initramfs: Some("/usr/lib/hull/initramfs.cpio".into()),
        max_memory: Some(64 << 30),
        ..MachineConfig::default()
    });
    assert!(!everything.to_toml().unwrap().contains("None"));
    // When its keys are compared with those of the example
    let (mut wanted, mut found) = (BTreeSet::new(), BTreeSet::new());
    keys("", &everything.to_toml().unwrap().parse().unwrap(), &mut wanted);
    keys("", &example_with_everything().parse().unwrap(), &mut found);
    // Then they are the same, and the values too
    assert_eq!(wanted, found);
    assert_eq!(read(&example_with_everything()).unwrap(), everything);
}

#[test]
fn what_is_printed_can_be_read_again() {
    let mut config = Config::default();
    config.registry.progress_timeout = Duration::from_millis(90_500);
    config.pod.shm_size = 1000;
    config.network.mtu = Some(9000);
    assert_eq!(read(&config.to_toml().unwrap()).unwrap(), config);
}

#[test]
fn a_certificate_needs_its_key() {
    let error = read("[streaming]\ncertificate = \"/a\"\n").unwrap_err();
    assert!(error.contains("certificate and key are given together"), "{error}");
    let both = read("[streaming]\ncertificate = \"/a\"\nkey = \"/b\"\n").unwrap();
    assert_eq!(both.streaming.key, Some("/b".into()));
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_known_one() {
    let error = read("[network]\nbridge = \"b0\"\nsubnet = [\"10.0.0.0/16\"]\n").unwrap_err();
    assert_eq!(error, "hull.toml:3:1: unknown key \"subnet\"; did you mean \"subnets\"?");
    let error = read("[registry]\nfrobnicate = 1\n").unwrap_err();
    assert!(
        error.starts_with("hull.toml:2:1: unknown key \"frobnicate\"; there are: hosts_dir, "),
        "{error}"
    );
    let error = read("\n\n[netwrok]\n").unwrap_err();
    assert_eq!(error, "hull.toml:3:2: unknown key \"netwrok\"; did you mean \"network\"?");
}

#[test]
fn a_bad_value_is_named_with_its_line_and_the_reason() {
    for (text, place, reason) in [
        ("root = \"var\"", "1:8", "the path \"var\" is not absolute"),
        ("\n[log]\nlevel = \"inof\"", "3:9", "\"inof\" is not a log level"),
        ("[log]\nformat = \"jsno\"", "2:10", "unknown value \"jsno\"; did you mean \"json\"?"),
        ("[network]\nsubnets = [\"10.66.0.0/33\"]", "2:11", "is not a range of addresses"),
        ("[network]\nsubnets = [\"10.66.0.1/16\"]", "2:11", "10.66.0.0/16 is meant?"),
        ("[network]\nsubnets = [\"10.66.0.0/16\", \"10.66.3.0/24\"]", "2:11", "overlap"),
        ("[network]\nmtu = 100", "2:7", "an MTU is 1280 to 65535, not 100"),
        ("[network]\nbridge = \"a/b\"", "2:10", "cannot name a network interface"),
        ("[registry]\nprogress_timeout = \"30\"", "2:20", "is not a duration"),
        ("[registry]\nprogress_timeout = 30", "2:20", "invalid type"),
        ("[registry]\nmax_parallel_layers = 0", "2:23", "is 1 to 64, not 0"),
        ("[registry]\nmax_parallel_downloads = 65", "2:26", "is 1 to 64, not 65"),
        ("[image]\npinned = [\"pause\"]", "2:10", "must begin with a registry"),
        ("[image]\npolicy = \"policy.toml\"", "2:10", "not absolute"),
        ("[pod]\nshm_size = \"lots\"", "2:12", "is not a size"),
        ("[cgroup]\nparent = \"/a/../..\"", "2:10", "contains \"..\""),
        ("listen = \"tcp://0.0.0.0:1\"", "1:10", "unix sockets only"),
        ("[runtimes]\ndefault = \"vm\"", "2:11", "there is no handler \"vm\"; there is: microvm, process"),
        ("[runtimes.handlers.process]\nkind = \"process\"\nmachine = {}", "1:11", "has no machine"),
        ("[runtimes.handlers.process]\nkind = \"vm\"", "2:8", "unknown value \"vm\""),
        ("state = \"/var/lib/hull\"", "1:9", "root and state must be different directories"),
        ("[log\nlevel = 1", "1:5", ""),
    ] {
        let error = read(text).unwrap_err();
        assert!(error.starts_with(&format!("hull.toml:{place}: ")), "{text:?} gave {error}");
        assert!(error.contains(reason), "{text:?} gave {error}");
        assert!(!error.contains('\n'), "{error:?}");
    }
}

#[test]
fn flags_win_and_the_socket_follows_the_state_directory() {
    let file = Path::new("hull.toml");
    let flags = Overrides { state: Some("/tmp/other".into()), ..Default::default() };
    let config = parse(file, "root = \"/srv/hull\"", &flags).unwrap();
    assert_eq!(config.root, Path::new("/srv/hull"));
    assert_eq!(config.listen, Path::new("/tmp/other/hull.sock"));
    assert_eq!(config.endpoint(), "unix:///tmp/other/hull.sock");
    let flags = Overrides { log_level: Some("loud".into()), ..Default::default() };
    assert!(parse(file, "", &flags).unwrap_err().to_string().starts_with("--log-level: \"loud\""));
}

#[test]
fn a_missing_file_is_an_error_only_when_it_was_named() {
    let error = load(Some(Path::new("/nonexistent/hull.toml")), &Overrides::default()).unwrap_err();
    assert!(error.to_string().starts_with("cannot read the configuration /nonexistent/hull.toml: "));
}

#[test]
fn a_pod_without_a_handler_gets_the_default_one() {
    let config = Config::default();
    assert_eq!(config.handler("").unwrap().0, "process");
    assert!(config.handler("kata").is_none());
}
