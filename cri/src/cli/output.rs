//! Tables for people, JSON for programs.

use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::error::CliError;

/// `-o`
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// Aligned columns, short ids, ages
    Table,
    /// Everything, exactly
    Json,
}

/// Hex digits of an id that people are shown.
const SHORT: usize = 13;

/// The beginning of an id, long enough to name it on one node.
pub(super) fn short_id(id: &str) -> &str {
    let bare = id.strip_prefix("sha256:").or_else(|| id.strip_prefix("sha512:")).unwrap_or(id);
    bare.get(..SHORT).unwrap_or(bare)
}

/// Bytes as people read them: `1.2 MiB`.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// How long ago, in the largest unit that says enough: `3 minutes ago`. `nanos` counts from 1970.
pub(super) fn age(nanos: i64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let then = u64::try_from(nanos / 1_000_000_000).unwrap_or(0);
    if then == 0 { "-".into() } else { format!("{} ago", span(now.saturating_sub(then))) }
}

fn span(seconds: u64) -> String {
    const UNITS: [(u64, &str); 5] =
        [(86_400 * 7, "week"), (86_400, "day"), (3600, "hour"), (60, "minute"), (1, "second")];
    // Two of a unit before it is used: 90 minutes say more than 1 hour.
    for (length, name) in UNITS {
        if seconds >= 2 * length {
            return format!("{} {name}s", seconds / length);
        }
    }
    if seconds == 1 { "1 second".into() } else { "less than a second".into() }
}

/// Rows under headings, each column as wide as its widest cell.
#[derive(Debug)]
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(headings: &[&str]) -> Self {
        Table { rows: vec![headings.iter().map(|heading| heading.to_string()).collect()] }
    }

    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.map(|cell| printable(&cell)).into());
    }

    pub(super) fn print(&self) -> Result<(), CliError> {
        print(&self.render())
    }

    fn render(&self) -> String {
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.rows[0].len()).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells: Vec<String> =
                row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            text.push_str(cells.join("   ").trim_end());
            text.push('\n');
        }
        text
    }
}

/// Names come from images and pods; what a terminal would obey is shown as `?`.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Prints `value` as JSON over several lines.
pub(super) fn print_json(value: &impl Serialize) -> Result<(), CliError> {
    let text =
        serde_json::to_string_pretty(value).map_err(|error| CliError::local("write JSON", error.into()))?;
    print(&(text + "\n"))
}

/// Prints to standard output; a reader that is gone is an error like any other, and not a panic.
pub(super) fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| CliError::local("print", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_nothing_trails() {
        let mut table = Table::new(&["ID", "NAME"]);
        table.row(["a".into(), "first".into()]);
        table.row(["longer".into(), String::new()]);
        assert_eq!(table.render(), "ID       NAME\na        first\nlonger\n");
    }

    #[test]
    fn numbers_are_for_people() {
        for (bytes, text) in
            [(0, "0 B"), (999, "999 B"), (1536, "1.5 KiB"), (1_040_000, "1.0 MiB"), (4 << 30, "4.0 GiB")]
        {
            assert_eq!(size(bytes), text);
        }
        for (seconds, text) in [
            (0, "less than a second"),
            (1, "1 second"),
            (90, "90 seconds"),
            (121, "2 minutes"),
            (90_000, "25 hours"),
            (1_300_000, "2 weeks"),
        ] {
            assert_eq!(span(seconds), text);
        }
        assert_eq!(short_id("sha256:0123456789abcdef0123"), "0123456789abc");
    }

    #[test]
    fn what_a_terminal_would_obey_is_not_printed() {
        assert_eq!(printable("a\u{1b}[2Jb\nc"), "a?[2Jb?c");
    }
}
