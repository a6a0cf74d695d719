//! /etc/hostname, /etc/hosts and /etc/resolv.conf of a pod.

use std::fmt::Write;
use std::net::IpAddr;

use super::invalid;
use crate::api::runtime::DnsConfig;
use crate::runtime::Error;

/// Longest hostname (uname(2)).
const MAX_HOSTNAME: usize = 64;

/// Refuses what the kernel or a reader of /etc/hosts would misunderstand.
pub fn check_hostname(hostname: &str) -> Result<(), Error> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if hostname.len() > MAX_HOSTNAME || !hostname.bytes().all(legal) {
        return Err(invalid(format!("{hostname:?} is not a hostname of at most {MAX_HOSTNAME} characters")));
    }
    Ok(())
}

/// /etc/hosts of a pod with a network of its own.
pub fn hosts(hostname: &str, addresses: &[IpAddr]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         ff00::0\tip6-mcastprefix\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n",
    );
    if !hostname.is_empty() {
        for address in addresses {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{address}\t{hostname}");
        }
    }
    text
}

/// /etc/resolv.conf from CRI's settings; None if they say nothing, and the host's is to be used.
pub fn resolv_conf(dns: &DnsConfig) -> Result<Option<String>, Error> {
    let mut text = String::new();
    let lists = [("search", &dns.searches), ("options", &dns.options)];
    for value in dns.servers.iter().chain(&dns.searches).chain(&dns.options) {
        if value.is_empty() || value.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(invalid(format!("{value:?} cannot stand in resolv.conf")));
        }
    }
    let [search, options] = lists.map(|(keyword, values)| {
        if values.is_empty() { String::new() } else { format!("{keyword} {}\n", values.join(" ")) }
    });
    text.push_str(&search);
    for server in &dns.servers {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "nameserver {server}");
    }
    text.push_str(&options);
    Ok((!text.is_empty()).then_some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn resolv_conf_has_what_was_asked_for() {
        let dns = DnsConfig {
            servers: words("10.0.0.10 fd00::a"),
            searches: words("default.svc cluster.local"),
            options: words("ndots:5"),
        };
        let expected =
            "search default.svc cluster.local\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n";
        assert_eq!(resolv_conf(&dns).unwrap().as_deref(), Some(expected));
        assert_eq!(resolv_conf(&DnsConfig::default()).unwrap(), None);
    }

    #[test]
    fn a_line_break_smuggles_nothing_in() {
        // CRI-O CVE-2022-4318 was this, in passwd.
        let dns = DnsConfig { servers: vec!["1.1.1.1\nnameserver 6.6.6.6".into()], ..Default::default() };
        assert!(resolv_conf(&dns).is_err());
        assert!(check_hostname("a\nb").is_err());
        assert!(check_hostname("web-0.web_1").is_ok());
        assert!(check_hostname(&"a".repeat(65)).is_err());
    }

    #[test]
    fn hosts_name_every_address_of_the_pod() {
        let text = hosts("web-0", &["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()]);
        assert!(text.starts_with("127.0.0.1\tlocalhost\n"));
        assert!(text.ends_with("10.0.0.2\tweb-0\nfd00::2\tweb-0\n"));
    }
}
