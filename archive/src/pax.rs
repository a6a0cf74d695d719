//! Extended headers: what does not fit into a ustar header (POSIX.1-2017 pax, "pax Extended Header").

/// The records of one entry's extended header.
#[derive(Default)]
pub(crate) struct Records(Vec<u8>);

impl Records {
    /// Adds `length key=value\n`, where the length counts its own digits too.
    pub(crate) fn add(&mut self, key: &[u8], value: &[u8]) {
        // Space, equals sign and newline.
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + digits(length) {
            length = rest + digits(length);
        }
        self.0.extend_from_slice(length.to_string().as_bytes());
        self.0.push(b' ');
        self.0.extend_from_slice(key);
        self.0.push(b'=');
        self.0.extend_from_slice(value);
        self.0.push(b'\n');
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

fn digits(number: usize) -> usize {
    number.checked_ilog10().map_or(1, |log| log as usize + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_records_length_counts_its_own_digits() {
        for length in [1, 2, 80, 90, 91, 92, 93, 94, 95, 990, 9_980, 100_000] {
            let mut records = Records::default();
            records.add(b"path", &vec![b'x'; length]);
            let text = records.bytes();
            let space = text.iter().position(|byte| *byte == b' ').unwrap();
            let stated: usize = std::str::from_utf8(&text[..space]).unwrap().parse().unwrap();
            assert_eq!(stated, text.len(), "value of {length} bytes");
        }
    }
}
