//! The same decisions with a fourth of the instructions.
//!
//! Installing a filter is a large part of starting a process: the kernel translates it to machine code, and runs it once
//! for each call that there is to learn which ones it always allows (kernel/seccomp.c, `seccomp_cache_prepare`). With a
//! comparison for each of 350 calls on three architectures that takes 0.3 to 0.4 ms, this way 0.1: calls that stand
//! beside each other mostly have the same answer, and a search needs to know only where answers change.
//!
//! This looks at nothing but the program: it is worked out for each architecture and each range of numbers between two
//! that it compares with; what is left are answers and comparisons of arguments. Equal ones are one, and the ranges are
//! searched by halves. So what libseccomp has decided stays decided, whatever its rules about rules are.

use std::collections::{BTreeSet, HashMap};

use super::instruction::{
    AND, ANY_BIT, ARCHITECTURE, EQUAL, GREATER, GREATER_OR_EQUAL, Instruction, JUMP, LOAD, NUMBER, RETURN,
};

/// Most comparisons of arguments one after the other; a longer chain leaves the program as it was. It bounds recursion.
const MAX_DEPTH: u32 = 512;

/// A program that answers each call as `program` does, or `None` if it does what this does not understand, or would not
/// become shorter.
pub(super) fn optimize(program: &[u8]) -> Option<Vec<u8>> {
    let program = Instruction::all(program);
    let written = rewrite(&program)?;
    (written.len() < program.len()).then(|| bytes(&written))
}

fn bytes(program: &[Instruction]) -> Vec<u8> {
    program.iter().flat_map(Instruction::bytes).collect()
}

/// The same decisions, however long they become.
fn rewrite(program: &[Instruction]) -> Option<Vec<Instruction>> {
    let found = Constants::find(program)?;
    let mut nodes = Nodes::default();
    let mut architectures = Vec::new();
    for &architecture in &found.architectures {
        let mut numbers = Vec::new();
        for &number in &found.numbers {
            let call = Call { program, architecture, number };
            let node = call.rest(0, None, &mut nodes, &mut HashMap::new(), MAX_DEPTH)?;
            join(&mut numbers, number, node);
        }
        let decided = nodes.search(&numbers);
        let decided = nodes.add(Node::Load { offset: NUMBER, then: decided });
        join(&mut architectures, architecture, decided);
    }
    let decided = nodes.search(&architectures);
    let first = nodes.add(Node::Load { offset: ARCHITECTURE, then: decided });
    Some(Placed::new(&nodes).program(first))
}

/// Adds a range to those before it, of which the last one goes on if it has the same answer.
fn join(ranges: &mut Vec<Range>, from: u32, node: NodeId) {
    if ranges.last().is_none_or(|last| last.node != node) {
        ranges.push(Range { from, node });
    }
}

/// Where decisions can change: the smallest value of each range within which no comparison tells two values apart.
struct Constants {
    architectures: BTreeSet<u32>,
    numbers: BTreeSet<u32>,
}

impl Constants {
    /// `None` for a program that does with number or architecture what is not comparing them, or is not made of the
    /// instructions that this knows.
    fn find(program: &[Instruction]) -> Option<Self> {
        // Without a load the kernel would compare a zero (and libseccomp never does).
        if program.first()?.code != LOAD {
            return None;
        }
        let mut found = Self { architectures: BTreeSet::from([0]), numbers: BTreeSet::from([0]) };
        // What may have been loaded when an instruction is reached. Jumps only go forward.
        let mut loaded = vec![Loaded::default(); program.len()];
        for (place, instruction) in program.iter().enumerate() {
            let before = loaded[place];
            let after = match instruction.code {
                RETURN => continue,
                LOAD => Loaded {
                    number: instruction.value == NUMBER,
                    architecture: instruction.value == ARCHITECTURE,
                },
                JUMP => before,
                AND | ANY_BIT if before.number || before.architecture => return None,
                AND | ANY_BIT => before,
                EQUAL | GREATER | GREATER_OR_EQUAL => {
                    let edges = [Some(instruction.value), instruction.value.checked_add(1)];
                    for edge in edges.into_iter().flatten() {
                        if before.number {
                            found.numbers.insert(edge);
                        }
                        if before.architecture {
                            found.architectures.insert(edge);
                        }
                    }
                    before
                }
                _ => return None,
            };
            for next in next(place, instruction) {
                let there = loaded.get_mut(next)?;
                there.number |= after.number;
                there.architecture |= after.architecture;
            }
        }
        Some(found)
    }
}

#[derive(Clone, Copy, Default)]
struct Loaded {
    number: bool,
    architecture: bool,
}

/// Where an instruction that does not return goes on: if what it asks holds, and if not.
fn next(place: usize, instruction: &Instruction) -> [usize; 2] {
    match instruction.code {
        EQUAL | GREATER | GREATER_OR_EQUAL | ANY_BIT => {
            [usize::from(instruction.if_true), usize::from(instruction.if_false)].map(|over| place + 1 + over)
        }
        JUMP => [place.saturating_add(1).saturating_add(instruction.value as usize); 2],
        _ => [place + 1; 2],
    }
}

/// What a program comes to for one architecture and one number.
struct Call<'a> {
    program: &'a [Instruction],
    architecture: u32,
    number: u32,
}

impl Call<'_> {
    /// What is left to do from `place` on, where `known` is loaded if that is no argument. `done` has what was found for
    /// places that are reached with an argument loaded.
    fn rest(
        &self,
        mut place: usize,
        mut known: Option<u32>,
        nodes: &mut Nodes,
        done: &mut HashMap<usize, NodeId>,
        depth: u32,
    ) -> Option<NodeId> {
        loop {
            if known.is_none()
                && let Some(node) = done.get(&place)
            {
                return Some(*node);
            }
            let instruction = self.program.get(place)?;
            let [if_true, if_false] = next(place, instruction);
            let value = instruction.value;
            let node = match (instruction.code, known) {
                (RETURN, _) => return Some(nodes.add(Node::Return { verdict: value })),
                (JUMP, _) => {
                    place = if_true;
                    continue;
                }
                (LOAD, _) if value == NUMBER || value == ARCHITECTURE => {
                    known = Some(if value == NUMBER { self.number } else { self.architecture });
                    place = if_true;
                    continue;
                }
                (EQUAL | GREATER | GREATER_OR_EQUAL, Some(known)) => {
                    place = if holds(instruction.code, known, value) { if_true } else { if_false };
                    continue;
                }
                (LOAD, _) => {
                    let then = self.rest(if_true, None, nodes, done, depth.checked_sub(1)?)?;
                    let node = nodes.add(Node::Load { offset: value, then });
                    if known.is_some() {
                        return Some(node);
                    }
                    node
                }
                (AND, None) => {
                    let then = self.rest(if_true, None, nodes, done, depth.checked_sub(1)?)?;
                    nodes.add(Node::And { mask: value, then })
                }
                (code @ (EQUAL | GREATER | GREATER_OR_EQUAL | ANY_BIT), None) => {
                    let if_true = self.rest(if_true, None, nodes, done, depth.checked_sub(1)?)?;
                    let if_false = self.rest(if_false, None, nodes, done, depth.checked_sub(1)?)?;
                    nodes.add(Node::Branch { code, value, if_true, if_false })
                }
                _ => return None,
            };
            done.insert(place, node);
            return Some(node);
        }
    }
}

const fn holds(code: u16, left: u32, right: u32) -> bool {
    match code {
        EQUAL => left == right,
        GREATER => left > right,
        _ => left >= right,
    }
}

/// Which node.
type NodeId = usize;

/// From this value to the next range's.
#[derive(Clone, Copy)]
struct Range {
    from: u32,
    node: NodeId,
}

/// A step of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Node {
    Return { verdict: u32 },
    Load { offset: u32, then: NodeId },
    And { mask: u32, then: NodeId },
    Branch { code: u16, value: u32, if_true: NodeId, if_false: NodeId },
}

/// All steps; equal ones are there once.
#[derive(Default)]
struct Nodes {
    all: Vec<Node>,
    known: HashMap<Node, NodeId>,
}

impl Nodes {
    /// The step, or what follows it where it makes no difference.
    fn add(&mut self, node: Node) -> NodeId {
        match node {
            Node::Load { then, .. } | Node::And { then, .. } if self.needs_nothing_loaded(then) => {
                return then;
            }
            Node::Branch { if_true, if_false, .. } if if_true == if_false => return if_true,
            _ => {}
        }
        *self.known.entry(node).or_insert_with(|| {
            self.all.push(node);
            self.all.len() - 1
        })
    }

    fn needs_nothing_loaded(&self, node: NodeId) -> bool {
        matches!(self.all[node], Node::Return { .. } | Node::Load { .. })
    }

    /// Finds the range of what is loaded, by halves. There is at least one range; the first begins at 0.
    fn search(&mut self, ranges: &[Range]) -> NodeId {
        match ranges {
            [] => unreachable!("values without a range"),
            [one] => one.node,
            // One value among others that are all alike.
            [before, one, after] if before.node == after.node && after.from - one.from == 1 => {
                let (value, if_true, if_false) = (one.from, one.node, before.node);
                self.add(Node::Branch { code: EQUAL, value, if_true, if_false })
            }
            _ => {
                let middle = split(ranges);
                let if_false = self.search(&ranges[..middle]);
                let if_true = self.search(&ranges[middle..]);
                let value = ranges[middle].from;
                self.add(Node::Branch { code: GREATER_OR_EQUAL, value, if_true, if_false })
            }
        }
    }
}

/// Where to halve, so that single values stay together with what is around them. There are at least two ranges.
fn split(ranges: &[Range]) -> usize {
    let half = ranges.len() / 2;
    let single = |index: usize| {
        let around =
            index.checked_sub(1).and_then(|before| Some((ranges.get(before)?, ranges.get(index + 1)?)));
        around
            .is_some_and(|(before, after)| before.node == after.node && after.from - ranges[index].from == 1)
    };
    let parts_none =
        |middle: &usize| (1..ranges.len()).contains(middle) && !single(middle - 1) && !single(*middle);
    [half, half + 1, half.wrapping_sub(1)].into_iter().find(parts_none).unwrap_or(half)
}

/// Steps in their places. It is built from its end, as jumps go forward: a place is how many instructions there are from
/// it to the end.
struct Placed<'a> {
    nodes: &'a [Node],
    places: HashMap<NodeId, usize>,
    reversed: Vec<Instruction>,
}

impl<'a> Placed<'a> {
    fn new(nodes: &'a Nodes) -> Self {
        Self { nodes: &nodes.all, places: HashMap::new(), reversed: Vec::new() }
    }

    fn program(mut self, first: NodeId) -> Vec<Instruction> {
        self.place(first);
        self.reversed.reverse();
        self.reversed
    }

    fn place(&mut self, id: NodeId) -> usize {
        if let Some(place) = self.places.get(&id) {
            return *place;
        }
        let instruction = match self.nodes[id] {
            Node::Return { verdict } => Instruction::plain(RETURN, verdict),
            Node::Load { offset: value, then } | Node::And { mask: value, then } => {
                let place = self.place(then);
                if place != self.reversed.len() {
                    self.bring_near(then, place);
                }
                let code = if matches!(self.nodes[id], Node::Load { .. }) { LOAD } else { AND };
                Instruction::plain(code, value)
            }
            Node::Branch { code, value, if_true, if_false } => {
                let far = self.place(if_true);
                let near = self.place(if_false);
                // The second of the two may come to stand in between.
                let near = if self.over(near) >= 255 { self.bring_near(if_false, near) } else { near };
                let far = if self.over(far) > 255 { self.bring_near(if_true, far) } else { far };
                Instruction::jump_if(code, value, self.over(far) as u8, self.over(near) as u8)
            }
        };
        self.push(id, instruction)
    }

    /// Over how many instructions a jump from here to that place goes.
    fn over(&self, place: usize) -> usize {
        self.reversed.len() - place
    }

    /// Puts an answer here once more, or a jump to the step: conditional ones span 255 instructions.
    fn bring_near(&mut self, id: NodeId, place: usize) -> usize {
        let instruction = match self.nodes[id] {
            Node::Return { verdict } => Instruction::plain(RETURN, verdict),
            _ => Instruction::plain(JUMP, self.over(place) as u32),
        };
        self.push(id, instruction)
    }

    fn push(&mut self, id: NodeId, instruction: Instruction) -> usize {
        self.reversed.push(instruction);
        self.places.insert(id, self.reversed.len());
        self.reversed.len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::compile::compile_only;
    use super::super::profile::{Action, Argument, Comparison, Profile, Rule};
    use super::super::{default, tests::verdict};
    use super::*;
    use crate::security::capabilities;

    const ARCHITECTURES: [u32; 7] =
        [0xc000_003e, 0xc000_003d, 0xc000_003f, 0x4000_0003, 0xc000_00b7, 0, u32::MAX];

    /// Every call there is and those at the edges of what there can be, with arguments that profiles ask for.
    fn same_answers(long: &[u8], short: &[u8], arguments: &[[u64; 6]]) {
        let x32 = 0x4000_0000_u32;
        let edges = [x32 - 1, x32 + 1200, 0x7fff_ffff, 0x8000_0000, u32::MAX - 1, u32::MAX];
        for architecture in ARCHITECTURES {
            for number in (0..1200).chain(x32..x32 + 1200).chain(edges) {
                for arguments in arguments {
                    let before = verdict(long, architecture, number, arguments);
                    let after = verdict(short, architecture, number, arguments);
                    assert_eq!(before, after, "{architecture:#x} {number} {arguments:x?}");
                }
            }
        }
    }

    #[test]
    fn the_default_profile_answers_the_same_with_a_fourth_of_the_instructions() {
        // The whole words of flags, families and personalities, and with bits above and below them.
        let first = [0, 1, 2, 8, 11, 16, 38, 39, 40, 44, 0x0002_0000, 0x0002_0008, 0x003d_0f00, 0x0040_0000];
        let first =
            first.into_iter().chain([0x1000_0000, 0x7e02_0000, 0x8000_0000, 0xffff_ffff, u64::MAX, 1 << 32]);
        let arguments: Vec<[u64; 6]> = first.map(|first| [first, 0, 0, 0, 0, 0]).collect();
        for caps in [0, capabilities::DEFAULT, u64::MAX] {
            let long = compile_only(&default::profile(caps)).unwrap();
            let short = optimize(&long).unwrap();
            assert!(short.len() * 4 < long.len(), "{} of {} instructions", short.len() / 8, long.len() / 8);
            same_answers(&long, &short, &arguments);
        }
    }

    #[test]
    fn any_profile_answers_the_same() {
        let names = [
            "read",
            "write",
            "open",
            "clone",
            "socket",
            "socketcall",
            "bind",
            "ipc",
            "semop",
            "ioctl",
            "mmap",
            "fcntl",
            "fcntl64",
            "personality",
            "futex",
            "fchmodat2",
            "cachestat",
            "exit",
            "epoll_wait",
            "ptrace",
            "mount",
        ];
        let actions = [Action::Allow, Action::Errno(1), Action::Errno(38), Action::KillProcess, Action::Log];
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut some = |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % below
        };
        let mut checked = 0;
        for _ in 0..40 {
            let rules = (0..some(30)).map(|_| {
                let of = (0..=some(5)).map(|_| names[some(names.len())].to_owned()).collect();
                let arguments = (0..some(4)).map(|_| {
                    let value = [0, 1, 2, 7, 1 << 32, 0xffff_ffff][some(6)];
                    let comparison = match some(7) {
                        0 => Comparison::NotEqual(value),
                        1 => Comparison::Less(value),
                        2 => Comparison::LessOrEqual(value),
                        3 => Comparison::Equal(value),
                        4 => Comparison::GreaterOrEqual(value),
                        5 => Comparison::Greater(value),
                        _ => Comparison::MaskedEqual { mask: 3, value: value & 3 },
                    };
                    Argument { index: some(3) as u32, comparison }
                });
                let arguments = arguments.collect();
                Rule::new(of, actions[some(actions.len())], arguments)
            });
            let rules = rules.collect();
            let mut profile = Profile::native(actions[some(actions.len())], rules);
            profile.architectures = default::profile(0).architectures;
            // libseccomp refuses some contradictions.
            let Ok(long) = compile_only(&profile) else { continue };
            let short = bytes(&rewrite(&Instruction::all(&long)).expect("it is understood"));
            let values = [0, 1, 2, 3, 7, 8, 1 << 32, (1 << 32) + 1, 0xffff_ffff, u64::MAX];
            let arguments: Vec<[u64; 6]> =
                (0..5).map(|_| [0; 6].map(|_: u64| values[some(values.len())])).collect();
            same_answers(&long, &short, &arguments);
            checked += 1;
        }
        assert!(checked >= 15, "{checked} profiles");
    }

    #[test]
    fn a_jump_over_more_than_255_instructions_reaches_its_place() {
        // Calls whose arguments are compared with so many values that no conditional jump spans them all.
        let calls = ["mount", "umount2", "unshare", "setns", "bpf", "keyctl"];
        let rule = |(index, value): (usize, u64)| {
            let comparison = Comparison::Equal(100 * index as u64 + value);
            Rule::new(
                vec![calls[index].to_owned()],
                Action::Allow,
                vec![Argument { index: index as u32, comparison }],
            )
        };
        let mut profile = default::profile(0);
        profile.rules.extend((0..6).flat_map(|index| (0..60).map(move |value| (index, value))).map(rule));
        let long = compile_only(&profile).unwrap();
        let short = optimize(&long).expect("it is understood");
        assert!(short.len() / 8 > 300, "{}", short.len() / 8);
        let arguments = [0, 1, 59, 60, 100, 259, 300, 1 << 32].map(|value| [value; 6]);
        same_answers(&long, &short, &arguments);
    }

    /// A comparison whose two ways stand `between` instructions before it and `apart` from each other, in either order.
    #[test]
    fn conditional_jumps_reach_whatever_the_distance() {
        for (between, apart) in (240..=262).flat_map(|between| (1..4).map(move |apart| (between, apart))) {
            for true_is_nearer in [false, true] {
                let mut nodes = Nodes::default();
                let (one, two) =
                    (nodes.add(Node::Return { verdict: 1 }), nodes.add(Node::Return { verdict: 2 }));
                let equal = |value, if_true, if_false| Node::Branch { code: EQUAL, value, if_true, if_false };
                let below = nodes.add(equal(1, one, two));
                let masks = |nodes: &mut Nodes, count, mask, then| {
                    (0..count).fold(then, |then, _| nodes.add(Node::And { mask, then }))
                };
                // Sees the last four bits only.
                let above = masks(&mut nodes, apart, 0xf, below);
                let (if_true, if_false) = if true_is_nearer { (above, below) } else { (below, above) };
                let before = nodes.add(equal(2, if_true, if_false));
                let before = masks(&mut nodes, between, u32::MAX, before);
                let asked = nodes.add(equal(0x11, if_true, if_false));
                let both = nodes.add(equal(9, before, asked));
                let first = nodes.add(Node::Load { offset: NUMBER, then: both });
                let program = bytes(&Placed::new(&nodes).program(first));
                // Each would have the other answer on the other way.
                let expected = if true_is_nearer { [(0x11, 1), (0x21, 2)] } else { [(0x11, 2), (0x21, 1)] };
                for (number, expected) in expected {
                    assert_eq!(verdict(&program, 0, number, &[]), expected, "{between} {apart} {number:#x}");
                }
            }
        }
    }

    /// Prints what installing RuntimeDefault costs before and after; asserts nothing.
    #[test]
    #[ignore = "prints a time"]
    fn installing_a_filter() {
        let long = compile_only(&default::profile(capabilities::DEFAULT)).unwrap();
        let short = optimize(&long).unwrap();
        for program in [&long, &short].repeat(2) {
            let mut times: Vec<_> = (0..200)
                .map(|_| {
                    let program = program.clone();
                    // A filter is its thread's, and goes with it.
                    std::thread::spawn(move || {
                        hull_sys::privilege::set_no_new_privs().unwrap();
                        let begun = std::time::Instant::now();
                        hull_sys::privilege::install_seccomp(&program, 0).unwrap();
                        begun.elapsed()
                    })
                    .join()
                    .unwrap()
                })
                .collect();
            times.sort();
            println!("{} instructions: {:?} least, {:?} median", program.len() / 8, times[0], times[100]);
        }
    }

    #[test]
    fn what_is_not_understood_is_left_alone() {
        let allow = Instruction::plain(RETURN, 0x7fff_0000);
        let masked = [Instruction::load(NUMBER), Instruction::plain(AND, 1), allow, allow, allow, allow];
        assert_eq!(optimize(&bytes(&masked)), None);
        let store = [Instruction::load(NUMBER), Instruction::plain(0x02, 1), allow, allow, allow, allow];
        assert_eq!(optimize(&bytes(&store)), None);
        let nothing_loaded = [Instruction::jump_if(EQUAL, 0, 0, 0), allow, allow, allow, allow];
        assert_eq!(optimize(&bytes(&nothing_loaded)), None);
        let past_the_end = [Instruction::load(NUMBER), Instruction::jump_if(EQUAL, 0, 200, 0), allow];
        assert_eq!(optimize(&bytes(&past_the_end)), None);
        let open_end = [Instruction::load(NUMBER), Instruction::load(NUMBER)];
        assert_eq!(optimize(&bytes(&open_end)), None);
        assert_eq!(optimize(&[]), None);
        // A chain of comparisons of arguments that is too long to follow.
        let mut chain = vec![Instruction::load(16)];
        for value in 0..MAX_DEPTH + 10 {
            chain.push(Instruction::jump_if(EQUAL, value, 0, 1));
            chain.push(Instruction::plain(RETURN, value));
        }
        chain.push(allow);
        assert_eq!(optimize(&bytes(&chain)), None);
    }
}
