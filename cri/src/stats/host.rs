//! Measures a pod whose processes are the host's. Blocks for as long as a few hundred small reads take.

use std::sync::Arc;

use hull_agent::cgroup::{CgroupError, Hierarchies, PodCgroup};

use super::{Measured, PodUsage, Subject, network, processes};
use crate::runtime::now;
use crate::sandbox::Place;

/// What the pod at `place` uses. What is gone already has no numbers; that is no error.
pub fn measure(
    hierarchies: &Arc<Hierarchies>,
    place: &Place,
    subject: &Subject,
) -> Result<PodUsage, CgroupError> {
    let pod = PodCgroup::open_existing(Arc::clone(hierarchies), &place.cgroup_parent, place.cgroup_levels)?;
    let mut answer = PodUsage::default();
    let mut all_processes = 0;
    for id in &subject.containers {
        let name = place.leaf(id);
        let leaf = pod.leaf(&name)?;
        let at = now();
        let usage = if subject.details { leaf.usage()? } else { leaf.brief_usage()? };
        let pids = leaf.processes()?;
        all_processes += pids.len() as u64;
        // It ended meanwhile.
        if usage.cpu.is_none() && pids.is_empty() {
            continue;
        }
        let measured = Measured {
            at,
            cgroup: format!("{}/{name}", place.cgroup_parent.trim_end_matches('/')),
            usage,
            processes: pids.len() as u64,
            limits: leaf.limits()?,
            details: subject.details.then(|| processes::details(&pids)),
        };
        answer.containers.insert(id.clone(), measured);
    }
    if subject.whole_pod {
        let agent = pod.leaf(&place.leaf(&place.id))?.processes()?.len() as u64;
        answer.whole = Some(Measured {
            at: now(),
            cgroup: place.cgroup_parent.clone(),
            usage: if subject.details { pod.usage()? } else { pod.brief_usage()? },
            processes: all_processes + agent,
            limits: pod.limits()?,
            details: None,
        });
        answer.interfaces = subject
            .network_namespace
            .as_deref()
            .map(|namespace| network::interfaces(subject.agent_pid, namespace))
            .unwrap_or_default();
    }
    Ok(answer)
}
