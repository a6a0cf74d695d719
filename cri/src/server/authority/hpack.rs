//! Header compression (RFC 7541): a decoder with its dynamic table, and an encoder that needs none.

use std::collections::VecDeque;

use bytes::Bytes;

use super::huffman;
use super::static_table::STATIC_TABLE;

/// SETTINGS_HEADER_TABLE_SIZE of the server, which leaves it at its initial value.
const MAX_TABLE: usize = 4096;
/// Most bytes of one block once decompressed, each header counted as in RFC 7541, 4.1.
const MAX_LIST: usize = 64 << 10;
/// What an entry counts beyond its name and value (RFC 7541, 4.1).
const ENTRY_OVERHEAD: usize = 32;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) name: Bytes,
    pub(super) value: Bytes,
    /// The client asked that it is never put into a table.
    pub(super) sensitive: bool,
}

impl Header {
    fn size(&self) -> usize {
        self.name.len() + self.value.len() + ENTRY_OVERHEAD
    }
}

/// One direction of a connection: what header blocks before this one have put into the table.
#[derive(Debug)]
pub(super) struct Decoder {
    /// Newest first.
    table: VecDeque<Header>,
    size: usize,
    max: usize,
}

impl Decoder {
    pub(super) fn new() -> Self {
        Decoder { table: VecDeque::new(), size: 0, max: MAX_TABLE }
    }

    /// The headers of one whole block. After an error the decoder is out of step with its peer and of no more use.
    pub(super) fn decode(&mut self, block: &[u8]) -> Result<Vec<Header>, &'static str> {
        let mut input = Input(block);
        let mut headers = Vec::new();
        let mut list = 0;
        while let Some(first) = input.peek() {
            // RFC 7541, 6: the leading bits tell the representation.
            let header = match first.leading_zeros() {
                0 => self.entry(input.integer(7)?)?,
                1 => {
                    let header = self.literal(&mut input, 6)?;
                    self.insert(header.clone());
                    header
                }
                2 => {
                    let max = input.integer(5)?;
                    if max > MAX_TABLE || !headers.is_empty() {
                        return Err("a header table is resized against the rules");
                    }
                    self.max = max;
                    self.evict(0);
                    continue;
                }
                3 => Header { sensitive: true, ..self.literal(&mut input, 4)? },
                _ => self.literal(&mut input, 4)?,
            };
            list += header.size();
            if list > MAX_LIST {
                return Err("the headers of a request are too large");
            }
            headers.push(header);
        }
        Ok(headers)
    }

    fn literal(&self, input: &mut Input<'_>, prefix: u32) -> Result<Header, &'static str> {
        let name = match input.integer(prefix)? {
            0 => input.string()?,
            index => self.entry(index)?.name,
        };
        Ok(Header { name, value: input.string()?, sensitive: false })
    }

    fn entry(&self, index: usize) -> Result<Header, &'static str> {
        const NO_ENTRY: &str = "a header refers to a table entry that is not there";
        let index = index.checked_sub(1).ok_or(NO_ENTRY)?;
        match STATIC_TABLE.get(index) {
            Some((name, value)) => Ok(Header {
                name: Bytes::from_static(name.as_bytes()),
                value: Bytes::from_static(value.as_bytes()),
                sensitive: false,
            }),
            None => self.table.get(index - STATIC_TABLE.len()).cloned().ok_or(NO_ENTRY),
        }
    }

    fn insert(&mut self, header: Header) {
        let size = header.size();
        self.evict(size);
        // An entry that is larger than the table only empties it (RFC 7541, 4.4).
        if size <= self.max {
            self.size += size;
            self.table.push_front(header);
        }
    }

    /// Drops the oldest entries until there is room for `size`.
    fn evict(&mut self, size: usize) {
        while self.size + size > self.max {
            let Some(oldest) = self.table.pop_back() else { return };
            self.size -= oldest.size();
        }
    }
}

/// Writes headers as literals that use no table.
pub(super) fn encode(headers: &[Header], out: &mut Vec<u8>) {
    for header in headers {
        out.push(if header.sensitive { 0x10 } else { 0x00 });
        for text in [&header.name, &header.value] {
            encode_length(text.len(), out);
            out.extend_from_slice(text);
        }
    }
}

/// Length of a string that is not Huffman-coded: an integer with a prefix of 7 bits (RFC 7541, 5.1).
fn encode_length(length: usize, out: &mut Vec<u8>) {
    const PREFIX: usize = 0x7f;
    if length < PREFIX {
        out.push(length as u8);
        return;
    }
    out.push(PREFIX as u8);
    let mut rest = length - PREFIX;
    while rest >= 0x80 {
        out.push(0x80 | (rest & 0x7f) as u8);
        rest >>= 7;
    }
    out.push(rest as u8);
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn peek(&self) -> Option<u8> {
        self.0.first().copied()
    }

    fn byte(&mut self) -> Result<u8, &'static str> {
        let (first, rest) = self.0.split_first().ok_or("a header block ends too early")?;
        self.0 = rest;
        Ok(*first)
    }

    /// RFC 7541, 5.1. Values beyond 21 bits of continuation are refused; nothing legal here is that large.
    fn integer(&mut self, prefix: u32) -> Result<usize, &'static str> {
        let mask = (1usize << prefix) - 1;
        let mut value = usize::from(self.byte()?) & mask;
        if value < mask {
            return Ok(value);
        }
        for shift in [0, 7, 14] {
            let byte = self.byte()?;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number in a header block is too large")
    }

    fn string(&mut self) -> Result<Bytes, &'static str> {
        let coded = self.peek().is_some_and(|first| first & 0x80 != 0);
        let length = self.integer(7)?;
        let (text, rest) = self.0.split_at_checked(length).ok_or("a header block ends too early")?;
        self.0 = rest;
        if coded { huffman::decode(text).map(Bytes::from) } else { Ok(Bytes::copy_from_slice(text)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        hex::decode(hex.replace(' ', "")).unwrap()
    }

    fn shown(headers: Vec<Header>) -> Vec<String> {
        let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).unwrap();
        headers.iter().map(|header| format!("{}={}", text(&header.name), text(&header.value))).collect()
    }

    #[test]
    fn the_requests_of_the_rfc_decode_with_one_table() {
        // RFC 7541, C.3 (plain) and C.4 (Huffman): three requests on one connection.
        for requests in [
            [
                "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
                "8286 84be 5808 6e6f 2d63 6163 6865",
                "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
            ],
            [
                "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
                "8286 84be 5886 a8eb 1064 9cbf",
                "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
            ],
        ] {
            let mut decoder = Decoder::new();
            let [first, second, third] = requests.map(|block| shown(decoder.decode(&bytes(block)).unwrap()));
            assert_eq!(first, [":method=GET", ":scheme=http", ":path=/", ":authority=www.example.com"]);
            assert_eq!(second[3..], [":authority=www.example.com", "cache-control=no-cache"]);
            assert_eq!(
                third[1..],
                [
                    ":scheme=https",
                    ":path=/index.html",
                    ":authority=www.example.com",
                    "custom-key=custom-value"
                ]
            );
            assert_eq!(decoder.size, 164);
        }
    }

    #[test]
    fn entries_leave_a_table_that_is_full() {
        // RFC 7541, C.5: a table of 256 bytes.
        let mut decoder = Decoder::new();
        decoder.decode(&bytes("3fe101")).unwrap();
        for block in [
            "4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3120 474d 546e 1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "4803 3330 37c1 c0bf",
        ] {
            decoder.decode(&bytes(block)).unwrap();
        }
        assert_eq!((decoder.table.len(), decoder.size), (4, 222));
        assert_eq!(decoder.table[0].value, "307");
    }

    #[test]
    fn what_is_encoded_decodes_to_the_same() {
        let header = |name: &str, length, sensitive| Header {
            name: Bytes::copy_from_slice(name.as_bytes()),
            value: vec![b'x'; length].into(),
            sensitive,
        };
        let headers = vec![
            header(":authority", 0, false),
            header("a", 126, false),
            header("b", 127, true),
            header("c", 255, false),
            header("d", 20_000, false),
        ];
        let mut block = Vec::new();
        encode(&headers, &mut block);
        assert_eq!(Decoder::new().decode(&block).unwrap(), headers);
    }

    #[test]
    fn hostile_blocks_are_refused_within_bounds() {
        let big = {
            // One entry of 4,000 bytes, then references to it.
            let mut block = vec![0x40, 1, b'a', 0x7f];
            block.extend([0xa1, 0x1e]);
            block.extend(vec![b'x'; 4000]);
            block.extend(vec![0xbe; 60_000]);
            block
        };
        let cases: [(&str, Vec<u8>); 9] = [
            ("index 0", vec![0x80]),
            ("an index that nobody put there", vec![0xbe]),
            ("an endless number", vec![0xff; 200]),
            ("a string longer than the block", vec![0x00, 0x7f, 0x80, 0x01]),
            ("a string that stops", vec![0x00, 0x05, b'a']),
            ("a table larger than allowed", vec![0x3f, 0xe2, 0x1f]),
            ("a resize after a header", vec![0x82, 0x20]),
            ("padding that is no padding", vec![0x00, 0x81, 0x00, 0x00]),
            ("a bomb", big),
        ];
        for (name, block) in cases {
            assert!(Decoder::new().decode(&block).is_err(), "{name}");
        }
    }
}
