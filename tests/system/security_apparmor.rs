//! AppArmor, where the kernel has it: inside hack/node.

use std::io::Write;
use std::process::{Command, Stdio};

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::pod::{Pod, container_config, pod_config};
use hull_tests::registry::Registry;
use k8s_cri::v1 as cri;
use k8s_cri::v1::security_profile::ProfileType;

const PROFILE: &str = "hull-test-deny-write";
const PROFILE_TEXT: &str = "profile hull-test-deny-write flags=(attach_disconnected) {
  file,
  capability,
  network,
  signal,
  deny /data/** w,
}
";

/// Whether the kernel of the containers has it; a machine's has not.
fn is_enabled() -> bool {
    !hull_tests::microvm::excepted("the guest's kernel has no AppArmor")
        && std::fs::read_to_string("/sys/module/apparmor/parameters/enabled")
            .is_ok_and(|text| text.starts_with('Y'))
}

fn parse(action: &str) {
    let mut parser = Command::new("apparmor_parser")
        .args([action, "--skip-cache"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("apparmor_parser (Debian package apparmor)");
    parser.stdin.take().unwrap().write_all(PROFILE_TEXT.as_bytes()).unwrap();
    assert!(parser.wait().unwrap().success());
}

fn with(
    name: &str,
    image: &str,
    change: impl FnOnce(&mut cri::LinuxContainerSecurityContext),
) -> cri::ContainerConfig {
    let mut config = container_config(name, image, &["/bin/sleep", "1000"]);
    change(config.linux.as_mut().unwrap().security_context.as_mut().unwrap());
    config
}

fn profile(kind: ProfileType, name: &str) -> Option<cri::SecurityProfile> {
    Some(cri::SecurityProfile { profile_type: kind as i32, localhost_ref: name.to_owned() })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_has_the_profile_that_it_asks_for_and_hulls_own_by_default() {
    if !is_enabled() {
        println!("the kernel of containers has no AppArmor here: hack/node's has");
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    parse("--replace");
    let mut config = pod_config(&daemon, "apparmor");
    config.linux.as_mut().unwrap().security_context.as_mut().unwrap().privileged = true;
    let mut pod = Pod::run(&daemon, config).await;
    let label = "cat /proc/self/attr/current";

    let unspecified = pod.start(container_config("unspecified", &name, &["/bin/sleep", "1000"])).await;
    assert_eq!(pod.shell(&unspecified, label).await, "hull-default (enforce)\n");
    let asked = with("default", &name, |context| context.apparmor = profile(ProfileType::RuntimeDefault, ""));
    let id = pod.start(asked).await;
    assert_eq!(pod.shell(&id, "cat /proc/1/attr/current").await, "hull-default (enforce)\n");
    // What a container does all day.
    pod.shell(
        &id,
        "mkdir /d && echo x > /d/x && chown 5 /d/x && ln -s x /d/y && rm -r /d; echo x > /dev/null; \
                    sleep 100 & kill $!; ps > /dev/null; cat /sys/class/net/lo/mtu /proc/meminfo > /dev/null",
    )
    .await;
    pod.stop_container(&id, 5).await;

    // Even with every capability and nothing hidden: what AppArmor alone denies.
    let all = with("all", &name, |context| {
        context.apparmor = profile(ProfileType::RuntimeDefault, "");
        context.capabilities =
            Some(cri::Capability { add_capabilities: vec!["ALL".into()], ..Default::default() });
        // One harmless path each: an empty list would mean the default.
        context.masked_paths = vec!["/nothing".into()];
        context.readonly_paths = vec!["/nothing".into()];
    });
    let id = pod.start(all).await;
    for script in [
        "mount -t tmpfs none /tmp",
        "echo x > /proc/sysrq-trigger",
        "echo 1 > /proc/sys/kernel/panic_on_oops",
        "echo 1 > /proc/sys/vm/drop_caches",
        "head -c 1 /proc/kcore",
        "kill -0 $(ps | grep '[h]ulld' | head -1) 2>/dev/null",
    ] {
        assert_ne!(pod.exec(&id, &["/bin/sh", "-c", script]).await.exit_code, 0, "{script}");
    }
    assert_eq!(
        pod.shell(&id, "echo 100 > /proc/sys/kernel/shmmni && cat /proc/sys/kernel/shmmni").await,
        "100\n"
    );

    let own = with("own", &name, |context| {
        context.apparmor = profile(ProfileType::Localhost, &format!("localhost/{PROFILE}"))
    });
    let id = pod.start(own).await;
    assert_eq!(pod.shell(&id, label).await, format!("{PROFILE} (enforce)\n"));
    assert_ne!(pod.exec(&id, &["touch", "/data/x"]).await.exit_code, 0);
    pod.shell(&id, "touch /tmp/x").await;

    for (name_of, context) in [("unconfined", ProfileType::Unconfined)] {
        let id = pod.start(with(name_of, &name, |own| own.apparmor = profile(context, ""))).await;
        assert_eq!(pod.shell(&id, label).await, "unconfined\n");
    }
    let id = pod.start(with("privileged", &name, |context| context.privileged = true)).await;
    assert_eq!(pod.shell(&id, label).await, "unconfined\n");

    #[allow(deprecated)]
    let old = with("old", &name, |context| context.apparmor_profile = format!("localhost/{PROFILE}"));
    let id = pod.start(old).await;
    assert_eq!(pod.shell(&id, label).await, format!("{PROFILE} (enforce)\n"));

    let missing =
        with("missing", &name, |context| context.apparmor = profile(ProfileType::Localhost, "not-there"));
    let status = pod.create(missing).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(status.message().contains("\"not-there\" is not loaded"), "{status}");
    daemon.finish().await;
    parse("--remove");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_apparmor_a_named_profile_is_refused_when_the_container_is_made() {
    if is_enabled() {
        return;
    }
    let registry = Registry::start();
    let name = registry.push("busybox", "v1", &image::busybox());
    let daemon = Daemon::start().await;
    daemon.pull(&name).await;
    let mut pod = Pod::run(&daemon, pod_config(&daemon, "apparmor")).await;
    let named = with("named", &name, |context| context.apparmor = profile(ProfileType::Localhost, "web"));
    let status = pod.create(named).await.unwrap_err();
    assert!(status.message().contains("no AppArmor"), "{status}");
    for (number, kind) in [ProfileType::RuntimeDefault, ProfileType::Unconfined].into_iter().enumerate() {
        pod.start(with(&format!("c{number}"), &name, |context| context.apparmor = profile(kind, ""))).await;
    }
    daemon.finish().await;
}
