//! v2: device rules as a BPF program on the cgroup (cgroup-v2.rst, "Device controller"). [`assemble`] is pure.

use std::os::fd::AsFd;

use hull_sys::bpf;

use super::control::Control;
use super::devices::{Access, Kind, Rule};
use super::hierarchies::Version;
use super::{CgroupError, files};

/// Marks programs as ours, so that an update replaces just them.
const NAME: &str = "hull_devices";

/// One instruction, as bpf(2) takes it: opcode, registers, jump offset, immediate value.
type Instruction = u64;

/// Opcodes of linux/bpf.h and linux/bpf_common.h.
mod opcode {
    pub(super) const LOAD_U32: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
    pub(super) const MOVE: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
    pub(super) const MOVE_VALUE: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
    pub(super) const AND_VALUE: u8 = 0x57; // BPF_ALU64 | BPF_AND | BPF_K
    pub(super) const SHIFT_RIGHT: u8 = 0x77; // BPF_ALU64 | BPF_RSH | BPF_K
    // 32-bit comparisons (BPF_JMP32): a 64-bit one would sign-extend numbers of 2^31 and more.
    pub(super) const JUMP_IF_NOT_EQUAL: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
    pub(super) const JUMP_IF_EQUAL: u8 = 0x16; // BPF_JMP32 | BPF_JEQ | BPF_K
    pub(super) const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT
}

/// r0 is the verdict; r1 comes in as `struct bpf_cgroup_dev_ctx` and is scratch after the first four loads.
const VERDICT: u8 = 0;
const CONTEXT: u8 = 1;
const SCRATCH: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

fn instruction(opcode: u8, destination: u8, source: u8, offset: i16, value: u32) -> Instruction {
    // struct bpf_insn's two register fields are the low and the high half of a byte on little-endian machines and the
    // other way round on big-endian ones.
    let registers =
        if cfg!(target_endian = "little") { destination | source << 4 } else { destination << 4 | source };
    let [offset0, offset1] = offset.to_ne_bytes();
    let [value0, value1, value2, value3] = value.to_ne_bytes();
    u64::from_ne_bytes([opcode, registers, offset0, offset1, value0, value1, value2, value3])
}

/// The program for `rules`, of which the last that matches decides; none matching is a denial.
pub(super) fn assemble(rules: &[Rule]) -> Vec<Instruction> {
    use opcode::*;
    let mut program = vec![
        // access_type: the device's kind in the low 16 bits, what is wanted of it above; then major and minor.
        instruction(LOAD_U32, KIND, CONTEXT, 0, 0),
        instruction(MOVE, ACCESS, KIND, 0, 0),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(AND_VALUE, KIND, 0, 0, 0xffff),
        instruction(LOAD_U32, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_U32, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        append(&mut program, rule);
        if rule.is_total() {
            // The verifier refuses instructions that are never reached.
            return program;
        }
    }
    program.extend(verdict(false));
    program
}

fn verdict(allow: bool) -> [Instruction; 2] {
    [instruction(opcode::MOVE_VALUE, VERDICT, 0, 0, u32::from(allow)), instruction(opcode::EXIT, 0, 0, 0, 0)]
}

/// One rule: tests that jump past its verdict when they fail.
fn append(program: &mut Vec<Instruction>, rule: &Rule) {
    use opcode::*;
    /// A test: what it computes first, and the opcode, register and value of its jump.
    struct Test(Vec<Instruction>, u8, u8, u32);
    let mut tests = Vec::new();
    match rule.kind {
        Kind::Any => {}
        Kind::Block => tests.push(Test(vec![], JUMP_IF_NOT_EQUAL, KIND, 1)),
        Kind::Character => tests.push(Test(vec![], JUMP_IF_NOT_EQUAL, KIND, 2)),
    }
    if rule.access != Access::ALL {
        // To allow, all that is wanted must be in the rule; to deny, any of it.
        let (mask, jump) = if rule.allow {
            (Access::ALL.0 & !rule.access.0, JUMP_IF_NOT_EQUAL)
        } else {
            (rule.access.0, JUMP_IF_EQUAL)
        };
        let masked =
            vec![instruction(MOVE, SCRATCH, ACCESS, 0, 0), instruction(AND_VALUE, SCRATCH, 0, 0, mask)];
        tests.push(Test(masked, jump, SCRATCH, 0));
    }
    for (register, number) in [(MAJOR, rule.major), (MINOR, rule.minor)] {
        if let Some(number) = number {
            tests.push(Test(vec![], JUMP_IF_NOT_EQUAL, register, number));
        }
    }
    // From the last test to the first, each jump crosses what follows it.
    let mut tail: Vec<Instruction> = verdict(rule.allow).into();
    for Test(before, jump, register, value) in tests.into_iter().rev() {
        let past = tail.len() as i16; // at most two verdict and six test instructions
        tail.splice(0..0, before.into_iter().chain([instruction(jump, register, 0, past, value)]));
    }
    program.extend(tail);
}

pub(super) fn attach(control: &Control, rules: &[Rule]) -> Result<(), CgroupError> {
    let base = control.directory(Version::V2)?;
    let path = control.leaf_in(Version::V2).unwrap_or(".");
    let cgroup =
        files::open_directory(base, path).map_err(|error| control.failed("open the directory", error))?;
    let failed = |action: &'static str| move |error| control.failed(action, error);

    let attached = bpf::device_programs(cgroup.as_fd()).map_err(failed("list the device programs"))?;
    let ours = attached.iter().find(|one| one.name == NAME).map(|one| one.program.as_fd());
    if matches!(rules, [rule] if rule.is_total() && rule.allow) {
        return match ours {
            Some(old) => {
                bpf::detach_device_program(cgroup.as_fd(), old).map_err(failed("detach the device program"))
            }
            None => Ok(()),
        };
    }
    let program =
        bpf::load_device_program(&assemble(rules), NAME).map_err(failed("load the device program"))?;
    bpf::attach_device_program(cgroup.as_fd(), program.as_fd(), ours)
        .map_err(failed("attach the device program"))
}
