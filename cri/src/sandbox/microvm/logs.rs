//! What a machine's processes and its guest write for people, in the pod's volatile directory. The VMM bounds the
//! console of its guest itself; what VMM and server write is little, unless one has been taken over.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What hull-vmm writes to stderr, and what the guest's kernel writes to its console.
pub(super) const VMM: &str = "vmm.log";
pub(super) const CONSOLE: &str = "console.log";
/// What hull-virtiofsd writes to stderr.
pub(super) const VIRTIOFSD: &str = "virtiofsd.log";

/// Longest log, as far as somebody looks, and what is kept of one that is longer. Bytes.
const MOST: u64 = 1 << 20;
const KEPT: usize = 64 << 10;

/// The end of a text file, at most `length` bytes, or nothing. What guests and VMMs write may be large, and is not read;
/// of its control characters only the ends of lines are left, for it goes into logs, records and terminals.
pub(super) fn tail(path: &Path, length: usize) -> String {
    let read = || {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let begin = size.saturating_sub(length as u64);
        let mut bytes = vec![0; (size - begin) as usize];
        file.read_exact_at(&mut bytes, begin)?;
        Ok::<_, io::Error>(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.chars()
        .filter(|letter| !letter.is_control() || *letter == '\n')
        .collect::<String>()
        .trim()
        .to_owned()
}

/// Cuts off the beginning of what has become too long in a pod's directory.
pub(super) fn shorten(directory: &Path) {
    for name in [VMM, VIRTIOFSD, CONSOLE] {
        let path = directory.join(name);
        if std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() > MOST) {
            let kept = tail(&path, KEPT);
            // Its writer appends: at the end that there is then.
            let shortened = File::options().write(true).open(&path).and_then(|file| {
                file.set_len(0)?;
                file.write_all_at(kept.as_bytes(), 0)
            });
            if let Err(error) = shortened {
                tracing::debug!(path = %path.display(), %error, "cannot shorten a log");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_log_of_any_size_only_the_end_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        assert_eq!(tail(&path, 10), "");
        std::fs::write(&path, "short\n").unwrap();
        assert_eq!(tail(&path, 10), "short");
        // More than there is memory: a hole, and the last words.
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(1 << 40).unwrap();
        file.write_all_at(b"\nlast words\n", 1 << 40).unwrap();
        assert_eq!(tail(&path, 12), "last words");
        std::fs::write(&path, "one\r\n\u{1b}[31mtwo\0\n").unwrap();
        assert_eq!(tail(&path, 100), "one\n[31mtwo");
    }

    #[test]
    fn a_log_that_grows_without_end_is_cut_while_its_writer_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(VMM);
        let mut writer = File::options().append(true).create(true).open(&path).unwrap();
        for _ in 0..40_000 {
            io::Write::write_all(&mut writer, b"a line of no interest to anybody at all\n").unwrap();
        }
        shorten(directory.path());
        io::Write::write_all(&mut writer, b"\nlast words\n").unwrap();
        let size = std::fs::metadata(&path).unwrap().len();
        assert!(size < MOST / 2, "{size}");
        assert!(tail(&path, 100).ends_with("last words"));
        shorten(directory.path());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), size, "one of modest size stays");
    }
}
