//! A pod's addresses in the result of ADD (SPEC.md, "ADD Success").

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

/// Most addresses that a pod is shown with.
const MOST: usize = 64;

/// The addresses of the pod's interface of this name, in the plugins' order; all addresses if the result does not say
/// whose they are.
///
/// # Errors
/// A sentence, if there is none or one is malformed.
pub(super) fn addresses(result: &Value, interface: &str) -> Result<Vec<IpAddr>, String> {
    let empty = Vec::new();
    let interfaces = result.get("interfaces").and_then(Value::as_array).unwrap_or(&empty);
    let ips = result.get("ips").and_then(Value::as_array).unwrap_or(&empty);
    let text =
        |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let is_pods = |ip: &Value| {
        let index = ip.get("interface").and_then(Value::as_u64).and_then(|index| usize::try_from(index).ok());
        match index.and_then(|index| interfaces.get(index)) {
            Some(owner) => !text(owner, "sandbox").is_empty() && text(owner, "name") == interface,
            None => false,
        }
    };
    let mut chosen: Vec<&Value> = ips.iter().filter(|ip| is_pods(ip)).collect();
    if chosen.is_empty() {
        chosen = ips.iter().filter(|ip| ip.get("interface").is_none_or(Value::is_null)).collect();
    }
    let mut addresses = Vec::new();
    for ip in chosen.into_iter().take(MOST) {
        let text = text(ip, "address");
        let address = text.parse::<IpNet>().map(|net| net.addr()).or_else(|_| text.parse());
        addresses.push(address.map_err(|_| format!("its result has {text:.80?} as an address"))?);
    }
    if addresses.is_empty() {
        return Err(format!("its result has no address for {interface}"));
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_the_pods_own_interface_counts() {
        let result = json!({
            "interfaces": [{ "name": "cni0" }, { "name": "veth1" }, { "name": "eth0", "sandbox": "/run/netns/x" }],
            "ips": [
                { "interface": 0, "address": "10.0.0.1/24" },
                { "interface": 2, "address": "10.0.0.5/24" },
                { "interface": 2, "address": "fd00::5/64" },
            ],
        });
        let addresses = addresses(&result, "eth0").unwrap();
        assert_eq!(addresses, ["10.0.0.5".parse::<IpAddr>().unwrap(), "fd00::5".parse().unwrap()]);
    }

    #[test]
    fn a_result_that_does_not_name_interfaces_is_taken_whole() {
        let result =
            json!({ "ips": [{ "address": "10.0.0.5/24", "version": "4" }, { "address": "fd00::5" }] });
        assert_eq!(addresses(&result, "eth0").unwrap().len(), 2);
    }

    #[test]
    fn a_result_without_a_usable_address_is_an_error() {
        for result in [
            json!({}),
            json!([]),
            json!({ "ips": [] }),
            json!({ "ips": [{ "address": "junk" }] }),
            json!({ "ips": [{ "interface": 9, "address": "10.0.0.1/24" }], "interfaces": [] }),
        ] {
            assert!(addresses(&result, "eth0").is_err(), "{result}");
        }
    }
}
