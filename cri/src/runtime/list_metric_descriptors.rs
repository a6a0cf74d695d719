//! ListMetricDescriptors.

use super::Runtime;
use crate::api::runtime::MetricDescriptor;
use crate::stats::metrics;

impl Runtime {
    /// The metrics that ListPodSandboxMetrics tells.
    pub fn list_metric_descriptors(&self) -> Vec<MetricDescriptor> {
        metrics::descriptors()
    }
}
