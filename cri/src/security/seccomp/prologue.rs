//! The short program in front of libseccomp's: calls that libseccomp is too old to know, and calls that the profile is
//! too old to know.

use libseccomp::{ScmpArch, ScmpSyscall};

use super::instruction::{ARCHITECTURE, EQUAL, GREATER, GREATER_OR_EQUAL, Instruction, JUMP, NUMBER};
use super::profile::{Action, Profile, Rule};
use super::recent;

const ENOSYS: u16 = 38;

/// Bit of the x32 calls' numbers. Those, and the −1 of a call that a tracer skips, are libseccomp's to judge.
const X32: u32 = 0x4000_0000;

/// Collects, while a profile is compiled, what is decided before libseccomp's program.
pub(super) struct Prologue {
    default: Action,
    /// Number and action of each call that libseccomp does not know.
    recent: Vec<(u32, Action)>,
    architectures: Vec<Architecture>,
}

struct Architecture {
    arch: ScmpArch,
    /// `AUDIT_ARCH_*` (linux/audit.h).
    token: u32,
    /// The highest number among the calls that the profile mentions.
    highest: u32,
}

impl Prologue {
    pub(super) fn new(profile: &Profile) -> Self {
        let mut architectures: Vec<Architecture> = Vec::new();
        for arch in [ScmpArch::native()].into_iter().chain(profile.architectures.iter().copied()) {
            let Some(token) = audit_token(arch) else { continue };
            if !architectures.iter().any(|known| known.token == token) {
                architectures.push(Architecture { arch, token, highest: 0 });
            }
        }
        Self { default: profile.default, recent: Vec::new(), architectures }
    }

    /// A call that libseccomp does not know. Arguments are not looked at here, so a rule with conditions counts only
    /// if it restricts. The first rule for a call wins.
    pub(super) fn add_recent(&mut self, rule: &Rule, name: &str) {
        let conditional = !rule.arguments.is_empty();
        if rule.action == self.default || (conditional && rule.action.lets_pass()) {
            return;
        }
        let Some(number) = recent::number_of(name) else { return };
        if !self.recent.iter().any(|(known, _)| *known == number) {
            self.recent.push((number, rule.action));
        }
    }

    /// Remembers how young a call the profile's author knew of.
    pub(super) fn mention(&mut self, name: &str) {
        let recent = recent::number_of(name);
        for one in &mut self.architectures {
            let known = || {
                let call = ScmpSyscall::from_name_by_arch(name, one.arch).ok()?;
                // Negative: a call that this architecture does not have.
                u32::try_from(call.as_raw_syscall()).ok()
            };
            if let Some(number) = recent.or_else(known) {
                one.highest = one.highest.max(number);
            }
        }
    }

    /// The program's bytes (struct sock_filter). It ends by running on into what stands after it.
    pub(super) fn assemble(&self) -> Vec<u8> {
        let mut sections: Vec<(u32, Vec<Instruction>)> = self
            .architectures
            .iter()
            .filter_map(|one| Some((one.token, self.decisions(one.highest)?)))
            .collect();
        if sections.is_empty() {
            return Vec::new();
        }
        let mut program = vec![Instruction::load(ARCHITECTURE)];
        // One for the test of the architecture before, one for the way out after.
        let mut left: usize = sections.iter().map(|(_, decisions)| decisions.len() + 2).sum();
        for (token, decisions) in &mut sections {
            left -= decisions.len() + 2;
            let length = decisions.len() as u8 + 1;
            program.push(Instruction::jump_if(EQUAL, *token, 0, length));
            program.append(decisions);
            program.push(Instruction::plain(JUMP, left as u32));
        }
        program.iter().flat_map(Instruction::bytes).collect()
    }

    /// What is decided for one architecture; whatever is not goes past the last instruction. Two for each recent call
    /// and five more: far fewer than the 255 that a conditional jump spans.
    fn decisions(&self, highest: u32) -> Option<Vec<Instruction>> {
        let too_young = !self.default.lets_pass() && self.default != Action::Errno(ENOSYS) && highest > 0;
        let first_recent = self.recent.iter().map(|(number, _)| *number).min();
        let first_decided = first_recent.into_iter().chain(too_young.then_some(highest + 1)).min()?;

        let mut tail = Vec::new();
        for (number, action) in &self.recent {
            tail.push(Instruction::jump_if(EQUAL, *number, 0, 1));
            tail.push(Instruction::verdict(*action));
        }
        if too_young {
            tail.push(Instruction::jump_if(GREATER, highest, 0, 1));
            tail.push(Instruction::verdict(Action::Errno(ENOSYS)));
        }
        let past = tail.len() as u8;
        let mut decisions = vec![
            Instruction::load(NUMBER),
            Instruction::jump_if(GREATER_OR_EQUAL, X32, past + 1, 0),
            // Nearly every call goes this way.
            Instruction::jump_if(GREATER_OR_EQUAL, first_decided, 0, past),
        ];
        decisions.append(&mut tail);
        Some(decisions)
    }
}

/// Architectures whose numbers `recent` describes and that hull's profiles name.
fn audit_token(arch: ScmpArch) -> Option<u32> {
    match arch {
        ScmpArch::X8664 => Some(0xc000_003e),
        ScmpArch::X86 => Some(0x4000_0003),
        ScmpArch::Aarch64 => Some(0xc000_00b7),
        ScmpArch::Arm => Some(0x4000_0028),
        _ => None,
    }
}
