use std::fs;
use std::io;
use std::time::Instant;

use serde_json::{Value, json};

/// Measurements by stage and runtime, in the order in which they first came. A stage's name ends with its unit.
pub struct Report {
    title: String,
    rows: Vec<Row>,
}

struct Row {
    stage: String,
    runtime: String,
    values: Vec<f64>,
}

impl Report {
    pub fn new(title: &str) -> Report {
        Report { title: title.to_owned(), rows: Vec::new() }
    }

    pub fn add(&mut self, stage: &str, runtime: &str, value: f64) {
        match self.rows.iter_mut().find(|row| row.stage == stage && row.runtime == runtime) {
            Some(row) => row.values.push(value),
            None => {
                let (stage, runtime) = (stage.to_owned(), runtime.to_owned());
                self.rows.push(Row { stage, runtime, values: vec![value] });
            }
        }
    }

    /// Runs `step` and notes how many milliseconds it took.
    pub async fn timed<T>(&mut self, stage: &str, runtime: &str, step: impl Future<Output = T>) -> (T, f64) {
        let started = Instant::now();
        let result = step.await;
        let milliseconds = started.elapsed().as_secs_f64() * 1e3;
        self.add(stage, runtime, milliseconds);
        (result, milliseconds)
    }

    /// Forgets what was measured: the warm-up.
    pub fn clear(&mut self) {
        self.rows.clear();
    }

    fn stages(&self) -> Vec<&str> {
        let mut stages: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !stages.contains(&row.stage.as_str()) {
                stages.push(&row.stage);
            }
        }
        stages
    }

    /// Median, p90 and the ratio of every other runtime's median to the first one's.
    pub fn print(&self) {
        println!("{:<46} {:<16} {:>9} {:>9} {:>5} {:>8}", self.title, "", "median", "p90", "n", "ratio");
        for stage in self.stages() {
            let mut first = None;
            for row in self.rows.iter().filter(|row| row.stage == stage) {
                let (median, p90) = (quantile(&row.values, 0.5), quantile(&row.values, 0.9));
                let ratio = first.map_or(String::new(), |first: f64| format!("{:.1} ×", median / first));
                first.get_or_insert(median);
                let (name, count) = (&row.runtime, row.values.len());
                println!("{stage:<46} {name:<16} {median:>9.2} {p90:>9.2} {count:>5} {ratio:>8}");
            }
        }
        println!();
    }

    /// Adds these measurements to those in the file, which may not be there yet.
    pub fn add_to(&self, path: &str) -> io::Result<()> {
        let mut all: Vec<Value> = match fs::read_to_string(path) {
            Ok(text) => serde_json::from_str(&text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let rows = self.rows.iter().map(|row| {
            let (median, p90) = (quantile(&row.values, 0.5), quantile(&row.values, 0.9));
            json!({"stage": row.stage, "runtime": row.runtime, "median": median, "p90": p90, "values": row.values})
        });
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load.split_whitespace().next().unwrap_or_default();
        all.push(json!({"workload": self.title, "load": load, "rows": rows.collect::<Vec<_>>()}));
        fs::write(path, serde_json::to_string_pretty(&all)?)
    }
}

fn quantile(values: &[f64], at: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * at).round() as usize).copied().unwrap_or(f64::NAN)
}
