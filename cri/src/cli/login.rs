//! Who hull is at a registry: what `docker login`, `podman login` and the like have written down.
//!
//! The file is docker's `config.json` (`auths`, `credHelpers`, `credsStore`), whose `auths` may name repositories too, as
//! containers-auth.json(5) has it: the longest name that fits counts.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use hull_images::{Credentials, Reference};
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::error::CliError;
use crate::api::runtime::AuthConfig;

/// Longest file of logins in bytes.
const MAX_FILE: u64 = 4 << 20;
/// Longest answer of a helper in bytes: tokens have a few KiB.
const MAX_ANSWER: u64 = 256 << 10;
/// How long a helper may take; some ask the network.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);
/// What docker calls its own registry.
const DOCKER_SERVER: &str = "https://index.docker.io/v1/";

#[derive(Default, Deserialize)]
struct Logins {
    #[serde(default)]
    auths: HashMap<String, Login>,
    #[serde(default, rename = "credHelpers")]
    helpers: HashMap<String, String>,
    #[serde(default, rename = "credsStore")]
    store: String,
}

#[derive(Clone, Default, Deserialize)]
struct Login {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default, rename = "identitytoken")]
    identity_token: String,
    #[serde(default, rename = "registrytoken")]
    registry_token: String,
}

/// Where a login comes from.
#[derive(Debug, PartialEq, Eq)]
enum Found<'l> {
    /// The file itself; the key it has there.
    Login(&'l str),
    /// A helper program, and what it is asked about.
    Helper { name: &'l str, server: String },
}

/// The login for what `image` names: of the file `$REGISTRY_AUTH_FILE` if that is set, of `$DOCKER_CONFIG/config.json` if
/// that is, else of podman's own file or of `~/.docker/config.json`, the first that has one. None if nobody has logged in.
pub(super) async fn saved(image: &str) -> Result<Option<AuthConfig>, CliError> {
    // What is no reference is for hulld to refuse.
    let Ok(reference) = image.parse::<Reference>() else { return Ok(None) };
    let user = rustix::process::geteuid().as_raw();
    for path in
        places(user, |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))
    {
        let found = match read(&path) {
            Ok(logins) => logins.of(&reference).await?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                return Err(CliError::local(format!("read the registry logins {}", path.display()), error));
            }
        };
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// The files to look into, in this order (containers-auth.json(5), and docker's documentation of `docker login`).
fn places(user: u32, variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    if let Some(named) =
        variable("REGISTRY_AUTH_FILE").or_else(|| Some(variable("DOCKER_CONFIG")?.join("config.json")))
    {
        return vec![named];
    }
    let podman = match variable("XDG_RUNTIME_DIR") {
        Some(directory) => directory.join("containers"),
        None => PathBuf::from(format!("/run/containers/{user}")),
    };
    let docker = variable("HOME").map(|home| home.join(".docker/config.json"));
    [podman.join("auth.json")].into_iter().chain(docker).collect()
}

fn read(path: &Path) -> io::Result<Logins> {
    let mut text = Vec::new();
    if File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut text)? as u64 > MAX_FILE {
        return Err(io::Error::other(format!("it is larger than {MAX_FILE} bytes")));
    }
    Ok(serde_json::from_slice(&text)?)
}

impl Logins {
    async fn of(&self, reference: &Reference) -> Result<Option<AuthConfig>, CliError> {
        for found in self.candidates(reference) {
            let config = match found {
                Found::Login(key) => self.auths.get(key).map(Login::config).transpose()?.flatten(),
                Found::Helper { name, server } => match ask(name, &server).await {
                    Ok(config) => config,
                    Err(reason) => {
                        // Most images need no login.
                        eprintln!("hull: docker-credential-{name}: {reason}; going on without it");
                        None
                    }
                },
            };
            if let Some(config) = config {
                return Ok(Some(AuthConfig { server_address: reference.domain().to_owned(), ..config }));
            }
        }
        Ok(None)
    }

    /// What may have a login for the reference, the best first.
    fn candidates(&self, reference: &Reference) -> Vec<Found<'_>> {
        let mut found = Vec::new();
        let repository = reference.repository();
        let mut name = repository.as_str();
        loop {
            let helper = self.helpers.iter().find(|(key, _)| normal(key) == name);
            if let Some((key, helper)) = helper {
                found.push(Found::Helper { name: helper, server: server(key) });
            }
            let mut keys: Vec<&str> =
                self.auths.keys().map(String::as_str).filter(|key| normal(key) == name).collect();
            // Of several ways to write one name the shortest: it is what today's programs write.
            keys.sort_unstable_by_key(|key| (key.len(), *key));
            if name == reference.domain() && !self.store.is_empty() {
                let server = keys.first().map_or_else(|| server(name), |key| server(key));
                found.push(Found::Helper { name: &self.store, server });
            }
            found.extend(keys.into_iter().map(Found::Login));
            match name.rsplit_once('/') {
                Some((shorter, _)) => name = shorter,
                None => return found,
            }
        }
    }
}

/// A key as a name: without a scheme and the paths of old APIs, docker's registry under one name.
fn normal(key: &str) -> String {
    let name = key.split_once("://").map_or(key, |(_, rest)| rest).trim_end_matches('/');
    let name = name.strip_suffix("/v1").or_else(|| name.strip_suffix("/v2")).unwrap_or(name);
    let (host, path) = name.split_once('/').map_or((name, None), |(host, path)| (host, Some(path)));
    let host = match host.to_ascii_lowercase().as_str() {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        host => host.to_owned(),
    };
    path.map_or(host.clone(), |path| format!("{host}/{path}"))
}

/// What a helper calls a registry: as it was stored.
fn server(key: &str) -> String {
    if key == "docker.io" { DOCKER_SERVER.to_owned() } else { key.to_owned() }
}

impl Login {
    /// None if there is nothing in it: docker leaves empty entries for what a helper keeps.
    fn config(&self) -> Result<Option<AuthConfig>, CliError> {
        let mut config = AuthConfig {
            username: self.username.clone(),
            password: self.password.clone(),
            identity_token: self.identity_token.clone(),
            registry_token: self.registry_token.clone(),
            ..Default::default()
        };
        if !self.auth.is_empty() {
            let unpacked = Credentials::from_auth(&self.auth);
            let unpacked =
                unpacked.map_err(|error| CliError::Refused(format!("the saved registry login: {error}")))?;
            (config.username, config.password) = (unpacked.username, unpacked.password);
        }
        Ok(Some(config).filter(|config| *config != AuthConfig::default()))
    }
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "Username")]
    username: String,
    #[serde(rename = "Secret")]
    secret: String,
}

/// Asks a helper for a login (docker-credential-helpers, "Development"). None if it has none.
async fn ask(name: &str, server: &str) -> Result<Option<AuthConfig>, String> {
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
        return Err("that cannot be a helper's name".into());
    }
    let (is_success, output) = match tokio::time::timeout(HELPER_TIMEOUT, run(name, server)).await {
        Ok(result) => result.map_err(|error| error.to_string())?,
        Err(_) => return Err(format!("no answer within {} s", HELPER_TIMEOUT.as_secs())),
    };
    if !is_success {
        let text = String::from_utf8_lossy(&output);
        // Its fixed words for that.
        if text.contains("credentials not found") {
            return Ok(None);
        }
        let text: String = text.trim().chars().filter(|c| !c.is_control()).take(200).collect();
        return Err(format!("it failed: {text:?}"));
    }
    let answer: Answer = serde_json::from_slice(&output).map_err(|_| "its answer is no login".to_owned())?;
    Ok(Some(match answer.username.as_str() {
        "<token>" => AuthConfig { identity_token: answer.secret, ..Default::default() },
        _ => AuthConfig { username: answer.username, password: answer.secret, ..Default::default() },
    }))
}

/// Whether it succeeded, and what it wrote to standard output.
async fn run(name: &str, server: &str) -> io::Result<(bool, Vec<u8>)> {
    let mut helper = Command::new(format!("docker-credential-{name}"))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut input) = helper.stdin.take() {
        // One that wants no input has ended already.
        let _ = input.write_all(server.as_bytes()).await;
    }
    let mut output = Vec::new();
    if let Some(out) = helper.stdout.take() {
        out.take(MAX_ANSWER + 1).read_to_end(&mut output).await?;
    }
    if output.len() as u64 > MAX_ANSWER {
        return Err(io::Error::other(format!("its answer is longer than {MAX_ANSWER} bytes")));
    }
    Ok((helper.wait().await?.success(), output))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logins(json: &str) -> Logins {
        serde_json::from_str(json).unwrap()
    }

    fn of(logins: &Logins, image: &str) -> Option<AuthConfig> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(logins.of(&image.parse().unwrap())).unwrap()
    }

    #[test]
    fn the_longest_name_that_fits_counts() {
        let logins = logins(
            r#"{"auths": {"quay.io": {"auth": "aG9zdDpw"}, "quay.io/team": {"auth": "dGVhbTpw"},
                "quay.io/team/app": {"username": "app", "password": "p"}, "other.io": {}}}"#,
        );
        let user = |image: &str| of(&logins, image).map(|config| config.username);
        assert_eq!(user("quay.io/team/app:1").as_deref(), Some("app"));
        assert_eq!(user("quay.io/team/app2").as_deref(), Some("team"));
        assert_eq!(user("quay.io/teams/app").as_deref(), Some("host"));
        assert_eq!(user("evil.quay.io/team/app"), None);
        assert_eq!(user("quay.io:443/team/app"), None);
        assert_eq!(user("other.io/a"), None, "an empty entry is no login");
        assert_eq!(of(&logins, "quay.io/team/app").unwrap().server_address, "quay.io");
    }

    #[test]
    fn dockers_registry_has_several_names() {
        for key in ["https://index.docker.io/v1/", "docker.io", "registry-1.docker.io", "index.docker.io"] {
            let logins = logins(&format!(r#"{{"auths": {{"{key}": {{"identitytoken": "t"}}}}}}"#));
            assert_eq!(of(&logins, "busybox").unwrap().identity_token, "t", "{key}");
            assert_eq!(of(&logins, "quay.io/busybox"), None);
        }
        let logins = logins(r#"{"auths": {"http://localhost:5000/v2/": {"registrytoken": "r"}}}"#);
        assert_eq!(of(&logins, "localhost:5000/a").unwrap().registry_token, "r");
    }

    #[test]
    fn helpers_come_before_what_the_file_says() {
        let logins = logins(
            r#"{"auths": {"https://index.docker.io/v1/": {"auth": "YTpi"}, "gcr.io": {}},
                "credHelpers": {"gcr.io": "gcloud"}, "credsStore": "desktop", "more": [1]}"#,
        );
        let docker = logins.candidates(&"busybox".parse().unwrap());
        let server = "https://index.docker.io/v1/".to_owned();
        assert_eq!(
            docker,
            [Found::Helper { name: "desktop", server: server.clone() }, Found::Login(&server)]
        );
        let google = logins.candidates(&"gcr.io/project/a".parse().unwrap());
        assert_eq!(google[0], Found::Helper { name: "gcloud", server: "gcr.io".into() });
    }

    #[test]
    fn a_login_that_cannot_be_read_is_told() {
        let login = Login { auth: "%%".into(), ..Login::default() };
        assert!(login.config().unwrap_err().to_string().contains("base64"));
        assert!(serde_json::from_str::<Logins>(r#"{"auths": 5}"#).is_err());
    }

    #[test]
    fn the_files_are_looked_for_in_order() {
        let with = |set: &[(&str, &str)]| -> Vec<String> {
            let value =
                |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
            places(7, value).iter().map(|path| path.display().to_string()).collect()
        };
        let all = [("REGISTRY_AUTH_FILE", "/a.json"), ("DOCKER_CONFIG", "/d"), ("HOME", "/h")];
        assert_eq!(with(&all), ["/a.json"]);
        assert_eq!(with(&all[1..]), ["/d/config.json"]);
        assert_eq!(with(&all[2..]), ["/run/containers/7/auth.json", "/h/.docker/config.json"]);
        let podman = [("XDG_RUNTIME_DIR", "/run/user/7")];
        assert_eq!(with(&podman), ["/run/user/7/containers/auth.json"]);
    }

    #[test]
    fn a_helpers_name_is_no_path() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for name in ["", "../../bin/sh", "a b", "x;y"] {
            assert!(runtime.block_on(ask(name, "s")).is_err(), "{name}");
        }
        let missing = runtime.block_on(ask("hull-has-no-such-helper", "s")).unwrap_err();
        assert!(missing.contains("No such file"), "{missing}");
    }
}
