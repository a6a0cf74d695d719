//! From a profile to the BPF program that the kernel runs at each system call.
//!
//! libseccomp compiles what it knows. In front of its program stands a short one of our own, which decides calls that
//! are younger than libseccomp (see `recent`) and answers ENOSYS to calls that are younger than the whole profile:
//! libraries take that, and not EPERM, as the word to use an older call. (runc does the latter too.)

use std::io::{Read, Seek};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use rustix::fs::{MemfdFlags, memfd_create};

use super::optimize::optimize;
use super::profile::{Action, Argument, Comparison, Profile, Rule};
use super::prologue::Prologue;
use super::{Program, SeccompError};

/// BPF_MAXINSNS, in bytes of struct sock_filter.
const MAX_PROGRAM: usize = 4096 * 8;

/// Compiles a profile.
pub(super) fn compile(profile: &Profile) -> Result<Program, SeccompError> {
    let long = compile_only(profile)?;
    let bpf = optimize(&long).unwrap_or(long);
    if bpf.len() > MAX_PROGRAM {
        return Err(SeccompError::TooLong(bpf.len() / 8));
    }
    Ok(Program { bpf, flags: profile.flags })
}

/// The prologue and libseccomp's program.
pub(super) fn compile_only(profile: &Profile) -> Result<Vec<u8>, SeccompError> {
    let mut filter =
        ScmpFilterContext::new(scmp(profile.default)).map_err(|error| failed("start the filter", error))?;
    for arch in &profile.architectures {
        add_architecture(&mut filter, *arch)?;
    }
    // A binary search over the calls in place of a comparison with each; the order of 350 calls matters to programs.
    filter.set_ctl_optimize(2).map_err(|error| failed("ask for a binary search", error))?;

    let mut prologue = Prologue::new(profile);
    for rule in &profile.rules {
        for name in &rule.names {
            match ScmpSyscall::from_name(name) {
                Ok(call) => add_rule(&mut filter, profile.default, rule, name, call)?,
                // Profiles are written for many machines: a call that nobody here knows is left out.
                Err(_) => prologue.add_recent(rule, name),
            }
            prologue.mention(name);
        }
    }
    let mut bpf = prologue.assemble();
    bpf.extend(export(&filter)?);
    Ok(bpf)
}

fn add_architecture(filter: &mut ScmpFilterContext, arch: ScmpArch) -> Result<(), SeccompError> {
    let present =
        filter.is_arch_present(arch).map_err(|error| failed(&format!("look for {arch:?}"), error))?;
    if !present {
        filter.add_arch(arch).map_err(|error| failed(&format!("add the architecture {arch:?}"), error))?;
    }
    Ok(())
}

fn add_rule(
    filter: &mut ScmpFilterContext,
    default: Action,
    rule: &Rule,
    name: &str,
    call: ScmpSyscall,
) -> Result<(), SeccompError> {
    // libseccomp refuses a rule that changes nothing.
    if rule.action == default {
        return Ok(());
    }
    for arguments in rule.alternatives() {
        let conditions: Vec<ScmpArgCompare> = arguments.iter().map(condition).collect();
        let added = if conditions.is_empty() {
            filter.add_rule(scmp(rule.action), call)
        } else {
            filter.add_rule_conditional(scmp(rule.action), call, &conditions)
        };
        added.map_err(|error| failed(&format!("add the rule for {name}"), error))?;
    }
    Ok(())
}

fn scmp(action: Action) -> ScmpAction {
    match action {
        Action::Allow => ScmpAction::Allow,
        Action::Log => ScmpAction::Log,
        Action::Errno(errno) => ScmpAction::Errno(i32::from(errno)),
        Action::Trap => ScmpAction::Trap,
        Action::KillThread => ScmpAction::KillThread,
        Action::KillProcess => ScmpAction::KillProcess,
        Action::Trace(message) => ScmpAction::Trace(message),
    }
}

fn condition(argument: &Argument) -> ScmpArgCompare {
    let (operator, value) = match argument.comparison {
        Comparison::NotEqual(value) => (ScmpCompareOp::NotEqual, value),
        Comparison::Less(value) => (ScmpCompareOp::Less, value),
        Comparison::LessOrEqual(value) => (ScmpCompareOp::LessOrEqual, value),
        Comparison::Equal(value) => (ScmpCompareOp::Equal, value),
        Comparison::GreaterOrEqual(value) => (ScmpCompareOp::GreaterEqual, value),
        Comparison::Greater(value) => (ScmpCompareOp::Greater, value),
        Comparison::MaskedEqual { mask, value } => (ScmpCompareOp::MaskedEqual(mask), value),
    };
    ScmpArgCompare::new(argument.index, operator, value)
}

/// libseccomp 2.5 writes its program only to a descriptor.
fn export(filter: &ScmpFilterContext) -> Result<Vec<u8>, SeccompError> {
    let memory =
        memfd_create("seccomp", MemfdFlags::CLOEXEC).map_err(|errno| SeccompError::Memory(errno.into()))?;
    filter.export_bpf(&memory).map_err(|error| failed("write the program", error))?;
    let mut memory = std::fs::File::from(memory);
    let mut bpf = Vec::new();
    memory.rewind().and_then(|()| memory.read_to_end(&mut bpf)).map_err(SeccompError::Memory)?;
    Ok(bpf)
}

fn failed(action: &str, error: libseccomp::error::SeccompError) -> SeccompError {
    SeccompError::Compile { action: action.to_owned(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::super::default;
    use super::*;
    use crate::security::capabilities;

    #[test]
    fn the_default_profile_compiles_for_every_set_of_capabilities() {
        for caps in [0, capabilities::DEFAULT, u64::MAX] {
            let program = compile(&default::profile(caps)).unwrap();
            assert_eq!(program.bpf.len() % 8, 0);
            assert!(program.bpf.len() / 8 > 50 && program.bpf.len() <= MAX_PROGRAM);
        }
    }

    #[test]
    fn unknown_calls_are_left_out_and_repeated_rules_do_no_harm() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let rules = vec![
            Rule::new(names(&["read", "call_of_another_machine", "read"]), Action::Allow, vec![]),
            Rule::new(names(&["read"]), Action::Allow, vec![]),
            Rule::new(names(&["write"]), Action::Errno(1), vec![]),
        ];
        compile(&Profile::native(Action::Errno(1), rules)).unwrap();
    }
}
