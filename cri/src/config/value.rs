//! Values of configuration keys as people write them, checked while they are read so that an error knows its line.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use serde::de::{Deserialize, Deserializer, Error};

/// Longest path of a unix socket: sun_path without its final zero byte (unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;

/// Checks that `path` is absolute, has no `..` and nothing that would break a line.
pub fn check_absolute(path: &Path) -> Result<(), String> {
    let text = path.to_string_lossy();
    if text.is_empty() {
        return Err("a path must not be empty".into());
    }
    if !path.is_absolute() {
        return Err(format!("the path \"{text}\" is not absolute"));
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(format!("the path \"{text}\" contains \"..\""));
    }
    if text.chars().any(char::is_control) {
        return Err(format!("the path {text:?} contains a control character"));
    }
    Ok(())
}

/// An absolute path.
pub fn absolute_path<'de, D: Deserializer<'de>>(input: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(input)?;
    check_absolute(&path).map_err(Error::custom)?;
    Ok(path)
}

/// An absolute path where none may be given.
pub fn optional_absolute_path<'de, D: Deserializer<'de>>(input: D) -> Result<Option<PathBuf>, D::Error> {
    absolute_path(input).map(Some)
}

/// A list of absolute paths.
pub fn absolute_paths<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<PathBuf>, D::Error> {
    let paths = Vec::<PathBuf>::deserialize(input)?;
    paths.iter().try_for_each(|path| check_absolute(path)).map_err(Error::custom)?;
    Ok(paths)
}

/// `unix:///path` for a socket's path.
pub fn endpoint(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// Reads `unix:///path` or a bare absolute path.
pub fn parse_endpoint(text: &str) -> Result<PathBuf, String> {
    let path = match text.split_once(':') {
        Some(("unix", rest)) => PathBuf::from(rest.strip_prefix("//").unwrap_or(rest)),
        Some((scheme, _)) if !text.starts_with('/') => {
            return Err(format!("hull listens on unix sockets only: \"{scheme}:\" should be unix:///path"));
        }
        _ => PathBuf::from(text),
    };
    check_absolute(&path)?;
    let length = path.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        return Err(format!("the socket path is {length} bytes long, the kernel takes {MAX_SOCKET_PATH}"));
    }
    Ok(path)
}

/// A socket, written as `unix:///path`.
pub mod socket {
    use super::*;

    /// Writes `unix:///path`.
    pub fn serialize<S: serde::Serializer>(path: &Path, out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(&endpoint(path))
    }

    /// Reads `unix:///path` or a bare absolute path.
    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<PathBuf, D::Error> {
        parse_endpoint(&String::deserialize(input)?).map_err(Error::custom)
    }
}

const DURATION_UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Reads durations such as `30s`, `1m30s`, `500ms`, `2h`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let invalid = || format!("\"{text}\" is not a duration such as 500ms, 30s, 1m30s or 2h");
    let mut rest = text;
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let (number, after) = split_at_first(rest, |c: char| !c.is_ascii_digit());
        let (unit, after) = split_at_first(after, |c: char| c.is_ascii_digit());
        let scale = DURATION_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(invalid)?.1;
        let part = number.parse::<u64>().ok().and_then(|n| n.checked_mul(scale)).ok_or_else(invalid)?;
        total = total.checked_add(part).ok_or_else(invalid)?;
        rest = after;
    }
    if text.is_empty() { Err(invalid()) } else { Ok(Duration::from_millis(total)) }
}

fn split_at_first(text: &str, stop: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(stop).unwrap_or(text.len()))
}

/// Writes what [`parse_duration`] reads, to the millisecond.
pub fn format_duration(duration: Duration) -> String {
    let mut left = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut text = String::new();
    for (unit, scale) in DURATION_UNITS {
        if left >= scale {
            text.push_str(&format!("{}{unit}", left / scale));
            left %= scale;
        }
    }
    if text.is_empty() { "0s".into() } else { text }
}

/// A duration longer than zero, written as `30s`.
pub mod duration {
    use super::*;

    /// Writes `1m30s`.
    pub fn serialize<S: serde::Serializer>(duration: &Duration, out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(&format_duration(*duration))
    }

    /// Reads `1m30s`; zero is refused.
    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Duration, D::Error> {
        let duration = parse_duration(&String::deserialize(input)?).map_err(Error::custom)?;
        if duration.is_zero() {
            Err(Error::custom("the duration must be longer than zero"))
        } else {
            Ok(duration)
        }
    }
}

const SIZE_UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
/// Accepted when reading: Kubernetes' and docker's spellings too.
const MORE_SIZE_UNITS: [(&str, u64); 13] = [
    ("", 1),
    ("ti", 1 << 40),
    ("gi", 1 << 30),
    ("mi", 1 << 20),
    ("ki", 1 << 10),
    ("t", 1 << 40),
    ("g", 1 << 30),
    ("m", 1 << 20),
    ("k", 1 << 10),
    ("tb", 1_000_000_000_000),
    ("gb", 1_000_000_000),
    ("mb", 1_000_000),
    ("kb", 1_000),
];

/// Reads sizes in bytes such as `64MiB`, `64m`, `1GB`, `4096`; a bare letter means the binary unit, as with docker.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let invalid = || format!("\"{text}\" is not a size such as 64MiB, 512k, 1GB or 4096");
    let (number, unit) = split_at_first(text, |c: char| !c.is_ascii_digit());
    let unit = unit.trim_start().to_ascii_lowercase();
    let known = |(name, scale): (&str, u64)| (name.to_ascii_lowercase() == unit).then_some(scale);
    let scale =
        SIZE_UNITS.into_iter().find_map(known).or_else(|| MORE_SIZE_UNITS.into_iter().find_map(known));
    let number: u64 = number.parse().map_err(|_| invalid())?;
    number.checked_mul(scale.ok_or_else(invalid)?).ok_or_else(invalid)
}

/// Writes what [`parse_size`] reads: in the largest unit that divides it.
pub fn format_size(bytes: u64) -> String {
    let unit = SIZE_UNITS.into_iter().find(|(_, scale)| bytes >= *scale && bytes.is_multiple_of(*scale));
    let (unit, scale) = unit.unwrap_or(("B", 1));
    format!("{}{unit}", bytes / scale)
}

/// A size in bytes above zero, written as `64MiB`.
pub mod size {
    use super::*;

    /// Writes `64MiB`.
    pub fn serialize<S: serde::Serializer>(bytes: &u64, out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(&format_size(*bytes))
    }

    /// Reads `64MiB`; zero is refused.
    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<u64, D::Error> {
        let bytes = parse_size(&String::deserialize(input)?).map_err(Error::custom)?;
        if bytes == 0 { Err(Error::custom("the size must be larger than zero")) } else { Ok(bytes) }
    }
}

/// Bytes where none may be given.
pub mod optional_size {
    use super::*;

    /// Writes `64MiB`; nobody asks for an unset one.
    pub fn serialize<S: serde::Serializer>(bytes: &Option<u64>, out: S) -> Result<S::Ok, S::Error> {
        size::serialize(&bytes.unwrap_or_default(), out)
    }

    /// Reads `64MiB`; zero is refused.
    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u64>, D::Error> {
        size::deserialize(input).map(Some)
    }
}

/// Processors of a machine: 1 to 64.
pub fn processors<'de, D: Deserializer<'de>>(input: D) -> Result<u32, D::Error> {
    checked(input, |count: &u32| in_range("a machine's number of processors", u64::from(*count), 1, 64))
}

/// A level, or levels of single modules: `info,hull_network=debug`.
pub fn check_log_level(text: &str) -> Result<(), String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    for directive in text.split(',') {
        let level = directive.rsplit('=').next().unwrap_or(directive);
        if !LEVELS.contains(&level) {
            return Err(format!("\"{level}\" is not a log level; there are {}", LEVELS.join(", ")));
        }
    }
    Ok(())
}

/// See [`check_log_level`].
pub fn log_level<'de, D: Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    checked(input, |text: &String| check_log_level(text))
}

/// Name of a network interface (net/core/dev.c, dev_valid_name).
pub fn interface_name<'de, D: Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    checked(input, |name: &String| {
        let legal = |c: char| c.is_ascii_graphic() && c != '/' && c != ':' && c != '%';
        if name.is_empty() || name.len() > 15 || name == "." || name == ".." || !name.chars().all(legal) {
            return Err(format!(
                "\"{name}\" cannot name a network interface (1 to 15 letters, digits, - _ .)"
            ));
        }
        Ok(())
    })
}

/// Ranges for pods: at least one, each with room, no two overlapping.
pub fn subnets<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<IpNet>, D::Error> {
    let texts = Vec::<String>::deserialize(input)?;
    let mut subnets: Vec<IpNet> = Vec::new();
    for text in texts {
        let net: IpNet = text.parse().map_err(|_| {
            Error::custom(format!("\"{text}\" is not a range of addresses such as 10.66.0.0/16"))
        })?;
        if net.addr() != net.network() {
            let meant = net.trunc();
            return Err(Error::custom(format!("\"{text}\" has bits beyond its prefix; {meant} is meant?")));
        }
        if net.max_prefix_len() - net.prefix_len() < 3 {
            return Err(Error::custom(format!("the range {net} is too small for pods")));
        }
        if let Some(other) = subnets.iter().find(|other| other.contains(&net) || net.contains(*other)) {
            return Err(Error::custom(format!("the ranges {other} and {net} overlap")));
        }
        subnets.push(net);
    }
    if subnets.is_empty() {
        return Err(Error::custom("at least one range is needed"));
    }
    Ok(subnets)
}

/// An MTU that IPv6 can live with (RFC 8200, 5) and a veth can have.
pub fn mtu<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u32>, D::Error> {
    checked(input, |mtu: &u32| in_range("an MTU", u64::from(*mtu), 1280, 65_535)).map(Some)
}

/// An address that clients can be told, such as `127.0.0.1:0`.
pub fn reachable_address<'de, D: Deserializer<'de>>(input: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(input)?;
    let address: SocketAddr = text.parse().map_err(|_| {
        Error::custom(format!("\"{text}\" is not an address with a port, such as 127.0.0.1:0 or [::1]:10010"))
    })?;
    if address.ip().is_unspecified() {
        let reason = format!("clients cannot be sent to {address}; name one of this machine's addresses");
        return Err(Error::custom(reason));
    }
    Ok(address)
}

/// How many layers at once.
pub fn parallel_layers<'de, D: Deserializer<'de>>(input: D) -> Result<usize, D::Error> {
    checked(input, |count: &usize| in_range("max_parallel_layers", *count as u64, 1, 64))
}

/// Downloads at the same time.
pub fn parallel_downloads<'de, D: Deserializer<'de>>(input: D) -> Result<usize, D::Error> {
    checked(input, |count: &usize| in_range("max_parallel_downloads", *count as u64, 1, 64))
}

/// Patterns of image names.
pub fn image_patterns<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<String>, D::Error> {
    checked(input, |patterns: &Vec<String>| {
        patterns.iter().try_for_each(|pattern| match pattern.parse::<hull_images::policy::Pattern>() {
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        })
    })
}

/// A cgroup below the root: `/hull`, `/system.slice/pods`.
pub fn cgroup_path<'de, D: Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    checked(input, |path: &String| {
        check_absolute(Path::new(path))?;
        if path.trim_matches('/').is_empty() {
            return Err("pods cannot live in the root cgroup".into());
        }
        Ok(())
    })
}

fn in_range(what: &str, value: u64, low: u64, high: u64) -> Result<(), String> {
    if (low..=high).contains(&value) {
        Ok(())
    } else {
        Err(format!("{what} is {low} to {high}, not {value}"))
    }
}

fn checked<'de, T, D>(input: D, check: impl Fn(&T) -> Result<(), String>) -> Result<T, D::Error>
where
    T: Deserialize<'de> + fmt::Debug,
    D: Deserializer<'de>,
{
    let value = T::deserialize(input)?;
    check(&value).map_err(Error::custom)?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_written() {
        for (text, millis) in
            [("30s", 30_000), ("1m30s", 90_000), ("500ms", 500), ("2h", 7_200_000), ("0s", 0)]
        {
            let duration = parse_duration(text).unwrap();
            assert_eq!(duration, Duration::from_millis(millis));
            assert_eq!(format_duration(duration), text);
        }
        for text in ["", "30", "s", "1d", "-1s", "1.5s", "99999999999999999999h", "1s ", "9999999999999999h"]
        {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_read_in_every_common_spelling() {
        for (text, bytes) in [
            ("64MiB", 64 << 20),
            ("64m", 64 << 20),
            ("64Mi", 64 << 20),
            ("1GB", 1_000_000_000),
            ("4096", 4096),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        assert_eq!(format_size(64 << 20), "64MiB");
        assert_eq!(format_size(1_000_000), "1000000B");
        for text in ["", "MiB", "-1", "1.5GiB", "64Mbit", "18446744073709551615TiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_endpoint_is_a_unix_socket_with_an_absolute_path() {
        for text in ["unix:///run/hull/hull.sock", "/run/hull/hull.sock", "unix:/run/hull/hull.sock"] {
            assert_eq!(parse_endpoint(text), Ok("/run/hull/hull.sock".into()), "{text}");
        }
        for text in ["", "hull.sock", "unix://hull.sock", "tcp://127.0.0.1:80", "unix:///a/../b", "/a\nb"] {
            assert!(parse_endpoint(text).is_err(), "{text}");
        }
        assert!(parse_endpoint(&format!("/{}", "a".repeat(MAX_SOCKET_PATH))).is_err());
    }

    #[test]
    fn a_misspelt_level_is_refused_where_a_filter_would_take_it_for_a_module() {
        assert!(check_log_level("info").is_ok());
        assert!(check_log_level("info,hull_network=debug").is_ok());
        for text in ["inof", "", "info,", "hull_network", "info,hull_network=loud"] {
            assert!(check_log_level(text).is_err(), "{text}");
        }
    }
}
