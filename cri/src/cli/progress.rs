//! How a pull comes along: a bar for each layer on a terminal, a line for each layer elsewhere.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::output::{printable, short_id, size};
use crate::api::hull::pull_progress::{Done, Event};

const RUNNING: &str = "{prefix:13}  {bar:30.cyan}  {binary_bytes:>11} / {binary_total_bytes:<11} {msg}";
const WAITING: &str = "{prefix:13}  {msg}";

/// Shown on standard error; the result goes to standard output.
pub(super) struct Progress {
    shape: Shape,
}

enum Shape {
    Nothing,
    Bars { all: MultiProgress, bars: BTreeMap<String, ProgressBar> },
    Lines { sizes: BTreeMap<String, u64> },
}

impl Progress {
    pub(super) fn new(image: &str, quiet: bool) -> Self {
        let shape = match quiet {
            true => Shape::Nothing,
            false if io::stderr().is_terminal() => {
                Shape::Bars { all: MultiProgress::new(), bars: BTreeMap::new() }
            }
            false => Shape::Lines { sizes: BTreeMap::new() },
        };
        if !quiet {
            eprintln!("Pulling {}", printable(image));
        }
        Progress { shape }
    }

    pub(super) fn show(&mut self, event: Event) {
        match &mut self.shape {
            Shape::Nothing => {}
            Shape::Bars { all, bars } => show_bars(all, bars, event),
            Shape::Lines { sizes } => show_lines(sizes, event),
        }
    }

    pub(super) fn finish(&mut self, done: &Done) {
        if let Shape::Nothing = self.shape {
            return;
        }
        if let Shape::Bars { bars, .. } = &self.shape {
            bars.values().for_each(ProgressBar::abandon);
        }
        eprintln!("{}: {} on disk", printable(&done.repo_digest), size(done.size));
    }
}

fn show_bars(all: &MultiProgress, bars: &mut BTreeMap<String, ProgressBar>, event: Event) {
    match event {
        Event::Resolved(resolved) => {
            for layer in resolved.layers {
                let bar = ProgressBar::new(layer.size).with_style(style(RUNNING));
                let bar = all.add(bar.with_prefix(printable(short_id(&layer.digest))));
                bar.set_message("");
                bars.insert(layer.digest, bar);
            }
        }
        Event::Downloaded(downloaded) => {
            if let Some(bar) = bars.get(&downloaded.layer) {
                bar.set_position(downloaded.bytes);
            }
        }
        Event::LayerDone(done) => finish_bar(bars.get(&done.layer), "done"),
        Event::LayerExists(exists) => {
            if let Some(bar) = bars.get(&exists.layer) {
                bar.set_style(style(WAITING));
            }
            finish_bar(bars.get(&exists.layer), "already here");
        }
        Event::Done(_) => {}
    }
}

fn finish_bar(bar: Option<&ProgressBar>, message: &'static str) {
    if let Some(bar) = bar {
        bar.set_position(bar.length().unwrap_or(0));
        bar.abandon_with_message(message);
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .map(|style| style.progress_chars("━╸ "))
        .unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn show_lines(sizes: &mut BTreeMap<String, u64>, event: Event) {
    match event {
        Event::Resolved(resolved) => {
            let total = resolved.layers.iter().map(|layer| layer.size).fold(0, u64::saturating_add);
            let digest = printable(&resolved.digest);
            match resolved.layers.len() {
                0 => eprintln!("{digest}: is here already"),
                1 => eprintln!("{digest}: 1 layer, {} to fetch at most", size(total)),
                count => eprintln!("{digest}: {count} layers, {} to fetch at most", size(total)),
            }
            sizes.extend(resolved.layers.into_iter().map(|layer| (layer.digest, layer.size)));
        }
        Event::LayerDone(done) => {
            let bytes = sizes.get(&done.layer).copied().unwrap_or(0);
            eprintln!("{}: done, {}", printable(short_id(&done.layer)), size(bytes));
        }
        Event::LayerExists(exists) => eprintln!("{}: already here", printable(short_id(&exists.layer))),
        Event::Downloaded(_) | Event::Done(_) => {}
    }
}
