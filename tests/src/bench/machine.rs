//! Where the benchmark ran.

use std::fs;

use anyhow::{Context, Result};
use nix::sys::utsname::uname;
use serde::Serialize;

/// What a reader needs to know to compare figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Machine {
    /// First `model name` of `/proc/cpuinfo`; the architecture where there is none.
    pub cpu_model: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Whether the CPU says that it is a virtual machine's.
    pub virtual_machine: bool,
    /// `MemTotal` of `/proc/meminfo`, in MiB.
    pub memory_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// `net.core.bpf_jit_enable`.
    pub bpf_jit: Option<u8>,
    /// Mean number of runnable tasks in the minute before the start: above 0.2 or so, something else was running.
    pub load_average: f64,
}

impl Machine {
    /// Reads `/proc`.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn describe() -> Result<Self> {
        let system = uname()?;
        let cpuinfo = read("/proc/cpuinfo")?;
        let architecture = system.machine().to_string_lossy().into_owned();
        let flags = field(&cpuinfo, "flags").unwrap_or_default();
        let memory = read("/proc/meminfo")?;
        let load = read("/proc/loadavg")?;
        Ok(Self {
            cpu_model: field(&cpuinfo, "model name").map_or(architecture, str::to_owned),
            cpus: std::thread::available_parallelism()?.get(),
            virtual_machine: flags.split(' ').any(|flag| flag == "hypervisor"),
            memory_mib: field(&memory, "MemTotal")
                .and_then(|value| value.strip_suffix(" kB")?.parse::<u64>().ok())
                .context("no MemTotal in /proc/meminfo")?
                / 1024,
            kernel: system.release().to_string_lossy().into_owned(),
            // Not there on kernels that always compile.
            bpf_jit: fs::read_to_string("/proc/sys/net/core/bpf_jit_enable")
                .ok()
                .and_then(|text| text.trim().parse().ok()),
            load_average: load
                .split(' ')
                .next()
                .and_then(|text| text.parse().ok())
                .context("no number in /proc/loadavg")?,
        })
    }

    /// In one line.
    #[must_use]
    pub fn line(&self) -> String {
        let kind = if self.virtual_machine { " (virtual machine)" } else { "" };
        format!(
            "{}, {} CPUs{kind}, {} MiB; Linux {}; load average at the start {:.2}",
            self.cpu_model, self.cpus, self.memory_mib, self.kernel, self.load_average
        )
    }
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {path}"))
}

/// Value of the first `name : value` line.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
}
