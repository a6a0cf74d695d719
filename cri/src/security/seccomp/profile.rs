//! A seccomp profile as data, independent of its file format and of the compiler.

use libseccomp::ScmpArch;

/// What happens to a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Allow,
    /// Allowed, and told to the audit log.
    Log,
    /// Fails with this errno.
    Errno(u16),
    /// SIGSYS.
    Trap,
    KillThread,
    KillProcess,
    /// Told to a tracer with this message; ENOSYS without one.
    Trace(u16),
}

impl Action {
    /// The filter's return value (linux/seccomp.h).
    pub(super) fn verdict(self) -> u32 {
        match self {
            Self::Allow => 0x7fff_0000,
            Self::Log => 0x7ffc_0000,
            Self::Trace(message) => 0x7ff0_0000 | u32::from(message),
            Self::Errno(errno) => 0x0005_0000 | u32::from(errno),
            Self::Trap => 0x0003_0000,
            Self::KillThread => 0,
            Self::KillProcess => 0x8000_0000,
        }
    }

    /// Whether the call takes place.
    pub(super) fn lets_pass(self) -> bool {
        matches!(self, Self::Allow | Self::Log | Self::Trace(_))
    }
}

/// A condition on one of the six arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Argument {
    /// 0 to 5.
    pub(super) index: u32,
    pub(super) comparison: Comparison,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    NotEqual(u64),
    Less(u64),
    LessOrEqual(u64),
    Equal(u64),
    GreaterOrEqual(u64),
    Greater(u64),
    /// The bits of `mask` are those of `value`.
    MaskedEqual {
        mask: u64,
        value: u64,
    },
}

/// What happens to some calls if all conditions hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) names: Vec<String>,
    pub(super) action: Action,
    pub(super) arguments: Vec<Argument>,
}

impl Rule {
    pub(super) fn new(names: Vec<String>, action: Action, arguments: Vec<Argument>) -> Self {
        Self { names, action, arguments }
    }

    /// The conditions as alternatives of conjunctions. Several conditions on one argument are alternatives, as runc
    /// has it (they could hardly hold together); otherwise all must hold.
    pub(super) fn alternatives(&self) -> Vec<Vec<Argument>> {
        let repeated = self
            .arguments
            .iter()
            .enumerate()
            .any(|(place, one)| self.arguments[..place].iter().any(|other| other.index == one.index));
        if repeated {
            self.arguments.iter().map(|one| vec![*one]).collect()
        } else {
            vec![self.arguments.clone()]
        }
    }
}

/// A whole profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Profile {
    /// For calls that no rule matches.
    pub(super) default: Action,
    /// Beside the machine's own.
    pub(super) architectures: Vec<ScmpArch>,
    pub(super) rules: Vec<Rule>,
    /// SECCOMP_FILTER_FLAG_* for seccomp(2).
    pub(super) flags: u32,
}

/// SECCOMP_FILTER_FLAG_LOG: tell the audit log of every action but Allow.
pub(super) const FLAG_LOG: u32 = 1 << 1;
/// SECCOMP_FILTER_FLAG_SPEC_ALLOW: no slower speculation for processes only because they have a filter.
pub(super) const FLAG_SPEC_ALLOW: u32 = 1 << 2;

impl Profile {
    /// A profile for this machine's architecture and the older ones that its processor also runs.
    pub(super) fn native(default: Action, rules: Vec<Rule>) -> Self {
        let architectures = match std::env::consts::ARCH {
            "x86_64" => vec![ScmpArch::X86, ScmpArch::X32],
            "aarch64" => vec![ScmpArch::Arm],
            _ => vec![],
        };
        // The same flag that runc sets for profiles that say nothing.
        Self { default, architectures, rules, flags: FLAG_SPEC_ALLOW }
    }
}
