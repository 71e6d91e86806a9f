//! From a frame's first byte to the port that it is for.
//!
//! It reads what the kernel's own receive path will read: as far as the packet's own length says, not as far as the frame goes.

use crate::abi::{FAMILY_V4, FAMILY_V6};

/// Bytes of a frame. No copy is longer than the largest header without options.
pub trait Frame {
    /// How long it is, in bytes.
    fn bytes(&self) -> u32;

    /// Copies bytes; false where not all of them are there.
    fn load<const N: usize>(&self, at: u32, to: &mut [u8; N]) -> bool;
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Kind {
    /// Not of IP, or its addresses can't be read: nothing in [`Packet`] counts.
    Foreign,
    /// A protocol without HTTP on it.
    Other,
    /// TCP, and its header is whole.
    Tcp,
    /// UDP, and its header is whole.
    Udp,
    /// A fragment that is not the first: its port can't be known.
    LaterFragment,
    /// It ends before its port, contradicts itself, or has more extension headers than anybody needs.
    Unreadable,
    /// More VLAN tags than are read, and the last of those leads on to the next: it may be for anybody, and nothing in [`Packet`] counts.
    Wrapped,
}

/// Where a packet goes, and where it comes from.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Packet {
    /// As in [`crate::abi::EndpointKey`].
    pub source: [u8; 16],
    /// As in [`crate::abi::EndpointKey`].
    pub destination: [u8; 16],
    /// Offset of the TCP or UDP header in the frame.
    pub transport_at: u32,
    /// Bytes of TCP's options; a multiple of four, at most 40.
    pub option_bytes: u32,
    /// The port that it is for.
    pub port: u16,
    /// TCP's flags.
    pub flags: u8,
    /// [`FAMILY_V4`] or [`FAMILY_V6`].
    pub family: u8,
}

/// Most VLAN tags. The kernel takes them off without end while the next one is of network 0, which is this device's own.
pub const MAX_TAGS: u32 = 8;
/// Most IPv6 extension headers. RFC 8504, section 5.3 lets a node set a bound, and proposes 8.
pub const MAX_EXTENSIONS: u32 = 8;

const ETHERNET_BYTES: u32 = 14;
const TAG_BYTES: u32 = 4;
/// 802.1Q.
const VLAN: u16 = 0x8100;
/// 802.1ad.
const SERVICE_VLAN: u16 = 0x88a8;
const IPV6_BYTES: u32 = 40;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// Reads a frame. What of `packet` could not be read stays as it was.
#[inline(always)]
pub fn walk(frame: &impl Frame, packet: &mut Packet) -> Kind {
    let mut at = ETHERNET_BYTES;
    let mut kind = [0; 2];
    if !frame.load(at - 2, &mut kind) {
        return Kind::Foreign;
    }
    let mut kind = u16::from_be_bytes(kind);
    let (mut tags, mut network) = (0, 0);
    // Of no other type does the kernel take a tag off.
    while kind == VLAN || kind == SERVICE_VLAN {
        if tags == MAX_TAGS {
            return if network == 0 { Kind::Wrapped } else { Kind::Foreign };
        }
        let mut tag = [0; TAG_BYTES as usize];
        if !frame.load(at, &mut tag) {
            return Kind::Foreign;
        }
        network = u16::from_be_bytes([tag[0], tag[1]]) & 0xfff;
        kind = u16::from_be_bytes([tag[2], tag[3]]);
        tags += 1;
        at += TAG_BYTES;
    }
    match kind {
        0x0800 => ipv4(frame, at, packet),
        0x86dd => ipv6(frame, at, packet),
        _ => Kind::Foreign,
    }
}

#[inline(always)]
fn ipv4(frame: &impl Frame, at: u32, packet: &mut Packet) -> Kind {
    let mut header = [0; 20];
    if !frame.load(at, &mut header) {
        // Without a whole header the kernel takes no packet.
        return Kind::Foreign;
    }
    if header[0] >> 4 != 4 {
        return Kind::Foreign;
    }
    packet.family = FAMILY_V4;
    packet.source[0] = header[12];
    packet.source[1] = header[13];
    packet.source[2] = header[14];
    packet.source[3] = header[15];
    packet.destination[0] = header[16];
    packet.destination[1] = header[17];
    packet.destination[2] = header[18];
    packet.destination[3] = header[19];
    let header_bytes = u32::from(header[0] & 0xf) * 4;
    let total_bytes = u32::from(u16::from_be_bytes([header[2], header[3]]));
    // Joined segments of more than 64 KiB (BIG TCP) don't say their length here; nor does what the kernel drops anyhow.
    let end = if total_bytes == 0 { frame.bytes() } else { at + total_bytes };
    if header_bytes < 20 || at + header_bytes > end || end > frame.bytes() {
        return Kind::Unreadable;
    }
    if u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0 {
        return Kind::LaterFragment;
    }
    transport(frame, header[9], at + header_bytes, end, packet)
}

#[inline(always)]
fn ipv6(frame: &impl Frame, at: u32, packet: &mut Packet) -> Kind {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    const MOBILITY: u8 = 135;
    let mut header = [0; 8];
    if !frame.load(at, &mut header)
        || header[0] >> 4 != 6
        || !frame.load(at + 8, &mut packet.source)
        || !frame.load(at + 24, &mut packet.destination)
    {
        return Kind::Foreign;
    }
    packet.family = FAMILY_V6;
    let payload_bytes = u32::from(u16::from_be_bytes([header[4], header[5]]));
    // A jumbogram does not say its length here either (RFC 2675).
    let end = if payload_bytes == 0 { frame.bytes() } else { at + IPV6_BYTES + payload_bytes };
    if end > frame.bytes() {
        return Kind::Unreadable;
    }
    let mut next = header[6];
    let mut at = at + IPV6_BYTES;
    let mut extensions = 0;
    while extensions <= MAX_EXTENSIONS {
        extensions += 1;
        let (units, unit_bytes) = match next {
            HOP_BY_HOP | ROUTING | DESTINATION | MOBILITY => (1, 8),
            AUTHENTICATION => (2, 4),
            FRAGMENT => (0, 0),
            protocol => return transport(frame, protocol, at, end, packet),
        };
        let mut extension = [0; 8];
        if at + 8 > end || !frame.load(at, &mut extension) {
            return Kind::Unreadable;
        }
        if unit_bytes == 0 {
            if u16::from_be_bytes([extension[2], extension[3]]) & 0xfff8 != 0 {
                return Kind::LaterFragment;
            }
            at += 8;
        } else {
            at += (u32::from(extension[1]) + units) * unit_bytes;
        }
        next = extension[0];
    }
    Kind::Unreadable
}

#[inline(always)]
fn transport(frame: &impl Frame, protocol: u8, at: u32, end: u32, packet: &mut Packet) -> Kind {
    match protocol {
        TCP => {
            let mut header = [0; 14];
            if at + 20 > end || !frame.load(at, &mut header) {
                return Kind::Unreadable;
            }
            let header_bytes = u32::from(header[12] >> 4) * 4;
            if header_bytes < 20 || at + header_bytes > end {
                return Kind::Unreadable;
            }
            packet.transport_at = at;
            packet.option_bytes = header_bytes - 20;
            packet.port = u16::from_be_bytes([header[2], header[3]]);
            packet.flags = header[13];
            Kind::Tcp
        }
        UDP => {
            let mut header = [0; 4];
            if at + 8 > end || !frame.load(at, &mut header) {
                return Kind::Unreadable;
            }
            packet.transport_at = at;
            packet.port = u16::from_be_bytes([header[2], header[3]]);
            Kind::Udp
        }
        _ => Kind::Other,
    }
}

#[cfg(test)]
#[path = "walk_tests.rs"]
mod tests;
