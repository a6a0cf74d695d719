/// A numeric field of a tar header: octal text, or base 256 when the first bit is set (GNU, star).
/// `None` when it is neither, or beyond 64 bits.
pub(super) fn field(bytes: &[u8]) -> Option<i64> {
    match bytes.first() {
        Some(first) if first & 0x80 != 0 => base256(bytes),
        _ => octal(bytes),
    }
}

fn octal(bytes: &[u8]) -> Option<i64> {
    let is_padding = |byte: &u8| matches!(byte, b' ' | 0);
    let start = bytes.iter().position(|byte| !is_padding(byte)).unwrap_or(bytes.len());
    let digits = &bytes[start..];
    let end = digits.iter().position(is_padding).unwrap_or(digits.len());
    if !digits[end..].iter().all(is_padding) {
        return None;
    }
    digits[..end].iter().try_fold(0_i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

// Big-endian two's complement; the top bit is the marker, the next one the sign.
fn base256(bytes: &[u8]) -> Option<i64> {
    let mut value: i128 = if bytes[0] & 0x40 != 0 { -1 } else { 0 };
    for (index, byte) in bytes.iter().enumerate() {
        let byte = if index == 0 { byte & 0x7f | (byte & 0x40) << 1 } else { *byte };
        value = value.checked_mul(256)? | i128::from(byte);
    }
    i64::try_from(value).ok()
}

/// A non-negative decimal number of at most 20 digits, and nothing else.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 20 {
        return None;
    }
    text.iter().try_fold(0_u64, |value, digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_fields_take_padding_and_nothing_else() {
        assert_eq!(field(b"0000644\0"), Some(0o644));
        assert_eq!(field(b"   644 \0"), Some(0o644));
        assert_eq!(field(b"77777777777\0"), Some((1 << 33) - 1));
        assert_eq!(field(b"\0\0\0\0"), Some(0));
        assert_eq!(field(b"64 4"), None);
        assert_eq!(field(b"0x12"), None);
        assert_eq!(field(b"-1"), None);
    }

    #[test]
    fn base_256_fields_are_signed_and_bounded() {
        assert_eq!(field(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]), Some(8 << 30));
        assert_eq!(field(&[0xff; 12]), Some(-1));
        assert_eq!(field(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe]), Some(-2));
        assert_eq!(field(&[0xbf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), None);
    }

    #[test]
    fn decimals_do_not_overflow() {
        assert_eq!(decimal(b"18446744073709551615"), Some(u64::MAX));
        assert_eq!(decimal(b"18446744073709551616"), None);
        for bad in [&b""[..], b"+1", b"-1", b" 1", b"1.5", b"000000000000000000001"] {
            assert_eq!(decimal(bad), None);
        }
    }
}
