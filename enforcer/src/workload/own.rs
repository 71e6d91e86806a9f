//! The addresses of this host.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use nix::ifaddrs::getifaddrs;
use tracing::warn;

/// How old what is known of them may be.
const MAX_AGE: Duration = Duration::from_secs(1);

/// Addresses of the interfaces in the network namespace of this process, looked up anew after a second.
#[derive(Debug, Default)]
pub struct OwnAddresses {
    known: Option<(Instant, BTreeSet<IpAddr>)>,
}

impl OwnAddresses {
    /// Whether an address is one of them, or of loopback. If they can't be looked up, each is.
    pub fn contains(&mut self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        if address.is_loopback() {
            return true;
        }
        if self.known.as_ref().is_none_or(|(at, _)| at.elapsed() > MAX_AGE) {
            self.known = None;
            match addresses() {
                Ok(own) => self.known = Some((Instant::now(), own)),
                Err(error) => warn!(%error, "the addresses of this host can't be looked up"),
            }
        }
        self.known.as_ref().is_none_or(|(_, own)| own.contains(&address))
    }
}

fn addresses() -> nix::Result<BTreeSet<IpAddr>> {
    let of = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
    };
    Ok(getifaddrs()?.filter_map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_this_host_and_an_address_for_documentation_is_not() {
        let mut own = OwnAddresses::default();
        for address in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert!(own.contains(address.parse().unwrap()), "{address}");
        }
        assert!(!own.contains("192.0.2.77".parse().unwrap()));
        let (_, known) = own.known.as_ref().unwrap();
        assert!(known.iter().all(|address| own_once(*address)), "{known:?}");
    }

    fn own_once(address: IpAddr) -> bool {
        OwnAddresses::default().contains(address)
    }
}
