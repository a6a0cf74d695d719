//! Ctrl-P Ctrl-Q: leaves a container running, as docker's users know it.

const CTRL_P: u8 = 0x10;
const CTRL_Q: u8 = 0x11;

/// Looks for the two keys, one directly after the other, in what is typed.
#[derive(Debug, Default)]
pub(super) struct DetachKeys {
    /// The first was typed, and is kept back until it is known what it was meant for.
    begun: bool,
}

impl DetachKeys {
    /// What is to be passed on, and whether both keys were typed. What follows them is lost.
    pub(super) fn pass(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(typed.len() + 1);
        for &byte in typed {
            if self.begun && byte == CTRL_Q {
                return (passed, true);
            }
            if std::mem::take(&mut self.begun) {
                passed.push(CTRL_P);
            }
            if byte == CTRL_P {
                self.begun = true;
            } else {
                passed.push(byte);
            }
        }
        (passed, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_keys_detach_even_if_they_come_apart() {
        assert_eq!(DetachKeys::default().pass(b"ls\x10\x11x"), (b"ls".to_vec(), true));
        let mut keys = DetachKeys::default();
        assert_eq!(keys.pass(b"a\x10"), (b"a".to_vec(), false));
        assert_eq!(keys.pass(b"\x11"), (Vec::new(), true));
    }

    #[test]
    fn one_key_alone_is_passed_on_with_what_follows() {
        let mut keys = DetachKeys::default();
        assert_eq!(keys.pass(b"\x10"), (Vec::new(), false));
        assert_eq!(keys.pass(b"b\x11"), (b"\x10b\x11".to_vec(), false));
        assert_eq!(keys.pass(b"\x10\x10\x11"), (b"\x10".to_vec(), true));
    }
}
