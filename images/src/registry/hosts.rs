//! `hosts.toml`: which hosts serve a registry, and how to talk to them.
//!
//! The form is the one that containerd documents (docs/hosts.md), so that existing directories work: one directory per
//! registry below `hosts_dir`, named `HOST`, `HOST:PORT` or `HOST_PORT_`, or `_default` for all others. A directory
//! without `hosts.toml` may still hold certificates: `*.crt` are authorities, `NAME.cert` and `NAME.key` a client pair.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use url::Url;

use crate::reference::{registry_host, same_registry};

use super::error::RegistryError;

/// Largest `hosts.toml` or certificate file.
const MAX_FILE: u64 = 1 << 20;
/// Most hosts of one registry, and most certificate files of one host.
const MAX_HOSTS: usize = 64;

/// One host that serves a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HostConfig {
    /// Where the API is, up to and including `/v2` (unless the path is overridden). Never ends with a slash.
    pub(super) base: Url,
    /// Whether tags may be resolved here.
    pub(super) resolve: bool,
    /// Whether manifests by digest and blobs may be fetched here.
    pub(super) pull: bool,
    /// Additional certificate authorities, PEM.
    pub(super) authorities: Vec<Vec<u8>>,
    /// Client certificate with its key, PEM.
    pub(super) identity: Option<Vec<u8>>,
    /// Do not verify the server's certificate.
    pub(super) skip_verify: bool,
    /// Headers sent with every request to this host.
    pub(super) headers: Vec<(String, String)>,
    /// How long connecting may take.
    pub(super) dial_timeout: Option<Duration>,
    /// Whether this is the registry itself (or its configured server) and not a mirror.
    pub(super) is_server: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostsFile {
    server: Option<String>,
    #[serde(default)]
    host: BTreeMap<toml::Spanned<String>, Section>,
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<Client>,
    skip_verify: Option<bool>,
    #[serde(default)]
    header: BTreeMap<String, OneOrMany>,
    override_path: Option<bool>,
    dial_timeout: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<Client>,
    skip_verify: Option<bool>,
    #[serde(default)]
    header: BTreeMap<String, OneOrMany>,
    override_path: Option<bool>,
    dial_timeout: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// A file with certificate and key, or a list of files or of pairs.
#[derive(Deserialize)]
#[serde(untagged)]
enum Client {
    One(String),
    Many(Vec<OneOrMany>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
        }
    }
}

/// The hosts that serve registry `domain`, in the order in which to try them. Reads the files anew at each call.
pub(super) fn load(hosts_dir: &Path, domain: &str) -> Result<Vec<HostConfig>, RegistryError> {
    let Some(directory) = directory_of(hosts_dir, domain) else { return Ok(vec![default_host(domain)]) };
    let path = directory.join("hosts.toml");
    let text = match read_bounded(&path) {
        Ok(bytes) => String::from_utf8(bytes).map_err(|_| wrong(&path, "it is not UTF-8".to_owned()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut host = default_host(domain);
            add_bare_certificates(&directory, &mut host)?;
            return Ok(vec![host]);
        }
        Err(error) => return Err(wrong(&path, error.to_string())),
    };
    parse(&path, &text, domain)
}

/// The first directory that exists for the registry. Domains cannot hold slashes, so none leads elsewhere.
fn directory_of(hosts_dir: &Path, domain: &str) -> Option<PathBuf> {
    let with_underscores = domain.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    let names = [with_underscores.as_deref(), Some(domain), Some("_default")];
    names.into_iter().flatten().map(|name| hosts_dir.join(name)).find(|path| path.is_dir())
}

/// The registry itself with no configuration: HTTPS, or plain HTTP on loopback unless the port says otherwise.
fn default_host(domain: &str) -> HostConfig {
    let host = registry_host(domain);
    let scheme = if is_loopback(host) && !host.ends_with(":443") { "http" } else { "https" };
    let text = format!("{scheme}://{host}/v2");
    // A domain of the reference grammar can still be no host (a port beyond 65535); it then fails to connect.
    let base = Url::parse(&text).unwrap_or_else(|_| invalid_host());
    HostConfig {
        base,
        resolve: true,
        pull: true,
        authorities: Vec::new(),
        identity: None,
        skip_verify: false,
        headers: Vec::new(),
        dial_timeout: None,
        is_server: true,
    }
}

/// A URL that reaches nothing (RFC 6761: `.invalid` never resolves).
#[expect(clippy::expect_used, reason = "a constant")]
fn invalid_host() -> Url {
    Url::parse("https://registry.invalid/v2").expect("a constant URL")
}

/// Whether the host (with an optional port) is this machine: localhost, 127.0.0.0/8 or ::1.
pub(super) fn is_loopback(host: &str) -> bool {
    if let Some(rest) = host.strip_prefix('[') {
        let address = rest.split(']').next().unwrap_or_default();
        return address.parse::<std::net::Ipv6Addr>().is_ok_and(|address| address.is_loopback());
    }
    let name = host.split(':').next().unwrap_or_default();
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback())
}

pub(super) fn parse(path: &Path, text: &str, domain: &str) -> Result<Vec<HostConfig>, RegistryError> {
    let file: HostsFile = toml::from_str(text).map_err(|error| wrong(path, error.to_string()))?;
    if file.host.len() > MAX_HOSTS {
        return Err(wrong(path, format!("it has more than {MAX_HOSTS} hosts")));
    }
    // A table has no order, the file has.
    let mut sections: Vec<_> = file.host.into_iter().collect();
    sections.sort_by_key(|(name, _)| name.span().start);
    let mut hosts = Vec::with_capacity(sections.len() + 1);
    for (name, section) in sections {
        hosts.push(section.into_host(path, name.get_ref(), domain, false)?);
    }
    let server = Section {
        capabilities: file.capabilities,
        ca: file.ca,
        client: file.client,
        skip_verify: file.skip_verify,
        header: file.header,
        override_path: file.override_path,
        dial_timeout: file.dial_timeout,
    };
    let address = file.server.filter(|server| !server.is_empty());
    let address = address.unwrap_or_else(|| default_host(domain).base.to_string());
    let server = server.into_host(path, &address, domain, true)?;
    // A server that is also listed as a host is not asked twice.
    match hosts.iter_mut().find(|host| host.base == server.base) {
        Some(host) => host.is_server = true,
        None => hosts.push(server),
    }
    Ok(hosts)
}

impl Section {
    fn into_host(
        self,
        path: &Path,
        address: &str,
        domain: &str,
        is_server: bool,
    ) -> Result<HostConfig, RegistryError> {
        let directory = path.parent().unwrap_or(Path::new("/"));
        let base = base_url(address, self.override_path.unwrap_or(false))
            .map_err(|reason| wrong(path, format!("host {address:?}: {reason}")))?;
        let mut host = HostConfig { base, is_server, ..default_host(domain) };
        if let Some(capabilities) = self.capabilities.filter(|capabilities| !capabilities.is_empty()) {
            (host.pull, host.resolve) = (false, false);
            for capability in &capabilities {
                match capability.to_ascii_lowercase().as_str() {
                    "pull" => host.pull = true,
                    "resolve" => host.resolve = true,
                    "push" => {}
                    other => return Err(wrong(path, format!("unknown capability {other:?}"))),
                }
            }
        }
        for name in self.ca.map(OneOrMany::into_vec).unwrap_or_default().iter().take(MAX_HOSTS) {
            host.authorities.push(read_certificate(&directory.join(name))?);
        }
        host.identity = self.client.map(|client| client.read(directory)).transpose()?.flatten();
        host.skip_verify = self.skip_verify.unwrap_or(false);
        for (name, values) in self.header {
            host.headers.extend(values.into_vec().into_iter().map(|value| (name.clone(), value)));
        }
        if let Some(text) = self.dial_timeout {
            let timeout = parse_duration(&text);
            host.dial_timeout = Some(
                timeout.ok_or_else(|| wrong(path, format!("dial_timeout {text:?} is not like \"1m30s\"")))?,
            );
        }
        Ok(host)
    }
}

impl Client {
    /// Certificate and key as one PEM text: the first pair counts, as a connection presents one.
    fn read(self, directory: &Path) -> Result<Option<Vec<u8>>, RegistryError> {
        let files = match self {
            Client::One(file) => vec![file],
            Client::Many(entries) => entries.into_iter().next().map(OneOrMany::into_vec).unwrap_or_default(),
        };
        let mut pem = Vec::new();
        for file in files.iter().filter(|file| !file.is_empty()).take(2) {
            pem.extend(read_certificate(&directory.join(file))?);
            pem.push(b'\n');
        }
        Ok((!pem.is_empty()).then_some(pem))
    }
}

/// The API's address: scheme defaults to HTTPS and the path to `/v2`.
fn base_url(address: &str, override_path: bool) -> Result<Url, String> {
    let text = match address.contains("://") {
        true => address.to_owned(),
        false => format!("https://{address}"),
    };
    let mut url = Url::parse(&text).map_err(|error| error.to_string())?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("the scheme {:?} is neither http nor https", url.scheme()));
    }
    let Some(host) = url.host_str().map(str::to_owned) else { return Err("it has no host".to_owned()) };
    if !url.username().is_empty() || url.password().is_some() {
        return Err("credentials do not belong in the address (use a header)".to_owned());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("it has a query or fragment".to_owned());
    }
    if same_registry(&host, "docker.io") && url.port().is_none() {
        url.set_host(Some(registry_host("docker.io"))).map_err(|error| error.to_string())?;
    }
    let mut path = url.path().trim_end_matches('/').to_owned();
    if !override_path && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    url.set_path(&path);
    Ok(url)
}

/// Certificates beside a missing `hosts.toml`, as Docker has them.
fn add_bare_certificates(directory: &Path, host: &mut HostConfig) -> Result<(), RegistryError> {
    let entries = std::fs::read_dir(directory).map_err(|error| wrong(directory, error.to_string()))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).take(1024).collect();
    paths.sort();
    for path in paths {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") if host.authorities.len() < MAX_HOSTS => {
                host.authorities.push(read_certificate(&path)?)
            }
            Some("cert") if host.identity.is_none() => {
                let mut pem = read_certificate(&path)?;
                pem.push(b'\n');
                pem.extend(read_certificate(&path.with_extension("key"))?);
                host.identity = Some(pem);
            }
            _ => {}
        }
    }
    Ok(())
}

fn read_certificate(path: &Path) -> Result<Vec<u8>, RegistryError> {
    read_bounded(path).map_err(|error| wrong(path, error.to_string()))
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    Ok(bytes)
}

fn wrong(path: &Path, reason: String) -> RegistryError {
    RegistryError::Configuration { path: path.to_owned(), reason }
}

/// Durations as Go writes them: `300ms`, `1.5s`, `1m30s`. At most a day.
fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = 0.0_f64;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let value: f64 = rest[..number].parse().ok()?;
        rest = &rest[number..];
        let unit_length = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let seconds = match &rest[..unit_length] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        rest = &rest[unit_length..];
        total += value * seconds;
    }
    (!text.is_empty() && total <= 86_400.0).then(|| Duration::from_secs_f64(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str, domain: &str) -> Result<Vec<HostConfig>, RegistryError> {
        parse(Path::new("/etc/hull/certs.d/x/hosts.toml"), text, domain)
    }

    #[test]
    fn without_configuration_loopback_is_plain_http_and_all_else_https() {
        let base = |domain: &str| default_host(domain).base.to_string();
        assert_eq!(base("docker.io"), "https://registry-1.docker.io/v2");
        assert_eq!(base("quay.io"), "https://quay.io/v2");
        assert_eq!(base("localhost:5000"), "http://localhost:5000/v2");
        assert_eq!(base("127.9.0.1:5000"), "http://127.9.0.1:5000/v2");
        assert_eq!(base("[::1]:5000"), "http://[::1]:5000/v2");
        assert!(base("localhost:443").starts_with("https://"));
        assert!(base("localhost.evil.com:5000").starts_with("https://"));
        assert!(base("127.0.0.1.evil.com").starts_with("https://"));
        assert!(base("host:99999").contains(".invalid"));
    }

    #[test]
    fn hosts_are_tried_in_the_order_of_the_file_and_the_server_last() {
        let hosts = parsed(
            r#"
            server = "https://registry-1.docker.io"
            [host."https://z.example:8443"]
              capabilities = ["pull"]
              [host."https://z.example:8443".header]
                x-one = "1"
                x-two = ["2", "3"]
            [host."http://a.example/prefix"]
              skip_verify = true
              dial_timeout = "1.5s"
            [host."m.example/api"]
              override_path = true
            "#,
            "docker.io",
        )
        .unwrap();
        let bases: Vec<_> = hosts.iter().map(|host| host.base.to_string()).collect();
        let expected = [
            "https://z.example:8443/v2",
            "http://a.example/prefix/v2",
            "https://m.example/api",
            "https://registry-1.docker.io/v2",
        ];
        assert_eq!(bases, expected);
        assert!(hosts[0].pull && !hosts[0].resolve && hosts[1].resolve);
        assert_eq!(hosts[0].headers.len(), 3);
        assert!(hosts[1].skip_verify && hosts[1].dial_timeout == Some(Duration::from_millis(1500)));
        assert_eq!(hosts.iter().filter(|host| host.is_server).count(), 1);
    }

    #[test]
    fn a_server_that_is_listed_is_not_asked_twice() {
        let hosts = parsed("server = \"quay.io\"\n[host.\"https://quay.io\"]\n", "quay.io").unwrap();
        assert_eq!(hosts.len(), 1);
        assert!(hosts[0].is_server);
        assert_eq!(parsed("", "quay.io").unwrap()[0].base.as_str(), "https://quay.io/v2");
    }

    #[test]
    fn mistakes_are_named() {
        let reason = |text: &str| parsed(text, "quay.io").unwrap_err().to_string();
        assert!(reason("skip_verfy = true").contains("skip_verfy"));
        assert!(reason("[host.\"ftp://a\"]").contains("ftp"));
        assert!(reason("[host.\"https://u:p@a\"]").contains("credentials"));
        assert!(reason("[host.\"https://a\"]\ncapabilities = [\"fly\"]").contains("fly"));
        assert!(reason("[host.\"https://a\"]\ndial_timeout = \"soon\"").contains("dial_timeout"));
        assert!(reason("[host.\"https://a\"]\nca = \"missing.pem\"").contains("missing.pem"));
        assert!(reason("server = ").contains("line 1"));
    }

    #[test]
    fn the_directory_may_be_named_with_colon_or_underscores_or_default() {
        let root = tempfile::tempdir().unwrap();
        let found =
            |domain: &str| directory_of(root.path(), domain).map(|path| path.file_name().unwrap().to_owned());
        assert_eq!(found("a.io:5000"), None);
        std::fs::create_dir(root.path().join("_default")).unwrap();
        assert_eq!(found("a.io:5000").unwrap(), "_default");
        std::fs::create_dir(root.path().join("a.io:5000")).unwrap();
        assert_eq!(found("a.io:5000").unwrap(), "a.io:5000");
        std::fs::create_dir(root.path().join("a.io_5000_")).unwrap();
        assert_eq!(found("a.io:5000").unwrap(), "a.io_5000_");
    }

    #[test]
    fn bare_certificates_are_used_without_hosts_toml() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("a.io");
        std::fs::create_dir(&directory).unwrap();
        for name in ["ca.crt", "me.cert", "me.key", "notes.txt"] {
            std::fs::write(directory.join(name), name).unwrap();
        }
        let hosts = load(root.path(), "a.io").unwrap();
        assert_eq!(hosts[0].authorities, [b"ca.crt".to_vec()]);
        assert_eq!(hosts[0].identity.as_deref(), Some(&b"me.cert\nme.key"[..]));
    }

    #[test]
    fn go_durations_are_read() {
        assert_eq!(parse_duration("1m30s"), Some(Duration::from_secs(90)));
        assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
        for bad in ["", "5", "s", "1x", "1s5", "-1s", "99999h", "1..5s"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }
}
