//! What containers write, and where it goes.

mod forward;
mod line;
mod log_file;
mod one_way;
mod output;
mod relay;
mod tap;
mod timestamp;

pub use forward::{Forward, SinkInterest};
pub use line::{MAX_LINE, Stream};
pub use log_file::LogFile;
pub use one_way::{Flow, OneWay};
pub use output::{Buffers, OutputInterest, OutputStream, Progress};
pub use relay::{InputRelay, Interest, TerminalRelay, Typed};
pub use timestamp::{now, rfc3339};
