//! Random stacks: what overlayfs shows of layers that lie on each other is what applying their archives one after the other
//! gives, with whiteouts, opaque directories and directories that no entry names, in any order.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;

use sha2::{Digest, Sha256};

use super::archive::{Archive, Member};
use super::converted;
use super::mounted::{Tree, snapshot, with_mounted_below};
use super::random_trees::Random;
use crate::image::make_upper_directories;
use crate::layer::erofs::ImageReader;
use crate::layer::stack::{StackLayer, overlaid};

/// More cases than the default with HULL_LAYER_CASES; the first seed with HULL_LAYER_SEED.
#[test]
fn stacks_of_random_layers_are_what_applying_them_gives() {
    let variable = |name: &str, default| std::env::var(name).map_or(default, |value| value.parse().unwrap());
    let first: u64 = variable("HULL_LAYER_SEED", 1);
    for seed in first..first + variable("HULL_LAYER_CASES", 40) {
        let mut random = Random::new(seed);
        let layers: Vec<Vec<Step>> = (0..2 + random.below(4)).map(|_| layer(&mut random)).collect();
        let expected = layers.iter().fold(Model::new(), apply);
        let seen = told(&seen(&layers));
        if seen != expected {
            let all: BTreeSet<&String> = seen.keys().chain(expected.keys()).collect();
            let path = all.into_iter().find(|path| seen.get(*path) != expected.get(*path)).unwrap();
            panic!(
                "seed {seed}: {path} is {:?} and should be {:?} in {layers:#?}",
                seen.get(path),
                expected.get(path)
            );
        }
    }
}

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Thing {
    Directory { mode: u32, owner: u32 },
    File { mode: u32, owner: u32, hash: Vec<u8> },
    Link(String),
}

type Model = BTreeMap<String, Thing>;

/// One entry of an archive.
#[derive(Clone, Debug)]
enum Step {
    Directory {
        path: String,
        mode: u32,
        owner: u32,
    },
    File {
        path: String,
        mode: u32,
        owner: u32,
        content: String,
    },
    Link {
        path: String,
        target: String,
    },
    Whiteout(String),
    /// Empty: the root.
    Opaque(String),
}

impl Step {
    /// The directory that this entry is in.
    fn parent(&self) -> &str {
        let parent = |path: &'_ str| path.rfind('/').unwrap_or(0);
        match self {
            Step::Directory { path, .. }
            | Step::File { path, .. }
            | Step::Link { path, .. }
            | Step::Whiteout(path) => &path[..parent(path)],
            Step::Opaque(path) => path,
        }
    }

    fn archive(&self, archive: Archive) -> Archive {
        match self {
            Step::Directory { path, mode, owner } => {
                archive.member(Member { mode: *mode, uid: *owner, ..Member::new(b'5', path) }, b"")
            }
            Step::File { path, mode, owner, content } => {
                let member = Member { mode: *mode, uid: *owner, ..Member::new(b'0', path) };
                archive.member(member, content.as_bytes())
            }
            Step::Link { path, target } => archive.symlink(path, target),
            Step::Whiteout(path) => {
                let at = path.rfind('/').map_or(0, |slash| slash + 1);
                archive.file(&format!("{}.wh.{}", &path[..at], &path[at..]), "")
            }
            Step::Opaque(path) if path.is_empty() => archive.file(".wh..wh..opq", ""),
            Step::Opaque(path) => archive.file(&format!("{path}/.wh..wh..opq"), ""),
        }
    }
}

fn prefixes(path: &str) -> impl Iterator<Item = &str> {
    let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]);
    ends.map(|end| &path[..end]).filter(|prefix| !prefix.is_empty())
}

/// Entries that do not contradict each other, in any order: few names, so that layers meet.
fn layer(random: &mut Random) -> Vec<Step> {
    // Whether it is a directory.
    let mut taken: BTreeMap<String, bool> = BTreeMap::new();
    let mut named: BTreeSet<String> = BTreeSet::new();
    let mut steps: Vec<Step> = Vec::new();
    for number in 0..1 + random.below(9) {
        let depth = 1 + random.below(4);
        let path = (0..depth).map(|_| ["a", "b", "c"][random.below(3)]).collect::<Vec<_>>().join("/");
        let (mode, owner) = ([0o755, 0o700, 0o1777, 0o2711][random.below(4)], random.below(3) as u32);
        let step = match random.below(10) {
            0..=3 => Step::File { path: path.clone(), mode, owner, content: format!("{number}") },
            4 | 5 => Step::Directory { path: path.clone(), mode, owner },
            6 => Step::Link { path: path.clone(), target: format!("nowhere/{number}") },
            7 | 8 => Step::Whiteout(path.clone()),
            _ if random.chance(20) => Step::Opaque(String::new()),
            _ => Step::Opaque(path.clone()),
        };
        let own = match &step {
            Step::Directory { .. } => Some(true),
            Step::File { .. } | Step::Link { .. } => Some(false),
            Step::Whiteout(_) | Step::Opaque(_) => None,
        };
        let is_clear = prefixes(step.parent()).all(|prefix| taken.get(prefix) != Some(&false))
            && own.is_none_or(|is_directory| {
                taken.get(&path).is_none_or(|known| *known && is_directory) && !named.contains(&path)
            });
        if !is_clear {
            continue;
        }
        taken.extend(prefixes(step.parent()).map(|prefix| (prefix.to_owned(), true)));
        if let Some(is_directory) = own {
            taken.insert(path.clone(), is_directory);
            named.insert(path);
        }
        steps.insert(random.below(steps.len() + 1), step);
    }
    steps
}

/// The specification's way: what is hidden goes, then what is there comes.
fn apply(mut model: Model, layer: &Vec<Step>) -> Model {
    for step in layer {
        match step {
            Step::Whiteout(path) => remove(&mut model, path),
            Step::Opaque(path) if path.is_empty() => model.clear(),
            Step::Opaque(path) => model.retain(|other, _| !other.starts_with(&format!("{path}/"))),
            _ => {}
        }
    }
    for step in layer {
        for prefix in prefixes(step.parent()) {
            if !matches!(model.get(prefix), Some(Thing::Directory { .. })) {
                put(&mut model, prefix, Thing::Directory { mode: 0o755, owner: 0 });
            }
        }
        match step {
            Step::Directory { path, mode, owner } => {
                put(&mut model, path, Thing::Directory { mode: *mode, owner: *owner });
            }
            Step::File { path, mode, owner, content } => {
                let hash = Sha256::digest(content).to_vec();
                put(&mut model, path, Thing::File { mode: *mode, owner: *owner, hash });
            }
            Step::Link { path, target } => put(&mut model, path, Thing::Link(target.clone())),
            Step::Whiteout(_) | Step::Opaque(_) => {}
        }
    }
    model
}

/// A directory in the place of a directory keeps what is in it.
fn put(model: &mut Model, path: &str, thing: Thing) {
    let both = matches!((model.get(path), &thing), (Some(Thing::Directory { .. }), Thing::Directory { .. }));
    if !both {
        remove(model, path);
    }
    model.insert(path.to_owned(), thing);
}

fn remove(model: &mut Model, path: &str) {
    model.retain(|other, _| other != path && !other.starts_with(&format!("{path}/")));
}

/// What a container would see: the layers that are mounted, below the directories that it gets beforehand.
fn seen(layers: &[Vec<Step>]) -> Tree {
    let made: Vec<_> = layers
        .iter()
        .map(|layer| {
            let archive = layer.iter().fold(Archive::new(), |archive, step| step.archive(archive));
            converted(&archive.end())
        })
        .collect();
    let lowest = made.iter().rposition(|(_, report)| report.opaque_root).unwrap_or(0);
    let mounted = &made[lowest..];
    let stack: Vec<StackLayer> = mounted
        .iter()
        .map(|(file, report)| StackLayer {
            image: ImageReader::new(file.try_clone().unwrap()).unwrap(),
            implied: report.implied_directories.clone(),
        })
        .collect();
    let writable = tempfile::tempdir().unwrap();
    let directories = overlaid(&stack).unwrap().directories;
    make_upper_directories(File::open(writable.path()).unwrap().as_fd(), &directories).unwrap();
    let upper = writable.path().join("upper");
    let images: Vec<&File> = mounted.iter().map(|(file, _)| file).collect();
    with_mounted_below(&images, fs::exists(&upper).unwrap().then_some(upper.as_path()), snapshot)
}

/// The tree in the model's words, without its root.
fn told(tree: &Tree) -> Model {
    let entries = tree.iter().filter(|(path, _)| !path.as_os_str().is_empty());
    entries
        .map(|(path, seen)| {
            let (mode, owner) = (seen.mode & 0o7777, seen.uid);
            let thing = match seen.mode & 0o170_000 {
                0o040_000 => Thing::Directory { mode, owner },
                0o120_000 => Thing::Link(String::from_utf8(seen.content.clone()).unwrap()),
                _ => Thing::File { mode, owner, hash: seen.content.clone() },
            };
            (String::from_utf8(path.as_os_str().as_bytes().to_vec()).unwrap(), thing)
        })
        .collect()
}
