//! Who is one source to the shield.

use crate::abi::{FAMILY_V4, ShieldKey};

const V4_MAPPED: u64 = 0xffff_0000_0000;
/// fe80::/10, the first ten bits.
const LINK_LOCAL: u64 = 0xfe80 << 48;
const LINK_LOCAL_MASK: u64 = 0xffc0 << 48;

/// Whose limits a packet uses up: an IPv4 address, or the first 64 bits of an IPv6 address, because a client can choose the others. On a link
/// all have the same first bits, so of fe80::/10 the whole address counts. `address` is as in [`crate::abi::EndpointKey`].
#[must_use]
#[inline(always)]
pub const fn key(family: u8, address: &[u8; 16]) -> ShieldKey {
    if family == FAMILY_V4 {
        let mapped = V4_MAPPED | word(address, 0) >> 32;
        return ShieldKey { prefix: 0, rest: mapped.to_be() };
    }
    let prefix = word(address, 0);
    let rest = if prefix & LINK_LOCAL_MASK == LINK_LOCAL { word(address, 8) } else { 0 };
    ShieldKey { prefix: prefix.to_be(), rest: rest.to_be() }
}

#[inline(always)]
const fn word(address: &[u8; 16], at: usize) -> u64 {
    let mut word = 0;
    let mut k = 0;
    while k < 8 {
        word = word << 8 | address[at + k] as u64;
        k += 1;
    }
    word
}

/// The source that a key stands for: the first address, and how many of its bits count. An IPv4 address is v4-mapped.
#[must_use]
pub const fn network(key: &ShieldKey) -> (u128, u8) {
    let (prefix, rest) = (u64::from_be(key.prefix), u64::from_be(key.rest));
    let bits = if rest == 0 && prefix & LINK_LOCAL_MASK != LINK_LOCAL { 64 } else { 128 };
    ((prefix as u128) << 64 | rest as u128, bits)
}

#[cfg(test)]
mod tests {
    use core::net::{Ipv4Addr, Ipv6Addr};

    use super::*;
    use crate::abi::FAMILY_V6;

    fn v4(address: [u8; 4]) -> ShieldKey {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&address);
        key(FAMILY_V4, &bytes)
    }

    fn v6(address: &str) -> ShieldKey {
        key(FAMILY_V6, &address.parse::<Ipv6Addr>().unwrap().octets())
    }

    #[test]
    fn clients_that_choose_their_last_bits_stay_one_source_and_neighbours_on_a_link_are_many() {
        assert_eq!(v6("2001:db8:0:7::1"), v6("2001:db8:0:7:ffff:ffff:ffff:ffff"));
        assert_ne!(v6("2001:db8:0:7::1"), v6("2001:db8:0:8::1"));
        for (one, other) in [("fe80::1", "fe80::2"), ("febf::1", "febf::2"), ("fe80::1", "fe80:0:0:1::1")] {
            assert_ne!(v6(one), v6(other));
        }
        assert_eq!(v6("fec0::1"), v6("fec0::2"));
        assert_eq!(v6("fe7f::1"), v6("fe7f::2"));
        assert_ne!(v4([192, 0, 2, 1]), v4([192, 0, 2, 2]));
        // No address of one family is one of the other.
        assert_ne!(v4([0, 0, 0, 0]), v6("::"));
        assert_ne!(v4([192, 0, 2, 1]), v6("::ffff:192.0.2.1"));
    }

    #[test]
    fn a_key_says_what_it_stands_for() {
        let of = |key| {
            let (address, bits) = network(&key);
            (Ipv6Addr::from_bits(address), bits)
        };
        assert_eq!(of(v4([192, 0, 2, 1])), (Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped(), 128));
        assert_eq!(of(v6("2001:db8:0:7::1")), ("2001:db8:0:7::".parse().unwrap(), 64));
        assert_eq!(of(v6("fe80::1")), ("fe80::1".parse().unwrap(), 128));
        assert_eq!(of(v6("fe80::")), ("fe80::".parse().unwrap(), 128));
        assert_eq!(of(v6("::1")), ("::".parse().unwrap(), 64));
    }
}
