//! CPU time of the machine and of single processes around a run.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

/// CPU time in microseconds, as three clocks saw it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CpuUse {
    /// Busy time of all CPUs by `/proc/stat` (user, nice, system, irq, softirq). It is counted in
    /// ticks of 10 ms, by sampling on kernels without precise accounting.
    pub machine_tick_us: f64,
    /// Time that tasks ran on all CPUs, exact to the nanosecond (softirq work counts where it
    /// interrupts a task, not where it interrupts the idle loop). See [`CpuUse::machine_run_source`].
    pub machine_run_us: f64,
    /// Where `machine_run_us` comes from: the best that this kernel offers.
    pub machine_run_source: RunSource,
    /// User and system time of this process, from getrusage(2).
    pub self_us: f64,
    /// Run time of the watched processes with all their threads, from `/proc/PID/task/*/schedstat`.
    pub watched_us: f64,
}

/// A clock of the whole machine's run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunSource {
    /// `/proc/schedstat`, seventh number of each `cpuN` line (kernels with CONFIG_SCHEDSTATS).
    Schedstat,
    /// `cpuacct.usage` of the cgroup v1 root.
    Cpuacct,
    /// Neither is there: the ticks of `/proc/stat`.
    Ticks,
}

/// Readings at the start of a run.
#[derive(Debug)]
pub struct CpuClock {
    watched_pids: Vec<u32>,
    start: CpuUse,
}

impl CpuClock {
    /// Reads all clocks.
    ///
    /// # Errors
    /// When /proc does not have them, or a watched process does not run.
    pub fn start(watched_pids: &[u32]) -> Result<Self> {
        Ok(Self { watched_pids: watched_pids.to_vec(), start: read(watched_pids)? })
    }

    /// Time used since the start.
    ///
    /// # Errors
    /// As [`CpuClock::start`].
    pub fn stop(&self) -> Result<CpuUse> {
        let (end, start) = (read(&self.watched_pids)?, self.start);
        Ok(CpuUse {
            machine_tick_us: end.machine_tick_us - start.machine_tick_us,
            machine_run_us: end.machine_run_us - start.machine_run_us,
            machine_run_source: end.machine_run_source,
            self_us: end.self_us - start.self_us,
            watched_us: end.watched_us - start.watched_us,
        })
    }
}

fn read(watched_pids: &[u32]) -> Result<CpuUse> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
    let micros = |time: nix::sys::time::TimeVal| -> Result<f64> {
        Ok(Duration::new(u64::try_from(time.tv_sec())?, u32::try_from(time.tv_usec())? * 1000).as_secs_f64()
            * 1e6)
    };
    let mut watched_us = 0.0;
    for pid in watched_pids {
        watched_us += process_run_us(*pid)?;
    }
    let machine_tick_us = machine_tick_us()?;
    let (machine_run_us, machine_run_source) = if let Some(run) = schedstat_run_us() {
        (run, RunSource::Schedstat)
    } else if let Some(run) = cpuacct_run_us() {
        (run, RunSource::Cpuacct)
    } else {
        (machine_tick_us, RunSource::Ticks)
    };
    Ok(CpuUse {
        machine_tick_us,
        machine_run_us,
        machine_run_source,
        self_us: micros(usage.user_time())? + micros(usage.system_time())?,
        watched_us,
    })
}

/// Fields of the first line of proc_stat(5): user nice system idle iowait irq softirq.
fn machine_tick_us() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<f64> = line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    let busy: f64 = [0, 1, 2, 5, 6].iter().filter_map(|index| ticks.get(*index)).sum();
    // SAFETY: sysconf(3) only reads a constant of the system.
    let per_second = u32::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) })?;
    Ok(busy * 1e6 / f64::from(per_second.max(1)))
}

/// Documentation/scheduler/sched-stats.rst: nanoseconds that tasks ran.
fn schedstat_run_us() -> Option<f64> {
    let text = fs::read_to_string("/proc/schedstat").ok()?;
    let of_cpu = |line: &str| -> Option<f64> { line.split(' ').nth(7)?.parse().ok() };
    Some(text.lines().filter(|line| line.starts_with("cpu")).filter_map(of_cpu).sum::<f64>() / 1e3)
}

/// Documentation/admin-guide/cgroup-v1/cpuacct.rst: nanoseconds, of all tasks at the root.
fn cpuacct_run_us() -> Option<f64> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let root = mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let accounts = *fields.get(2)? == "cgroup" && fields.get(3)?.split(',').any(|name| name == "cpuacct");
        accounts.then(|| fields.get(1).copied()).flatten()
    })?;
    Some(fs::read_to_string(format!("{root}/cpuacct.usage")).ok()?.trim().parse::<f64>().ok()? / 1e3)
}

fn process_run_us(pid: u32) -> Result<f64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("no process {pid}"))?;
    let mut sum_ns = 0.0;
    for task in tasks.flatten() {
        // A thread may end between the listing and the read.
        let Ok(text) = fs::read_to_string(task.path().join("schedstat")) else { continue };
        sum_ns += text.split(' ').next().and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    }
    Ok(sum_ns / 1e3)
}
