//! The shield's program on interfaces: links, pinned beside the others as `link_shield_<interface index>`.

mod maps;

use std::collections::BTreeSet;
use std::io::Error;
use std::os::fd::AsFd;
use std::path::PathBuf;

use enforcer_common::abi::map;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::{InterfaceFlags, if_nametoindex};
use nix::sys::socket::SockaddrStorage;
use tracing::{info, warn};

use super::load::pin_of;
use super::{LiveError, PinDir, sys};
use crate::policy::{Shield, ShieldAttach};
pub use maps::{Failing, Interface, Prefix, ShieldMaps};

/// The program.
pub(super) const SHIELD: &str = "shield";
/// Pins of its links.
const LINK_PREFIX: &str = "link_shield_";

/// Flags of an XDP link, from `linux/if_link.h`.
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// Why an interface is not shielded.
#[derive(Debug, thiserror::Error)]
pub enum ShieldError {
    /// It is not there.
    #[error(
        "shield: there is no interface `{name}` in this network namespace; `ip link` lists them. Correct `shield.interfaces` in the policy, or \
         start the enforcer once the interface is there"
    )]
    NoInterface {
        /// Its name.
        name: String,
    },
    /// It is a loopback interface.
    #[error(
        "shield: `{name}` is a loopback interface, which the shield leaves alone; take it out of `shield.interfaces`"
    )]
    Loopback {
        /// Its name.
        name: String,
    },
    /// Its packets have no Ethernet header.
    #[error(
        "shield: `{name}` is not an Ethernet interface (a tunnel, say), and the shield reads Ethernet frames alone; take it out of \
         `shield.interfaces`, and name the interface that its packets come through before, or none"
    )]
    NotEthernet {
        /// Its name.
        name: String,
    },
    /// The kernel did not attach the program.
    #[error(
        "shield: cannot attach to `{name}`: {reason}. `ip link show {name}` names a program that is there already; `attach: generic` needs nothing of the driver"
    )]
    Attach {
        /// Its name.
        name: String,
        /// What the kernel said.
        reason: String,
    },
    /// The interfaces can't be listed.
    #[error("shield: cannot list the interfaces: {0}")]
    List(#[source] Error),
    /// The program or a pin can't be used.
    #[error("shield: cannot use {path}: {source}")]
    Pin {
        /// The pin.
        path: PathBuf,
        /// Why.
        source: Error,
    },
    /// A map can't be used.
    #[error(transparent)]
    Map(#[from] LiveError),
}

/// The pinned links and the indexes of their interfaces.
pub(super) fn link_pins(pins: &PinDir) -> Vec<(u32, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(pins.path()) else { return Vec::new() };
    let index = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix(LINK_PREFIX)?.parse().ok();
    entries.flatten().map(|entry| entry.path()).filter_map(|path| Some((index(&path)?, path))).collect()
}

/// Whether the program is on the interface still: the kernel takes it off when the interface goes.
pub(super) fn is_attached(index: u32, pin: &std::path::Path) -> bool {
    sys::open(pin).and_then(|link| sys::link_interface(link.as_fd())).is_ok_and(|found| found == index)
}

/// Indexes of the interfaces that are under the shield.
#[must_use]
pub fn shielded(pins: &PinDir) -> BTreeSet<u32> {
    link_pins(pins)
        .into_iter()
        .filter(|(index, pin)| is_attached(*index, pin))
        .map(|(index, _)| index)
        .collect()
}

fn index_of(name: &str) -> Option<u32> {
    if_nametoindex(name).ok()
}

/// Looks whether a policy's interfaces are there and can be shielded, before anything is changed.
///
/// # Errors
/// See [`ShieldError`].
pub fn check_interfaces(shield: &Shield) -> Result<(), ShieldError> {
    let all: Vec<_> = getifaddrs().map_err(|error| ShieldError::List(error.into()))?.collect();
    for name in &shield.interfaces {
        if index_of(name).is_none() {
            return Err(ShieldError::NoInterface { name: name.clone() });
        }
        let is_loopback = |flags: InterfaceFlags| flags.contains(InterfaceFlags::IFF_LOOPBACK);
        if all.iter().any(|interface| interface.interface_name == *name && is_loopback(interface.flags)) {
            return Err(ShieldError::Loopback { name: name.clone() });
        }
        // An interface without hardware addresses is listed without one.
        let is_ethernet = |address: &SockaddrStorage| {
            address.as_link_addr().is_some_and(|link| link.hatype() == libc::ARPHRD_ETHER)
        };
        if !all.iter().any(|interface| {
            interface.interface_name == *name && interface.address.as_ref().is_some_and(is_ethernet)
        }) {
            return Err(ShieldError::NotEthernet { name: name.clone() });
        }
    }
    Ok(())
}

/// Takes the shield off interfaces that the policy does not name any more, or that are gone. What can't be taken off is logged.
pub fn detach_others(pins: &PinDir, shield: Option<&Shield>, maps: &mut ShieldMaps) {
    let names = shield.map(|shield| shield.interfaces.as_slice()).unwrap_or_default();
    let wanted: BTreeSet<u32> = names.iter().filter_map(|name| index_of(name)).collect();
    for (index, pin) in link_pins(pins) {
        if wanted.contains(&index) && is_attached(index, &pin) {
            continue;
        }
        if let Err(error) = std::fs::remove_file(&pin) {
            warn!(%error, pin = %pin.display(), "the shield stays on an interface that the policy does not name");
            continue;
        }
        info!(interface = maps.interface(index).map(|interface| interface.name), "shield taken off");
        maps.remove_interface(index);
    }
}

/// Puts the shield on all interfaces that the policy names and that do not have it yet, and takes it off all others. For a daemon that
/// starts: a running one may not attach programs any more.
///
/// # Errors
/// See [`ShieldError`]; the interfaces before that one are shielded.
pub fn attach(pins: &PinDir, shield: Option<&Shield>, maps: &mut ShieldMaps) -> Result<(), ShieldError> {
    detach_others(pins, shield, maps);
    let Some(shield) = shield else { return Ok(()) };
    let attached = shielded(pins);
    for name in &shield.interfaces {
        let Some(index) = index_of(name) else { return Err(ShieldError::NoInterface { name: name.clone() }) };
        let fits = |interface: &Interface| match shield.attach {
            ShieldAttach::Auto => true,
            ShieldAttach::Native => interface.native,
            ShieldAttach::Generic => !interface.native,
        };
        if attached.contains(&index) && maps.interface(index).is_some_and(|interface| fits(&interface)) {
            continue;
        }
        let pin = pins.pin(&format!("{LINK_PREFIX}{index}"));
        let before = maps.interface(index).filter(|_| attached.contains(&index));
        // In the other mode, or nobody knows in which: the kernel does not change a link's mode, nor takes a second link.
        let _ = std::fs::remove_file(&pin);
        let native = match attach_one(pins, name, index, shield.attach, &pin, maps) {
            Ok(native) => native,
            Err(error) => {
                if let Some(Interface { native, .. }) = before {
                    let mode = if native { ShieldAttach::Native } else { ShieldAttach::Generic };
                    if let Err(error) = attach_one(pins, name, index, mode, &pin, maps) {
                        warn!(%error, interface = name, "the interface has no shield any more");
                    }
                }
                return Err(error);
            }
        };
        info!(interface = name, mode = if native { "native" } else { "generic" }, "shield attached");
    }
    Ok(())
}

fn attach_one(
    pins: &PinDir,
    name: &str,
    index: u32,
    attach: ShieldAttach,
    pin: &std::path::Path,
    maps: &mut ShieldMaps,
) -> Result<bool, ShieldError> {
    let path = pins.pin(&pin_of(SHIELD));
    let program = sys::open(&path).map_err(|source| ShieldError::Pin { path, source })?;
    let modes: &[(bool, u32)] = match attach {
        ShieldAttach::Auto => &[(true, XDP_FLAGS_DRV_MODE), (false, XDP_FLAGS_SKB_MODE)],
        ShieldAttach::Native => &[(true, XDP_FLAGS_DRV_MODE)],
        ShieldAttach::Generic => &[(false, XDP_FLAGS_SKB_MODE)],
    };
    let mut reasons = Vec::new();
    for (native, flags) in modes {
        match sys::create_xdp_link(program.as_fd(), index, *flags) {
            Ok(link) => {
                // First the record, then the pin: a pin without one is attached anew by the next start.
                maps.set_interface(index, name, *native)?;
                sys::pin(link.as_fd(), pin)
                    .map_err(|source| ShieldError::Pin { path: pin.to_owned(), source })?;
                return Ok(*native);
            }
            Err(error) => reasons.push(format!("{}: {error}", if *native { "native" } else { "generic" })),
        }
    }
    Err(ShieldError::Attach { name: name.to_owned(), reason: reasons.join("; ") })
}

/// Takes over what an enforcement that goes away has on interfaces: its links get our program and lie among our pins from then on, so
/// there is no moment without a shield. What can't be taken over is attached anew later. Operators' prefixes and quarantines come along.
pub fn inherit(from: &PinDir, to: &PinDir, maps: &mut ShieldMaps) {
    let old = match ShieldMaps::open(from) {
        Ok(old) => old,
        // No enforcement, or one from before there was a shield.
        Err(_) if !from.pin(map::SHIELD_CONFIG).exists() => return,
        Err(error) => {
            warn!(
                %error,
                interfaces = link_pins(from).len(),
                "what operators told the shield, and quarantines, are lost: its earlier maps can't be read; the shield is attached anew"
            );
            return;
        }
    };
    if let Err((lost, error)) = maps.copy_operators(&old) {
        warn!(%error, lost, "not all operators' prefixes and quarantines could be taken over by the shield; see `enforcer shield list`");
    }
    let program = match sys::open(&to.pin(&pin_of(SHIELD))) {
        Ok(program) => program,
        Err(error) => {
            warn!(%error, "the shield's program can't be opened");
            return;
        }
    };
    for (index, pin) in link_pins(from) {
        let Some(interface) = old.interface(index) else { continue };
        let moved = sys::open(&pin)
            .and_then(|link| sys::update_link(link.as_fd(), program.as_fd()))
            .and_then(|()| maps.set_interface(index, &interface.name, interface.native).map_err(Error::other))
            .and_then(|()| std::fs::rename(&pin, to.pin(&format!("{LINK_PREFIX}{index}"))));
        if let Err(error) = moved {
            warn!(%error, interface = interface.name, "the shield is attached anew");
        }
    }
}
