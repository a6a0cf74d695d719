//! The instructions of a filter, as the kernel takes them (Documentation/networking/filter.rst).

use super::profile::Action;

/// Offsets in struct seccomp_data (linux/seccomp.h).
pub(super) const NUMBER: u32 = 0;
pub(super) const ARCHITECTURE: u32 = 4;

/// Opcodes of linux/bpf_common.h that filters of system calls are made of.
pub(super) const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
pub(super) const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
pub(super) const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
pub(super) const EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
pub(super) const GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
pub(super) const GREATER_OR_EQUAL: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
pub(super) const ANY_BIT: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
pub(super) const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// struct sock_filter. A jump leads over that many instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    pub(super) code: u16,
    pub(super) if_true: u8,
    pub(super) if_false: u8,
    pub(super) value: u32,
}

impl Instruction {
    pub(super) const fn plain(code: u16, value: u32) -> Self {
        Self { code, if_true: 0, if_false: 0, value }
    }

    pub(super) const fn load(offset: u32) -> Self {
        Self::plain(LOAD, offset)
    }

    pub(super) const fn jump_if(code: u16, value: u32, if_true: u8, if_false: u8) -> Self {
        Self { code, if_true, if_false, value }
    }

    pub(super) fn verdict(action: Action) -> Self {
        Self::plain(RETURN, action.verdict())
    }

    pub(super) fn bytes(&self) -> [u8; 8] {
        let [code0, code1] = self.code.to_ne_bytes();
        let [value0, value1, value2, value3] = self.value.to_ne_bytes();
        [code0, code1, self.if_true, self.if_false, value0, value1, value2, value3]
    }

    /// The instructions of a program; what is left of less than eight bytes is no instruction.
    pub(super) fn all(program: &[u8]) -> Vec<Self> {
        let one = |bytes: &[u8; 8]| {
            let [code0, code1, if_true, if_false, value @ ..] = *bytes;
            Self {
                code: u16::from_ne_bytes([code0, code1]),
                if_true,
                if_false,
                value: u32::from_ne_bytes(value),
            }
        };
        program.as_chunks::<8>().0.iter().map(one).collect()
    }
}
