//! What a token stands for.

use super::attach::AttachSession;
use super::exec::ExecSession;
use super::port_forward::PortForwardSession;

/// What somebody was allowed to do, once.
#[derive(Debug)]
pub enum Session {
    /// Run a command.
    Exec(ExecSession),
    /// Look at what runs already.
    Attach(AttachSession),
    /// Reach the pod's ports.
    PortForward(PortForwardSession),
}

impl Session {
    /// The first part of its URL's path.
    pub(super) const fn path(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::Attach(_) => "attach",
            Self::PortForward(_) => "portforward",
        }
    }
}
