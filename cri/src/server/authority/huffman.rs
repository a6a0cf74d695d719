//! The Huffman code of HPACK (RFC 7541, appendix B).
//!
//! The code is canonical: codes of one length follow each other in the order of their symbols, and those of the next
//! length follow on. So the lengths are all there is to know.

/// Code length in bits of each byte. The end-of-string symbol has 30 bits and the highest code.
#[rustfmt::skip]
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
     6, 10, 10, 12, 13,  6,  8, 11, 10, 10,  8, 11,  8,  6,  6,  6,
     5,  5,  5,  6,  6,  6,  6,  6,  6,  6,  7,  8, 15,  6, 12, 10,
    13,  6,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,  7,
     7,  7,  7,  7,  7,  7,  7,  7,  8,  7,  8, 13, 19, 13, 14,  6,
    15,  5,  6,  5,  6,  5,  6,  6,  6,  5,  7,  7,  6,  6,  6,  5,
     6,  7,  6,  5,  5,  6,  7,  7,  7,  7,  7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
];
const MAX_LENGTH: usize = 30;

/// For each length: its first code, and where its symbols begin in [`SYMBOLS`].
struct Lengths {
    first: [u32; MAX_LENGTH + 1],
    start: [usize; MAX_LENGTH + 2],
}

/// Symbols by length, then by value.
static SYMBOLS: [u8; 256] = symbols();
static CODES: Lengths = lengths();

const fn symbols() -> [u8; 256] {
    let mut sorted = [0; 256];
    let (mut next, mut length) = (0, 1);
    while length <= MAX_LENGTH {
        let mut symbol = 0;
        while symbol < 256 {
            if LENGTHS[symbol] as usize == length {
                sorted[next] = symbol as u8;
                next += 1;
            }
            symbol += 1;
        }
        length += 1;
    }
    sorted
}

const fn lengths() -> Lengths {
    let mut table = Lengths { first: [0; MAX_LENGTH + 1], start: [0; MAX_LENGTH + 2] };
    let mut length = 1;
    while length <= MAX_LENGTH {
        let mut count = 0;
        let mut symbol = 0;
        while symbol < 256 {
            if LENGTHS[symbol] as usize == length {
                count += 1;
            }
            symbol += 1;
        }
        table.start[length + 1] = table.start[length] + count;
        if length < MAX_LENGTH {
            table.first[length + 1] = (table.first[length] + count as u32) << 1;
        }
        length += 1;
    }
    table
}

/// Decodes a string. At most 8/5 of the input's length comes out.
pub(super) fn decode(input: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut text = Vec::with_capacity(input.len() * 8 / 5);
    let (mut code, mut length) = (0u32, 0usize);
    for byte in input {
        for bit in (0..8).rev() {
            code = code << 1 | u32::from(byte >> bit & 1);
            length += 1;
            if length > MAX_LENGTH {
                return Err("a header string is not in the Huffman code");
            }
            let offset = code.wrapping_sub(CODES.first[length]) as usize;
            let symbols = &SYMBOLS[CODES.start[length]..CODES.start[length + 1]];
            if code >= CODES.first[length]
                && let Some(symbol) = symbols.get(offset)
            {
                text.push(*symbol);
                (code, length) = (0, 0);
            }
        }
    }
    // What is left over is padding: the beginning of the end-of-string code, all ones, less than a byte (5.2).
    let padding = (1u32 << length) - 1;
    if length > 7 || code != padding { Err("a header string ends within a code") } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The code of a symbol from the tables, as the RFC prints it.
    fn code_of(symbol: u8) -> (u32, u8) {
        let length = usize::from(LENGTHS[usize::from(symbol)]);
        let at = SYMBOLS.iter().position(|s| *s == symbol).unwrap();
        (CODES.first[length] + (at - CODES.start[length]) as u32, length as u8)
    }

    #[test]
    fn codes_are_those_of_the_rfc() {
        for (symbol, code) in [
            (b'0', (0x0, 5)),
            (b'a', (0x3, 5)),
            (b' ', (0x14, 6)),
            (b'/', (0x18, 6)),
            (b'z', (0x7b, 7)),
            (b'Z', (0xfd, 8)),
            (b'%', (0x15, 6)),
            (b'\\', (0x7fff0, 19)),
            (0, (0x1ff8, 13)),
            (249, (0xffffffe, 28)),
            (22, (0x3ffffffe, 30)),
        ] {
            assert_eq!(code_of(symbol), code, "{symbol}");
        }
    }

    #[test]
    fn every_byte_survives_coding() {
        let text: Vec<u8> = (0..=255).collect();
        let mut bits = String::new();
        for symbol in &text {
            let (code, length) = code_of(*symbol);
            bits.push_str(&format!("{code:0width$b}", width = usize::from(length)));
        }
        bits.extend(std::iter::repeat_n('1', (8 - bits.len() % 8) % 8));
        let coded: Vec<u8> = bits
            .as_bytes()
            .chunks(8)
            .map(|b| u8::from_str_radix(str::from_utf8(b).unwrap(), 2).unwrap())
            .collect();
        assert_eq!(decode(&coded).unwrap(), text);
    }

    #[test]
    fn padding_is_short_and_all_ones() {
        assert_eq!(decode(&[0x1f]).unwrap(), b"a");
        assert!(decode(&[0x18]).is_err());
        assert!(decode(&[0x1f, 0xff]).is_err());
        assert!(decode(&[0xff, 0xff, 0xff, 0xff]).is_err());
    }
}
