//! What containers write, and where it goes.

mod line;
mod log_file;
mod output;
mod relay;
mod timestamp;

pub use line::{MAX_LINE, Stream};
pub use log_file::LogFile;
pub use output::{Buffers, OutputStream, Progress};
pub use relay::{InputRelay, Interest, TerminalRelay, Typed};
pub use timestamp::{now, rfc3339};
