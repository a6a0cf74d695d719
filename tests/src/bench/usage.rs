use super::{Options, Report, processes};

/// What a step costs beside its time: processor seconds of those who take part, and the daemon's peak memory.
pub struct Usage {
    daemon: Option<(u32, f64)>,
    registry: Option<(u32, f64)>,
    children: f64,
}

impl Usage {
    /// From now on; `daemon` is the runtime's process, if it has one.
    pub fn begin(options: &Options, daemon: Option<u32>) -> Usage {
        let now = |pid: u32| (pid, processes::cpu_seconds(pid));
        if let Some(pid) = daemon {
            processes::forget_peak(pid);
        }
        Usage {
            daemon: daemon.map(now),
            registry: options.registry_pid.map(now),
            children: processes::cpu_seconds(std::process::id()),
        }
    }

    /// Up to now. What this program's children cost counts for programs (`is_program`), its own work for nobody.
    pub fn end(self, report: &mut Report, name: &str, is_program: bool) {
        let since = |(pid, before): (u32, f64)| processes::cpu_seconds(pid) - before;
        let mut cpu = self.daemon.map_or(0.0, since);
        if is_program {
            cpu += since((std::process::id(), self.children));
        }
        report.add("processor time, its own (s)", name, cpu);
        if let Some(registry) = self.registry {
            report.add("processor time, the registry's (s)", name, since(registry));
        }
        if let Some(peak) = self.daemon.and_then(|(pid, _)| processes::peak_mib(pid)) {
            report.add("peak resident memory of the daemon (MiB)", name, peak);
        }
    }
}
