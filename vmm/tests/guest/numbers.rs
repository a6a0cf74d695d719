//! Numbers for docs/SPECIFICATION.md; run by hand on a machine that is quiet.

use hull_agent::protocol::messages::{Measure, request::Call, response::Outcome};

use crate::machine::Machine;

#[test]
#[ignore = "measures for a minute"]
fn how_long_a_machine_takes_and_what_it_needs_before_the_first_container() {
    let (mut started, mut listening, mut ready) = (Vec::new(), Vec::new(), Vec::new());
    let mut used = 0;
    for _ in 0..20 {
        let Some(mut machine) = Machine::boot(1, 128 << 20) else { return };
        let (first, second) = machine.started();
        let mut agent = machine.agent();
        let start = std::time::Instant::now();
        agent.create(|_| ());
        ready.push(start.elapsed().as_micros() as u64);
        started.push(first);
        listening.push(second);
        if let Outcome::Measured(measured) = agent.call(Call::Measure(Measure::default()), vec![]) {
            used = (128 << 20) - measured.memory_available;
        }
    }
    for (what, times) in [("first instruction", started), ("listens", listening), ("CreateSandbox", ready)] {
        let mut times = times;
        times.sort_unstable();
        println!("{what}: median {} µs, {} to {}", times[times.len() / 2], times[0], times[times.len() - 1]);
    }
    println!("of 128 MiB in use before the first container: {} KiB", used >> 10);
}
