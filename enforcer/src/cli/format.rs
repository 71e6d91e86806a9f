//! Numbers of the maps as people read them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use enforcer_common::abi::{EndpointKey, FAMILY_V4, HeadDigest};
use ring::digest;

/// Stands where there is nothing to say.
pub(super) const NONE: &str = "-";

const NS_PER_MS: u64 = 1_000_000;
const NS_PER_SEC: u64 = 1_000_000_000;

/// Time since `then`, in milliseconds; 0 for a time that is still to come.
pub(super) fn age_ms(then_ns: u64, now_ns: u64) -> u64 {
    now_ns.saturating_sub(then_ns) / NS_PER_MS
}

/// Seconds until `then`, rounded towards minus infinity; negative when it is past.
pub(super) fn remaining_secs(then_ns: u64, now_ns: u64) -> i64 {
    let secs = (i128::from(then_ns) - i128::from(now_ns)).div_euclid(i128::from(NS_PER_SEC));
    i64::try_from(secs).unwrap_or(i64::MAX)
}

/// Seconds since 1970, now; 0 for a clock before that.
pub(super) fn unix_secs() -> u64 {
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A duration in its two largest units, e.g. `3m12s`; below a second in milliseconds.
pub(super) fn duration(ms: u64) -> String {
    let secs = ms / 1000;
    match (secs / 86_400, secs / 3600 % 24, secs / 60 % 60, secs % 60) {
        (0, 0, 0, 0) => format!("{ms}ms"),
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m{s:02}s"),
        (0, h, m, _) => format!("{h}h{m:02}m"),
        (d, h, _, _) => format!("{d}d{h:02}h"),
    }
}

/// Remaining seconds; what is past is said so.
pub(super) fn remaining(secs: i64) -> String {
    let shown = duration(secs.unsigned_abs().saturating_mul(1000));
    if secs < 0 { format!("{shown} ago") } else { shown }
}

/// Bytes in MiB, with one decimal.
pub(crate) fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// An address of the ABI.
pub(crate) fn ip(key: &EndpointKey) -> IpAddr {
    let [a, b, c, d, ..] = key.addr;
    if key.family == FAMILY_V4 { Ipv4Addr::new(a, b, c, d).into() } else { Ipv6Addr::from(key.addr).into() }
}

/// An address and port of the ABI, as URLs write them.
pub(crate) fn socket(key: &EndpointKey) -> String {
    SocketAddr::new(ip(key), key.port).to_string()
}

/// Stands for a head digest, which is itself secret (it shows which heads are known): SHA-256 of it, 64 bits of that.
pub(super) fn digest_fingerprint(head: &HeadDigest) -> String {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&head.lo.to_le_bytes());
    bytes[8..].copy_from_slice(&head.hi.to_le_bytes());
    let hash = digest::digest(&digest::SHA256, &bytes);
    hex(hash.as_ref().get(..8).unwrap_or_default())
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The text, or a dash for an empty one.
pub(super) fn or_none(text: &str) -> String {
    if text.is_empty() { NONE.to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_two_units() {
        let shown = [0, 999, 1000, 59_999, 61_000, 3_600_000, 90_061_000].map(duration);
        assert_eq!(shown, ["0ms", "999ms", "1s", "59s", "1m01s", "1h00m", "1d01h"]);
    }

    #[test]
    fn times_do_not_wrap() {
        assert_eq!(age_ms(5, 3), 0);
        assert_eq!(age_ms(1_000_000, 3_000_000), 2);
        assert_eq!(remaining_secs(3_500_000_000, 0), 3);
        assert_eq!(remaining_secs(0, 1), -1);
        assert_eq!(remaining_secs(u64::MAX, 0), 18_446_744_073);
        assert_eq!(remaining(-1), "1s ago");
        assert_eq!(remaining(75), "1m15s");
        assert_eq!(remaining(i64::MIN), duration(u64::MAX) + " ago");
    }

    #[test]
    fn addresses_of_both_families() {
        let mut addr = [0; 16];
        addr[..4].copy_from_slice(&[192, 0, 2, 1]);
        let mut key = EndpointKey { addr, port: 80, family: FAMILY_V4, zero: 0 };
        assert_eq!(socket(&key), "192.0.2.1:80");
        key = EndpointKey { family: enforcer_common::abi::FAMILY_V6, addr: [0; 16], ..key };
        assert_eq!(socket(&key), "[::]:80");
    }

    #[test]
    fn digests_are_shown_by_a_hash_only() {
        let head = HeadDigest { lo: 0x1122_3344_5566_7788, hi: 1 };
        let shown = digest_fingerprint(&head);
        assert_eq!(shown.len(), 16);
        assert!(!shown.contains("1122") && !shown.contains("8877"));
        assert_ne!(shown, digest_fingerprint(&HeadDigest { hi: 2, ..head }));
    }
}
