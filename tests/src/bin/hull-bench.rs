//! Measures CRI runtimes side by side: the same client, the same requests, taking turns in one run. See hack/bench.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::ExitCode;

use hull_tests::bench::{Options, Peer, Report, WORKLOADS, draw, run};

const USAGE: &str = "hull-bench WORKLOAD --image NAME [OPTIONS] NAME=SOCKET[#HANDLER]…
hull-bench chart JSON SVG

NAME=SOCKET names a runtime and its unix socket, #HANDLER a runtime handler of it. The first is compared with the others.

  --title TEXT          what the workload is called in the output
  --rounds N            how often (default 20)
  --pods N              for memory and restart (default 30)
  --containers N        for logs and crowd (default 1000)
  --parallel N          for parallel (default 8)
  --seconds N           for logs (default 10)
  --network host|own    of the pods (default host)
  --spaced MS           pause before every measurement (default 0)
  --json FILE           add the values to this file
  --registry-pid PID    for pull: measure this process as well
  --program NAME=SCRIPT for pull and load: a script that takes `run` or `clean`

chart draws what --json gathered.
";

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [chart, json, svg] = words.as_slice()
        && chart == "chart"
    {
        let picture =
            draw(&std::fs::read_to_string(json).expect("the JSON file")).expect("JSON of hull-bench");
        std::fs::write(svg, picture).expect("the picture is written");
        return ExitCode::SUCCESS;
    }
    let options = match Options::parse(words.into_iter()) {
        Ok(options) => options,
        Err(error) => return usage(&error),
    };
    let mut peers = Vec::new();
    for named in &options.peers {
        peers.push(Peer::connect(named).await);
    }
    let mut report = Report::new(&options.title);
    if !run(&options, &peers, &mut report).await {
        return usage(&format!("there is no workload {}", options.workload));
    }
    report.print();
    if let Some(path) = &options.json {
        report.add_to(path).expect("the JSON file is written");
    }
    ExitCode::SUCCESS
}

fn usage(error: &str) -> ExitCode {
    eprintln!("hull-bench: {error}\n\n{USAGE}\nWORKLOAD is one of");
    for (name, what) in WORKLOADS {
        eprintln!("  {name:<10} {what}");
    }
    ExitCode::from(2)
}
