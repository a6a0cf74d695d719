//! ListPodSandbox.

use super::objects::Pod;
use super::{Runtime, selector};
use crate::api::runtime::{ListPodSandboxRequest, PodSandbox, PodSandboxFilter, PodSandboxState};
use crate::store::record::PodPhase;

impl Runtime {
    /// The pods that the filter lets through, newest first.
    pub fn list_pod_sandbox(&self, request: &ListPodSandboxRequest) -> Vec<PodSandbox> {
        let everything = PodSandboxFilter::default();
        let filter = request.filter.as_ref().unwrap_or(&everything);
        let mut found: Vec<_> = self
            .objects
            .pods()
            .iter()
            .filter_map(|pod| listed(pod).filter(|item| fits(item, filter)))
            .collect();
        found.sort_by_key(|item| std::cmp::Reverse(item.created_at));
        found
    }
}

/// The state as CRI knows it.
pub(super) fn state(phase: PodPhase) -> PodSandboxState {
    match phase {
        PodPhase::Ready => PodSandboxState::SandboxReady,
        PodPhase::Creating | PodPhase::Lost | PodPhase::Stopped => PodSandboxState::SandboxNotready,
    }
}

fn listed(pod: &Pod) -> Option<PodSandbox> {
    pod.with_record(|record| {
        let config = record.config.as_ref()?;
        Some(PodSandbox {
            id: record.id.clone(),
            metadata: config.metadata.clone(),
            state: state(record.phase()).into(),
            created_at: record.created_at,
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
            runtime_handler: record.runtime_handler.clone(),
        })
    })
}

fn fits(item: &PodSandbox, filter: &PodSandboxFilter) -> bool {
    item.id.starts_with(&filter.id)
        && filter.state.as_ref().is_none_or(|wanted| wanted.state == item.state)
        && selector::matches(&item.labels, &filter.label_selector)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::PodSandboxStateValue;

    #[test]
    fn a_filter_lets_through_what_fits_all_of_it() {
        let item = PodSandbox {
            id: "abc".into(),
            state: PodSandboxState::SandboxNotready.into(),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            ..Default::default()
        };
        let filter = |id: &str, state: Option<PodSandboxState>, value: &str| PodSandboxFilter {
            id: id.into(),
            state: state.map(|state| PodSandboxStateValue { state: state.into() }),
            label_selector: [("app".to_owned(), value.to_owned())].into(),
        };
        assert!(fits(&item, &filter("", None, "web")));
        assert!(fits(&item, &filter("ab", Some(PodSandboxState::SandboxNotready), "web")));
        assert!(!fits(&item, &filter("b", None, "web")));
        assert!(!fits(&item, &filter("", Some(PodSandboxState::SandboxReady), "web")));
        assert!(!fits(&item, &filter("", None, "db")));
    }
}
