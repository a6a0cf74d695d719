//! The terminal that hull sits at.

use std::io;

use rustix::stdio;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// Whether standard input is a terminal.
pub(super) fn is_here() -> bool {
    isatty(stdio::stdin())
}

/// Columns and rows, if there is a terminal at all.
pub(super) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdio::stdout()).or_else(|_| tcgetwinsize(stdio::stdin())).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// While this lives, every key goes to the other side as it is, Ctrl-C too.
pub(super) struct RawTerminal(Termios);

impl RawTerminal {
    pub(super) fn begin() -> io::Result<Self> {
        let before = tcgetattr(stdio::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdio::stdin(), OptionalActions::Drain, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may have gone.
        let _ = tcsetattr(stdio::stdin(), OptionalActions::Drain, &self.0);
    }
}
