//! Labels that a list is asked for.

use std::collections::BTreeMap;

/// True if every wanted label is there with its value.
pub(crate) fn matches(labels: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_wants_all_its_labels() {
        let map = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect::<BTreeMap<_, _>>()
        };
        let labels = map(&[("app", "web"), ("tier", "front")]);
        assert!(matches(&labels, &map(&[])));
        assert!(matches(&labels, &map(&[("app", "web")])));
        assert!(!matches(&labels, &map(&[("app", "web"), ("tier", "back")])));
        assert!(!matches(&labels, &map(&[("zone", "")])));
    }
}
