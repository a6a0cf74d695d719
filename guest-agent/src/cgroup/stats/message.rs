//! Usage and limits as the protocol tells them: what an agent in a guest measures is the same to hulld as what hulld
//! reads itself.

use super::{
    Cpu, CpuLimits, DeviceIo, Hugepages, Limits, Memory, MemoryLimits, Pressure, Stall, Stalls, Usage,
};
use crate::protocol::messages::{CgroupUsage, cgroup_usage};

impl CgroupUsage {
    /// The message.
    pub fn new(usage: &Usage, limits: &Limits) -> Self {
        let Limits { cpu, memory } = limits;
        Self {
            cpu: usage.cpu.map(cgroup_usage::Cpu::from),
            memory: usage.memory.map(cgroup_usage::Memory::from),
            hugepages: usage.hugepages.iter().map(cgroup_usage::Hugepages::from).collect(),
            io: usage.io.iter().map(|io| cgroup_usage::DeviceIo::from(*io)).collect(),
            tasks: usage.tasks,
            tasks_limit: usage.tasks_limit,
            cpu_pressure: usage.pressure.cpu.map(cgroup_usage::Stalls::from),
            memory_pressure: usage.pressure.memory.map(cgroup_usage::Stalls::from),
            io_pressure: usage.pressure.io.map(cgroup_usage::Stalls::from),
            cpu_shares: cpu.shares,
            cpu_quota: cpu.quota,
            cpu_period: cpu.period,
            memory_limit: memory.memory,
            swap_limit: memory.swap,
            swap_limit_as_written: memory.swap_as_written,
            memory_reservation: memory.reservation,
        }
    }

    /// What it says was used.
    pub fn usage(&self) -> Usage {
        Usage {
            cpu: self.cpu.map(Cpu::from),
            memory: self.memory.map(Memory::from),
            hugepages: self.hugepages.iter().map(Hugepages::from).collect(),
            io: self.io.iter().map(|io| DeviceIo::from(*io)).collect(),
            tasks: self.tasks,
            tasks_limit: self.tasks_limit,
            pressure: Pressure {
                cpu: self.cpu_pressure.map(Stalls::from),
                memory: self.memory_pressure.map(Stalls::from),
                io: self.io_pressure.map(Stalls::from),
            },
        }
    }

    /// The limits it tells.
    pub const fn limits(&self) -> Limits {
        Limits {
            cpu: CpuLimits { shares: self.cpu_shares, quota: self.cpu_quota, period: self.cpu_period },
            memory: MemoryLimits {
                memory: self.memory_limit,
                swap: self.swap_limit,
                swap_as_written: self.swap_limit_as_written,
                reservation: self.memory_reservation,
            },
        }
    }
}

/// Two structs with the same fields, each made from the other.
macro_rules! alike {
    ($ours:ident, $message:ident { $($field:ident),* }) => {
        impl From<$ours> for cgroup_usage::$message {
            fn from(ours: $ours) -> Self {
                let $ours { $($field),* } = ours;
                Self { $($field),* }
            }
        }

        impl From<cgroup_usage::$message> for $ours {
            fn from(message: cgroup_usage::$message) -> Self {
                let cgroup_usage::$message { $($field),* } = message;
                Self { $($field),* }
            }
        }
    };
}

alike!(Cpu, Cpu { usage, user, system, periods, throttled_periods, throttled });
alike!(
    Memory,
    Memory {
        usage,
        max_usage,
        working_set,
        rss,
        cache,
        mapped_file,
        kernel,
        swap,
        faults,
        major_faults,
        own_faults,
        own_major_faults,
        limit_hits,
        oom_kills
    }
);
alike!(DeviceIo, DeviceIo { major, minor, read_bytes, written_bytes, reads, writes });
alike!(Stall, Stall { total, average_10, average_60, average_300 });

impl From<&Hugepages> for cgroup_usage::Hugepages {
    fn from(ours: &Hugepages) -> Self {
        Self { size: ours.size.clone(), usage: ours.usage, max_usage: ours.max_usage }
    }
}

impl From<&cgroup_usage::Hugepages> for Hugepages {
    fn from(message: &cgroup_usage::Hugepages) -> Self {
        Self { size: message.size.clone(), usage: message.usage, max_usage: message.max_usage }
    }
}

impl From<Stalls> for cgroup_usage::Stalls {
    fn from(ours: Stalls) -> Self {
        Self { some: Some(ours.some.into()), full: Some(ours.full.into()) }
    }
}

impl From<cgroup_usage::Stalls> for Stalls {
    fn from(message: cgroup_usage::Stalls) -> Self {
        let part = |stall: Option<cgroup_usage::Stall>| stall.unwrap_or_default().into();
        Self { some: part(message.some), full: part(message.full) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    #[test]
    fn what_is_told_is_what_was_measured() {
        let stalls =
            Stalls { some: Stall { total: 5, average_10: 1.5, ..Stall::default() }, ..Stalls::default() };
        let usage = Usage {
            cpu: Some(Cpu { usage: 1, throttled: 2, ..Cpu::default() }),
            memory: Some(Memory { usage: 3, swap: Some(0), oom_kills: 4, ..Memory::default() }),
            hugepages: vec![Hugepages { size: "2MB".into(), usage: 7, max_usage: None }],
            io: vec![DeviceIo { major: 254, minor: 16, read_bytes: 9, ..DeviceIo::default() }],
            tasks: Some(0),
            tasks_limit: None,
            pressure: Pressure { io: Some(stalls), ..Pressure::default() },
        };
        let limits = Limits {
            cpu: CpuLimits { shares: Some(2), ..CpuLimits::default() },
            memory: MemoryLimits { memory: Some(1 << 40), swap: Some(0), ..MemoryLimits::default() },
        };
        let bytes = CgroupUsage::new(&usage, &limits).encode_to_vec();
        let told = CgroupUsage::decode(&*bytes).unwrap();
        assert_eq!((told.usage(), told.limits()), (usage, limits));
    }
}
