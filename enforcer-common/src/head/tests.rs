//! The scan and the digest against byte-wise references.

use super::*;
use crate::digest::KEY_WORDS;
use proptest::prelude::*;

fn key(seed: u64) -> DigestKey {
    let mut state = seed;
    DigestKey {
        words: core::array::from_fn(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state ^ state >> 29
        }),
    }
}

/// What the scan must find, one byte at a time and without tricks: head length, content length, masked head.
fn reference(bytes: &[u8]) -> Result<(usize, Option<u64>, Vec<u8>), Miss> {
    let bytes = &bytes[..bytes.len().min(HEAD_MAX_BYTES)];
    let mut lines = Vec::new();
    let mut start = 0;
    let mut end = None;
    for (at, &byte) in bytes.iter().enumerate() {
        if byte != b'\n' {
            continue;
        }
        lines.push((start, at));
        if at <= start + 1 {
            if lines.len() == 1 {
                return Err(Miss::Irregular);
            }
            end = Some(at + 1);
            break;
        }
        start = at + 1;
    }
    let Some(end) = end else { return Err(Miss::Incomplete) };
    let mut masked = bytes[..end].to_vec();
    let mut length = None;
    for (index, &(start, line_feed)) in lines.iter().enumerate() {
        if line_feed == start || bytes[line_feed - 1] != b'\r' || matches!(bytes[start], b' ' | b'\t') {
            return Err(Miss::Irregular);
        }
        let line = &bytes[start..line_feed - 1];
        let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
        if index == 0 {
            continue;
        }
        let name = line[..colon].to_ascii_lowercase();
        let value = &line[colon + 1..];
        if name == b"content-length" {
            let digits = value.strip_prefix(b" ").unwrap_or(value);
            let plain = !digits.is_empty()
                && digits.len() <= 10
                && digits.iter().all(u8::is_ascii_digit)
                && (digits.len() == 1 || digits[0] != b'0');
            if !plain || length.is_some() {
                return Err(Miss::Irregular);
            }
            length = Some(core::str::from_utf8(digits).unwrap().parse().unwrap());
            let from = line_feed - 1 - digits.len();
            masked[from..line_feed - 1].fill(0);
        } else if IGNORED.iter().any(|ignored| ignored.as_bytes() == name) && value.len() <= 256 {
            if !value.iter().all(|byte| (0x20..=0x7e).contains(byte)) {
                return Err(Miss::Irregular);
            }
            let from = start + colon + 1;
            masked[from..line_feed - 1].fill(0);
        }
    }
    Ok((end, length, masked))
}

/// NH by its definition, over 32-bit words.
fn reference_digest(masked: &[u8], key: &DigestKey, endpoint_id: u32) -> HeadDigest {
    let mut padded = masked.to_vec();
    padded.resize(masked.len().div_ceil(64) * 64, 0);
    let message: Vec<u32> =
        padded.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    let halves: Vec<u32> = key.words.iter().flat_map(|word| [*word as u32, (*word >> 32) as u32]).collect();
    let nh = |message: &[u32], key: &[u32]| {
        message.chunks(2).zip(key.chunks(2)).fold(0_u64, |sum, (m, k)| {
            let product = u64::from(m[0].wrapping_add(k[0])) * u64::from(m[1].wrapping_add(k[1]));
            sum.wrapping_add(product)
        })
    };
    let last = [masked.len() as u32, endpoint_id];
    let at = HEAD_MAX_BYTES / 4;
    HeadDigest {
        lo: nh(&message, &halves).wrapping_add(nh(&last, &halves[at..])),
        hi: nh(&message, &halves[4..]).wrapping_add(nh(&last, &halves[at + 4..])),
    }
}

fn check(bytes: &[u8]) -> Result<(HeadInfo, HeadDigest), Miss> {
    let key = key(1);
    let got = analyze_bytes(bytes, &key, 5);
    match (&got, reference(bytes)) {
        (Ok((info, digest)), Ok((end, length, masked))) => {
            assert_eq!(info.head_bytes as usize, end);
            assert_eq!((info.has_content_length == 1).then_some(info.content_length), length);
            assert_eq!(*digest, reference_digest(&masked, &key, 5));
        }
        // The scan may call irregular what the reference reads: more lines than it keeps, line feeds too dense.
        (Err(Miss::Irregular), _) => {}
        (Err(got), Err(wanted)) => assert_eq!(*got, wanted),
        (got, wanted) => {
            panic!("scan {got:?}, reference {wanted:?} for {:?}", String::from_utf8_lossy(bytes))
        }
    }
    got
}

fn digest(head: &str) -> HeadDigest {
    check(head.as_bytes()).unwrap_or_else(|miss| panic!("{miss:?}: {head:?}")).1
}

const HEAD: &str = "POST /mcp HTTP/1.1\r\nHost: a\r\nUser-Agent: x/1\r\nAuthorization: Bearer abc\r\nContent-Length: 12\r\n\r\n";

#[test]
fn left_out_values_do_not_count_but_their_lengths_do() {
    assert_eq!(digest(HEAD), digest(&HEAD.replace("x/1", "y/2")));
    assert_eq!(digest(HEAD), digest(&HEAD.replace(": 12", ": 99")));
    assert_ne!(digest(HEAD), digest(&HEAD.replace("x/1", "y/22")));
    assert_ne!(digest(HEAD), digest(&HEAD.replace(": 12", ": 123")));
    assert_ne!(digest(HEAD), digest(&HEAD.replace("User-Agent", "user-agent")));
    for name in IGNORED {
        assert_eq!(
            digest(&format!("GET / HTTP/1.1\r\n{name}: 1\r\n\r\n")),
            digest(&format!("GET / HTTP/1.1\r\n{name}: 2\r\n\r\n")),
            "{name}"
        );
    }
}

#[test]
fn every_other_byte_counts() {
    let original = digest(HEAD);
    let left_out = [
        HEAD.find("x/1").unwrap() - 1..HEAD.find("x/1").unwrap() + 3,
        HEAD.find("12\r").unwrap()..HEAD.find("12\r").unwrap() + 2,
    ];
    for at in 0..HEAD.len() {
        if left_out.iter().any(|range| range.contains(&at)) {
            continue;
        }
        let mut bytes = HEAD.as_bytes().to_vec();
        bytes[at] ^= 1;
        if let Ok((_, changed)) = check(&bytes) {
            assert_ne!(changed, original, "byte {at}");
        }
    }
}

#[test]
fn body_bytes_and_the_endpoint() {
    let with_body = format!("{HEAD}{{\"a\":\"\\r\\n\"}}\r\n\r\nxx");
    assert_eq!(digest(&with_body), digest(HEAD));
    let key = key(1);
    assert_ne!(analyze_bytes(HEAD.as_bytes(), &key, 1), analyze_bytes(HEAD.as_bytes(), &key, 2));
}

#[test]
fn unusual_heads_are_misses() {
    for head in [
        "GET / HTTP/1.1\nHost: a\n\n",
        "GET / HTTP/1.1\r\nHost: a\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n\tfolded\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\n\n",
        "\r\nGET / HTTP/1.1\r\n\r\n",
        "\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 1\r\ncontent-length: 1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 01\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 0x1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 1 \r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length:  1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length:\t1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: \r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length:\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 18446744073709551616\r\n\r\n",
        "GET / HTTP/1.1\r\nUser-Agent: a\rb\r\n\r\n",
        "GET / HTTP/1.1\r\nUser-Agent: a\0b\r\n\r\n",
        "GET / HTTP/1.1\r\nUser-Agent: a\tb\r\n\r\n",
        "GET / HTTP/1.1\r\nUser-Agent: a\u{7f}\r\n\r\n",
        "GET / HTTP/1.1\r\nUser-Agent: é\r\n\r\n",
    ] {
        assert_eq!(check(head.as_bytes()).map(|_| ()), Err(Miss::Irregular), "{head:?}");
    }
    for head in
        ["", "G", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nHost: a\r\n", "GET / HTTP/1.1\r\nHost: a\r\n\r"]
    {
        assert_eq!(check(head.as_bytes()).map(|_| ()), Err(Miss::Incomplete), "{head:?}");
    }
}

#[test]
fn limits_of_length_and_lines() {
    let fill = |len: usize| format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(len - 23));
    assert_eq!(fill(4096).len(), 4096);
    assert!(check(fill(4096).as_bytes()).is_ok());
    assert_eq!(check(fill(4097).as_bytes()).map(|_| ()), Err(Miss::Incomplete));
    let lines = |count: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "Abcdef: 1\r\n".repeat(count));
    assert!(check(lines(62).as_bytes()).is_ok());
    assert_eq!(check(lines(63).as_bytes()).map(|_| ()), Err(Miss::Irregular));
    let agent = |len: usize| format!("GET / HTTP/1.1\r\nUser-Agent:{}\r\n\r\n", "a".repeat(len));
    assert_eq!(digest(&agent(256)), digest(&agent(256).replace("aa", "bb")));
    assert_ne!(digest(&agent(257)), digest(&agent(257).replace("aa", "bb")));
}

#[test]
fn key_matters_everywhere() {
    let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(4000));
    let original = analyze_bytes(long.as_bytes(), &key(1), 5).unwrap().1;
    for word in (0..long.len() / 8).chain([KEY_WORDS - 8]) {
        let mut other = key(1);
        other.words[word] ^= 1 << 7;
        assert_ne!(analyze_bytes(long.as_bytes(), &other, 5).unwrap().1, original, "key word {word}");
    }
}

fn header_line() -> impl Strategy<Value = String> {
    prop_oneof![
        "[A-Za-z-]{1,14}: [ -~]{0,60}",
        Just("Content-Length: 5".to_owned()),
        "(?i)content-length:( |  |)[0-9+x, ]{0,12}",
        "(?i)(user-agent|traceparent|tracestate|x-request-id|baggage): ?[ -~]{0,40}",
        "(User-Agen|Traceparents|X-Request-Ix|content-lengt|Content-Lengthy): [0-9a-z]{0,9}",
        "[ \t\r\n\x00-\x7f]{0,6}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn scan_and_digest_equal_the_reference(
        lines in prop::collection::vec(header_line(), 0..12),
        body in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let mut bytes = format!("POST /mcp HTTP/1.1\r\n{}\r\n", lines.iter().map(|line| format!("{line}\r\n")).collect::<String>()).into_bytes();
        bytes.extend_from_slice(&body);
        let _ = check(&bytes);
    }

    #[test]
    fn arbitrary_bytes_equal_the_reference(bytes in prop::collection::vec(prop_oneof![Just(b'\r'), Just(b'\n'), Just(b':'), any::<u8>()], 0..300)) {
        let _ = check(&bytes);
    }

    #[test]
    fn a_cut_head_is_incomplete_or_irregular(cut in 0..HEAD.len()) {
        prop_assert!(check(&HEAD.as_bytes()[..cut]).is_err());
    }

    #[test]
    fn different_heads_have_different_digests(a in "[ -~]{0,200}", b in "[ -~]{0,200}") {
        prop_assume!(a != b);
        let head = |text: &str| format!("GET / HTTP/1.1\r\nX: {text}\r\n\r\n");
        prop_assert_ne!(digest(&head(&a)), digest(&head(&b)));
    }
}
