//! Times as Python's tarfile writes them: numbers with powers of ten among them.

use std::collections::BTreeMap;
use std::process::Command;

use super::converted;
use super::mounted::{snapshot, with_mounted};

/// Writes an archive with a file for each time, and tells what each time is, floored to nanoseconds, by its own decimals.
const SCRIPT: &str = "import decimal, io, sys, tarfile
decimal.getcontext().prec = 60
times = [1e-09, 9.99e-10, 1.5e-07, 1.23456789e-05, -1e-09, -1.5e-07, -0.25, 0.1, 1e-300, 123.456789, 1700000000.25,
         1e16, 1.5e17, -1e16, 1700000000, -5, 0.0]
with tarfile.open(sys.argv[1], 'w', format=tarfile.PAX_FORMAT) as archive:
    for number, time in enumerate(times):
        entry = tarfile.TarInfo(str(number))
        entry.mtime = time
        archive.addfile(entry, io.BytesIO())
with tarfile.open(sys.argv[1]) as archive:
    for entry in archive:
        text = entry.pax_headers.get('mtime', str(entry.mtime))
        nanoseconds = (decimal.Decimal(text) * 10**9).to_integral_value(decimal.ROUND_FLOOR)
        print(entry.name, int(nanoseconds) // 10**9, int(nanoseconds) % 10**9, text)
";

#[test]
fn a_layer_by_python_has_the_times_that_python_says() {
    let work = tempfile::tempdir().unwrap();
    let path = work.path().join("layer.tar");
    let output = Command::new("python3").args(["-c", SCRIPT]).arg(&path).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(told.contains("1e-09"), "{told}");
    let expected: BTreeMap<String, (i64, i64)> = told
        .lines()
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            (words[0].to_owned(), (words[1].parse().unwrap(), words[2].parse().unwrap()))
        })
        .collect();
    let (image, _) = converted(&std::fs::read(&path).unwrap());
    let seen = with_mounted(&[&image], snapshot);
    assert_eq!(expected.len(), 17);
    for (name, time) in expected {
        assert_eq!(seen[std::path::Path::new(&name)].mtime, time, "{name} of\n{told}");
    }
}
