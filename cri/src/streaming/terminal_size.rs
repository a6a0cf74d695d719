//! Sizes of a client's terminal: JSON objects one after the other, `{"Width":80,"Height":24}`.

use serde::Deserialize;

/// Longest text of one size in bytes.
const MAX_TEXT: usize = 1024;

/// In characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// What has come of a size that is not complete.
#[derive(Debug, Default)]
pub struct SizeReader(Vec<u8>);

impl SizeReader {
    /// Takes what came and gives the last complete size in it; sizes in between are of no interest any more. None
    /// also for what is no size: it is skipped.
    pub fn push(&mut self, bytes: &[u8]) -> Option<TerminalSize> {
        self.0.extend_from_slice(bytes);
        let mut sizes = serde_json::Deserializer::from_slice(&self.0).into_iter::<TerminalSize>();
        let mut last = None;
        let broken = loop {
            match sizes.next() {
                Some(Ok(size)) => last = Some(size),
                Some(Err(error)) => break !error.is_eof(),
                None => break false,
            }
        };
        let read = sizes.byte_offset();
        self.0.drain(..read);
        if broken || self.0.len() > MAX_TEXT {
            self.0 = Vec::new();
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_however_they_are_cut() {
        let text = b"{\"Width\":80,\"Height\":24}\n{\"Width\":100,\"Height\":50}\n";
        for cut in 0..text.len() {
            let mut reader = SizeReader::default();
            let (first, second) = (reader.push(&text[..cut]), reader.push(&text[cut..]));
            assert_eq!(second.or(first), Some(TerminalSize { width: 100, height: 50 }), "{cut}");
        }
    }

    #[test]
    fn what_is_no_size_is_skipped() {
        let mut reader = SizeReader::default();
        for nonsense in ["{\"Width\":-1,\"Height\":24}", "{\"Width\":70000,\"Height\":1}", "[", "x"] {
            assert_eq!(reader.push(nonsense.as_bytes()), None);
            reader.0.clear();
        }
        assert_eq!(reader.push(&[b' '; 5000]), None);
        assert_eq!(reader.push(&[b'{'; 5000]), None);
        assert!(reader.0.is_empty());
        assert!(reader.push(b"{\"Width\":1,\"Height\":2}").is_some());
    }
}
