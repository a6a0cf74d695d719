//! The promise of bounded memory, measured as the peak of a process of its own.

use std::io::{self, Read};
use std::process::Command;

use super::archive::Member;
use crate::layer::{Limits, Target, convert};

const BOUND_KIB: u64 = 64 << 10;

#[test]
fn a_million_entries_take_less_than_64_mib() {
    peak_of("a_million_entries");
}

#[test]
fn a_million_directories_take_less_than_64_mib() {
    peak_of("a_million_directories");
}

#[test]
fn a_file_of_two_gigabytes_takes_less_than_64_mib() {
    peak_of("two_gigabytes");
}

// Runs one of the ignored tests below in a fresh process and checks the peak that it prints.
fn peak_of(name: &str) {
    let module = module_path!().split_once("::").unwrap().1;
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--nocapture", &format!("{module}::{name}")])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    let line = text.lines().find(|line| line.contains("VmHWM")).unwrap();
    let peak: u64 = line.split_ascii_whitespace().rev().nth(1).unwrap().parse().unwrap();
    assert!(peak < BOUND_KIB, "{peak} KiB");
}

fn print_peak() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    println!("\n{}", status.lines().find(|line| line.starts_with("VmHWM")).unwrap());
}

#[test]
#[ignore = "started in a process of its own by a_million_entries_take_less_than_64_mib"]
fn a_million_entries() {
    const COUNT: u64 = 1_000_000;
    let entries = (0..COUNT).map(|number| {
        let path = format!("usr/lib/module-{}/part-{:05}/file-name-{number}.js", number / 2000, number / 20);
        [&Member { size: 9, ..Member::new(b'0', &path) }.header(), pad(b"content\n\n").as_slice()].concat()
    });
    let (file, scratch) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let target = Target { layer: &file, scratch: Some(&scratch) };
    let converted = convert(Blocks::new(entries), target, &Limits::default()).unwrap();
    print_peak();
    assert_eq!(converted.entries, COUNT);
}

#[test]
#[ignore = "started in a process of its own by a_million_directories_take_less_than_64_mib"]
fn a_million_directories() {
    const COUNT: u64 = 1_000_000;
    let entries = (0..COUNT).map(|number| {
        let path = format!("usr/lib/module-{}/part-{number:07}/", number / 2000);
        Member::new(b'5', &path).header().to_vec()
    });
    let (file, scratch) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let target = Target { layer: &file, scratch: Some(&scratch) };
    convert(Blocks::new(entries), target, &Limits::default()).unwrap();
    print_peak();
}

#[test]
#[ignore = "started in a process of its own by a_file_of_two_gigabytes_takes_less_than_64_mib"]
fn two_gigabytes() {
    const SIZE: u64 = 2 << 30;
    let header = Member { size: SIZE, ..Member::new(b'0', "large") }.header();
    let (file, scratch) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let target = Target { layer: &file, scratch: Some(&scratch) };
    let tar = header.chain(io::repeat(7).take(SIZE));
    let converted = convert(tar, target, &Limits::default()).unwrap();
    print_peak();
    assert_eq!(converted.content, SIZE);
}

fn pad(content: &[u8]) -> [u8; 512] {
    let mut block = [0; 512];
    block[..content.len()].copy_from_slice(content);
    block
}

// An archive that is made while it is read.
struct Blocks<I> {
    blocks: I,
    current: io::Cursor<Vec<u8>>,
}

impl<I: Iterator<Item = Vec<u8>>> Blocks<I> {
    fn new(blocks: I) -> Self {
        Self { blocks, current: io::Cursor::default() }
    }
}

impl<I: Iterator<Item = Vec<u8>>> Read for Blocks<I> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.current.read(buffer)?;
        if length > 0 {
            return Ok(length);
        }
        match self.blocks.next() {
            Some(blocks) => self.current = io::Cursor::new(blocks),
            None => return Ok(0),
        }
        self.current.read(buffer)
    }
}
