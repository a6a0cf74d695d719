//! Exec: the URL under which a command can be run, once.

use super::{Error, Result, Runtime};
use crate::api::runtime::ExecRequest;
use crate::streaming::{ExecSession, Session, Wanted};

impl Runtime {
    /// Checks that the command can be run, and says where.
    pub fn exec(&self, request: ExecRequest) -> Result<String> {
        let ExecRequest { container_id, cmd, tty, stdin, stdout, stderr } = request;
        if cmd.first().is_none_or(String::is_empty) {
            return Err(Error::Invalid("the request has no command".into()));
        }
        let wanted = checked(Wanted { stdin, stdout, stderr, tty })?;
        let container = self.running_container(&container_id)?;
        self.stream(Session::Exec(ExecSession { container, command: cmd, wanted }))
    }
}

/// What CRI asks of the streams (api.proto, ExecRequest and AttachRequest).
pub(super) fn checked(wanted: Wanted) -> Result<Wanted> {
    if wanted.tty && wanted.stderr {
        return Err(Error::Invalid(
            "with a terminal there is no stderr: tty and stderr cannot both be true".into(),
        ));
    }
    if !(wanted.stdin || wanted.stdout || wanted.stderr) {
        return Err(Error::Invalid("at least one of stdin, stdout and stderr must be true".into()));
    }
    Ok(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_that_cannot_be_are_refused() {
        let wanted = |stdin, stdout, stderr, tty| checked(Wanted { stdin, stdout, stderr, tty });
        assert!(wanted(true, true, false, true).is_ok());
        assert!(wanted(false, true, true, false).is_ok());
        assert!(matches!(wanted(true, true, true, true), Err(Error::Invalid(_))));
        assert!(matches!(wanted(false, false, false, false), Err(Error::Invalid(_))));
    }
}
