//! Ethernet frames, built byte by byte.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// TCP's flags.
pub const SYN: u8 = 0x02;
/// TCP's flags.
pub const ACK: u8 = 0x10;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// A frame in the making. Lengths and checksums are right, whatever is in it.
#[derive(Debug, Clone)]
pub struct Frame {
    from: SocketAddr,
    to: SocketAddr,
    tags: Vec<u16>,
    /// IPv4 options, or IPv6 extension headers by their protocol numbers, without their first two bytes.
    ip_options: Vec<u8>,
    extensions: Vec<(u8, Vec<u8>)>,
    /// IPv4's field of flags and offset.
    fragment: u16,
    protocol: u8,
    tcp_options: Vec<u8>,
    flags: u8,
    payload: Vec<u8>,
}

impl Frame {
    /// A TCP segment without bytes. Both ends are of one family.
    #[must_use]
    pub fn tcp(from: SocketAddr, to: SocketAddr, flags: u8) -> Self {
        Self {
            from,
            to,
            tags: Vec::new(),
            ip_options: Vec::new(),
            extensions: Vec::new(),
            fragment: 0,
            protocol: TCP,
            tcp_options: Vec::new(),
            flags,
            payload: Vec::new(),
        }
    }

    /// A datagram of four bytes.
    #[must_use]
    pub fn udp(from: SocketAddr, to: SocketAddr) -> Self {
        Self { protocol: UDP, payload: b"quic".to_vec(), ..Self::tcp(from, to, 0) }
    }

    /// VLAN tags, by their Ethernet types, the outer one first.
    #[must_use]
    pub fn tags(mut self, tags: &[u16]) -> Self {
        self.tags = tags.to_vec();
        self
    }

    /// IPv4 options; a multiple of four bytes.
    #[must_use]
    pub fn ip_options(mut self, options: &[u8]) -> Self {
        self.ip_options = options.to_vec();
        self
    }

    /// One more IPv6 extension header: its number, and its bytes behind the first two; with them a multiple of eight.
    #[must_use]
    pub fn extension(mut self, number: u8, rest: &[u8]) -> Self {
        self.extensions.push((number, rest.to_vec()));
        self
    }

    /// A fragment: its offset in units of eight bytes. More follow.
    #[must_use]
    pub fn fragment(self, offset: u16) -> Self {
        match self.to {
            SocketAddr::V4(_) => Self { fragment: 0x2000 | offset, ..self },
            SocketAddr::V6(_) => {
                let [high, low] = (offset << 3 | 1).to_be_bytes();
                self.extension(44, &[high, low, 0, 0, 0, 7])
            }
        }
    }

    /// TCP options; a multiple of four bytes.
    #[must_use]
    pub fn options(mut self, options: &[u8]) -> Self {
        self.tcp_options = options.to_vec();
        self
    }

    /// Bytes behind the header.
    #[must_use]
    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// The frame, to this hardware address.
    #[must_use]
    pub fn build_for(&self, hardware: [u8; 6]) -> Vec<u8> {
        let mut frame = hardware.to_vec();
        frame.extend_from_slice(&[2, 0, 0, 0, 0, 9]);
        for tag in &self.tags {
            frame.extend_from_slice(&tag.to_be_bytes());
            frame.extend_from_slice(&[0, 5]);
        }
        let transport = self.transport();
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                frame.extend_from_slice(&[8, 0]);
                frame.extend(self.v4(from, to, &transport));
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                frame.extend_from_slice(&[0x86, 0xdd]);
                frame.extend(self.v6(from, to, &transport));
            }
            _ => unreachable!("both ends are of one family"),
        }
        frame
    }

    /// The frame, to whoever gets it.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        self.build_for([2, 0, 0, 0, 0, 1])
    }

    fn v4(&self, from: Ipv4Addr, to: Ipv4Addr, transport: &[u8]) -> Vec<u8> {
        let header_bytes = 20 + self.ip_options.len();
        let mut packet = vec![0x40 | (header_bytes / 4) as u8, 0];
        packet.extend_from_slice(&((header_bytes + transport.len()) as u16).to_be_bytes());
        packet.extend_from_slice(&[0, 7]);
        packet.extend_from_slice(&self.fragment.to_be_bytes());
        packet.extend_from_slice(&[64, self.protocol, 0, 0]);
        packet.extend_from_slice(&from.octets());
        packet.extend_from_slice(&to.octets());
        packet.extend_from_slice(&self.ip_options);
        let sum = checksum(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend_from_slice(transport);
        packet
    }

    fn v6(&self, from: Ipv6Addr, to: Ipv6Addr, transport: &[u8]) -> Vec<u8> {
        let mut body = Vec::new();
        for (place, (_, rest)) in self.extensions.iter().enumerate() {
            body.push(self.extensions.get(place + 1).map_or(self.protocol, |(number, _)| *number));
            let units = (rest.len() + 2) / 8 - 1;
            body.push(units as u8);
            body.extend_from_slice(rest);
        }
        body.extend_from_slice(transport);
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend_from_slice(&(body.len() as u16).to_be_bytes());
        packet.extend_from_slice(&[self.extensions.first().map_or(self.protocol, |(number, _)| *number), 64]);
        packet.extend_from_slice(&from.octets());
        packet.extend_from_slice(&to.octets());
        packet.extend_from_slice(&body);
        packet
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = self.from.port().to_be_bytes().to_vec();
        bytes.extend_from_slice(&self.to.port().to_be_bytes());
        let checksum_at = if self.protocol == UDP {
            bytes.extend_from_slice(&((8 + self.payload.len()) as u16).to_be_bytes());
            bytes.extend_from_slice(&[0, 0]);
            6
        } else {
            bytes.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0]);
            let words = 5 + self.tcp_options.len() / 4;
            bytes.extend_from_slice(&[(words << 4) as u8, self.flags, 250, 0, 0, 0, 0, 0]);
            bytes.extend_from_slice(&self.tcp_options);
            16
        };
        bytes.extend_from_slice(&self.payload);
        let sum = self.transport_checksum(&bytes);
        bytes[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// Of a segment or datagram between these ends; 0 for one whose checksum is right.
    #[must_use]
    pub fn transport_checksum(&self, transport: &[u8]) -> u16 {
        let mut pseudo = Vec::new();
        for end in [self.from.ip(), self.to.ip()] {
            match end {
                IpAddr::V4(address) => pseudo.extend_from_slice(&address.octets()),
                IpAddr::V6(address) => pseudo.extend_from_slice(&address.octets()),
            }
        }
        pseudo.extend_from_slice(&[0, self.protocol]);
        pseudo.extend_from_slice(&(transport.len() as u16).to_be_bytes());
        pseudo.extend_from_slice(transport);
        checksum(&pseudo)
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
