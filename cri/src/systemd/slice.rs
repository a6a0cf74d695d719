//! Names of slices and the cgroups that they mean (systemd.slice(5)).

/// The cgroup of a slice below the root: `a-b.slice` lies at `/a.slice/a-b.slice`. `parent` is the slice's name, or its
/// path, of which the last part counts. The error says what is wrong.
pub fn cgroup_of(parent: &str) -> Result<String, String> {
    let name = parent.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let wrong = |what: &str| Err(format!("the cgroup parent {parent:?} is no slice of systemd: {what}"));
    let Some(stem) = name.strip_suffix(".slice") else { return wrong("it does not end with \".slice\"") };
    if stem == "-" {
        return Ok("/".to_owned());
    }
    if stem.is_empty() || stem.split('-').any(str::is_empty) {
        return wrong("between its dashes nothing may be empty");
    }
    if name.len() > 255
        || !stem.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:\\@".contains(&byte))
    {
        return wrong("it has characters that a unit's name cannot have, or too many");
    }
    let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
    Ok(ends.map(|end| format!("/{}.slice", &stem[..end])).collect())
}

/// Whether a pod's cgroup is a slice.
pub fn is_slice(cgroup: &str) -> bool {
    cgroup.trim_end_matches('/').ends_with(".slice")
}

/// The name of the slice whose cgroup this is.
pub fn name_of(cgroup: &str) -> &str {
    cgroup.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

/// The leaf of a container (or an agent) below a pod's cgroup: its id, or a scope with the id as cAdvisor and kubelet
/// expect it.
pub fn leaf(pod_cgroup: &str, id: &str) -> String {
    if is_slice(pod_cgroup) { format!("hull-{id}.scope") } else { id.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dashes_are_levels() {
        let wanted = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1_2.slice";
        assert_eq!(cgroup_of("kubepods-besteffort-pod1_2.slice").unwrap(), wanted);
        assert_eq!(cgroup_of(wanted).unwrap(), wanted);
        assert_eq!(cgroup_of("-.slice").unwrap(), "/");
        assert_eq!(name_of(wanted), "kubepods-besteffort-pod1_2.slice");
    }

    #[test]
    fn what_is_no_slice_is_refused() {
        for bad in
            ["", "a", "a.scope", "-a.slice", "a-.slice", "a--b.slice", "a b.slice", "a\n.slice", ".slice"]
        {
            assert!(cgroup_of(bad).is_err(), "{bad:?}");
        }
        assert!(cgroup_of("a.slice:prefix:name").is_err());
    }

    #[test]
    fn a_leaf_of_a_slice_is_a_scope() {
        assert_eq!(leaf("/kubepods.slice/kubepods-pod1.slice", "ab"), "hull-ab.scope");
        assert_eq!(leaf("/kubepods/pod1", "ab"), "ab");
    }
}
