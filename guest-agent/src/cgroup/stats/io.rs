//! Transfers from and to block devices.

use std::collections::BTreeMap;

use super::super::CgroupError;
use super::super::hierarchies::Version;
use super::Reader;

/// What went to and from one block device so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceIo {
    /// Device number, major.
    pub major: u32,
    /// Device number, minor.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Finished reads.
    pub reads: u64,
    /// Finished writes.
    pub writes: u64,
}

pub(super) fn usage(reader: Reader<'_>) -> Result<Vec<DeviceIo>, CgroupError> {
    if let Some(version @ Version::V1(_)) = reader.version("blkio") {
        let bytes = reader.text(version, "blkio.throttle.io_service_bytes_recursive")?.unwrap_or_default();
        let counts = reader.text(version, "blkio.throttle.io_serviced_recursive")?.unwrap_or_default();
        return Ok(v1(&bytes, &counts));
    }
    match reader.version("io") {
        Some(version) => Ok(v2(&reader.text(version, "io.stat")?.unwrap_or_default())),
        None => Ok(Vec::new()),
    }
}

/// Lines of `8:0 Read 4096`, and one `Total` in the end.
fn v1(bytes: &str, counts: &str) -> Vec<DeviceIo> {
    let mut devices = BTreeMap::new();
    let mut add = |text: &str, set: fn(&mut DeviceIo, &str, u64)| {
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some(device), Some(operation), Some(value)) = (words.next(), words.next(), words.next())
            else {
                continue;
            };
            if let (Some(number), Ok(value)) = (number(device), value.parse()) {
                set(devices.entry(number).or_default(), operation, value);
            }
        }
    };
    add(bytes, |io, operation, value| match operation {
        "Read" => io.read_bytes = value,
        "Write" => io.written_bytes = value,
        _ => {}
    });
    add(counts, |io, operation, value| match operation {
        "Read" => io.reads = value,
        "Write" => io.writes = value,
        _ => {}
    });
    numbered(devices)
}

/// Lines of `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`; a device without transfers may stand alone.
fn v2(text: &str) -> Vec<DeviceIo> {
    let mut devices: BTreeMap<_, DeviceIo> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(number) = words.next().and_then(number) else { continue };
        let io = devices.entry(number).or_default();
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let Ok(value) = value.parse() else { continue };
            match key {
                "rbytes" => io.read_bytes = value,
                "wbytes" => io.written_bytes = value,
                "rios" => io.reads = value,
                "wios" => io.writes = value,
                _ => {}
            }
        }
    }
    numbered(devices)
}

fn number(device: &str) -> Option<(u32, u32)> {
    let (major, minor) = device.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn numbered(devices: BTreeMap<(u32, u32), DeviceIo>) -> Vec<DeviceIo> {
    devices.into_iter().map(|((major, minor), io)| DeviceIo { major, minor, ..io }).collect()
}
