//! The CRI log format: `2016-10-06T00:17:09.669794202Z stdout F a line`.
//!
//! Lines of more than 16 KiB become parts tagged P with the rest tagged F; what is left without a newline at the end
//! of the stream is tagged P too, so that a reader who joins parts gets exactly the bytes that were written.

use std::io::BufRead;

use super::timestamp;

/// Longest content of one line in the log, in bytes; longer ones are split.
pub const MAX_LINE: usize = 16 << 10;

/// Which of a container's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    const fn label(self) -> &'static [u8] {
        match self {
            Self::Stdout => b" stdout ",
            Self::Stderr => b" stderr ",
        }
    }
}

/// Longest text before a line's content: time, stream, tag.
const MAX_PREFIX: usize = timestamp::LENGTH + 8 + 2;
/// Longest entry in the log.
pub(super) const MAX_ENTRY: usize = MAX_PREFIX + MAX_LINE + 1;

/// Where formatted entries go, one call for each.
pub(super) trait Entries {
    /// Adds an entry made of these pieces; together at most [`MAX_ENTRY`] bytes.
    fn entry(&mut self, pieces: [&[u8]; 6]);
}

/// Cuts a stream of bytes into entries, across chunks.
#[derive(Debug)]
pub(super) struct Lines {
    stream: Stream,
    /// Beginning of a line whose end has not come yet; at most [`MAX_LINE`] bytes.
    begun: Vec<u8>,
}

impl Lines {
    pub(super) const fn new(stream: Stream) -> Self {
        Self { stream, begun: Vec::new() }
    }

    /// Takes the next bytes of the stream, read at `time`.
    pub(super) fn push(&mut self, mut chunk: &[u8], time: &[u8], out: &mut impl Entries) {
        while !chunk.is_empty() {
            let mut rest = chunk;
            // Memory cannot fail to be read; the search is the C library's memchr.
            let length = rest.skip_until(b'\n').unwrap_or(chunk.len());
            let line = &chunk[..length];
            match line.split_last() {
                Some((b'\n', content)) => self.whole(content, time, out),
                _ => self.begin(line, time, out),
            }
            chunk = rest;
        }
    }

    /// The stream has ended: writes what has no newline.
    pub(super) fn finish(&mut self, time: &[u8], out: &mut impl Entries) {
        if !self.begun.is_empty() {
            self.emit(time, b"P ", &[], out);
        }
    }

    /// Adds the end of a line, without its newline.
    fn whole(&mut self, content: &[u8], time: &[u8], out: &mut impl Entries) {
        let content = self.split_off_parts(content, time, out);
        self.emit(time, b"F ", content, out);
    }

    /// Adds bytes whose newline has not come yet.
    fn begin(&mut self, content: &[u8], time: &[u8], out: &mut impl Entries) {
        let content = self.split_off_parts(content, time, out);
        self.begun.extend_from_slice(content);
    }

    /// Emits full parts until what was begun and the rest of `content` fit one entry; returns that rest.
    fn split_off_parts<'a>(
        &mut self,
        mut content: &'a [u8],
        time: &[u8],
        out: &mut impl Entries,
    ) -> &'a [u8] {
        while self.begun.len() + content.len() > MAX_LINE {
            let (part, rest) = content.split_at(MAX_LINE - self.begun.len());
            self.emit(time, b"P ", part, out);
            content = rest;
        }
        content
    }

    fn emit(&mut self, time: &[u8], tag: &[u8], content: &[u8], out: &mut impl Entries) {
        out.entry([time, self.stream.label(), tag, &self.begun, content, b"\n"]);
        if !self.begun.is_empty() {
            // Given back, so that idle containers hold nothing.
            self.begun = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TIME: &[u8] = b"2016-10-06T00:17:09.669794202Z";

    struct Log(Vec<u8>);
    impl Entries for Log {
        fn entry(&mut self, pieces: [&[u8]; 6]) {
            assert!(pieces.iter().map(|piece| piece.len()).sum::<usize>() <= MAX_ENTRY);
            self.0.extend(pieces.concat());
        }
    }

    fn log(chunks: &[&[u8]]) -> Vec<u8> {
        let (mut lines, mut log) = (Lines::new(Stream::Stdout), Log(Vec::new()));
        for chunk in chunks {
            lines.push(chunk, TIME, &mut log);
        }
        lines.finish(TIME, &mut log);
        assert!(lines.begun.is_empty());
        log.0
    }

    /// What a reader of the log makes of it: tags and contents.
    fn entries(log: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let mut entries = Vec::new();
        for line in log.strip_suffix(b"\n").unwrap_or(log).split(|byte| *byte == b'\n') {
            if log.is_empty() {
                break;
            }
            assert_eq!(&line[..38], [TIME, b" stdout "].concat());
            assert_eq!(line[39], b' ');
            entries.push((line[38], line[40..].to_vec()));
        }
        entries
    }

    #[test]
    fn a_line_is_time_stream_tag_and_content() {
        assert_eq!(log(&[b"hello\n"]), b"2016-10-06T00:17:09.669794202Z stdout F hello\n");
    }

    #[test]
    fn a_line_in_pieces_is_one_entry_and_an_empty_one_counts() {
        assert_eq!(
            entries(&log(&[b"he", b"ll", b"o\n\nx\n"])),
            [(b'F', b"hello".to_vec()), (b'F', Vec::new()), (b'F', b"x".to_vec())]
        );
    }

    #[test]
    fn a_last_line_without_newline_is_partial_as_kubelet_expects() {
        assert_eq!(entries(&log(&[b"a\nb"])), [(b'F', b"a".to_vec()), (b'P', b"b".to_vec())]);
    }

    #[test]
    fn lines_of_exactly_the_limit_stay_whole_and_longer_ones_are_split() {
        let tags = |length: usize| {
            let mut line = vec![b'x'; length];
            line.push(b'\n');
            entries(&log(&[&line])).iter().map(|(tag, content)| (*tag, content.len())).collect::<Vec<_>>()
        };
        assert_eq!(tags(MAX_LINE), [(b'F', MAX_LINE)]);
        assert_eq!(tags(MAX_LINE + 1), [(b'P', MAX_LINE), (b'F', 1)]);
        assert_eq!(tags(2 * MAX_LINE), [(b'P', MAX_LINE), (b'F', MAX_LINE)]);
        assert_eq!(tags(2 * MAX_LINE + 5), [(b'P', MAX_LINE), (b'P', MAX_LINE), (b'F', 5)]);
    }

    proptest! {
        #[test]
        fn joined_entries_are_exactly_the_bytes_written(
            chunks in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..100),
                    (0_usize..40_000).prop_map(|length| vec![b'x'; length]),
                ],
                0..12,
            )
        ) {
            let chunks: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
            let mut joined = Vec::new();
            for (tag, content) in entries(&log(&chunks)) {
                prop_assert!(content.len() <= MAX_LINE);
                joined.extend(content);
                if tag == b'F' {
                    joined.push(b'\n');
                }
            }
            prop_assert_eq!(joined, chunks.concat());
        }
    }
}
