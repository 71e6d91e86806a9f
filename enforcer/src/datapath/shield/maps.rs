//! The shield's maps.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::Pod;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuHashMap, PerCpuValues};
use aya::util::nr_cpus;
use enforcer_common::abi::{
    EndpointKey, MAX_SHIELD_FAILING, MAX_SHIELD_PREFIXES, SHIELD_EXEMPT, SHIELD_NONE, SHIELD_REASONS,
    ShieldConfig, ShieldFailing, ShieldInterface, ShieldKey, ShieldPrefix, map, text, text_str,
};
use enforcer_common::shield::source;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::super::maps::open;
use super::super::{LiveError, PinDir};
use crate::core::endpoint_keys;
use crate::policy::{Policy, Rate};

/// A prefix and what is said of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// The prefix.
    pub network: IpNet,
    /// What is said.
    pub entry: ShieldPrefix,
}

/// A source whose requests were refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failing {
    /// See [`source::key`].
    pub network: IpNet,
    /// What is known of it.
    pub entry: ShieldFailing,
}

/// An interface under the shield.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name when the program was attached.
    pub name: String,
    /// The driver runs the program.
    pub native: bool,
    /// Dropped packets by reason.
    pub drops: [u64; SHIELD_REASONS],
}

/// The shield's maps, as far as anybody but its program uses them.
pub struct ShieldMaps {
    config: Array<MapData, ShieldConfig>,
    addresses: HashMap<MapData, EndpointKey, u32>,
    failing: HashMap<MapData, ShieldKey, ShieldFailing>,
    v4: LpmTrie<MapData, [u8; 4], ShieldPrefix>,
    v6: LpmTrie<MapData, [u8; 16], ShieldPrefix>,
    interfaces: PerCpuHashMap<MapData, u32, ShieldInterface>,
}

fn failed(name: &'static str) -> impl Fn(MapError) -> LiveError {
    move |source| LiveError::Map { name, source }
}

impl ShieldMaps {
    /// Opens the maps.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn open(pins: &PinDir) -> Result<Self, LiveError> {
        Ok(Self {
            config: open(pins, map::SHIELD_CONFIG, Map::Array)?,
            addresses: open(pins, map::SHIELD_ADDRESSES, Map::HashMap)?,
            failing: open(pins, map::SHIELD_FAILING, Map::LruHashMap)?,
            v4: open(pins, map::SHIELD_V4, Map::LpmTrie)?,
            v6: open(pins, map::SHIELD_V6, Map::LpmTrie)?,
            interfaces: open(pins, map::SHIELD_INTERFACES, Map::PerCpuHashMap)?,
        })
    }

    /// What the policy asks for.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn config(&self) -> Result<ShieldConfig, LiveError> {
        self.config.get(&0, 0).map_err(failed(map::SHIELD_CONFIG))
    }

    /// Brings a policy into the maps. The state directory must be locked: operators change the prefixes too.
    ///
    /// # Errors
    /// See [`LiveError`]; part of it is there then.
    pub fn apply(&mut self, policy: &Policy) -> Result<(), LiveError> {
        let addresses: std::collections::BTreeSet<EndpointKey> =
            endpoint_keys(policy).into_iter().map(|key| EndpointKey { port: 0, ..key }).collect();
        let at = failed(map::SHIELD_ADDRESSES);
        let before = self.addresses.keys().collect::<Result<Vec<_>, _>>().map_err(&at)?;
        for key in &addresses {
            self.addresses.insert(key, 1, 0).map_err(&at)?;
        }
        for key in before.iter().filter(|key| !addresses.contains(key)) {
            self.addresses.remove(key).map_err(&at)?;
        }
        let exceptions = policy.shield.as_ref().map(|shield| shield.exceptions.clone()).unwrap_or_default();
        for Prefix { network, entry } in self.prefixes()? {
            if entry.policy != SHIELD_NONE && !exceptions.contains(&network) {
                self.set_prefix(network, ShieldPrefix { policy: SHIELD_NONE, ..entry })?;
            }
        }
        for network in exceptions {
            let entry = self.prefix(network)?;
            self.set_prefix(network, ShieldPrefix { policy: SHIELD_EXEMPT, ..entry })?;
        }
        self.config.set(0, config_of(policy), 0).map_err(failed(map::SHIELD_CONFIG))
    }

    /// What is said of exactly this prefix.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn prefix(&self, network: IpNet) -> Result<ShieldPrefix, LiveError> {
        let bits = u32::from(network.prefix_len());
        let (found, name) = match network {
            IpNet::V4(net) => (self.v4.get(&Key::new(bits, net.network().octets()), 0), map::SHIELD_V4),
            IpNet::V6(net) => (self.v6.get(&Key::new(bits, net.network().octets()), 0), map::SHIELD_V6),
        };
        match found {
            Ok(entry) if entry.bits == bits => Ok(entry),
            // A shorter one.
            Ok(_) | Err(MapError::KeyNotFound) => Ok(ShieldPrefix::default()),
            Err(source) => Err(LiveError::Map { name, source }),
        }
    }

    /// Says something of a prefix; nothing at all removes it.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn set_prefix(&mut self, network: IpNet, entry: ShieldPrefix) -> Result<(), LiveError> {
        let entry = ShieldPrefix { bits: u32::from(network.prefix_len()), ..entry };
        match network {
            IpNet::V4(net) => set(&mut self.v4, map::SHIELD_V4, entry, net.network().octets()),
            IpNet::V6(net) => set(&mut self.v6, map::SHIELD_V6, entry, net.network().octets()),
        }
    }

    /// All prefixes of which something is said, in order.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn prefixes(&self) -> Result<Vec<Prefix>, LiveError> {
        let mut all = Vec::new();
        let limit = 2 * MAX_SHIELD_PREFIXES as usize;
        for found in self.v4.iter().take(limit) {
            let (key, entry) = found.map_err(failed(map::SHIELD_V4))?;
            let bits = u8::try_from(key.prefix_len()).unwrap_or(32).min(32);
            all.push(Prefix { network: Ipv4Net::new_assert(Ipv4Addr::from(key.data()), bits).into(), entry });
        }
        for found in self.v6.iter().take(limit) {
            let (key, entry) = found.map_err(failed(map::SHIELD_V6))?;
            let bits = u8::try_from(key.prefix_len()).unwrap_or(128).min(128);
            all.push(Prefix { network: Ipv6Net::new_assert(Ipv6Addr::from(key.data()), bits).into(), entry });
        }
        all.sort_by_key(|prefix| prefix.network);
        all.dedup_by_key(|prefix| prefix.network);
        Ok(all)
    }

    /// Sources whose requests were refused, in order.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn failing(&self) -> Result<Vec<Failing>, LiveError> {
        let mut all = Vec::new();
        for found in self.failing.iter().take(2 * MAX_SHIELD_FAILING as usize) {
            let (key, entry) = found.map_err(failed(map::SHIELD_FAILING))?;
            // One that was evicted at this moment may be half another's.
            if entry.key == key {
                all.push(Failing { network: source_network(&key), entry });
            }
        }
        all.sort_by_key(|failing| failing.network);
        all.dedup_by_key(|failing| failing.network);
        Ok(all)
    }

    /// Ends a quarantine.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub fn release(&mut self, key: &ShieldKey) -> Result<(), LiveError> {
        match self.failing.remove(key) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
            Err(source) => Err(LiveError::Map { name: map::SHIELD_FAILING, source }),
        }
    }

    /// An interface's record.
    #[must_use]
    pub fn interface(&self, index: u32) -> Option<Interface> {
        let values = self.interfaces.get(&index, 0).ok()?;
        let first = values.first()?;
        let mut drops = [0_u64; SHIELD_REASONS];
        for value in values.iter() {
            for (sum, count) in drops.iter_mut().zip(value.drops) {
                *sum = sum.wrapping_add(count);
            }
        }
        Some(Interface { index, name: text_str(&first.name).to_owned(), native: first.native != 0, drops })
    }

    /// All interfaces, in the order of their names.
    #[must_use]
    pub fn interfaces(&self) -> Vec<Interface> {
        let mut all: Vec<_> =
            self.interfaces.keys().flatten().filter_map(|index| self.interface(index)).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name).then(a.index.cmp(&b.index)));
        all.dedup_by_key(|interface| interface.index);
        all
    }

    /// Records an interface; what was dropped there before is forgotten.
    ///
    /// # Errors
    /// See [`LiveError`].
    pub(super) fn set_interface(&mut self, index: u32, name: &str, native: bool) -> Result<(), LiveError> {
        let failed = failed(map::SHIELD_INTERFACES);
        let value =
            ShieldInterface { name: text(name), native: u64::from(native), drops: [0; SHIELD_REASONS] };
        let cpus = nr_cpus().map_err(|(_, error)| failed(MapError::IoError(error)))?;
        let values =
            PerCpuValues::try_from(vec![value; cpus]).map_err(|error| failed(MapError::IoError(error)))?;
        self.interfaces.insert(index, values, 0).map_err(failed)
    }

    /// Forgets an interface.
    pub(super) fn remove_interface(&mut self, index: u32) {
        // Not there is fine, and nobody reads it else.
        let _ = self.interfaces.remove(&index);
    }

    /// Takes over what operators said, and who is quarantined. What can't be taken over is left: how many entries, if all could be
    /// read, and why the first.
    pub(super) fn copy_operators(&mut self, from: &Self) -> Result<(), (Option<usize>, LiveError)> {
        let unread = |error| (None, error);
        let (prefixes, failing) = (from.prefixes().map_err(unread)?, from.failing().map_err(unread)?);
        let mut errors = Vec::new();
        for Prefix { network, entry } in
            prefixes.into_iter().filter(|found| found.entry.operator != SHIELD_NONE)
        {
            let ours = self.prefix(network);
            let set =
                ours.and_then(|ours| self.set_prefix(network, ShieldPrefix { policy: ours.policy, ..entry }));
            errors.extend(set.err());
        }
        for Failing { entry, .. } in failing {
            let set = self.failing.insert(entry.key, entry, 0).map_err(failed(map::SHIELD_FAILING));
            errors.extend(set.err());
        }
        let lost = Some(errors.len());
        errors.into_iter().next().map_or(Ok(()), |first| Err((lost, first)))
    }
}

fn set<K: Pod>(
    trie: &mut LpmTrie<MapData, K, ShieldPrefix>,
    name: &'static str,
    entry: ShieldPrefix,
    address: K,
) -> Result<(), LiveError> {
    let key = Key::new(entry.bits, address);
    if entry.operator != SHIELD_NONE || entry.policy != SHIELD_NONE {
        return trie.insert(&key, entry, 0).map_err(failed(name));
    }
    match trie.remove(&key) {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        // `LpmTrie::remove` does not tell it apart.
        Err(MapError::SyscallError(call)) if call.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(LiveError::Map { name, source }),
    }
}

fn config_of(policy: &Policy) -> ShieldConfig {
    let Some(shield) = &policy.shield else { return ShieldConfig::default() };
    let interval = |rate: Option<Rate>| rate.map_or(0, |rate| rate.interval_ns);
    let burst = |rate: Option<Rate>| rate.map_or(0, |rate| rate.interval_ns * u64::from(rate.burst));
    let mut config = ShieldConfig {
        connection_interval_ns: interval(shield.connections),
        connection_burst_ns: burst(shield.connections),
        packet_interval_ns: interval(shield.packets),
        packet_burst_ns: burst(shield.packets),
        ..ShieldConfig::default()
    };
    if let Some(quarantine) = shield.quarantine {
        config.refusal_window_ns = quarantine.within.as_nanos() as u64;
        config.quarantine_ns = quarantine.lasts.as_nanos() as u64;
        config.max_refusals = u64::from(quarantine.refusals);
    }
    config
}

/// The source that a key stands for.
fn source_network(key: &ShieldKey) -> IpNet {
    let (address, bits) = source::network(key);
    let address = Ipv6Addr::from_bits(address);
    match address.to_ipv4_mapped() {
        Some(v4) => IpAddr::V4(v4).into(),
        None => Ipv6Net::new_assert(address, bits).into(),
    }
}
