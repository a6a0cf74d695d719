//! User namespaces: which ids a pod's are outside.

use hull_agent::sandbox::IdMap;

use super::invalid;
use crate::api::runtime::{IdMapping, NamespaceMode, NamespaceOption, UserNamespace};
use crate::runtime::Error;

/// What a pod's user namespace maps. The container's root is among it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// User ids.
    pub uids: IdMap,
    /// Group ids.
    pub gids: IdMap,
}

/// What the options ask for; `None`: the node's own ids.
pub fn mapping(options: Option<&UserNamespace>) -> Result<Option<Mapping>, Error> {
    let Some(options) = options else { return Ok(None) };
    let has_mappings = !options.uids.is_empty() || !options.gids.is_empty();
    match NamespaceMode::try_from(options.mode) {
        Ok(NamespaceMode::Node) if has_mappings => {
            Err(invalid("the user namespace mode NODE is given together with ID mappings"))
        }
        Ok(NamespaceMode::Node) => Ok(None),
        Ok(NamespaceMode::Pod) => {
            Ok(Some(Mapping { uids: one("user", &options.uids)?, gids: one("group", &options.gids)? }))
        }
        _ => Err(invalid(format!(
            "a pod cannot have the user namespace mode {}; there are POD and NODE",
            options.mode
        ))),
    }
}

/// One mapping, from the container's root on, that leaves the node's root alone.
fn one(what: &str, mappings: &[IdMapping]) -> Result<IdMap, Error> {
    let [mapping] = mappings else {
        return Err(invalid(format!(
            "the user namespace has {} mappings of {what} ids; it must have exactly one",
            mappings.len()
        )));
    };
    if mapping.container_id != 0 {
        return Err(invalid(format!("the mapping of {what} ids does not begin with the container's 0")));
    }
    if mapping.host_id == 0 {
        return Err(invalid(format!("the mapping of {what} ids has the node's own 0 in it")));
    }
    IdMap::new(mapping.container_id, mapping.host_id, mapping.length).ok_or_else(|| {
        invalid(format!(
            "the mapping of {what} ids is empty, or ends beyond 4294967294: {} ids from {} on",
            mapping.length, mapping.host_id
        ))
    })
}

/// What a pod's options ask for. Its other namespaces must fit: those that it shares with the node belong to the node's
/// user namespace, and only of the network's it can do without.
pub fn of_pod(options: Option<&NamespaceOption>) -> Result<Option<Mapping>, Error> {
    let Some(options) = options else { return Ok(None) };
    let mapping = mapping(options.userns_options.as_ref())?;
    if mapping.is_some() {
        for (kind, mode) in [("IPC", options.ipc()), ("PID", options.pid())] {
            if mode == NamespaceMode::Node {
                return Err(invalid(format!(
                    "a pod with a user namespace cannot share the node's {kind} namespace"
                )));
            }
        }
    }
    Ok(mapping)
}

/// A container lives in its pod's user namespace. What it says of one must agree; silence does.
pub fn check_container(options: Option<&NamespaceOption>, pod: Option<&Mapping>) -> Result<(), Error> {
    if pod.is_some() && options.is_some_and(|options| options.pid() == NamespaceMode::Node) {
        return Err(invalid("a container in a user namespace cannot share the node's PID namespace"));
    }
    let Some(asked) = options.and_then(|options| options.userns_options.as_ref()) else { return Ok(()) };
    if mapping(Some(asked))?.as_ref() == pod {
        return Ok(());
    }
    Err(invalid("the container's user namespace options differ from its pod's"))
}

/// Whether a mount's own mappings ask for the pod's ids on its file system. None other are possible.
pub fn of_mount(uids: &[IdMapping], gids: &[IdMapping], pod: Option<&Mapping>) -> Result<bool, String> {
    if uids.is_empty() && gids.is_empty() {
        return Ok(false);
    }
    let Some(pod) = pod else { return Err("has ID mappings, but its pod has no user namespace".into()) };
    let same = |mappings: &[IdMapping], map: &IdMap| match mappings {
        [one] => IdMap::new(one.container_id, one.host_id, one.length).as_ref() == Some(map),
        _ => false,
    };
    if same(uids, &pod.uids) && same(gids, &pod.gids) {
        return Ok(true);
    }
    Err("has ID mappings that differ from those of its pod's user namespace".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id_mapping(container_id: u32, host_id: u32, length: u32) -> IdMapping {
        IdMapping { host_id, container_id, length }
    }

    fn asked(mode: NamespaceMode, mappings: &[IdMapping]) -> UserNamespace {
        UserNamespace { mode: mode.into(), uids: mappings.to_vec(), gids: mappings.to_vec() }
    }

    #[test]
    fn one_mapping_from_the_containers_root_on_is_taken() {
        let options = asked(NamespaceMode::Pod, &[id_mapping(0, 100_000, 65_536)]);
        let found = mapping(Some(&options)).unwrap().unwrap();
        assert_eq!((found.uids.outside(7), found.gids.outside(65_536)), (Some(100_007), None));
        assert_eq!(mapping(None).unwrap(), None);
        assert_eq!(mapping(Some(&asked(NamespaceMode::Node, &[]))).unwrap(), None);
    }

    #[test]
    fn what_cri_forbids_is_refused() {
        let good = id_mapping(0, 100_000, 65_536);
        for options in [
            asked(NamespaceMode::Pod, &[]),
            asked(NamespaceMode::Pod, &[good, id_mapping(65_536, 200_000, 1)]),
            asked(NamespaceMode::Pod, &[good, good]),
            asked(NamespaceMode::Pod, &[id_mapping(1, 100_000, 65_536)]),
            asked(NamespaceMode::Pod, &[id_mapping(0, 0, 65_536)]),
            asked(NamespaceMode::Pod, &[id_mapping(0, 100_000, 0)]),
            asked(NamespaceMode::Pod, &[id_mapping(0, u32::MAX, 1)]),
            asked(NamespaceMode::Pod, &[id_mapping(0, u32::MAX - 5, 100)]),
            UserNamespace { gids: Vec::new(), ..asked(NamespaceMode::Pod, &[good]) },
            asked(NamespaceMode::Node, &[good]),
            asked(NamespaceMode::Container, &[good]),
            asked(NamespaceMode::Container, &[]),
            asked(NamespaceMode::Target, &[]),
            UserNamespace { mode: 9, ..asked(NamespaceMode::Pod, &[good]) },
        ] {
            assert!(mapping(Some(&options)).is_err(), "{options:?}");
        }
    }

    #[test]
    fn of_the_nodes_namespaces_only_the_network_goes_together_with_it() {
        let user = asked(NamespaceMode::Pod, &[id_mapping(0, 100_000, 65_536)]);
        let node = NamespaceMode::Node.into();
        let with = NamespaceOption { userns_options: Some(user), ..Default::default() };
        assert!(of_pod(Some(&with)).unwrap().is_some());
        assert!(of_pod(Some(&NamespaceOption { network: node, ..with.clone() })).unwrap().is_some());
        assert!(of_pod(Some(&NamespaceOption { ipc: node, ..with.clone() })).is_err());
        assert!(of_pod(Some(&NamespaceOption { pid: node, ..with })).is_err());
        let without = NamespaceOption { ipc: node, pid: node, ..Default::default() };
        assert_eq!(of_pod(Some(&without)).unwrap(), None);
    }

    #[test]
    fn a_container_agrees_with_its_pod_or_says_nothing() {
        let user = |host| asked(NamespaceMode::Pod, &[id_mapping(0, host, 65_536)]);
        let options = |user| NamespaceOption { userns_options: user, ..Default::default() };
        let pod = mapping(Some(&user(100_000))).unwrap();
        let check = |asked: Option<UserNamespace>, pod: Option<&Mapping>| {
            check_container(Some(&options(asked)), pod).is_ok()
        };
        assert!(check(None, pod.as_ref()) && check(Some(user(100_000)), pod.as_ref()));
        assert!(!check(Some(user(200_000)), pod.as_ref()));
        assert!(!check(Some(asked(NamespaceMode::Node, &[])), pod.as_ref()));
        assert!(!check(Some(user(100_000)), None));
        assert!(check(Some(asked(NamespaceMode::Node, &[])), None) && check(None, None));
    }

    #[test]
    fn a_mount_has_the_pods_mappings_or_none() {
        let ids = [id_mapping(0, 100_000, 65_536)];
        let pod = mapping(Some(&asked(NamespaceMode::Pod, &ids))).unwrap();
        assert_eq!(of_mount(&ids, &ids, pod.as_ref()), Ok(true));
        assert_eq!(of_mount(&[], &[], pod.as_ref()), Ok(false));
        assert!(of_mount(&ids, &[], pod.as_ref()).is_err());
        assert!(of_mount(&ids, &[id_mapping(0, 1, 1)], pod.as_ref()).is_err());
        assert!(of_mount(&ids, &ids, None).is_err());
    }
}
