//! What `docker login` has saved, used by `hull pull` and `hull push` against a registry that wants it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use hull_tests::daemon::Daemon;
use hull_tests::image;
use hull_tests::registry::Registry;

use crate::cli::Hull;

/// Runs hull with these variables and no other place to find logins; its exit status and what it said.
fn run(hull: &Hull, variables: &[(&str, &Path)], arguments: &[&str]) -> (bool, String) {
    let mut command = hull.command(arguments);
    command.env("HOME", "/nonexistent").env_remove("DOCKER_CONFIG").env_remove("REGISTRY_AUTH_FILE");
    command.env("XDG_RUNTIME_DIR", "/nonexistent");
    let path = std::env::var("PATH").unwrap();
    for (name, value) in variables {
        match *name {
            "PATH" => command.env("PATH", format!("{}:{path}", value.display())),
            name => command.env(name, value),
        };
    }
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn saved_logins_are_used_by_pull_and_push() {
    let registry = Registry::start();
    registry.push("team/app", "1", &image::busybox());
    let registry = registry.with_login();
    let host = registry.host();
    let name = format!("{host}/team/app:1");
    let daemon = Daemon::start().await;
    let hull = Hull::of(&daemon);
    let home = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = home.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    };

    // Nobody has logged in
    let (ok, error) = run(&hull, &[("HOME", home.path())], &["pull", &name]);
    assert!(!ok && error.contains("--creds"), "{error}");

    // The four places
    let right = format!(r#"{{"auths": {{"{host}": {{"auth": "bWU6c2VjcmV0"}}}}}}"#);
    write(".docker/config.json", &right);
    let (ok, error) = run(&hull, &[("HOME", home.path())], &["pull", &name]);
    assert!(ok, "{error}");
    write("run/containers/auth.json", &right);
    let (ok, error) = run(&hull, &[("XDG_RUNTIME_DIR", &home.path().join("run"))], &["pull", &name]);
    assert!(ok, "{error}");
    write("other/config.json", &right);
    let (ok, error) = run(&hull, &[("DOCKER_CONFIG", &home.path().join("other"))], &["pull", &name]);
    assert!(ok, "{error}");
    let wrong = format!(
        r#"{{"auths": {{"{host}": {{"auth": "bWU6c2VjcmV0"}}, "{host}/team": {{"auth": "bWU6bm8="}}}}}}"#
    );
    let file = write("auth.json", &wrong);
    let variables = [("REGISTRY_AUTH_FILE", &*file), ("HOME", home.path())];
    let (ok, error) = run(&hull, &variables, &["pull", &name]);
    assert!(!ok && !error.contains("bWU6bm8="), "the longer name counts: {error}");
    let (ok, error) = run(&hull, &variables, &["pull", "--creds", "me:secret", &name]);
    assert!(ok, "flags count more: {error}");

    // Layers that are not kept compressed are fetched again
    let saved = home.path().join("exact.tar");
    let save = ["save", "--exact", "-f", saved.to_str().unwrap(), &name];
    let (ok, error) = run(&hull, &[], &save);
    assert!(!ok && error.contains("as it came") && !saved.exists(), "{error}");
    let (ok, error) = run(&hull, &[("HOME", home.path())], &save);
    assert!(ok && error.contains(": fetched again, "), "{error}");
    let digests = || hull.json(&["inspect", &name])["status"]["repoDigests"].clone();
    let before = digests();
    assert!(before[0].as_str().unwrap().contains("@sha256:"), "{before}");
    hull.ok(&["rmi", &name]);
    hull.ok(&["load", "-i", saved.to_str().unwrap()]);
    assert_eq!(digests(), before);
    let broken = write("broken.json", "{");
    let (ok, error) = run(&hull, &[("REGISTRY_AUTH_FILE", &broken)], &["pull", &name]);
    assert!(!ok && error.contains("broken.json"), "{error}");

    // A helper, and one that is not there
    let helper = write(
        "bin/docker-credential-test",
        &format!(
            "#!/bin/sh\nread -r server\n[ \"$1 $server\" = 'get {host}' ] || exit 1\n\
                  echo '{{\"ServerURL\":\"x\",\"Username\":\"me\",\"Secret\":\"secret\"}}'\n"
        ),
    );
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    let file = write("helper.json", &format!(r#"{{"credHelpers": {{"{host}": "test"}}}}"#));
    let bin = home.path().join("bin");
    let variables = [("REGISTRY_AUTH_FILE", &*file), ("PATH", &*bin)];
    let target = format!("{host}/team/copy:2");
    let (ok, error) = run(&hull, &variables, &["push", &name, &target]);
    assert!(ok, "{error}");
    let (ok, error) = run(&hull, &variables, &["pull", &target]);
    assert!(ok, "{error}");
    let file = write("missing.json", r#"{"credsStore": "hull-has-none"}"#);
    let (ok, error) = run(&hull, &[("REGISTRY_AUTH_FILE", &file)], &["pull", &name]);
    assert!(!ok && error.contains("docker-credential-hull-has-none"), "{error}");
    daemon.finish().await;
}
