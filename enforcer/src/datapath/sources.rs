//! Where requests come from that have no grant, and what they are charged.

use aya::maps::MapError;
use enforcer_common::abi::{Source, SourceKey, map};
use enforcer_common::limit::admit;

use super::buckets::UNREADABLE_NS;
use super::{LiveError, Maps};

impl Maps {
    /// Charges a request that the kernel does not know to where it comes from, as the kernel does. What the kernel charges there, for whatever,
    /// at this very moment may be forgotten.
    ///
    /// # Errors
    /// It is over the limit, for so many nanoseconds; what can't be read or written refuses.
    pub fn charge_source(&mut self, key: &SourceKey, now_ns: u64) -> Result<(), u64> {
        let config = self.live.configuration().map_err(|_| UNREADABLE_NS)?;
        let mut source = match self.live.sources.get(key, 0) {
            Ok(source) => source,
            Err(MapError::KeyNotFound) => {
                Source { unknown_tat_ns: 0, refused_tat_ns: 0, answered_tat_ns: 0, limited: 0 }
            }
            Err(_) => return Err(UNREADABLE_NS),
        };
        let (interval_ns, burst_ns) = (config.unknown_interval_ns, config.unknown_burst_ns);
        let charged = admit(source.unknown_tat_ns, now_ns, interval_ns, burst_ns);
        match charged {
            Ok(next_ns) if next_ns == source.unknown_tat_ns => return Ok(()),
            Ok(next_ns) => source.unknown_tat_ns = next_ns,
            Err(_) => source.limited += 1,
        }
        self.live.sources.insert(key, source, 0).map_err(|_| UNREADABLE_NS)?;
        charged.map(|_| ())
    }

    /// Makes a cgroup part of the source that another is: the one around it which has its workload's name.
    ///
    /// # Errors
    /// See [`LiveError`]; it stays a source of its own.
    pub fn name_source(&mut self, cgroup_id: u64, named: u64) -> Result<(), LiveError> {
        if self.live.named.get(&cgroup_id, 0).unwrap_or(cgroup_id) == named {
            return Ok(());
        }
        let failed = |source| LiveError::Map { name: map::NAMED, source };
        self.live.named.insert(cgroup_id, named, 0).map_err(failed)
    }
}
