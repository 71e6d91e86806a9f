//! Where requests come from that have no grant, and what they are charged.

use aya::maps::MapError;
use enforcer_common::abi::{Origin, Source, SourceKey, map};
use enforcer_common::limit::admit;

use super::{LiveError, Maps};

impl Maps {
    /// Charges a request that the kernel does not know to where it comes from, as the kernel does. What the kernel charges there, for whatever,
    /// at this very moment may be forgotten.
    ///
    /// # Errors
    /// It is over the limit, for so many nanoseconds; what can't be read or written refuses.
    pub fn charge_source(&mut self, origin: &Origin, now_ns: u64) -> Result<(), u64> {
        const NEVER_NS: u64 = u64::MAX;
        let config = self.live.configuration().map_err(|_| NEVER_NS)?;
        let mut key = SourceKey::of(origin);
        if let Ok(named) = self.live.named.get(&origin.cgroup_id(), 0) {
            key.cgroup_id = named;
        }
        let mut source = match self.live.sources.get(&key, 0) {
            Ok(source) => source,
            Err(MapError::KeyNotFound) => {
                Source { unknown_tat_ns: 0, refused_tat_ns: 0, answered_tat_ns: 0, limited: 0 }
            }
            Err(_) => return Err(NEVER_NS),
        };
        let (interval_ns, burst_ns) = (config.unknown_interval_ns, config.unknown_burst_ns);
        let charged = admit(source.unknown_tat_ns, now_ns, interval_ns, burst_ns);
        match charged {
            Ok(next_ns) if next_ns == source.unknown_tat_ns => return Ok(()),
            Ok(next_ns) => source.unknown_tat_ns = next_ns,
            Err(_) => source.limited += 1,
        }
        self.live.sources.insert(key, source, 0).map_err(|_| NEVER_NS)?;
        charged.map(|_| ())
    }

    /// Makes a cgroup part of the source that the one around it is which has its workload's name. Whether it was not before: what the
    /// kernel has charged then was another.
    ///
    /// # Errors
    /// See [`LiveError`]; it stays what it was.
    pub fn name_source(&mut self, cgroup_id: u64, named: u64) -> Result<bool, LiveError> {
        let before = self.live.named.get(&cgroup_id, 0).unwrap_or(cgroup_id);
        if before == named {
            return Ok(false);
        }
        let failed = |source| LiveError::Map { name: map::NAMED, source };
        self.live.named.insert(cgroup_id, named, 0).map_err(failed)?;
        Ok(true)
    }
}
