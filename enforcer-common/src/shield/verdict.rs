//! Whether a packet passes the shield.

use super::walk::{Kind, Packet};
use crate::abi::{Counter, SHIELD_DROP, SHIELD_EXEMPT};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// What the tables say of a packet.
pub trait Tables {
    /// It is for a protected endpoint.
    fn is_for_endpoint(&self, packet: &Packet) -> bool;
    /// It is for an address that has a protected endpoint on some port.
    fn is_for_address(&self, packet: &Packet) -> bool;
    /// What is said of its source: `SHIELD_*`.
    fn listed(&self, packet: &Packet) -> u32;
    /// Its source is quarantined.
    fn is_quarantined(&self, packet: &Packet) -> bool;
    /// Takes it from its source's limits; `is_new`: also from that of new connections. Says which of them has no room, if one has none.
    fn charge(&self, packet: &Packet, is_new: bool) -> Result<(), Counter>;
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// Nothing of ours.
    NotOurs,
    /// It passes.
    Pass,
    /// It passes without MPTCP's option.
    PassSyn,
    /// It is dropped.
    Drop(Counter),
}

/// Index of a reason in [`crate::abi::ShieldInterface::drops`].
#[must_use]
#[inline(always)]
pub const fn reason_index(reason: Counter) -> u32 {
    (reason as u32).wrapping_sub(Counter::ShieldListed as u32)
}

/// Decides. Fragments behind the first show no port, so they are charged like packets for any port of a protected address and pass: the guard
/// judges what becomes of them. What can't be read, and may be for a protected endpoint, is dropped.
#[inline(always)]
pub fn decide(kind: Kind, packet: &Packet, tables: &impl Tables) -> Verdict {
    match kind {
        Kind::Foreign | Kind::Other => return Verdict::NotOurs,
        Kind::Wrapped => return Verdict::Drop(Counter::ShieldUnreadable),
        Kind::Tcp | Kind::Udp => {
            if !tables.is_for_endpoint(packet) {
                return Verdict::NotOurs;
            }
        }
        Kind::LaterFragment | Kind::Unreadable => {
            if !tables.is_for_address(packet) {
                return Verdict::NotOurs;
            }
        }
    }
    if kind == Kind::Udp {
        return Verdict::Drop(Counter::ShieldDatagram);
    }
    if kind == Kind::Unreadable {
        return Verdict::Drop(Counter::ShieldUnreadable);
    }
    let is_syn = kind == Kind::Tcp && packet.flags & SYN != 0;
    let listed = tables.listed(packet);
    if listed == SHIELD_DROP {
        return Verdict::Drop(Counter::ShieldListed);
    }
    if listed != SHIELD_EXEMPT {
        if tables.is_quarantined(packet) {
            return Verdict::Drop(Counter::ShieldQuarantined);
        }
        if let Err(reason) = tables.charge(packet, is_syn && packet.flags & ACK == 0) {
            return Verdict::Drop(reason);
        }
    }
    if is_syn { Verdict::PassSyn } else { Verdict::Pass }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::abi::{SHIELD_NONE, SHIELD_REASONS};

    struct Said {
        endpoint: bool,
        address: bool,
        listed: u32,
        quarantined: bool,
        charge: Result<(), Counter>,
        charged: Cell<Option<bool>>,
    }

    impl Said {
        fn ours() -> Self {
            Self {
                endpoint: true,
                address: true,
                listed: SHIELD_NONE,
                quarantined: false,
                charge: Ok(()),
                charged: Cell::new(None),
            }
        }
    }

    impl Tables for Said {
        fn is_for_endpoint(&self, _: &Packet) -> bool {
            self.endpoint
        }
        fn is_for_address(&self, _: &Packet) -> bool {
            self.address
        }
        fn listed(&self, _: &Packet) -> u32 {
            self.listed
        }
        fn is_quarantined(&self, _: &Packet) -> bool {
            self.quarantined
        }
        fn charge(&self, _: &Packet, is_new: bool) -> Result<(), Counter> {
            self.charged.set(Some(is_new));
            self.charge
        }
    }

    fn packet(flags: u8) -> Packet {
        Packet { flags, ..Packet::default() }
    }

    #[test]
    fn only_what_may_be_for_a_protected_endpoint_is_looked_at() {
        let none = Said { endpoint: false, address: false, listed: SHIELD_DROP, ..Said::ours() };
        for kind in [Kind::Foreign, Kind::Other, Kind::Tcp, Kind::Udp, Kind::LaterFragment, Kind::Unreadable]
        {
            assert_eq!(decide(kind, &packet(SYN), &none), Verdict::NotOurs, "{kind:?}");
        }
        assert_eq!(decide(Kind::Wrapped, &packet(0), &none), Verdict::Drop(Counter::ShieldUnreadable));
        // Another port of a protected address.
        let address = Said { endpoint: false, ..Said::ours() };
        assert_eq!(decide(Kind::Tcp, &packet(SYN), &address), Verdict::NotOurs);
        assert_eq!(decide(Kind::Udp, &packet(0), &address), Verdict::NotOurs);
        assert_eq!(decide(Kind::LaterFragment, &packet(0), &address), Verdict::Pass);
        assert_eq!(decide(Kind::Unreadable, &packet(0), &address), Verdict::Drop(Counter::ShieldUnreadable));
    }

    #[test]
    fn what_is_charged_for_what() {
        for (kind, flags, is_new, verdict) in [
            (Kind::Tcp, SYN, true, Verdict::PassSyn),
            (Kind::Tcp, SYN | ACK, false, Verdict::PassSyn),
            (Kind::Tcp, ACK, false, Verdict::Pass),
            (Kind::LaterFragment, SYN, false, Verdict::Pass),
        ] {
            let said = Said::ours();
            assert_eq!(decide(kind, &packet(flags), &said), verdict);
            assert_eq!(said.charged.get(), Some(is_new), "{kind:?} {flags:x}");
            let said = Said { charge: Err(Counter::ShieldPackets), ..Said::ours() };
            assert_eq!(decide(kind, &packet(flags), &said), Verdict::Drop(Counter::ShieldPackets));
        }
    }

    #[test]
    fn exceptions_pass_whatever_else_is_said_and_others_do_not() {
        let full = || Said { quarantined: true, charge: Err(Counter::ShieldConnections), ..Said::ours() };
        let exempt = Said { listed: SHIELD_EXEMPT, ..full() };
        assert_eq!(decide(Kind::Tcp, &packet(SYN), &exempt), Verdict::PassSyn);
        assert_eq!(exempt.charged.get(), None);
        assert_eq!(decide(Kind::Udp, &packet(0), &exempt), Verdict::Drop(Counter::ShieldDatagram));
        assert_eq!(decide(Kind::Tcp, &packet(SYN), &full()), Verdict::Drop(Counter::ShieldQuarantined));
        let listed = Said { listed: SHIELD_DROP, ..Said::ours() };
        assert_eq!(decide(Kind::Tcp, &packet(ACK), &listed), Verdict::Drop(Counter::ShieldListed));
        assert_eq!(decide(Kind::LaterFragment, &packet(0), &listed), Verdict::Drop(Counter::ShieldListed));
    }

    #[test]
    fn each_reason_has_its_place() {
        let reasons = [
            Counter::ShieldListed,
            Counter::ShieldQuarantined,
            Counter::ShieldPackets,
            Counter::ShieldConnections,
            Counter::ShieldDatagram,
            Counter::ShieldUnreadable,
            Counter::ShieldSourcesFull,
            Counter::ShieldHelper,
        ];
        assert_eq!(reasons.len(), SHIELD_REASONS);
        for (index, reason) in reasons.into_iter().enumerate() {
            assert_eq!(reason_index(reason) as usize, index);
        }
    }
}
