//! What the maps cost in kernel memory, as the kernel itself counts it.

use std::os::fd::{AsFd, AsRawFd};

use aya::maps::{MapData, MapError};
use enforcer_common::abi::map;

use super::{LiveError, PinDir};

/// Kernel memory of one map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapMemory {
    /// The map.
    pub name: &'static str,
    /// Bytes that it holds now (`memlock` in bpf(2)'s fdinfo). Only a socket map grows with its use; all others are allocated whole
    /// when they are made.
    pub bytes: u64,
}

/// Kernel memory of every map of a loaded enforcement, the largest first.
///
/// # Errors
/// A map can't be opened, or the kernel does not say.
pub fn map_memory(pins: &PinDir) -> Result<Vec<MapMemory>, LiveError> {
    let mut maps = map::ALL.iter().map(|&name| of(pins, name)).collect::<Result<Vec<_>, _>>()?;
    maps.sort_by(|a, b| b.bytes.cmp(&a.bytes).then(a.name.cmp(b.name)));
    Ok(maps)
}

fn of(pins: &PinDir, name: &'static str) -> Result<MapMemory, LiveError> {
    let failed = |source| LiveError::Map { name, source };
    let map = MapData::from_pin(pins.pin(name)).map_err(failed)?;
    let path = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let text = std::fs::read_to_string(path).map_err(|error| failed(MapError::IoError(error)))?;
    let bytes = memlock(&text).ok_or_else(|| {
        failed(MapError::IoError(std::io::Error::other("the kernel does not say how much memory it holds")))
    })?;
    Ok(MapMemory { name, bytes })
}

/// The figure in a map's fdinfo.
fn memlock(fdinfo: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figure_is_found_or_missed_but_never_guessed() {
        assert_eq!(memlock("pos:\t0\nmap_type:\t1\nmemlock:\t5246976\nmap_id:\t7\n"), Some(5_246_976));
        assert_eq!(memlock("pos:\t0\nmap_id:\t7\n"), None);
        assert_eq!(memlock("memlock:\tmuch\n"), None);
    }
}
