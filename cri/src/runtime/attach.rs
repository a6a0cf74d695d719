//! Attach: the URL under which a container's own streams can be had, once.

use super::exec::checked;
use super::{Error, Result, Runtime};
use crate::api::runtime::AttachRequest;
use crate::streaming::{AttachSession, Session, Wanted};

impl Runtime {
    /// Checks that the container has what is asked for, and says where.
    pub fn attach(&self, request: AttachRequest) -> Result<String> {
        let AttachRequest { container_id, stdin, tty, stdout, stderr } = request;
        let wanted = checked(Wanted { stdin, stdout, stderr, tty })?;
        // One that is about to be started is attached to in the moment of its start.
        let container = self.objects.container(&container_id)?;
        if container.with_record(|record| record.is_over()) {
            return Err(Error::FailedPrecondition(format!("the container {} does not run", container.id())));
        }
        let has_terminal =
            container.with_record(|record| record.config.as_ref().is_some_and(|config| config.tty));
        if tty != has_terminal {
            let message = match has_terminal {
                true => "has a terminal; attach to it with tty",
                false => "has no terminal; attach to it without tty",
            };
            return Err(Error::Invalid(format!("the container {} {message}", container.id())));
        }
        self.stream(Session::Attach(AttachSession { container, wanted }))
    }
}
