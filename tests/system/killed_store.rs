//! hulld is killed at random instants of everything that it does with images: after each of them the store is whole,
//! nothing is left over, and what was interrupted works.
//!
//! HULL_STORE_KILLS says how often, HULL_KILL_SEED makes a run's choices come again. Each daemon keeps blobs or does not, as
//! it comes.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hull_tests::daemon::Daemon;
use hull_tests::image::{self, Image, Layer, Packing};
use hull_tests::registry::Registry;
use serde_json::{Value, json};

use crate::cli::Hull;
use crate::kill_anywhere::Chance;

const DEFAULT_KILLS: usize = 25;
/// Incompressible bytes of each image's own layer: every operation takes some time.
const BALLAST: usize = 6 << 20;

/// What hulld is at when it is killed.
#[derive(Clone, Copy, Debug)]
enum Work {
    Pull,
    PullBoth,
    Remove,
    Load,
    Save,
    SaveExactly,
    Commit,
    Push,
    PushExactly,
    Prune,
    Repair,
}

const WORKS: [Work; 11] = [
    Work::Pull,
    Work::PullBoth,
    Work::Remove,
    Work::Load,
    Work::Save,
    Work::SaveExactly,
    Work::Commit,
    Work::Push,
    Work::PushExactly,
    Work::Prune,
    Work::Repair,
];

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_at_any_instant_of_its_work_with_images_keeps_its_store_whole() {
    let mut ground = Ground::new().await;
    let mut interrupted = 0;
    for number in 0..kills() {
        let work = WORKS[ground.chance.below(WORKS.len())];
        interrupted += usize::from(ground.kill_during(number, work).await);
    }
    eprintln!("{interrupted} of {} works were interrupted", kills());
    assert!(interrupted * 4 >= kills(), "nearly all came too late: {interrupted} of {}", kills());
    ground.finish().await;
}

fn kills() -> usize {
    std::env::var("HULL_STORE_KILLS").map_or(DEFAULT_KILLS, |kills| kills.parse().expect("a number"))
}

struct Ground {
    daemon: Daemon,
    hull: Hull,
    chance: Chance,
    registry: Registry,
    /// Two images with layers in common, as a registry has them, and their ids.
    names: [String; 2],
    ids: [String; 2],
    /// Both in one file.
    archive: String,
    /// Whether the daemon that runs keeps blobs.
    keeps_blobs: bool,
    /// How long each work took when it was left alone.
    typical: [Duration; WORKS.len()],
}

impl Ground {
    async fn new() -> Ground {
        let mut chance = Chance::new();
        let registry = Registry::start();
        let one = registry.push("team/one", "1", &heavy(&mut chance));
        let two = registry.push("team/two", "1", &heavy(&mut chance));
        let daemon = Daemon::start_with("mode = \"builtin\"\n", "[image]\nkeep_blobs = true\n").await;
        let hull = Hull::of(&daemon);
        let ids = [&one, &two].map(|name| {
            hull.ok(&["pull", name]);
            hull.json(&["inspect", name])["status"]["id"].as_str().unwrap().to_owned()
        });
        let archive = daemon.path("both.tar").to_str().unwrap().to_owned();
        hull.ok(&["save", "-f", &archive, &one, &two]);
        // Of a third image, so that the first two can be removed while it runs.
        let base = registry.push("team/base", "1", &image::busybox());
        hull.ok(&["pull", &base]);
        let script = "mkdir /many; i=0; while [ $i -lt 300 ]; do echo $i > /many/$i; i=$((i+1)); done; \
                      dd if=/dev/urandom of=/noise bs=65536 count=64; echo ready; exec sleep 100000";
        hull.ok(&["run", "-d", "--name", "maker", &base, "sh", "-c", script]);
        hull_tests::eventually("the container's files", hull_tests::patience(30), async || {
            hull.ok(&["logs", "maker"]).contains("ready").then_some(())
        })
        .await;
        let names = [one, two];
        let typical = [Duration::from_millis(100); WORKS.len()];
        let keeps_blobs = true;
        let mut ground = Ground { daemon, hull, chance, registry, names, ids, archive, keeps_blobs, typical };
        for work in WORKS {
            ground.prepare(work);
            let begun = Instant::now();
            assert!(ground.begin(work, 0).wait().unwrap().success(), "{work:?}");
            ground.typical[work as usize] = begun.elapsed();
        }
        ground
    }

    /// True if the work was not done when hulld was killed.
    async fn kill_during(&mut self, number: usize, work: Work) -> bool {
        self.prepare(work);
        let within = self.typical[work as usize].as_micros() as usize;
        let delay = Duration::from_micros(self.chance.below(within.max(1)) as u64);
        eprintln!("{number}: killed {delay:?} into {work:?}");
        let mut working = self.begin(work, number);
        std::thread::sleep(delay);
        self.daemon.kill();
        let interrupted = !working.wait().unwrap().success();
        self.choose_whether_blobs_are_kept();
        self.daemon.restart().await;
        self.whole();
        // What was interrupted works now.
        self.prepare(work);
        assert!(self.begin(work, number).wait().unwrap().success(), "{work:?} after a restart");
        for (name, id) in self.names.iter().zip(&self.ids) {
            self.hull.ok(&["pull", name]);
            assert_eq!(self.hull.json(&["inspect", name])["status"]["id"], **id);
        }
        self.whole();
        if number.is_multiple_of(10) {
            let sums = self.hull.ok(&[
                "run",
                "--rm",
                &self.names[0],
                "sh",
                "-c",
                "busybox md5sum < /ballast; cat /sum",
            ]);
            let sums: Vec<&str> = sums.lines().map(|line| &line[..32]).collect();
            assert_eq!(sums[0], sums[1], "the content of {}", self.names[0]);
            assert_eq!(self.hull.ok(&["exec", "maker", "echo", "alive"]), "alive\n");
        }
        interrupted
    }

    /// Mostly they are: that is more to be interrupted.
    fn choose_whether_blobs_are_kept(&mut self) {
        let keeps = self.chance.below(4) > 0;
        let path = self.daemon.path("hull.toml");
        let text = fs::read_to_string(&path).unwrap();
        let line = |keeps| format!("keep_blobs = {keeps}\n");
        assert!(text.contains(&line(self.keeps_blobs)), "{text}");
        fs::write(&path, text.replace(&line(self.keeps_blobs), &line(keeps))).unwrap();
        self.keeps_blobs = keeps;
    }

    fn prepare(&self, work: Work) {
        let gone = |name: &String| {
            if !self.hull.ok(&["images", "-q", name]).is_empty() {
                self.hull.ok(&["rmi", name]);
            }
        };
        let here = |name: &String| drop(self.hull.ok(&["pull", name]));
        match work {
            Work::Pull => gone(&self.names[0]),
            Work::PullBoth | Work::Load => self.names.iter().for_each(gone),
            Work::Remove | Work::Push | Work::PushExactly => here(&self.names[0]),
            Work::Save | Work::SaveExactly | Work::Prune | Work::Repair => self.names.iter().for_each(here),
            Work::Commit => {}
        }
    }

    fn begin(&self, work: Work, number: usize) -> Child {
        let [one, two] = &self.names;
        let pushed = format!("{}/pushed/one:{number}", self.registry.host());
        let made = format!("made:{}", number % 3);
        let saved = self.daemon.path("saved.tar");
        let arguments: Vec<&str> = match work {
            Work::Pull => vec!["pull", one],
            Work::PullBoth => {
                let script = "\"$0\" pull \"$1\" & \"$0\" pull \"$2\" && wait $!";
                let mut both = Command::new("sh");
                both.args(["-c", script]).arg(self.hull.command(&[]).get_program()).args([one, two]);
                both.env("HULL_SOCKET", format!("unix://{}", self.daemon.socket().display()));
                return both.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            }
            Work::Remove => vec!["rmi", one],
            Work::Load => vec!["load", "-i", &self.archive],
            Work::Save => vec!["save", "-f", saved.to_str().unwrap(), one, two],
            Work::SaveExactly => vec!["save", "--exact", "-f", saved.to_str().unwrap(), one, two],
            Work::Commit => vec!["commit", "maker", &made],
            Work::Push => vec!["push", one, &pushed],
            Work::PushExactly => vec!["push", "--exact", one, &pushed],
            Work::Prune => vec!["system", "prune", "-a"],
            Work::Repair => vec!["system", "check", "--repair"],
        };
        self.hull.command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Every layer is what it should be, every file is known, every image is complete.
    fn whole(&self) {
        let said = self.hull.run(&["system", "check"]);
        assert!(said.code == 0 && said.out.contains("all is well"), "{said:?}");
        // What nobody needs any more is deleted in the background.
        let given_up = Instant::now() + hull_tests::patience(5);
        while let Err(left) = self.nothing_left() {
            assert!(Instant::now() < given_up, "{left}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn nothing_left(&self) -> Result<(), String> {
        let usage = self.hull.json(&["system", "df"]);
        let layers = usage["layers"].as_array().unwrap();
        let file = |layer: &Value| {
            format!("{}.erofs", layer["layer"].as_str().unwrap().trim_start_matches("sha256:"))
        };
        let known: BTreeSet<String> = layers.iter().map(file).collect();
        let names = |directory: &str| -> BTreeSet<String> {
            let entries = fs::read_dir(self.daemon.root().join(directory)).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        if names("layers") != known {
            return Err(format!("there are {:?}, and known are {known:?}", names("layers")));
        }
        let unused = |one: &&Value| one["images"].as_array().unwrap().is_empty() && one["held"] == false;
        if let Some(layer) = layers.iter().find(unused) {
            return Err(format!("the layer of nobody: {layer}"));
        }
        let known = match self.keeps_blobs {
            true => usage["blobs"].as_array().unwrap().clone(),
            false => Vec::new(),
        };
        if let Some(blob) = known.iter().find(|blob| blob["images"].as_array().unwrap().is_empty()) {
            return Err(format!("the blob of nobody: {blob}"));
        }
        let hex = |blob: &Value| blob["digest"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
        let known: BTreeSet<String> = known.iter().map(hex).collect();
        if names("blobs/sha256") != known || names("blobs") != ["sha256", "sha512"].map(str::to_owned).into()
        {
            let there = (names("blobs"), names("blobs/sha256"));
            return Err(format!("there are {there:?}, and known are the blobs {known:?}"));
        }
        let expected: BTreeSet<String> = ["index.redb", "lock", "reserve"].map(str::to_owned).into();
        match names("images") {
            found if found.is_subset(&expected) => Ok(()),
            found => Err(format!("{found:?} in images")),
        }
    }

    async fn finish(self) {
        self.hull.ok(&["rm", "-f", "--all"]);
        self.hull.ok(&["system", "prune", "-a"]);
        let layers = fs::read_dir(self.daemon.root().join("layers")).unwrap().count();
        assert_eq!(layers, 0, "files of layers that nobody needs");
        let blobs = fs::read_dir(self.daemon.root().join("blobs/sha256")).unwrap().count();
        assert_eq!(blobs, 0, "blobs that nobody needs");
        self.daemon.finish().await;
    }
}

/// Busybox, a layer that all of these have, and one of noise.
fn heavy(chance: &mut Chance) -> Image {
    let noise: Vec<u8> = (0..BALLAST / 8).flat_map(|_| chance.draw().to_le_bytes()).collect();
    let sum = {
        let mut child = Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), &noise).unwrap();
        child.wait_with_output().unwrap().stdout
    };
    let common = Layer::default().file("common", 0o644, &[7; 1 << 20]);
    let own = Layer::default().file("ballast", 0o644, &noise).file("sum", 0o644, &sum);
    let layers = vec![(image::busybox_layer(), Packing::Gzip), (common, Packing::Zstd), (own, Packing::Gzip)];
    Image::new(layers, json!({"Cmd": ["sh"]}))
}
