//! One connection of the recorder: read, record, answer.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use ring::digest::{Context, SHA256, digest};

use super::{Answer, ReadMode, RequestRecord, Shared, wait_readable, wait_writable};
use crate::wire::{ChunkedScanner, Framing, head_end, header, method_and_target, request_framing};

/// How often a waiting connection looks whether the recorder closes.
const POLL_MS: u8 = 200;
const PATTERN_PERIOD: u64 = 251;

pub(super) fn hex_sha256(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn serve(stream: &TcpStream, shared: &Shared, id: u64) {
    let mut connection = Connection {
        stream,
        shared,
        id,
        hash: Context::new(&SHA256),
        unparsed: Vec::new(),
        scratch: vec![0; 256 << 10],
    };
    let outcome = connection.run();
    shared.update(id, |record| {
        record.closed = true;
        record.error = outcome.err().map(|error| error.to_string());
    });
}

struct Connection<'a> {
    stream: &'a TcpStream,
    shared: &'a Shared,
    id: u64,
    hash: Context,
    /// Read and recorded, not yet parsed.
    unparsed: Vec<u8>,
    scratch: Vec<u8>,
}

impl Connection<'_> {
    fn run(&mut self) -> io::Result<()> {
        loop {
            let head = loop {
                if let Some(end) = head_end(&self.unparsed) {
                    let rest = self.unparsed.split_off(end);
                    break std::mem::replace(&mut self.unparsed, rest);
                }
                if self.fill()? == 0 {
                    return Ok(());
                }
            };
            let expects_continue =
                header(&head, "expect").is_some_and(|value| value.eq_ignore_ascii_case(b"100-continue"));
            if expects_continue {
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            }
            let (body_bytes, body_hash) = self.body(request_framing(&head))?;
            let (method, target) = method_and_target(&head);
            let record = RequestRecord {
                method: method.to_owned(),
                target: target.to_owned(),
                head_bytes: head.len() as u64,
                body_bytes,
                body_sha256: hex(body_hash.finish().as_ref()),
            };
            self.shared.update(self.id, |connection| connection.requests.push(record));
            let last = header(&head, "connection").is_some_and(|value| value.eq_ignore_ascii_case(b"close"));
            if !self.answer(method == "HEAD")? || last {
                return Ok(());
            }
        }
    }

    /// Consumes the body; gives its length and hash without chunking.
    fn body(&mut self, framing: Framing) -> io::Result<(u64, Context)> {
        let (mut length, mut hash) = (0, Context::new(&SHA256));
        let mut scanner = ChunkedScanner::default();
        loop {
            let bytes = std::mem::take(&mut self.unparsed);
            let (used, end) = match framing {
                Framing::Length(total) => {
                    let used = bytes.len().min(usize::try_from(total - length).unwrap_or(usize::MAX));
                    hash.update(bytes.get(..used).unwrap_or_default());
                    length += used as u64;
                    (used, length == total)
                }
                Framing::Chunked => scanner.feed(&bytes, |data| {
                    hash.update(data);
                    length += data.len() as u64;
                })?,
            };
            self.unparsed.extend_from_slice(bytes.get(used..).unwrap_or_default());
            if end {
                return Ok((length, hash));
            }
            if self.fill()? == 0 {
                return Err(io::Error::new(
                    ErrorKind::UnexpectedEof,
                    format!("closed after {length} body bytes"),
                ));
            }
        }
    }

    /// Reads once and records it.
    fn fill(&mut self) -> io::Result<usize> {
        let count = loop {
            if self.shared.is_closing() {
                return Ok(0);
            }
            // First wait, then look how to read: a change holds for the very next bytes.
            if !wait_readable(self.stream, POLL_MS) {
                continue;
            }
            let mode = self.shared.config().read;
            let limit = match mode {
                ReadMode::Fast => self.scratch.len(),
                ReadMode::Slow { bytes, .. } => bytes.clamp(1, self.scratch.len()),
            };
            match self.stream.read(self.scratch.get_mut(..limit).unwrap_or_default()) {
                Err(error) if is_timeout(&error) => {}
                outcome => {
                    if let ReadMode::Slow { pause_ms, .. } = mode {
                        thread::sleep(Duration::from_millis(pause_ms));
                    }
                    break outcome?;
                }
            }
        };
        let bytes = self.scratch.get(..count).unwrap_or_default();
        self.hash.update(bytes);
        let sha256 = hex(self.hash.clone().finish().as_ref());
        let keep_bytes = self.shared.config().keep_bytes;
        self.shared.update(self.id, |record| {
            record.bytes_read += count as u64;
            record.sha256 = sha256;
            let room = keep_bytes.saturating_sub(record.kept.len()).min(count);
            record.kept.extend_from_slice(bytes.get(..room).unwrap_or_default());
        });
        self.unparsed.extend_from_slice(bytes);
        Ok(count)
    }

    /// Answers as configured; false when the connection ends here.
    fn answer(&mut self, head_only: bool) -> io::Result<bool> {
        let config = self.shared.config();
        if config.answer_delay_ms > 0 {
            thread::sleep(Duration::from_millis(config.answer_delay_ms));
        }
        match config.answer {
            Answer::Close => return Ok(false),
            Answer::Json => {
                self.small(200, br#"{"jsonrpc":"2.0","id":1,"result":{"content":[]}}"#, head_only)?;
            }
            Answer::Status { code } => self.small(code, br#"{"error":"as configured"}"#, head_only)?,
            Answer::Big { bytes } => {
                self.head(200, "application/octet-stream", &format!("Content-Length: {bytes}"))?;
                if !head_only {
                    self.pattern(bytes)?;
                }
            }
            Answer::Sse { events, event_bytes, interval_ms } => {
                self.head(200, "text/event-stream", "Transfer-Encoding: chunked")?;
                let data = "x".repeat(event_bytes);
                for event in 0..events {
                    thread::sleep(Duration::from_millis(interval_ms));
                    let text = format!("id: {event}\ndata: {data}\n\n");
                    self.write(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes())?;
                }
                self.write(b"0\r\n\r\n")?;
            }
        }
        Ok(true)
    }

    fn small(&mut self, status: u16, body: &[u8], head_only: bool) -> io::Result<()> {
        let body = if head_only { b"" } else { body };
        let head = format!(
            "HTTP/1.1 {status} Status\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        self.write(&[head.as_bytes(), body].concat())
    }

    fn head(&mut self, status: u16, content_type: &str, framing: &str) -> io::Result<()> {
        self.write(
            format!("HTTP/1.1 {status} OK\r\nContent-Type: {content_type}\r\n{framing}\r\n\r\n").as_bytes(),
        )
    }

    fn pattern(&mut self, total: u64) -> io::Result<()> {
        let period = pattern(PATTERN_PERIOD * 1024);
        let mut left = total;
        while left > 0 {
            let take = period.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            self.write(period.get(..take).unwrap_or_default())?;
            left -= take as u64;
        }
        Ok(())
    }

    /// Writes all of it, however long the client takes, unless the recorder closes.
    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) if is_timeout(&error) && !self.shared.is_closing() => {
                    wait_writable(self.stream, POLL_MS);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// The body of [`Answer::Big`] (byte `i` is `i % 251`), to compare with.
pub fn pattern(bytes: u64) -> Vec<u8> {
    let period: Vec<u8> = (0..=u8::MAX).take(251).collect();
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    let mut body = period.repeat(bytes.div_ceil(period.len()));
    body.truncate(bytes);
    body
}
