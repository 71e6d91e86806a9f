//! Heads that are good, nearly good, or spoiled in a few places.

/// SplitMix64: enough for test data, and the same on every run.
#[derive(Debug, Clone)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(super) fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }

    pub(super) fn one_in(&mut self, of: usize) -> bool {
        self.below(of) == 0
    }
}

const STARTS: [&str; 12] = [
    "POST /mcp HTTP/1.1",
    "POST /mcp HTTP/1.1",
    "POST /mcp HTTP/1.1",
    "GET /mcp HTTP/1.1",
    "GET /mcp HTTP/1.1",
    "DELETE /mcp HTTP/1.1",
    "GET /healthz HTTP/1.1",
    "HEAD /healthz HTTP/1.1",
    "GET /elsewhere HTTP/1.1",
    "POST /mcp/more HTTP/1.1",
    "POST /mcp?a=b HTTP/1.1",
    "PUT /mcp HTTP/1.1",
];
const TOKENS: [&str; 6] = [
    "Authorization: Bearer {TOKEN}",
    "Authorization: Bearer {TOKEN}",
    "Authorization: Bearer {TOKEN}",
    "authorization: bearer {TOKEN}",
    "Authorization: Bearer abc.def.ghi",
    "Authorization: Basic YTpi",
];
const FRAMINGS: [&str; 6] = [
    "Content-Length: 0",
    "Content-Length: 5",
    "content-length:17",
    "CONTENT-LENGTH: 1234",
    "Content-Length: 4000000000",
    "Transfer-Encoding: chunked",
];
const MASKED: [&str; 12] = [
    "User-Agent: agent/1.0 (x; y)",
    "user-agent: a",
    "User-Agent:",
    "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "tracestate: a=1,b=2",
    "X-Request-Id: 5f1c",
    "x-request-ID:1",
    "baggage: k=v;p=1, l=w",
    "baggage:  spaced  ",
    "User-Agents: plural",
    "User_Agent: dashed",
    "X-Request-Idx: 1",
];
const OTHERS: [&str; 16] = [
    "Accept: application/json, text/event-stream",
    "Content-Type: application/json",
    "Mcp-Session-Id: 1234",
    "MCP-Protocol-Version: 2026-07-28",
    "Mcp-Method: tools/call",
    "Connection: keep-alive",
    "Connection: close",
    "Cookie: a=b; c=d",
    "Cache-Control: no-cache",
    "X-Empty:",
    "X-Tab:\ta\tb",
    "Accept-Encoding: gzip, deflate",
    "Origin: https://evil.example",
    "Expect: 100-continue",
    "TE: trailers",
    "X-Forwarded-For: 10.0.0.1",
];
/// What spoils a head.
const PIECES: [&str; 40] = [
    "\r\n",
    "\r\n",
    "\r",
    "\n",
    "\0",
    " ",
    "\t",
    ":",
    ": ",
    ",",
    ";",
    "\u{b}",
    "\u{c}",
    "\u{1a}",
    "\u{7f}",
    "\u{85}",
    "\u{e9}",
    "\r\n ",
    "\r\n\t",
    "\n\n",
    "\r\r\n",
    "\n\r\n",
    " HTTP/1.0",
    " HTTP/1.1",
    "Content-Length: 7\r\n",
    "Content\rLength: 7\r\n",
    "Content-Length\u{1a} 7\r\n",
    "Content-Length : 7\r\n",
    "content_length: 7\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding: \u{b}chunked\r\n",
    "Transfer\rEncoding: chunked\r\n",
    "Authorization: Bearer other\r\n",
    "Authorization : Bearer other\r\n",
    "User-Agent: x\r\n",
    "User\rAgent: x\r\n",
    "Upgrade: h2c\r\n",
    "0",
    "+",
    "x",
];

/// A head, `{TOKEN}` standing for a good token.
pub(super) fn head(random: &mut Random) -> Vec<u8> {
    let start = random.pick(&STARTS);
    let mut lines = vec!["Host: mcp.example.com"];
    if !random.one_in(6) {
        lines.push(random.pick(&TOKENS));
    }
    if start.starts_with("POST") && !random.one_in(5) || random.one_in(12) {
        lines.push(random.pick(&FRAMINGS));
    }
    for _ in 0..random.below(4) {
        lines.push(random.pick(&MASKED));
    }
    for _ in 0..random.below(4) {
        lines.push(random.pick(&OTHERS));
    }
    for at in (1..lines.len()).rev() {
        lines.swap(at, random.below(at + 1));
    }
    let mut bytes = format!("{start}\r\n{}\r\n\r\n", lines.join("\r\n")).into_bytes();
    if random.one_in(20) {
        let pad = "p".repeat(random.below(4200));
        bytes.truncate(bytes.len() - 2);
        bytes.extend_from_slice(format!("X-Pad: {pad}\r\n\r\n").as_bytes());
    }
    let edits = [0, 0, 1, 1, 1, 2, 3][random.below(7)];
    for _ in 0..edits {
        edit(&mut bytes, random);
    }
    bytes
}

fn edit(bytes: &mut Vec<u8>, random: &mut Random) {
    let at = random.below(bytes.len());
    match random.below(8) {
        0 => bytes[at] = random.next() as u8,
        1 => bytes[at] ^= 1 << random.below(8),
        2 => drop(bytes.remove(at)),
        3 => bytes.insert(at, random.next() as u8),
        4 => {
            let piece = random.pick(&PIECES).as_bytes();
            drop(bytes.splice(at..at, piece.iter().copied()));
        }
        5 => {
            let piece = random.pick(&PIECES).as_bytes();
            drop(bytes.splice(at..=at, piece.iter().copied()));
        }
        // A line again, here or at its end.
        _ => {
            let lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
            let line = lines[random.below(lines.len())].to_vec();
            let ends: Vec<usize> =
                (0..bytes.len()).filter(|at| bytes[*at] == b'\n').map(|at| at + 1).collect();
            let at = if ends.is_empty() || random.one_in(4) { at } else { ends[random.below(ends.len())] };
            drop(bytes.splice(at..at, line));
        }
    }
}
