//! Which CPUs client and server run on.

use std::fs;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// Placement of client and server. Left to itself the scheduler puts a single connection's two ends now on one CPU, now on
/// two, which differ by more than what is measured.
#[derive(Debug, Clone)]
pub(super) struct Pinning {
    allowed: CpuSet,
    first: CpuSet,
    second: CpuSet,
}

/// Where the two ends of a measurement run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Client and server share one CPU.
    Together,
    /// One CPU for the client, another for the server (the same one where there is no other).
    Apart,
    /// Wherever the scheduler likes.
    Anywhere,
}

impl Pinning {
    /// Takes the first two of the CPUs that this process may use.
    pub(super) fn choose() -> Result<Self> {
        let allowed = sched_getaffinity(Pid::from_raw(0)).context("sched_getaffinity")?;
        let mut cpus = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
        let first = cpus.next().context("no CPU to run on")?;
        let second = cpus.next().unwrap_or(first);
        Ok(Self { allowed, first: only(first)?, second: only(second)? })
    }

    /// Moves the calling thread (threads that it starts later follow) and all threads of the servers.
    pub(super) fn apply(&self, place: Place, server_pids: &[u32]) -> Result<()> {
        let (client, server) = match place {
            Place::Together => (&self.first, &self.first),
            Place::Apart => (&self.first, &self.second),
            Place::Anywhere => (&self.allowed, &self.allowed),
        };
        sched_setaffinity(Pid::from_raw(0), client).context("sched_setaffinity")?;
        for pid in server_pids {
            let tasks =
                fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("no process {pid}"))?;
            for task in tasks {
                let id = task?.file_name().to_string_lossy().parse().context("task id")?;
                sched_setaffinity(Pid::from_raw(id), server).context("sched_setaffinity of a server")?;
            }
        }
        Ok(())
    }
}

fn only(cpu: usize) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_runs_on_one_cpu_until_it_may_run_anywhere_again() {
        let pinning = Pinning::choose().unwrap();
        let cpus = || {
            let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
            (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap()).count()
        };
        let before = cpus();
        pinning.apply(Place::Together, &[]).unwrap();
        assert_eq!(cpus(), 1);
        pinning.apply(Place::Anywhere, &[]).unwrap();
        assert_eq!(cpus(), before);
    }
}
