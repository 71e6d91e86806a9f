use proptest::prelude::*;

use super::*;

struct Bytes<'a>(&'a [u8]);

impl Frame for Bytes<'_> {
    fn bytes(&self) -> u32 {
        self.0.len() as u32
    }

    fn load<const N: usize>(&self, at: u32, to: &mut [u8; N]) -> bool {
        match self.0.get(at as usize..at as usize + N) {
            Some(bytes) => {
                to.copy_from_slice(bytes);
                true
            }
            None => false,
        }
    }
}

fn read(frame: &[u8]) -> (Kind, Packet) {
    let mut packet = Packet::default();
    let kind = walk(&Bytes(frame), &mut packet);
    (kind, packet)
}

fn ethernet(tags: &[u16], kind: u16) -> Vec<u8> {
    let mut frame = vec![2; 12];
    for tag in tags {
        frame.extend_from_slice(&tag.to_be_bytes());
        frame.extend_from_slice(&[0, 7]);
    }
    frame.extend_from_slice(&kind.to_be_bytes());
    frame
}

/// A segment to port 8080 with so many words of options, and a byte.
fn tcp(option_words: u8) -> Vec<u8> {
    let mut segment =
        vec![0x9c, 0x40, 0x1f, 0x90, 0, 0, 0, 1, 0, 0, 0, 0, (5 + option_words) << 4, 2, 4, 0, 0, 0, 0, 0];
    segment.extend(vec![1; usize::from(option_words) * 4]);
    segment.push(b'x');
    segment
}

fn udp() -> Vec<u8> {
    vec![0x9c, 0x40, 0x1f, 0x90, 0, 9, 0, 0, b'x']
}

fn v4(option_words: u8, fragment: u16, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let header_bytes = 20 + usize::from(option_words) * 4;
    let mut packet = vec![0x45 + option_words, 0];
    packet.extend_from_slice(&((header_bytes + payload.len()) as u16).to_be_bytes());
    packet.extend_from_slice(&[0, 1]);
    packet.extend_from_slice(&fragment.to_be_bytes());
    packet.extend_from_slice(&[64, protocol, 0, 0, 192, 0, 2, 1, 10, 0, 0, 2]);
    packet.extend(vec![1; usize::from(option_words) * 4]);
    packet.extend_from_slice(payload);
    packet
}

/// Extensions as `(protocol number, bytes behind the first two)`; each gets the length that its kind counts in.
fn v6(extensions: &[(u8, Vec<u8>)], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    for (index, (kind, rest)) in extensions.iter().enumerate() {
        body.push(extensions.get(index + 1).map_or(protocol, |(next, _)| *next));
        let bytes = rest.len() + 2;
        body.push(match kind {
            44 => 0,
            51 => (bytes / 4 - 2) as u8,
            _ => (bytes / 8 - 1) as u8,
        });
        body.extend_from_slice(rest);
    }
    body.extend_from_slice(payload);
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend_from_slice(&(body.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[extensions.first().map_or(protocol, |(kind, _)| *kind), 64]);
    packet.extend_from_slice(&[0x20; 16]);
    packet.extend_from_slice(&[0xfd; 16]);
    packet.extend_from_slice(&body);
    packet
}

fn fragment(offset: u16) -> (u8, Vec<u8>) {
    let [high, low] = (offset << 3 | 1).to_be_bytes();
    (44, vec![high, low, 0, 0, 0, 1])
}

fn extension(kind: u8, units: usize) -> (u8, Vec<u8>) {
    (kind, vec![0; units * 8 + 6])
}

fn check_tcp(frame: &[u8], header_at: usize, option_words: u8, family: u8) {
    let (kind, packet) = read(frame);
    assert_eq!(kind, Kind::Tcp);
    assert_eq!(packet.transport_at as usize, header_at);
    assert_eq!(packet.option_bytes, u32::from(option_words) * 4);
    assert_eq!((packet.port, packet.flags, packet.family), (8080, 2, family));
    if family == FAMILY_V4 {
        assert_eq!(
            (&packet.source[..5], &packet.destination[..5]),
            (&[192, 0, 2, 1, 0][..], &[10, 0, 0, 2, 0][..])
        );
    } else {
        assert_eq!((packet.source, packet.destination), ([0x20; 16], [0xfd; 16]));
    }
    // The kernel drops what is shorter than it says it is; here as soon as an address can be read, it is not taken for anything else.
    for cut in 0..frame.len() {
        let (kind, _) = read(&frame[..cut]);
        assert!(matches!(kind, Kind::Foreign | Kind::Unreadable), "{cut} of {}: {kind:?}", frame.len());
    }
    // Bytes behind the packet are padding.
    let padded = [frame, &[0xff; 40]].concat();
    assert_eq!(read(&padded).0, Kind::Tcp);
}

#[test]
fn tags_options_and_extensions_are_stepped_over() {
    for tags in [&[][..], &[0x8100], &[0x88a8, 0x8100], &[0x8100; 8]] {
        let at = 14 + tags.len() * 4;
        for words in [0, 1, 10] {
            let frame = [ethernet(tags, 0x0800), v4(words, 0x4000, 6, &tcp(words))].concat();
            check_tcp(&frame, at + 20 + usize::from(words) * 4, words, FAMILY_V4);
        }
        for (extensions, bytes) in [
            (vec![], 0),
            (vec![extension(0, 0)], 8),
            (
                vec![
                    extension(0, 1),
                    extension(60, 0),
                    extension(43, 2),
                    fragment(0),
                    (51, vec![0; 22]),
                    extension(60, 0),
                ],
                16 + 8 + 24 + 8 + 24 + 8,
            ),
            (vec![extension(60, 0); 8], 64),
        ] {
            let frame = [ethernet(tags, 0x86dd), v6(&extensions, 6, &tcp(5))].concat();
            check_tcp(&frame, at + 40 + bytes, 5, FAMILY_V6);
        }
    }
}

#[test]
fn what_is_not_read_is_said() {
    let v4_frame = |packet: Vec<u8>| read(&[ethernet(&[], 0x0800), packet].concat()).0;
    let v6_frame = |packet: Vec<u8>| read(&[ethernet(&[], 0x86dd), packet].concat()).0;
    assert_eq!(read(&[ethernet(&[], 0x0806), vec![0; 28]].concat()).0, Kind::Foreign);
    // The kernel does not know the type.
    assert_eq!(read(&[ethernet(&[0x9100, 0x8100], 0x0800), v4(0, 0, 6, &tcp(0))].concat()).0, Kind::Foreign);
    assert_eq!(v4_frame(v4(0, 0, 1, &[8, 0, 0, 0])), Kind::Other);
    assert_eq!(v4_frame(v4(0, 0x2000, 6, &tcp(0))), Kind::Tcp, "the first fragment");
    assert_eq!(v4_frame(v4(0, 0x2000, 6, &tcp(0)[..16])), Kind::Unreadable, "a tiny first fragment");
    assert_eq!(v4_frame(v4(0, 0x2001, 6, &tcp(0))), Kind::LaterFragment);
    assert_eq!(v4_frame(v4(0, 1, 17, &udp())), Kind::LaterFragment);
    assert_eq!(v4_frame(v4(0, 0, 17, &udp())), Kind::Udp);
    assert_eq!(v6_frame(v6(&[fragment(3)], 6, &tcp(0))), Kind::LaterFragment);
    assert_eq!(v6_frame(v6(&[extension(0, 0), fragment(1)], 17, &udp())), Kind::LaterFragment);
    assert_eq!(v6_frame(v6(&[extension(60, 3)], 17, &udp())), Kind::Udp);
    assert_eq!(v6_frame(v6(&[], 58, &[128, 0, 0, 0])), Kind::Other);
    assert_eq!(
        v6_frame(v6(&vec![extension(60, 0); 9], 6, &tcp(0))),
        Kind::Unreadable,
        "nine extension headers"
    );
    // Headers that contradict themselves.
    let mut short = v4(0, 0, 6, &tcp(0));
    short[0] = 0x44;
    assert_eq!(v4_frame(short), Kind::Unreadable);
    let mut offset = tcp(0);
    offset[12] = 4 << 4;
    assert_eq!(v4_frame(v4(0, 0, 6, &offset)), Kind::Unreadable);
    offset[12] = 15 << 4;
    assert_eq!(v6_frame(v6(&[], 6, &offset)), Kind::Unreadable);
    let mut version = v4(0, 0, 6, &tcp(0));
    version[0] = 0x65;
    assert_eq!(v4_frame(version), Kind::Foreign);
}

/// The kernel takes tags of network 0 off until there are none.
#[test]
fn tags_that_are_left_unread_hide_nothing() {
    let tagged = |count: usize, last_network: u16| {
        let mut frame = ethernet(&vec![0x8100; count], 0x0800);
        for tag in 0..count {
            // With a priority.
            let network = if tag == MAX_TAGS as usize - 1 { last_network } else { 0 };
            frame[14 + tag * 4..16 + tag * 4].copy_from_slice(&(0xe000 | network).to_be_bytes());
        }
        read(&[frame, v4(0, 0, 6, &tcp(0))].concat()).0
    };
    for count in 0..=8 {
        assert_eq!(tagged(count, 0), Kind::Tcp, "{count}");
    }
    for count in [9, 10, 40] {
        assert_eq!(tagged(count, 0), Kind::Wrapped, "{count}");
        assert_eq!(tagged(count, 5), Kind::Foreign, "{count}: for another device");
    }
}

proptest! {
    #[test]
    fn whatever_comes_is_read_within_bounds(
        head in 0_usize..6, bytes in proptest::collection::vec(any::<u8>(), 0..200), nibbles in any::<(u8, u8)>()
    ) {
        let kinds = [vec![0x0800], vec![0x86dd], vec![0x8100, 0x0800], vec![0x8100, 0x86dd], vec![0x88a8, 0x8100, 0x86dd], vec![0x0806]];
        let mut kinds = kinds[head].clone();
        let last = kinds.pop().unwrap_or_default();
        let mut frame = ethernet(&kinds, last);
        let at = frame.len();
        frame.extend_from_slice(&bytes);
        if let Some(first) = frame.get_mut(at) {
            *first = if last == 0x0800 { 0x40 | nibbles.0 & 0xf } else { 0x60 | nibbles.0 & 0xf };
        }
        // A length that fits is the interesting case.
        if nibbles.1 & 1 == 0 && bytes.len() >= 40 {
            let (place, length) = if last == 0x0800 { (at + 2, bytes.len()) } else { (at + 4, bytes.len() - 40) };
            frame[place..place + 2].copy_from_slice(&(length as u16).to_be_bytes());
        }
        let (kind, packet) = read(&frame);
        match kind {
            Kind::Tcp => {
                let end = packet.transport_at as usize + 20 + packet.option_bytes as usize;
                prop_assert!(end <= frame.len() && packet.option_bytes <= 40);
                prop_assert_eq!(packet.flags, frame[packet.transport_at as usize + 13]);
                let port = packet.transport_at as usize + 2;
                prop_assert_eq!(packet.port, u16::from_be_bytes([frame[port], frame[port + 1]]));
            }
            Kind::Udp => prop_assert!(packet.transport_at as usize + 8 <= frame.len()),
            _ => {}
        }
    }
}
