//! PortForward: the URL under which a pod's ports can be reached, once.

use super::{Error, Result, Runtime};
use crate::api::runtime::PortForwardRequest;
use crate::store::record::PodPhase;
use crate::streaming::{PortForwardSession, Session};

impl Runtime {
    /// Checks that the pod can be reached, and says where. Which ports is said when they are connected to; the list
    /// in the request is only for protocols that hull does not speak.
    pub fn port_forward(&self, request: &PortForwardRequest) -> Result<String> {
        if let Some(port) = request.port.iter().find(|port| !(1..=65_535).contains(*port)) {
            return Err(Error::Invalid(format!("{port} is not a port")));
        }
        let pod = self.objects.pod(&request.pod_sandbox_id)?;
        if pod.phase() != PodPhase::Ready {
            return Err(Error::FailedPrecondition(format!("the pod sandbox {} is not ready", pod.id())));
        }
        self.stream(Session::PortForward(PortForwardSession { pod }))
    }
}
