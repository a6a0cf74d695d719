use serde_json::{Value, json};

/// Measurements by stage and runtime, in the order in which they first came.
pub struct Report {
    workload: String,
    rows: Vec<(String, String, Vec<f64>)>,
}

impl Report {
    pub fn new(workload: &str) -> Report {
        Report { workload: workload.to_owned(), rows: Vec::new() }
    }

    pub fn add(&mut self, stage: &str, runtime: &str, value: f64) {
        match self.rows.iter_mut().find(|(s, r, _)| s == stage && r == runtime) {
            Some((_, _, values)) => values.push(value),
            None => self.rows.push((stage.to_owned(), runtime.to_owned(), vec![value])),
        }
    }

    /// Median, p90 and the ratio of every other runtime's median to the first one's.
    pub fn print(&self) {
        println!("{:<32} {:<14} {:>10} {:>10} {:>5} {:>9}", self.workload, "", "median", "p90", "n", "ratio");
        let mut stages: Vec<&str> = Vec::new();
        for (stage, _, _) in &self.rows {
            if !stages.contains(&stage.as_str()) {
                stages.push(stage);
            }
        }
        for stage in stages {
            let mut first = None;
            for (_, runtime, values) in self.rows.iter().filter(|(s, _, _)| s == stage) {
                let median = quantile(values, 0.5);
                let ratio = first.map_or(String::new(), |first: f64| format!("{:.1} ×", median / first));
                first.get_or_insert(median);
                println!(
                    "{stage:<32} {runtime:<14} {median:>10.2} {:>10.2} {:>5} {ratio:>9}",
                    quantile(values, 0.9),
                    values.len()
                );
            }
        }
    }

    pub fn write_json(&self, path: &str) -> std::io::Result<()> {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|(stage, runtime, values)| {
                json!({"stage": stage, "runtime": runtime, "median": quantile(values, 0.5), "p90": quantile(values, 0.9), "values": values})
            })
            .collect();
        std::fs::write(path, json!({"workload": self.workload, "rows": rows}).to_string())
    }
}

fn quantile(values: &[f64], at: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * at).round() as usize).copied().unwrap_or(f64::NAN)
}
