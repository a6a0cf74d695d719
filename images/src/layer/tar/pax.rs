use super::number;
use super::sparse::Segment;
use crate::layer::erofs::Timestamp;

/// More extended attributes on one entry than this are refused.
pub(crate) const MAX_XATTRS: usize = 200;

const XATTR: &[u8] = b"SCHILY.xattr.";

/// Extended attributes, each a full name (`user.x`) and a value.
pub(crate) type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// What PAX records say about an entry. POSIX.1-2017 pax, "pax Extended Header"; SCHILY.* as star and Go, GNU.sparse.*
/// as the GNU tar manual, "Storing Sparse Files".
#[derive(Debug, Default, Clone)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<i128>,
    pub(super) gid: Option<i128>,
    pub(super) mtime: Option<Timestamp>,
    pub(super) xattrs: Xattrs,
    pub(super) sparse: SparseRecords,
}

/// The records of GNU's sparse formats 0.0, 0.1 and 1.0.
#[derive(Debug, Default, Clone)]
pub(super) struct SparseRecords {
    pub(super) version: (Option<u64>, Option<u64>),
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    pub(super) segments: Vec<Segment>,
    pub(super) has_map: bool,
    offset: Option<u64>,
}

impl Records {
    /// Takes over every record of an extended header's content. A later record wins over an earlier one, an empty value
    /// takes one back.
    pub(super) fn read(&mut self, mut content: &[u8]) -> Result<(), &'static str> {
        while !content.is_empty() {
            // Some writers pad the content with NULs.
            if content.iter().all(|byte| *byte == 0) {
                return Ok(());
            }
            let (key, value, rest) = split_record(content).ok_or("a PAX record is malformed")?;
            self.take(key, value)?;
            content = rest;
        }
        Ok(())
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let unless_empty = |value: &[u8]| (!value.is_empty()).then(|| value.to_vec());
        match key {
            b"path" => self.path = unless_empty(value),
            b"linkpath" => self.link = unless_empty(value),
            b"size" => self.size = optional(value, number::decimal, "a PAX size is not a number")?,
            b"uid" => self.uid = optional(value, signed, "a PAX uid is not a number")?,
            b"gid" => self.gid = optional(value, signed, "a PAX gid is not a number")?,
            b"mtime" => self.mtime = optional(value, timestamp, "a PAX mtime is not a time")?,
            _ if key.starts_with(XATTR) => self.take_xattr(&key[XATTR.len()..], value)?,
            _ if key.starts_with(b"GNU.sparse.") => self.sparse.take(&key[11..], value)?,
            _ => {}
        }
        Ok(())
    }

    fn take_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), &'static str> {
        if name.is_empty() || name.contains(&0) {
            return Err("an extended attribute has no valid name");
        }
        if let Some((_, old)) = self.xattrs.iter_mut().find(|(known, _)| known == name) {
            *old = value.to_vec();
        } else if self.xattrs.len() >= MAX_XATTRS {
            return Err("an entry has too many extended attributes");
        } else {
            self.xattrs.push((name.to_vec(), value.to_vec()));
        }
        Ok(())
    }

    /// Whether this says what only one entry can say for itself. In a global header, readers disagree on it.
    pub(super) fn is_about_one_entry(&self) -> bool {
        self.path.is_some() || self.link.is_some() || self.size.is_some() || self.sparse.is_present()
    }
}

impl SparseRecords {
    pub(super) fn is_present(&self) -> bool {
        self.version.0.is_some() || self.real_size.is_some() || self.has_map || self.name.is_some()
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let number = || number::decimal(value).ok_or("a sparse record is not a number");
        match key {
            b"major" => self.version.0 = Some(number()?),
            b"minor" => self.version.1 = Some(number()?),
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.real_size = Some(number()?),
            b"numblocks" => self.has_map = true,
            b"offset" => self.offset = Some(number()?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or("a sparse record is out of order")?;
                self.segments.push(Segment { offset, length: number()? });
                self.has_map = true;
            }
            b"map" => {
                self.segments = map(value).ok_or("a sparse map is malformed")?;
                self.has_map = true;
            }
            _ => {}
        }
        Ok(())
    }
}

// "LENGTH KEY=VALUE\n", where the length counts the whole record.
fn split_record(content: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = content.iter().take(21).position(|byte| *byte == b' ')?;
    let length = usize::try_from(number::decimal(&content[..space])?).ok()?;
    if length <= space + 1 || length > content.len() {
        return None;
    }
    let (record, rest) = content.split_at(length);
    let record = record[space + 1..].strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    (equals > 0).then(|| (&record[..equals], &record[equals + 1..], rest))
}

fn optional<T>(
    value: &[u8],
    parse: impl Fn(&[u8]) -> Option<T>,
    message: &'static str,
) -> Result<Option<T>, &'static str> {
    if value.is_empty() {
        return Ok(None);
    }
    parse(value).map(Some).ok_or(message)
}

fn signed(text: &[u8]) -> Option<i128> {
    match text.strip_prefix(b"-") {
        Some(digits) => number::decimal(digits).map(|value| -i128::from(value)),
        None => number::decimal(text).map(i128::from),
    }
}

// Seconds as POSIX has them, a decimal with an optional fraction, or as Python's tarfile writes a small or a large one
// ("1e-09"): with a power of ten. Digits after the ninth are dropped towards the past, as GNU tar does. Nothing is ever
// a floating-point number, so that no nanosecond is lost.
fn timestamp(text: &[u8]) -> Option<Timestamp> {
    let (is_negative, text) = match text {
        [sign @ (b'-' | b'+'), text @ ..] => (*sign == b'-', text),
        text => (false, text),
    };
    let (mantissa, exponent) = match text.iter().position(|byte| matches!(byte, b'e' | b'E')) {
        Some(at) => (&text[..at], exponent(&text[at + 1..])?),
        None => (text, 0),
    };
    let point = mantissa.iter().position(|byte| *byte == b'.');
    let (whole, fraction) = match point {
        Some(point) => (&mantissa[..point], &mantissa[point + 1..]),
        None => (mantissa, &b""[..]),
    };
    let digits = || whole.iter().chain(fraction);
    if digits().next().is_none() || !digits().all(u8::is_ascii_digit) {
        return None;
    }
    let Some(zeros) = digits().position(|digit| *digit != b'0') else { return Some(Timestamp::default()) };
    let significant: Vec<u64> = digits().skip(zeros).map(|digit| u64::from(digit - b'0')).collect();
    // How many of them come before the point; below zero, how many zeros come between it and them.
    let before = i64::try_from(whole.len()).ok()? - i64::try_from(zeros).ok()? + exponent;
    // Nothing with 20 digits before the point fits.
    let before = i32::try_from(before.max(-16)).ok().filter(|before| *before < 20)?;
    let digit = |at: i32| usize::try_from(at).ok().and_then(|at| significant.get(at)).copied().unwrap_or(0);
    let number =
        |from, to| (from..to).try_fold(0_u64, |sum: u64, at| sum.checked_mul(10)?.checked_add(digit(at)));
    let seconds = i64::try_from(number(0, before)?).ok()?;
    let nanoseconds = u32::try_from(number(before, before + 9)?).ok()?;
    if !is_negative {
        return Some(Timestamp { seconds, nanoseconds });
    }
    let dropped =
        usize::try_from(before + 9).map_or(&significant[..], |kept| significant.get(kept..).unwrap_or(&[]));
    let nanoseconds = nanoseconds + u32::from(dropped.iter().any(|digit| *digit != 0));
    Some(match nanoseconds {
        0 => Timestamp { seconds: -seconds, nanoseconds: 0 },
        _ => Timestamp { seconds: -seconds - 1, nanoseconds: 1_000_000_000 - nanoseconds },
    })
}

// Bounded so that sums with it are far from any limit.
fn exponent(text: &[u8]) -> Option<i64> {
    let (is_negative, digits) = match text {
        [sign @ (b'-' | b'+'), digits @ ..] => (*sign == b'-', digits),
        digits => (false, digits),
    };
    let value = i64::try_from(number::decimal(digits)?).ok().filter(|value| *value <= 1 << 40)?;
    Some(if is_negative { -value } else { value })
}

// "OFFSET,LENGTH,OFFSET,LENGTH…" of format 0.1.
fn map(text: &[u8]) -> Option<Vec<Segment>> {
    let numbers: Option<Vec<u64>> = text.split(|byte| *byte == b',').map(number::decimal).collect();
    let numbers = numbers?;
    if !numbers.len().is_multiple_of(2) {
        return None;
    }
    Some(numbers.chunks_exact(2).map(|pair| Segment { offset: pair[0], length: pair[1] }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(content: &[u8]) -> Result<Records, &'static str> {
        let mut records = Records::default();
        records.read(content).map(|()| records)
    }

    #[test]
    fn records_are_read_with_newlines_and_equal_signs_in_values() {
        let records = read(b"13 path=a\nb=\n28 SCHILY.xattr.user.k=v\0=\n\n12 size=100\n").unwrap();
        assert_eq!(records.path.unwrap(), b"a\nb=");
        assert_eq!(records.xattrs, [(b"user.k".to_vec(), b"v\0=\n".to_vec())]);
        assert_eq!(records.size, Some(100));
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"9999999999999999999999 path=x\n"[..],
            b"12 path=abcdef\n",
            b"5 a=b\n",
            b"0 path=x\n",
            b"10 path=xyz",
            b"7 =abc\n",
            b"-8 path=x\n",
            b"11 size=-1\n",
            b"30 size=99999999999999999999\n",
        ] {
            assert!(read(bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn times_have_nanoseconds_and_a_sign() {
        let at = |text: &[u8]| timestamp(text).map(|time| (time.seconds, time.nanoseconds));
        for (text, expected) in [
            ("1700000000.123456789", (1_700_000_000, 123_456_789)),
            ("5.5", (5, 500_000_000)),
            ("-1.25", (-2, 750_000_000)),
            ("-3", (-3, 0)),
            ("+3", (3, 0)),
            ("007.5", (7, 500_000_000)),
            ("1.0000000009", (1, 0)),
            ("-1.0000000009", (-2, 999_999_999)),
            ("-0.9999999999", (-1, 0)),
            ("-0", (0, 0)),
            ("9223372036854775807", (i64::MAX, 0)),
            ("-9223372036854775806.5", (i64::MIN + 1, 500_000_000)),
        ] {
            assert_eq!(at(text.as_bytes()), Some(expected), "{text}");
        }
        let bad = [
            "",
            ".",
            "-",
            "e",
            "1.x",
            "--1",
            "+-1",
            "1.2.3",
            "nan",
            "inf",
            "1_0",
            " 1",
            "0x1",
            "9223372036854775808",
        ];
        for bad in bad {
            assert_eq!(at(bad.as_bytes()), None, "{bad}");
        }
    }

    /// Python's tarfile makes them of small and of large times.
    #[test]
    fn times_with_powers_of_ten_are_exact() {
        let at = |text: &[u8]| timestamp(text).map(|time| (time.seconds, time.nanoseconds));
        for (text, expected) in [
            ("1e-09", (0, 1)),
            ("-1e-09", (-1, 999_999_999)),
            ("1.5e-07", (0, 150)),
            ("1.23456789e-07", (0, 123)),
            ("9e-10", (0, 0)),
            ("-9e-10", (-1, 999_999_999)),
            ("1e5", (100_000, 0)),
            ("1.5E+3", (1500, 0)),
            ("1.7000000001234e9", (1_700_000_000, 123_400_000)),
            ("12345e-3", (12, 345_000_000)),
            ("0e99999", (0, 0)),
            ("1e-99999", (0, 0)),
            ("-1e-99999", (-1, 999_999_999)),
            (".5e1", (5, 0)),
            ("5.e0", (5, 0)),
        ] {
            assert_eq!(at(text.as_bytes()), Some(expected), "{text}");
        }
        for bad in ["1e", "1e+", "1e1.5", "1e99999999999999999999", "1e19", "1e20", "e5", ".e5", "1e5e5"] {
            assert_eq!(at(bad.as_bytes()), None, "{bad}");
        }
        // As much as an extended header may hold takes no time worth speaking of.
        let long = [b"1".repeat(500_000), b"e-500000".to_vec()].concat();
        assert_eq!(at(&long), Some((0, 111_111_111)));
    }

    #[test]
    fn a_thousand_attributes_are_refused_before_they_cost_time() {
        let mut content = Vec::new();
        for index in 0..1000 {
            content.extend_from_slice(format!("25 SCHILY.xattr.user.{index:03}=\n").as_bytes());
        }
        assert!(read(&content).is_err());
    }
}
