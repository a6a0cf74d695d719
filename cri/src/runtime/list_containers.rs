//! ListContainers.

use super::container_status::state;
use super::{Runtime, selector};
use crate::api::runtime::{Container, ContainerFilter, ListContainersRequest};
use crate::store::record::ContainerRecord;

impl Runtime {
    /// The containers that the filter lets through, newest first.
    pub fn list_containers(&self, request: &ListContainersRequest) -> Vec<Container> {
        let everything = ContainerFilter::default();
        let filter = request.filter.as_ref().unwrap_or(&everything);
        let mut found: Vec<_> = self
            .objects
            .containers()
            .iter()
            // Most are asked for by id: what has another is not copied.
            .filter(|container| container.id().starts_with(&filter.id))
            .map(|container| container.with_record(listed))
            .filter(|item| fits(item, filter))
            .collect();
        found.sort_by_key(|item| std::cmp::Reverse(item.created_at));
        found
    }
}

fn listed(record: &ContainerRecord) -> Container {
    // kubelet lists every second: only what is shown is copied.
    let config = record.config.as_ref();
    let image_id = record.image.as_ref().map_or("", |image| &image.id);
    Container {
        id: record.id.clone(),
        pod_sandbox_id: record.sandbox_id.clone(),
        metadata: config.and_then(|config| config.metadata.clone()),
        image: config.and_then(|config| config.image.clone()),
        image_ref: image_id.to_owned(),
        state: state(record.phase()).into(),
        created_at: record.created_at,
        labels: config.map(|config| config.labels.clone()).unwrap_or_default(),
        annotations: config.map(|config| config.annotations.clone()).unwrap_or_default(),
        image_id: image_id.to_owned(),
    }
}

fn fits(item: &Container, filter: &ContainerFilter) -> bool {
    item.id.starts_with(&filter.id)
        && item.pod_sandbox_id.starts_with(&filter.pod_sandbox_id)
        && filter.state.as_ref().is_none_or(|wanted| wanted.state == item.state)
        && selector::matches(&item.labels, &filter.label_selector)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::{ContainerState, ContainerStateValue};

    #[test]
    fn a_filter_lets_through_what_fits_all_of_it() {
        let item = Container {
            id: "abc".into(),
            pod_sandbox_id: "def".into(),
            state: ContainerState::ContainerExited.into(),
            ..Default::default()
        };
        let filter = |id: &str, pod: &str, state: Option<ContainerState>| ContainerFilter {
            id: id.into(),
            pod_sandbox_id: pod.into(),
            state: state.map(|state| ContainerStateValue { state: state.into() }),
            ..Default::default()
        };
        assert!(fits(&item, &ContainerFilter::default()));
        assert!(fits(&item, &filter("a", "de", Some(ContainerState::ContainerExited))));
        assert!(!fits(&item, &filter("", "ef", None)));
        assert!(!fits(&item, &filter("", "", Some(ContainerState::ContainerRunning))));
    }
}
