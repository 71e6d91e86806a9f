//! Whatever may have a verdict, every parser reads alike.
//!
//! The real engine judges generated heads. Where it writes a verdict, the kernel will act on this head, and on each that differs
//! from it in masked bytes only, without anybody's parser. So these are read by the kernel's scan, by `httparse`
//! (hyper's parser), by Node's HTTP server (llhttp) and by Python's `http.server`, and all must see the same method, target,
//! `Authorization` and end of the request. A parser may refuse a head that we accept: its server then serves nothing.
//!
//! Heads are made from parts and spoiled at random, by seed; coverage does not guide it. `cargo xtask fuzz` runs it for long. What was
//! found, and what is worth keeping, lies in `tests/fuzz-corpus` and is tried on every run.

mod generate;
mod readers;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use enforcer_common::abi::{
    EndpointKey, FAMILY_V4, HeadDigest, PUNT_DATA, PuntHeader, VERDICT_DENY, Verdict,
};
use enforcer_common::digest::DigestKey;
use enforcer_common::head::{self, HEAD_MAX_BYTES, HeadBuf, HeadInfo, Layout};

use super::tests::Fake;
use super::{EndpointPolicy, Endpoints, Engine, Now, Secrets};
use crate::http::head::{find_head_end, parse_head};
use crate::keys::KeySnapshot;
use crate::policy::{Mode, Server};
use crate::token::Fingerprinter;
use crate::token::testing::{NOW, World};
use generate::Random;
use readers::{Reader, Seen};

const PLACE: &[u8] = b"{TOKEN}";
const MARKER: &[u8] = b"GET /marker HTTP/1.1\r\nHost: m\r\n\r\n";
/// Longer bodies are not sent to the parsers; then only what they read of the head counts.
const BODY_MAX_BYTES: u64 = 20_000;

/// The engine, the parsers, and what they saw.
struct Bench {
    engine: Engine,
    fake: Fake,
    keys: KeySnapshot,
    token: String,
    key: Box<DigestKey>,
    epoch: u32,
    readers: Vec<Reader>,
    tally: Tally,
}

#[derive(Debug, Default)]
struct Tally {
    heads: u64,
    known: u64,
    allowed: u64,
    /// Streams that a parser refused, by parser.
    refused: BTreeMap<&'static str, u64>,
    streams: u64,
}

/// A stream for the parsers, and what they must see first.
struct Case {
    /// As it was made, for the corpus.
    source: Vec<u8>,
    stream: Vec<u8>,
    wanted: Seen,
    /// The body is in the stream, and the marker behind it.
    whole: bool,
    masked: bool,
}

impl Bench {
    fn new() -> Self {
        let world = World::new();
        let server = Server { public_paths: vec!["/healthz".into()], ..world.server() };
        let endpoint = EndpointPolicy {
            key: EndpointKey { addr: [0; 16], port: 1, family: FAMILY_V4, zero: 0 },
            servers: vec![(0, Arc::new(server))],
        };
        let words = std::array::from_fn(|k| (k as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let key = Box::new(DigestKey { words });
        let secrets = Secrets { digest: key.clone(), fingerprint: Fingerprinter::new([1; 32]) };
        Self {
            engine: Engine::new((Endpoints(BTreeMap::from([(0, endpoint)])), Mode::Enforce), 1, 1, secrets),
            fake: Fake::default(),
            keys: world.keys(),
            token: world.token(),
            key,
            epoch: 0,
            readers: Reader::all(),
            tally: Tally::default(),
        }
    }

    /// The verdict that the engine writes for these bytes.
    fn verdict(&mut self, bytes: &[u8]) -> Option<(HeadDigest, Verdict)> {
        self.epoch = (self.epoch + 1) & 0xffff;
        let header = PuntHeader {
            cookie: 7,
            offset_bytes: 0,
            netns_cookie: 0,
            skip_bytes: 0,
            kind: PUNT_DATA,
            epoch: self.epoch,
            len_bytes: bytes.len() as u32,
            flags: 0,
            endpoint_id: 0,
            reason: 0,
            write_seq: 0,
            interface: 0,
            origin: enforcer_common::abi::Origin::NONE,
        };
        let now = Now { boot_ns: 1_000_000_000_000, unix_secs: NOW, unix_subsec_ns: 0 };
        // The grants stay; what else was written is of no interest, and would pile up.
        let grants = std::mem::take(&mut self.fake.grants);
        self.fake = Fake::default();
        self.fake.grants = grants;
        self.engine.record(&header, bytes, now, &self.keys, &mut self.fake);
        self.engine.end_batch(&mut self.fake);
        self.fake.verdicts.pop_last()
    }

    /// Judges a head, and makes the streams that the parsers must read alike.
    fn cases(&mut self, source: &[u8], random: &mut Random) -> Vec<Case> {
        self.tally.heads += 1;
        let bytes = with_token(source, &self.token);
        let Some((digest, verdict)) = self.verdict(&bytes) else { return Vec::new() };
        self.tally.known += 1;
        self.tally.allowed += u64::from(verdict.kind != VERDICT_DENY);
        let end = find_head_end(&bytes).expect("a head with a verdict has an end");
        let head = &bytes[..end];
        let (info, same) = head::analyze_bytes(head, &self.key, &enforcer_common::abi::Origin::NONE)
            .expect("so it has a digest");
        assert_eq!(same, digest);
        assert_eq!(info.head_bytes as usize, end, "kernel and parser see another end");
        let layout = layout_of(head);
        let mut cases = vec![case(source, head, info, false)];
        if layout.masks() > 0 || layout.length().1 > 0 {
            let other = masked_otherwise(head, &layout, random);
            let (info, same) = head::analyze_bytes(&other, &self.key, &enforcer_common::abi::Origin::NONE)
                .expect("it only differs in masked bytes");
            assert_eq!(same, digest, "a masked byte counts: {:?}", String::from_utf8_lossy(&other));
            cases.push(case(source, &other, info, true));
        }
        cases
    }

    /// Has all parsers read all streams. The first that reads one otherwise is an error, with the head that it came from.
    fn compare<'c>(&mut self, cases: &'c [Case]) -> Result<(), (String, &'c [u8])> {
        let streams: Vec<Vec<u8>> = cases.iter().map(|case| case.stream.clone()).collect();
        self.tally.streams += streams.len() as u64;
        for reader in &mut self.readers {
            for (case, reading) in cases.iter().zip(reader.read(&streams)) {
                let Some(first) = reading.requests.first().filter(|_| case.whole || !reading.refused) else {
                    *self.tally.refused.entry(reader.name).or_default() += 1;
                    continue;
                };
                let marker = reading.requests.get(1).map(|second| second.target.as_str());
                let ends = !case.whole
                    || (reading.requests.len() == 2 && marker == Some("/marker") && !reading.refused);
                let same = Seen { body: case.wanted.body, ..first.clone() } == case.wanted
                    && (!case.whole || first.body == case.wanted.body);
                if !ends || !same {
                    let stream = String::from_utf8_lossy(&case.stream);
                    let (name, wanted, masked) = (reader.name, &case.wanted, case.masked);
                    let what =
                        format!("{name} reads {reading:?}, not {wanted:?}, of {stream:?} (masked: {masked})");
                    return Err((what, &case.source));
                }
            }
        }
        Ok(())
    }
}

fn with_token(source: &[u8], token: &str) -> Vec<u8> {
    match source.windows(PLACE.len()).position(|window| window == PLACE) {
        Some(at) => [&source[..at], token.as_bytes(), &source[at + PLACE.len()..]].concat(),
        None => source.to_vec(),
    }
}

fn layout_of(head: &[u8]) -> Layout {
    let mut buf = HeadBuf::new();
    buf.bytes[..head.len()].copy_from_slice(head);
    head::scan(&mut buf, head.len() as u32).expect("it has a digest")
}

/// Other bytes in all masked places.
fn masked_otherwise(head: &[u8], layout: &Layout, random: &mut Random) -> Vec<u8> {
    const TRICKS: [&str; 6] = [":", " ", ",", "Transfer-Encoding: chunked", "\"", "\\"];
    let mut other = head.to_vec();
    for index in 0..layout.masks() {
        let (from, to) = layout.mask(index);
        let value = &mut other[from as usize..to as usize];
        for byte in value.iter_mut() {
            *byte = 0x20 + random.below(0x5f) as u8;
        }
        let trick = random.pick(&TRICKS).as_bytes();
        if trick.len() <= value.len() {
            let at = random.below(value.len() - trick.len() + 1);
            value[at..at + trick.len()].copy_from_slice(trick);
        }
    }
    let (from, to) = layout.length();
    for at in from..to {
        let least = usize::from(at == from && to - from > 1);
        other[at as usize] = b'0' + (least + random.below(10 - least)) as u8;
    }
    other
}

/// What the parsers must see of a head, as the kernel frames it and `httparse` reads it.
fn case(source: &[u8], head: &[u8], info: HeadInfo, masked: bool) -> Case {
    let mut slots = [httparse::EMPTY_HEADER; 100];
    let mut request = httparse::Request::new(&mut slots);
    let read = request.parse(head);
    assert_eq!(read, Ok(httparse::Status::Complete(head.len())), "httparse sees another end");
    let named = |name: &str| -> Vec<String> {
        let fields = request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case(name));
        fields.map(|field| String::from_utf8_lossy(field.value).into_owned()).collect()
    };
    let wanted = Seen {
        method: request.method.unwrap_or_default().to_owned(),
        target: request.path.unwrap_or_default().to_owned(),
        authorization: named("authorization"),
        content_length: named("content-length"),
        transfer_encoding: named("transfer-encoding"),
        body: info.content_length,
    };
    let lengths: Vec<String> = wanted.content_length.clone();
    let ours = if info.has_content_length == 1 { vec![info.content_length.to_string()] } else { Vec::new() };
    assert_eq!(lengths, ours, "httparse sees another length");
    assert!(wanted.transfer_encoding.is_empty(), "a chunked head has a verdict");
    if !masked {
        let parsed = parse_head(head, HEAD_MAX_BYTES).expect("it was judged");
        assert_eq!((parsed.method(), parsed.target()), (wanted.method.as_str(), wanted.target.as_str()));
    }
    let whole = info.content_length <= BODY_MAX_BYTES;
    let mut stream = head.to_vec();
    if whole {
        stream.resize(head.len() + info.content_length as usize, b'b');
        stream.extend_from_slice(MARKER);
    }
    Case { source: source.to_vec(), stream, wanted, whole, masked }
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz-corpus")
}

fn keep(source: &[u8]) -> PathBuf {
    let sum = source
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    let file = corpus().join(format!("found-{sum:016x}.http"));
    std::fs::write(&file, source).expect("the corpus can be written");
    file
}

#[test]
fn what_may_have_a_verdict_is_read_alike_by_every_parser() {
    let seconds = std::env::var("ENFORCER_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let seed = std::env::var("ENFORCER_FUZZ_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
    let mut random = Random(seed);
    let mut bench = Bench::new();
    let mut rounds = 0;
    while rounds < 16 || Instant::now() < until {
        let mut cases = Vec::new();
        for _ in 0..250 {
            let source = generate::head(&mut random);
            cases.extend(bench.cases(&source, &mut random));
        }
        if let Err((what, source)) = bench.compare(&cases) {
            panic!("seed {seed}, round {rounds}, kept as {}: {what}", keep(source).display());
        }
        rounds += 1;
    }
    let tally = &bench.tally;
    eprintln!("{tally:?}, seed {seed}");
    // The test tells something only if many heads are known, and the parsers read nearly all of them.
    assert!(tally.known * 10 > tally.heads && tally.allowed * 10 > tally.known, "{tally:?}");
    for reader in &bench.readers {
        let refused = tally.refused.get(reader.name).copied().unwrap_or(0);
        assert!(refused * 5 < tally.streams, "{} refuses too many: {tally:?}", reader.name);
    }
}

/// Files in `known` must have a verdict, those in `unknown` must not; what was found may.
#[test]
fn the_corpus_is_read_alike_by_every_parser() {
    let mut bench = Bench::new();
    let mut random = Random(7);
    let mut files = 0;
    for (folder, known) in [("known", Some(true)), ("unknown", Some(false)), ("", None)] {
        for entry in std::fs::read_dir(corpus().join(folder)).expect("the corpus is there") {
            let path = entry.expect("it can be read").path();
            if path.extension().is_none_or(|extension| extension != "http") {
                continue;
            }
            files += 1;
            let source = std::fs::read(&path).expect("it can be read");
            let cases = bench.cases(&source, &mut random);
            let has_verdict = !cases.is_empty();
            assert!(known.is_none_or(|known| known == has_verdict), "{}: {has_verdict}", path.display());
            bench.compare(&cases).unwrap_or_else(|(what, _)| panic!("{}: {what}", path.display()));
        }
    }
    assert!(files >= 40, "{files} files");
}

/// The scan folds bytes when it looks for a name, so it takes some others for the dash and the colon. No head with one of those has
/// a verdict: the daemon's parser refuses it.
#[test]
fn names_that_the_scan_takes_for_others_have_no_verdict() {
    let mut bench = Bench::new();
    for name in head::IGNORED.into_iter().chain(["content-length"]) {
        let line = format!("{name}: 5\r\n");
        for (at, byte) in line.bytes().enumerate().take(name.len() + 1) {
            // All bytes that the scan's folding makes the same.
            for other in (0..=255_u8).filter(|other| *other != byte && (other | 0x20) == (byte | 0x20)) {
                let mut spoiled = line.clone().into_bytes();
                spoiled[at] = other;
                let mut source = b"POST /mcp HTTP/1.1\r\nHost: mcp.example.com\r\n".to_vec();
                source.extend_from_slice(&spoiled);
                source.extend_from_slice(b"Authorization: Bearer {TOKEN}\r\n\r\n");
                let known = !bench.cases(&source, &mut Random(1)).is_empty();
                assert_eq!(known, byte.is_ascii_alphabetic(), "{:?}", String::from_utf8_lossy(&spoiled));
            }
        }
    }
}

/// The comparison can fail: streams whose second request is hidden in the first's body, or the other way round.
#[test]
fn a_different_reading_is_noticed() {
    let head = b"POST /mcp HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n";
    let info =
        |content_length| HeadInfo { head_bytes: head.len() as u32, has_content_length: 1, content_length };
    let good = case(b"self-test", head, info(5), false);
    let mut bench = Bench::new();
    let shorter =
        Case { wanted: Seen { body: 4, ..good.wanted.clone() }, ..case(b"self-test", head, info(5), false) };
    let mut longer = case(b"self-test", head, info(5), false);
    longer.stream.insert(head.len(), b'b');
    let bearer = vec!["Bearer x".to_owned()];
    let other = Case {
        wanted: Seen { authorization: bearer, ..good.wanted.clone() },
        ..case(b"self-test", head, info(5), false)
    };
    assert_eq!(bench.compare(&[good]), Ok(()));
    for wrong in [shorter, longer, other] {
        let cases = [wrong];
        let (found, _) = bench.compare(&cases).unwrap_err();
        assert!(found.starts_with("node reads"), "{found}");
    }
}
