//! The shield's program, run by the kernel with frames that nobody sent (`BPF_PROG_TEST_RUN`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use anyhow::Result;
use enforcer_tests::bpf::{Ran, XDP_DROP, XDP_PASS, open_pinned, run_xdp};
use enforcer_tests::enforcement::{Enforcement, IssuerSpec, PolicySpec, ServerSpec};
use enforcer_tests::frame::{ACK, Frame, SYN};
use enforcer_tests::guard::{Cgroup, Deadline, NetNs, veth_pair};
use enforcer_tests::issuer::{Alg, Issuer};
use serde_json::{Value, json};

mod common;

use common::LIMIT;

const SERVER_V4: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 66, 0, 1)), 8080);
const SERVER_V6: SocketAddr =
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd00, 0x66, 0, 0, 0, 0, 0, 1)), 8080);

/// A daemon in a network namespace of its own, with the shield on an interface there. No server listens: no frame is sent.
struct Scene {
    enforcement: Enforcement,
    program: OwnedFd,
    _netns: [Arc<NetNs>; 2],
}

impl Scene {
    fn new(name: &str, fields: Value) -> Result<Self> {
        let netns = [Arc::new(NetNs::new(name)?), Arc::new(NetNs::new("peer")?)];
        let pair = veth_pair(&netns[0], &netns[1])?;
        let issuer = Issuer::new("https://login.example.com/tools", Alg::Es256)?;
        let server = ServerSpec::new("tools", &[SERVER_V4, SERVER_V6], "https://mcp.example.com/mcp");
        let mut shield = fields;
        shield["interfaces"] = json!([pair.interface_a]);
        let policy = PolicySpec::new(vec![IssuerSpec::from_file("corp", &issuer)], vec![server])
            .with("shield", shield);
        let mut enforcement = Enforcement::prepare(Cgroup::new(name)?, &policy, &["--drain-timeout", "0"])?;
        enforcement.live_in(&netns[0]);
        enforcement.launch()?;
        let program = open_pinned(&enforcement.pins().join("prog_shield"))?;
        Ok(Self { enforcement, program, _netns: netns })
    }

    fn run(&self, frame: &[u8]) -> Result<Ran> {
        run_xdp(self.program.as_fd(), frame, 1)
    }

    fn verdict(&self, frame: &[u8]) -> Result<u32> {
        Ok(self.run(frame)?.verdict)
    }
}

/// A client's end; of IPv6 clients the first 64 bits count.
fn client(v6: bool, number: u16) -> SocketAddr {
    let [high, low] = number.to_be_bytes();
    let ip = if v6 {
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, number, 0, 0, 0, 9))
    } else {
        IpAddr::V4(Ipv4Addr::new(198, 18, high, low))
    };
    SocketAddr::new(ip, 40_000)
}

/// Every way that a packet may be wrapped: a name, whether it is IPv6, and the wrapping.
type Wrapping = (&'static str, bool, fn(Frame) -> Frame);

const WRAPPINGS: &[Wrapping] = &[
    ("v4", false, |f| f),
    ("v4, VLAN", false, |f| f.tags(&[0x8100])),
    ("v4, QinQ", false, |f| f.tags(&[0x88a8, 0x8100])),
    ("v4, eight tags", false, |f| f.tags(&[0x8100; 8])),
    ("v4, options", false, |f| f.ip_options(&[148, 4, 0, 0, 1, 1, 1, 0])),
    ("v4, first fragment", false, |f| f.fragment(0)),
    ("v6", true, |f| f),
    ("v6, VLAN", true, |f| f.tags(&[0x8100])),
    ("v6, QinQ", true, |f| f.tags(&[0x88a8, 0x8100])),
    ("v6, eight tags", true, |f| f.tags(&[0x88a8; 8])),
    ("v6, hop by hop", true, |f| f.extension(0, &[5, 2, 0, 0, 1, 0])),
    ("v6, routing", true, |f| f.extension(43, &[4, 0, 0, 0, 0, 0])),
    ("v6, destination options", true, |f| f.extension(60, &[1, 4, 0, 0, 0, 0])),
    ("v6, first fragment", true, |f| f.fragment(0)),
    ("v6, all of them", true, |f| {
        let f =
            f.extension(0, &[5, 2, 0, 0, 1, 0]).extension(60, &[1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        f.extension(43, &[4, 0, 0, 0, 0, 0]).fragment(0).extension(60, &[1, 4, 0, 0, 0, 0])
    }),
    ("v6, eight headers", true, |f| (0..8).fold(f, |f, _| f.extension(60, &[1, 4, 0, 0, 0, 0]))),
];

fn server(v6: bool) -> SocketAddr {
    if v6 { SERVER_V6 } else { SERVER_V4 }
}

/// An address without protected endpoints.
fn elsewhere(v6: bool) -> SocketAddr {
    let ip = if v6 {
        Ipv6Addr::new(0xfd00, 0x66, 0, 0, 0, 0, 0, 2).into()
    } else {
        Ipv4Addr::new(10, 66, 0, 2).into()
    };
    SocketAddr::new(ip, 8080)
}

#[test]
fn whatever_is_around_it_a_packet_is_found_by_its_port() -> Result<()> {
    let _deadline = Deadline::new("wrapped", LIMIT);
    let scene = Scene::new("wrapped", json!({ "connections": { "rate": "1/h", "burst": 1 } }))?;
    for (number, (name, v6, wrap)) in WRAPPINGS.iter().enumerate() {
        let (from, to) = (client(*v6, number as u16), server(*v6));
        let other_port = SocketAddr::new(to.ip(), 8081);
        // A connection is the limit, so the program has found the SYN if it counts it.
        let syn = wrap(Frame::tcp(from, to, SYN)).build();
        let first = scene.run(&syn)?;
        assert_eq!((first.verdict, &first.frame), (XDP_PASS, &syn), "{name}");
        assert_eq!(scene.verdict(&syn)?, XDP_DROP, "{name}: a second SYN");
        assert_eq!(
            scene.verdict(&wrap(Frame::tcp(from, to, ACK)).build())?,
            XDP_PASS,
            "{name}: of a connection"
        );
        assert_eq!(
            scene.verdict(&wrap(Frame::tcp(from, to, SYN | ACK)).build())?,
            XDP_PASS,
            "{name}: an answer"
        );
        assert_eq!(
            scene.verdict(&wrap(Frame::tcp(from, other_port, SYN)).build())?,
            XDP_PASS,
            "{name}: another port"
        );
        assert_eq!(scene.verdict(&wrap(Frame::udp(from, to)).build())?, XDP_DROP, "{name}: a datagram");
        assert_eq!(
            scene.verdict(&wrap(Frame::udp(from, other_port)).build())?,
            XDP_PASS,
            "{name}: another port"
        );
    }
    let counters = scene.enforcement.counters()?;
    assert_eq!(counters.kernel("shield-datagram"), WRAPPINGS.len() as u64);
    assert_eq!(counters.kernel("shield-unreadable") + counters.kernel("shield-helper"), 0);
    Ok(())
}

#[test]
fn a_packet_that_ends_too_early_does_not_pass_for_a_protected_address() -> Result<()> {
    let _deadline = Deadline::new("cut", LIMIT);
    let scene = Scene::new("cut", json!({}))?;
    for (name, v6, wrap) in WRAPPINGS {
        let (from, to) = (client(*v6, 1), server(*v6));
        let tag_bytes = if name.contains("eight tags") {
            32
        } else if name.contains("QinQ") {
            8
        } else if name.contains("VLAN") {
            4
        } else {
            0
        };
        let addresses_end = 14 + tag_bytes + if *v6 { 40 } else { 20 };
        for (frame, foreign) in [
            (Frame::tcp(from, to, SYN), Frame::tcp(from, elsewhere(*v6), SYN)),
            (Frame::udp(from, to), Frame::udp(from, elsewhere(*v6))),
        ] {
            let (frame, foreign) = (wrap(frame.payload(b"x")).build(), wrap(foreign.payload(b"x")).build());
            for end in 14..frame.len() {
                // Before that nobody can tell for whom it is, and nobody takes it.
                let wanted = if end < addresses_end { XDP_PASS } else { XDP_DROP };
                assert_eq!(scene.verdict(&frame[..end])?, wanted, "{name}: {end} of {} bytes", frame.len());
                assert_eq!(
                    scene.verdict(&foreign[..end])?,
                    XDP_PASS,
                    "{name}: {end} bytes for somebody else"
                );
            }
        }
    }
    Ok(())
}

/// The kernel takes tags of network 0 off until there are none, and takes what is in them for this interface's.
#[test]
fn tags_that_lead_on_to_more_than_are_read_do_not_pass() -> Result<()> {
    let _deadline = Deadline::new("tags", LIMIT);
    let scene = Scene::new("tags", json!({}))?;
    let tagged = |count: usize, eighth_network: u8| {
        let mut frame = Frame::udp(client(false, 1), SERVER_V4).tags(&vec![0x8100; count]).build();
        for tag in 0..count {
            frame[15 + tag * 4] = if tag == 7 { eighth_network } else { 0 };
        }
        frame
    };
    for count in [0, 1, 3, 8, 9, 30] {
        assert_eq!(scene.verdict(&tagged(count, 0))?, XDP_DROP, "{count} tags");
    }
    assert_eq!(scene.verdict(&tagged(9, 5))?, XDP_PASS, "for another interface");
    let unknown = Frame::udp(client(false, 1), SERVER_V4).tags(&[0x9100]).build();
    assert_eq!(scene.verdict(&unknown)?, XDP_PASS, "no tag to the kernel");
    assert_eq!(scene.enforcement.counter("shield-datagram")?, 4);
    assert_eq!(scene.enforcement.counter("shield-unreadable")?, 2);
    Ok(())
}

#[test]
fn fragments_without_a_port_are_charged_to_their_source() -> Result<()> {
    let _deadline = Deadline::new("fragments", LIMIT);
    let scene = Scene::new("fragments", json!({ "packets": { "rate": "1/h", "burst": 3 } }))?;
    for v6 in [false, true] {
        let later = |from, to| Frame::tcp(from, to, SYN).fragment(9).payload(&[7; 64]).build();
        let (from, to) = (client(v6, 1), server(v6));
        for round in 0..3 {
            assert_eq!(scene.verdict(&later(from, to))?, XDP_PASS, "{v6} {round}");
        }
        assert_eq!(scene.verdict(&later(from, to))?, XDP_DROP);
        assert_eq!(scene.verdict(&Frame::tcp(from, to, ACK).build())?, XDP_DROP, "from the same bucket");
        assert_eq!(scene.verdict(&later(client(v6, 2), to))?, XDP_PASS);
        assert_eq!(scene.verdict(&later(from, elsewhere(v6)))?, XDP_PASS);
        // A first fragment that does not hold the header whole.
        let tiny = Frame::tcp(client(v6, 2), to, SYN).fragment(0).build();
        let (length_at, short) = if v6 { (18, 8 + 16_u16) } else { (16, 20 + 16) };
        let mut tiny = tiny;
        tiny[length_at..length_at + 2].copy_from_slice(&short.to_be_bytes());
        assert_eq!(scene.verdict(&tiny)?, XDP_DROP, "a tiny first fragment");
    }
    assert_eq!(scene.enforcement.counter("shield-packets")?, 4);
    assert_eq!(scene.enforcement.counter("shield-unreadable")?, 2);
    Ok(())
}

#[test]
fn mptcps_option_becomes_nops_and_the_checksum_stays_right() -> Result<()> {
    let _deadline = Deadline::new("mptcp-option", LIMIT);
    let scene = Scene::new("mptcp-option", json!({}))?;
    let (mss, sack, scale) = ([2, 4, 5, 180], [4, 2], [1, 3, 3, 7]);
    let capable = [30, 4, 1, 0];
    let join = [30, 12, 16, 1, 9, 8, 7, 6, 5, 4, 3, 2];
    let stamps = [8, 10, 1, 2, 3, 4, 0, 0, 0, 0];
    // What a Linux client sends; a join; the option at an odd offset; twice.
    let cases: [&[&[u8]]; 5] = [
        &[&mss, &sack, &stamps, &scale, &capable],
        &[&mss, &sack, &stamps, &scale, &join],
        &[&[1], &capable, &sack, &[1]],
        &[&join, &join, &capable, &mss],
        &[&mss, &sack, &stamps, &scale],
    ];
    let nops = |piece: &[u8]| if piece[0] == 30 { vec![1; piece.len()] } else { piece.to_vec() };
    for (name, v6, wrap) in WRAPPINGS {
        for pieces in cases {
            let options = pieces.concat();
            let wanted: Vec<u8> = pieces.iter().flat_map(|piece| nops(piece)).collect();
            let frame =
                wrap(Frame::tcp(client(*v6, 1), server(*v6), SYN).options(&options).payload(b"early data"));
            let before = frame.build();
            let after = scene.run(&before)?;
            assert_eq!((after.verdict, after.frame.len()), (XDP_PASS, before.len()), "{name}");
            let header_at = before.len() - 10 - options.len() - 20;
            let (headers, segment) = after.frame.split_at(header_at);
            assert_eq!(headers, &before[..header_at], "{name}");
            assert_eq!(frame.transport_checksum(segment), 0, "{name}: {options:?}");
            assert_eq!(&segment[20..20 + options.len()], wanted, "{name}");
            assert_eq!(&segment[20 + options.len()..], b"early data");
            if wanted == options {
                assert_eq!(after.frame, before, "{name}");
            }
        }
        let ack = Frame::tcp(client(*v6, 1), server(*v6), ACK).options(&capable);
        let ack = wrap(ack).build();
        assert_eq!(scene.run(&ack)?.frame, ack, "{name}: only SYNs");
        let other = SocketAddr::new(server(*v6).ip(), 8081);
        let other = wrap(Frame::tcp(client(*v6, 1), other, SYN).options(&capable)).build();
        assert_eq!(scene.run(&other)?.frame, other, "{name}: only protected ports");
    }
    assert_eq!(scene.enforcement.counter("shield-mptcp")?, 4 * WRAPPINGS.len() as u64);
    Ok(())
}

#[test]
fn each_source_has_its_own_limits() -> Result<()> {
    let _deadline = Deadline::new("sources", LIMIT);
    let limits = json!({
        "connections": { "rate": "1/h", "burst": 3 }, "packets": { "rate": "1/h", "burst": 10 },
        "exceptions": ["198.18.7.0/24", "2001:db8:0:7::/64"],
    });
    let scene = Scene::new("sources", limits)?;
    for v6 in [false, true] {
        let passed = |number: u16, flags: u8, count: usize| -> Result<usize> {
            let frame = Frame::tcp(client(v6, number), server(v6), flags).build();
            let verdicts = (0..count).map(|_| scene.verdict(&frame)).collect::<Result<Vec<_>>>()?;
            Ok(verdicts.into_iter().filter(|verdict| *verdict == XDP_PASS).count())
        };
        assert_eq!(passed(1, SYN, 5)?, 3);
        // Five packets were SYNs.
        assert_eq!(passed(1, ACK, 9)?, 5);
        assert_eq!(passed(2, ACK, 20)?, 10);
        assert_eq!(passed(2, SYN, 5)?, 0);
        assert_eq!(passed(3, SYN, 5)?, 3);
        // An exception, of the second source in IPv6.
        let exempt = if v6 { 7 } else { 7 << 8 | 1 };
        assert_eq!(passed(exempt, SYN, 50)?, 50);
    }
    // Neighbours on a link have the first 64 bits in common.
    for last in 1..4 {
        let neighbour = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, last)), 40_000);
        let syn = Frame::tcp(neighbour, SERVER_V6, SYN).build();
        let verdicts = (0..4).map(|_| scene.verdict(&syn)).collect::<Result<Vec<_>>>()?;
        assert_eq!(verdicts, [XDP_PASS, XDP_PASS, XDP_PASS, XDP_DROP]);
    }
    // Other IPv6 clients can choose their last 64 bits.
    let neighbour = SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 3, 1, 2, 3, 4)), 40_000);
    assert_eq!(scene.verdict(&Frame::tcp(neighbour, SERVER_V6, SYN).build())?, XDP_DROP);
    Ok(())
}
