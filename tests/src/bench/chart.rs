use std::fmt::Write;

use serde_json::Value;

/// What the picture shows: a workload's title, a stage, and what a reader calls it.
const ROWS: [(&str, &str, &str, &str); 9] = [
    ("pods, host network", "pod start (the three, ms)", "start a pod, host network", "ms"),
    ("pods, host network", "pod stop and remove (the four, ms)", "stop and remove it", "ms"),
    ("pods, own network", "pod start (the three, ms)", "start a pod, network of its own", "ms"),
    ("pods, own network", "pod stop and remove (the four, ms)", "stop and remove it", "ms"),
    ("exec", "ExecSync of true (ms)", "run a command in a container", "ms"),
    ("pull, 500 MiB in 5 layers", "PullImage (ms)", "pull 500 MiB in five layers", "ms"),
    ("memory", "each pod, private (KiB)", "memory beside each idle pod", "KiB"),
    ("memory", "daemon, resident (MiB)", "memory of the daemon, 30 pods", "MiB"),
    ("restart", "killed to all pods listed (ms)", "daemon back after a kill, 200 pods", "ms"),
];
const PICKED: [&str; 2] = ["hull", "containerd"];
const COLOURS: [&str; 2] = ["#0f766e", "#9ca3af"];

const WIDTH: usize = 760;
const LEFT: usize = 250;
const BAR: usize = 14;
const GROUP: usize = 46;
const TOP: usize = 56;
/// Widest bar, in pixels; what is right of it is for the number.
const SPAN: f64 = 400.0;

/// A bar chart of what `hull-bench --json` has gathered. Each pair of bars has its own scale; shorter is better.
pub fn draw(gathered: &str) -> serde_json::Result<String> {
    let results: Vec<Value> = serde_json::from_str(gathered)?;
    let mut body = String::new();
    let mut groups = 0;
    for (workload, stage, label, unit) in ROWS {
        let medians = PICKED.map(|runtime| median(&results, workload, stage, runtime));
        let [Some(ours), Some(theirs)] = medians else { continue };
        let top = TOP + groups * GROUP;
        groups += 1;
        group(&mut body, top, label, [ours, theirs], unit);
    }
    let height = TOP + groups * GROUP + 12;
    let mut picture = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"13\">\n\
         <title>hull and containerd with runc, measured in one run; shorter is better</title>\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" rx=\"8\" fill=\"#ffffff\"/>\n"
    );
    for (number, name) in ["hull", "containerd + runc"].iter().enumerate() {
        let x = LEFT + number * 110;
        let (colour, text) = (COLOURS[number], x + 18);
        let _ = writeln!(
            picture,
            "<rect x=\"{x}\" y=\"20\" width=\"12\" height=\"12\" rx=\"2\" fill=\"{colour}\"/>\n\
             <text x=\"{text}\" y=\"31\" fill=\"#111827\">{name}</text>"
        );
    }
    let note = WIDTH - 16;
    let _ = writeln!(
        picture,
        "<text x=\"{note}\" y=\"31\" text-anchor=\"end\" fill=\"#6b7280\" font-size=\"11\">medians; shorter is better</text>"
    );
    Ok(picture + &body + "</svg>\n")
}

fn median(results: &[Value], workload: &str, stage: &str, runtime: &str) -> Option<f64> {
    let of_workload = results.iter().rev().filter(|result| result["workload"] == workload);
    let rows = of_workload.flat_map(|result| result["rows"].as_array().into_iter().flatten());
    rows.filter(|row| row["stage"] == stage && row["runtime"] == runtime)
        .find_map(|row| row["median"].as_f64())
}

fn group(body: &mut String, top: usize, label: &str, values: [f64; 2], unit: &str) {
    let longest = values[0].max(values[1]).max(f64::MIN_POSITIVE);
    let (x, middle) = (LEFT - 12, top + BAR + 5);
    let _ =
        writeln!(body, "<text x=\"{x}\" y=\"{middle}\" text-anchor=\"end\" fill=\"#111827\">{label}</text>");
    for (number, value) in values.into_iter().enumerate() {
        let y = top + number * (BAR + 3);
        let width = (value / longest * SPAN).max(2.0);
        let (colour, text, base) = (COLOURS[number], LEFT as f64 + width + 8.0, y + BAR - 3);
        let shown = if value < 100.0 { format!("{value:.1}") } else { thousands(value.round() as u64) };
        let gain = values[1] / values[0];
        let gain = if number == 0 {
            format!(" <tspan fill=\"#0f766e\">({gain:.1} × less)</tspan>")
        } else {
            String::new()
        };
        let _ = writeln!(
            body,
            "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.0}\" height=\"{BAR}\" rx=\"2\" fill=\"{colour}\"/>\n\
             <text x=\"{text:.0}\" y=\"{base}\" fill=\"#374151\" font-size=\"12\">{shown} {unit}{gain}</text>"
        );
    }
}

fn thousands(value: u64) -> String {
    if value < 1000 { value.to_string() } else { format!("{},{:03}", value / 1000, value % 1000) }
}
