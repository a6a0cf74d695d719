use super::*;

const TIME: &str = "2026-11-21T10:15:00.123456789Z";

fn record(stream: &str, tag: &str, text: &str) -> String {
    format!("{TIME} {stream} {tag} {text}\n")
}

fn append(path: &Path, text: &str) {
    let mut file = File::options().append(true).create(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

fn copy(log: &mut ContainerLog) -> (String, String) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    log.copy_new(&mut Sink { out: &mut out, err: &mut err }).unwrap();
    (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

#[test]
fn parts_become_lines_and_each_stream_goes_its_way() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    append(&path, &record("stdout", "P", "a long "));
    append(&path, &record("stderr", "F", "oops"));
    append(&path, &record("stdout", "F", "line"));
    append(&path, &record("stdout", "F", ""));
    append(&path, &record("stdout", "F:x", " two  spaces "));
    let mut log = ContainerLog::open(&path, false, None).unwrap();
    assert_eq!(copy(&mut log), ("a long line\n\n two  spaces \n".into(), "oops\n".into()));
    let mut log = ContainerLog::open(&path, true, None).unwrap();
    let (out, err) = copy(&mut log);
    assert!(out.starts_with(&format!("{TIME} a long line\n{TIME} \n")), "{out}");
    assert_eq!(err, format!("{TIME} oops\n"));
}

#[test]
fn a_record_that_is_still_being_written_waits_for_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let mut log = ContainerLog::open(&path, false, None).unwrap();
    assert_eq!(copy(&mut log).0, "");
    let (first, second) = (record("stdout", "F", "hello"), record("stdout", "F", "again"));
    append(&path, &first[..40]);
    assert_eq!(copy(&mut log).0, "");
    append(&path, &first[40..]);
    append(&path, &second);
    assert_eq!(copy(&mut log).0, "hello\nagain\n");
    assert_eq!(copy(&mut log).0, "");
}

#[test]
fn rotation_loses_and_doubles_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (path, old) = (directory.path().join("0.log"), directory.path().join("0.log.1"));
    append(&path, &record("stdout", "F", "1"));
    let mut log = ContainerLog::open(&path, false, None).unwrap();
    assert_eq!(copy(&mut log).0, "1\n");
    // Given a rename, after which the writer still uses the old file for a while
    std::fs::rename(&path, &old).unwrap();
    append(&old, &record("stdout", "F", "2"));
    assert_eq!(copy(&mut log).0, "2\n");
    append(&old, &record("stdout", "F", "3"));
    append(&path, &record("stdout", "F", "4"));
    assert_eq!(copy(&mut log).0, "3\n4\n");
    // And one that cuts the file short
    std::fs::write(&path, "").unwrap();
    assert_eq!(copy(&mut log).0, "");
    append(&path, &record("stdout", "F", "5"));
    assert_eq!(copy(&mut log).0, "5\n");
}

#[test]
fn a_tail_counts_lines_and_not_their_parts() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    append(&path, &record("stdout", "F", "one"));
    append(&path, &record("stdout", "P", "tw"));
    append(&path, &record("stdout", "F", "o"));
    append(&path, &record("stdout", "F", "three"));
    for (lines, wanted) in
        [(0, ""), (1, "three\n"), (2, "two\nthree\n"), (3, "one\ntwo\nthree\n"), (9, "one\ntwo\nthree\n")]
    {
        let mut log = ContainerLog::open(&path, false, Some(lines)).unwrap();
        assert_eq!(copy(&mut log).0, wanted, "{lines}");
    }
}

#[test]
fn what_is_no_record_is_shown_as_it_is_within_bounds() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let endless = "x".repeat(200_000);
    append(&path, &format!("no record\n{endless}\n"));
    let mut log = ContainerLog::open(&path, false, None).unwrap();
    let (out, _) = copy(&mut log);
    assert!(out.starts_with("no record\nxxx"));
    assert_eq!(out.matches('x').count(), 200_000);
}
