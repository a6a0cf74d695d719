//! The metrics that cAdvisor has, by its names, with its labels and in its units.
//!
//! CRI carries whole numbers only, so what cAdvisor tells in fractions of a second is told in whole ones.

mod container;
mod definitions;
mod pod;

pub use container::{Layer, container};
pub use definitions::descriptors;
pub use pod::pod;

use self::definitions::Definition;
use crate::api::runtime::{Metric, UInt64Value};

/// Whose metrics they are: the values of the labels that all of them have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    /// Path of the cgroup.
    pub id: String,
    /// The container's id; empty for a pod as a whole.
    pub name: String,
    /// The image by the name that people know it by; empty for a pod.
    pub image: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The container's name; empty for a pod.
    pub container: String,
}

/// Keys of [`Labels`], in the order of their values.
const LABELS: [&str; 6] = ["id", "name", "image", "namespace", "pod", "container"];

/// Collects the metrics of one container or pod.
#[derive(Debug)]
struct Sheet<'a> {
    labels: &'a Labels,
    metrics: Vec<Metric>,
}

impl<'a> Sheet<'a> {
    fn new(labels: &'a Labels) -> Self {
        Self { labels, metrics: Vec::with_capacity(64) }
    }

    /// Adds a value that was read for this very call. `more` are the values of the definition's own labels.
    fn add(&mut self, definition: &Definition, more: &[&str], value: u64) {
        debug_assert_eq!(definition.labels.len(), more.len(), "{}", definition.name);
        let Labels { id, name, image, namespace, pod, container } = self.labels;
        let own = more.iter().map(|value| (*value).to_owned());
        self.metrics.push(Metric {
            name: definition.name.to_owned(),
            // 0 is "read for this call" in CRI, so that a collector uses its own time.
            timestamp: 0,
            metric_type: definition.kind.into(),
            label_values: [id, name, image, namespace, pod, container]
                .into_iter()
                .cloned()
                .chain(own)
                .collect(),
            value: Some(UInt64Value { value }),
        });
    }

    fn add_known(&mut self, definition: &Definition, more: &[&str], value: Option<u64>) {
        if let Some(value) = value {
            self.add(definition, more, value);
        }
    }
}

#[cfg(test)]
mod tests;
