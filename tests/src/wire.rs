//! The little HTTP/1.1 that the test servers read: leniently, for they stand behind the enforcer.

use std::io::{self, Read};

use memchr::{memchr, memchr_iter};

/// How a request's body is delimited, as a lenient server sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    Length(u64),
    Chunked,
}

/// Collects bytes of a stream of requests without bodies and gives their heads one by one.
#[derive(Debug, Default)]
pub(crate) struct HeadBuffer {
    bytes: Vec<u8>,
}

impl HeadBuffer {
    /// The next head with its blank line, or `None` at the end of the stream.
    pub(crate) fn next_head(&mut self, stream: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(end) = head_end(&self.bytes) {
                return Ok(Some(self.bytes.drain(..end).collect()));
            }
            let count = stream.read(&mut buffer)?;
            if count == 0 {
                return Ok(None);
            }
            self.bytes.extend_from_slice(buffer.get(..count).unwrap_or_default());
        }
    }
}

/// Where the head ends: behind the first CRLFCRLF. By lines: a head has few, and the benchmark pays for each byte.
pub(crate) fn head_end(bytes: &[u8]) -> Option<usize> {
    memchr_iter(b'\n', bytes)
        .map(|at| at + 1)
        .find(|end| bytes.get(..*end).is_some_and(|head| head.ends_with(b"\r\n\r\n")))
}

/// Value of the first header called `name` (any case), trimmed.
pub(crate) fn header<'a>(head: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let mut starts = memchr_iter(b'\n', head).map(|at| at + 1);
    let value = starts.find_map(|start| {
        let (field, value) = head.get(start..)?.split_at_checked(name.len())?;
        let value = value.strip_prefix(b":")?;
        field.eq_ignore_ascii_case(name.as_bytes()).then_some(value)
    })?;
    let end = memchr(b'\n', value).unwrap_or(value.len());
    value.get(..end).map(<[u8]>::trim_ascii)
}

/// `Content-Length`, if it is a number.
pub(crate) fn content_length(head: &[u8]) -> Option<u64> {
    std::str::from_utf8(header(head, "content-length")?).ok()?.parse().ok()
}

/// How the body behind this request head ends; no body when nothing says so.
pub(crate) fn request_framing(head: &[u8]) -> Framing {
    let chunked = header(head, "transfer-encoding")
        .is_some_and(|value| value.to_ascii_lowercase().ends_with(b"chunked"));
    if chunked { Framing::Chunked } else { Framing::Length(content_length(head).unwrap_or(0)) }
}

/// The request line's method and target.
pub(crate) fn method_and_target(head: &[u8]) -> (&str, &str) {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = std::str::from_utf8(line).unwrap_or_default().split(' ');
    (words.next().unwrap_or_default(), words.next().unwrap_or_default())
}

/// The target without its query.
pub(crate) fn path_of(head: &[u8]) -> &str {
    let (_, target) = method_and_target(head);
    target.split('?').next().unwrap_or_default()
}

/// A number from the target's query, e.g. `size` of `/blob?size=5`.
pub(crate) fn query_number(target: &str, name: &str) -> Option<u64> {
    let (_, query) = target.split_once('?')?;
    query.split('&').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name)?.1.parse().ok()
}

/// Finds the end of a chunked body (RFC 9112 section 7.1) fed in pieces, without keeping it.
#[derive(Debug, Default)]
pub(crate) struct ChunkedScanner {
    state: ChunkState,
    line: Vec<u8>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum ChunkState {
    #[default]
    Size,
    Data(u64),
    DataEnd,
    Trailer,
}

impl ChunkedScanner {
    /// Takes from the front of `bytes`, giving data to `on_data`; returns how many bytes belong to
    /// the body and whether its end was among them. An error is a malformed chunk size.
    pub(crate) fn feed(&mut self, bytes: &[u8], mut on_data: impl FnMut(&[u8])) -> io::Result<(usize, bool)> {
        let mut at = 0;
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            if let ChunkState::Data(left) = self.state {
                let take = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                on_data(rest.get(..take).unwrap_or_default());
                at += take;
                let left = left - take as u64;
                self.state = if left == 0 { ChunkState::DataEnd } else { ChunkState::Data(left) };
                continue;
            }
            let Some(length) = rest.iter().position(|byte| *byte == b'\n') else {
                self.line.extend_from_slice(rest);
                return Ok((bytes.len(), false));
            };
            self.line.extend_from_slice(rest.get(..length).unwrap_or_default());
            at += length + 1;
            let line = std::mem::take(&mut self.line);
            let line = line.strip_suffix(b"\r").unwrap_or(&line);
            self.state = match self.state {
                ChunkState::Size => match chunk_size(line)? {
                    0 => ChunkState::Trailer,
                    size => ChunkState::Data(size),
                },
                ChunkState::DataEnd => ChunkState::Size,
                ChunkState::Trailer if line.is_empty() => {
                    self.state = ChunkState::Size;
                    return Ok((at, true));
                }
                other => other,
            };
        }
        Ok((at, false))
    }
}

fn chunk_size(line: &[u8]) -> io::Result<u64> {
    let digits = line.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    std::str::from_utf8(digits)
        .ok()
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "chunk size is no hexadecimal number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_found_in_any_case_and_trimmed() {
        let head = b"POST /a?size=7&x=1 HTTP/1.1\r\nHost: h\r\ncontent-LENGTH:  12 \r\n\r\n";
        assert_eq!(content_length(head), Some(12));
        assert_eq!(request_framing(head), Framing::Length(12));
        assert_eq!(method_and_target(head), ("POST", "/a?size=7&x=1"));
        assert_eq!(path_of(head), "/a");
        assert_eq!(query_number("/a?size=7&x=1", "size"), Some(7));
        assert_eq!(head_end(head), Some(head.len()));
        assert_eq!(head_end(&head[..head.len() - 1]), None);
    }

    #[test]
    fn a_chunked_body_is_read_alike_in_any_segmentation() {
        let body = b"5\r\nhello\r\n0a;ext=1\r\n, chunked!\r\n0\r\nTrailer: x\r\n\r\n";
        for step in 1..=body.len() {
            let (mut scanner, mut data, mut ends) = (ChunkedScanner::default(), Vec::new(), 0);
            for piece in body.chunks(step) {
                let (used, end) = scanner.feed(piece, |bytes| data.extend_from_slice(bytes)).unwrap();
                assert_eq!(used, piece.len());
                ends += usize::from(end);
            }
            assert_eq!((data.as_slice(), ends), (b"hello, chunked!".as_slice(), 1), "step {step}");
        }
        let mut next = body.to_vec();
        next.extend_from_slice(b"GET / HTTP/1.1");
        assert_eq!(ChunkedScanner::default().feed(&next, |_| {}).unwrap(), (body.len(), true));
        assert!(ChunkedScanner::default().feed(b"zz\r\n", |_| {}).is_err());
    }
}
