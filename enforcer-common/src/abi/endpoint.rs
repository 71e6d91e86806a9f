//! Protected endpoints.

use super::assert_layout;

/// Address family in the ABI's addresses: IPv4, in the first four bytes.
pub const FAMILY_V4: u8 = 4;
/// IPv6, all sixteen bytes. Never a v4-mapped address: that is [`FAMILY_V4`].
pub const FAMILY_V6: u8 = 6;

/// A local address and port. All-zero address: any address of the family.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointKey {
    /// Address in network order; IPv4 in the first four bytes, the rest zero.
    pub addr: [u8; 16],
    /// Port in host order.
    pub port: u16,
    /// [`FAMILY_V4`] or [`FAMILY_V6`].
    pub family: u8,
    /// Zero.
    pub zero: u8,
}
assert_layout!(EndpointKey, 20, [addr: [u8; 16], port: u16, family: u8, zero: u8]);

impl EndpointKey {
    /// The key that stands for every address of this key's family.
    #[must_use]
    pub const fn wildcard(self) -> Self {
        Self { addr: [0; 16], ..self }
    }
}

/// What is known of a protected endpoint: `ENDPOINTS`, a hash by [`EndpointKey`]. Writer: the daemon. Reader: sock_ops.
/// 4,096 entries: an operator lists them by hand.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// Number of the endpoint; part of every head digest, so that a head allowed here is unknown elsewhere.
    pub endpoint_id: u32,
    /// Reply that the kernel gives when the daemon is not alive: index in `REPLIES`.
    pub unavailable_reply_id: u32,
}
assert_layout!(Endpoint, 8, [endpoint_id: u32, unavailable_reply_id: u32]);

/// Size of `ENDPOINTS`.
pub const MAX_ENDPOINTS: u32 = 4096;
