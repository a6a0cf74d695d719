//! Values of `hull run`'s flags.

use std::net::IpAddr;
use std::path::Path;

use crate::api::runtime::{Mount, MountPropagation, PortMapping, Protocol};

/// `-v`
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Volume(pub(super) Mount);

/// `-p`
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Port(pub(super) PortMapping);

/// `-u`
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum User {
    Id { uid: u32, gid: Option<u32> },
    Name { name: String, gid: Option<u32> },
}

/// `HOST:CONTAINER[:OPTIONS]`; a relative host path counts from here.
pub(super) fn volume(text: &str) -> Result<Volume, String> {
    let mut parts = text.splitn(3, ':');
    let (Some(host), Some(container)) = (parts.next(), parts.next()) else {
        return Err("HOST:CONTAINER is wanted, e.g. ./site:/srv/site:ro".into());
    };
    if host.is_empty() || !Path::new(container).is_absolute() {
        return Err(format!("\"{container}\" is not an absolute path in the container"));
    }
    let host = std::path::absolute(host).map_err(|error| format!("{host}: {error}"))?;
    let host_path = host.to_str().ok_or("the host path is not UTF-8")?.to_owned();
    let mut mount = Mount { container_path: container.into(), host_path, ..Default::default() };
    for option in parts.next().unwrap_or("rw").split(',') {
        match option {
            "rw" => mount.readonly = false,
            "ro" => mount.readonly = true,
            "rprivate" => mount.propagation = MountPropagation::PropagationPrivate as i32,
            "rslave" => mount.propagation = MountPropagation::PropagationHostToContainer as i32,
            "rshared" => mount.propagation = MountPropagation::PropagationBidirectional as i32,
            other => return Err(format!("\"{other}\" is none of ro, rw, rprivate, rslave, rshared")),
        }
    }
    Ok(Volume(mount))
}

/// `[ADDRESS:]HOST:CONTAINER[/PROTOCOL]`; an IPv6 address is put in brackets.
pub(super) fn port(text: &str) -> Result<Port, String> {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        other => return Err(format!("\"{other}\" is none of tcp, udp, sctp")),
    };
    let (rest, container) = ports.rsplit_once(':').ok_or("HOST:CONTAINER is wanted, e.g. 8080:80")?;
    let (address, host) = match rest.rsplit_once(':') {
        Some((address, host)) => (address.trim_start_matches('[').trim_end_matches(']'), host),
        None => ("", rest),
    };
    if !address.is_empty() && address.parse::<IpAddr>().is_err() {
        return Err(format!("\"{address}\" is not an address"));
    }
    Ok(Port(PortMapping {
        protocol: protocol as i32,
        container_port: port_number(container)?,
        host_port: port_number(host)?,
        host_ip: address.into(),
    }))
}

fn port_number(text: &str) -> Result<i32, String> {
    match text.parse::<u16>() {
        Ok(number) if number > 0 => Ok(i32::from(number)),
        _ => Err(format!("\"{text}\" is not a port (1 to 65535)")),
    }
}

/// `USER[:GROUP]`
pub(super) fn user(text: &str) -> Result<User, String> {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let number =
        |group: &str| group.parse::<u32>().map_err(|_| format!("the group \"{group}\" is not a number"));
    let gid = group.map(number).transpose()?;
    // All digits but no number is an overflow, never a name (containerd CVE-2024-40635).
    let numeric = !user.is_empty() && user.bytes().all(|byte| byte.is_ascii_digit());
    match user.parse::<u32>() {
        Ok(uid) => Ok(User::Id { uid, gid }),
        Err(_) if user.is_empty() || numeric => Err(format!("\"{user}\" is not a user")),
        Err(_) => Ok(User::Name { name: user.into(), gid }),
    }
}

/// Processors, above zero and fewer than a machine can have.
pub(super) fn cpus(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(cpus) if (0.01..=8192.0).contains(&cpus) => Ok(cpus),
        _ => Err("a number from 0.01 to 8192 is wanted, e.g. 0.5".into()),
    }
}

/// `NAME=VALUE`
pub(super) fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("NAME=VALUE is wanted".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_have_two_paths_and_options() {
        let Volume(mount) = volume("/srv/a:/b:ro,rslave").unwrap();
        assert_eq!((mount.host_path.as_str(), mount.container_path.as_str()), ("/srv/a", "/b"));
        assert!(mount.readonly);
        assert_eq!(mount.propagation(), MountPropagation::PropagationHostToContainer);
        assert!(volume("site:/b").unwrap().0.host_path.starts_with('/'));
        for text in ["/a", "/a:b", ":/b", "/a:/b:rx", "/a:"] {
            assert!(volume(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ports_may_have_an_address_and_a_protocol() {
        let plain = port("8080:80").unwrap().0;
        assert_eq!((plain.host_port, plain.container_port, plain.host_ip.as_str()), (8080, 80, ""));
        let udp = port("127.0.0.1:53:5353/udp").unwrap().0;
        assert_eq!((udp.protocol(), udp.host_ip.as_str()), (Protocol::Udp, "127.0.0.1"));
        assert_eq!(port("[::1]:1:2").unwrap().0.host_ip, "::1");
        for text in ["80", "0:80", "80:0", "80:65536", "host:80:80", "80:80/icmp"] {
            assert!(port(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_user_that_overflows_is_no_user() {
        assert_eq!(user("1000:50").unwrap(), User::Id { uid: 1000, gid: Some(50) });
        assert_eq!(user("www-data").unwrap(), User::Name { name: "www-data".into(), gid: None });
        for text in ["", "4294967296", ":5", "5:wheel"] {
            assert!(user(text).is_err(), "{text}");
        }
    }
}
