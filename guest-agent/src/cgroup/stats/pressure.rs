//! Pressure stall information (accounting/psi.rst).

use super::super::CgroupError;
use super::super::hierarchies::Version;
use super::Reader;

/// Time that tasks lost, in one of two senses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stall {
    /// Microseconds so far.
    pub total: u64,
    /// Percent of the last 10 seconds.
    pub average_10: f64,
    /// Percent of the last minute.
    pub average_60: f64,
    /// Percent of the last five minutes.
    pub average_300: f64,
}

/// Time lost for want of one resource.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stalls {
    /// While at least one task waited.
    pub some: Stall,
    /// While all of them did.
    pub full: Stall,
}

/// Time lost for want of each resource; `None` where it is not accounted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// Processors.
    pub cpu: Option<Stalls>,
    /// Memory.
    pub memory: Option<Stalls>,
    /// Block devices.
    pub io: Option<Stalls>,
}

pub(super) fn usage(reader: Reader<'_>) -> Result<Pressure, CgroupError> {
    let read = |file| Ok::<_, CgroupError>(reader.text(Version::V2, file)?.map(|text| parse(&text)));
    Ok(Pressure { cpu: read("cpu.pressure")?, memory: read("memory.pressure")?, io: read("io.pressure")? })
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same for `full` (cpu has that since 5.13).
fn parse(text: &str) -> Stalls {
    let mut stalls = Stalls::default();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let stall = match words.next() {
            Some("some") => &mut stalls.some,
            Some("full") => &mut stalls.full,
            _ => continue,
        };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "total" => stall.total = value.parse().unwrap_or(0),
                "avg10" => stall.average_10 = value.parse().unwrap_or(0.0),
                "avg60" => stall.average_60 = value.parse().unwrap_or(0.0),
                "avg300" => stall.average_300 = value.parse().unwrap_or(0.0),
                _ => {}
            }
        }
    }
    stalls
}
