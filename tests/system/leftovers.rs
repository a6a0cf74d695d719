//! What counts as left behind: the tests of everything else rely on it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hull_tests::daemon::Machine;
use hull_tests::residue::Residue;
use rustix::process::{Pid, Signal, kill_process};

/// As many agents as one hulld prepares wait with it and end with it.
const PREPARED: usize = 4;

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_more_than_a_living_hulld_prepares_is_left_behind_and_so_is_each_of_a_dead_one() {
    let _machine = Machine::alone().await;
    let directory = tempfile::Builder::new().prefix("hull-e2e-").tempdir().unwrap();
    let before = Residue::look();
    let left = |before: &Residue| -> usize {
        let is_agent = |left: &&String| left.split(' ').nth(2).is_some_and(|of| of.ends_with("/hull-agent"));
        Residue::since(before).iter().filter(is_agent).count()
    };

    let usual = Impostor::start(directory.path(), PREPARED);
    assert_eq!(left(&before), 0);
    drop(usual);

    let mut greedy = Impostor::start(directory.path(), PREPARED + 1);
    assert_eq!(left(&before), 1);
    greedy.end_hulld();
    hull_tests::eventually("they are nobody's", hull_tests::patience(20), async || {
        (left(&before) == PREPARED + 1).then_some(())
    })
    .await;
    drop(greedy);
    hull_tests::eventually("nothing is left", hull_tests::patience(20), async || {
        Residue::since(&before).is_empty().then_some(())
    })
    .await;
}

/// Processes that are called as hulld and its agents are. They end with this value.
struct Impostor {
    hulld: Child,
    agents: Vec<Pid>,
}

impl Impostor {
    fn start(directory: &Path, agents: usize) -> Impostor {
        let (hulld, agent) = (directory.join("hulld"), directory.join("hull-agent"));
        for (original, copy) in [("/bin/sh", &hulld), ("/bin/sleep", &agent)] {
            if !copy.exists() {
                fs::copy(original, copy).unwrap();
            }
        }
        let one = format!("{} 1000 >/dev/null & echo $!; ", agent.display());
        let mut hulld = Command::new(&hulld)
            .args(["-c", &format!("{}wait", one.repeat(agents))])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(hulld.stdout.take().unwrap());
        let pids = output.lines().take(agents);
        let agents: Vec<Pid> =
            pids.map(|pid| Pid::from_raw(pid.unwrap().parse().unwrap()).unwrap()).collect();
        let impostor = Impostor { hulld, agents };
        // Forked is not yet called so
        for pid in &impostor.agents {
            let comm = format!("/proc/{}/comm", pid.as_raw_nonzero());
            for _ in 0..1000 {
                if fs::read_to_string(&comm).is_ok_and(|name| name == "hull-agent\n") {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        impostor
    }

    fn end_hulld(&mut self) {
        let _ = self.hulld.kill();
        let _ = self.hulld.wait();
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        for agent in &self.agents {
            let _ = kill_process(*agent, Signal::KILL);
        }
        self.end_hulld();
    }
}
