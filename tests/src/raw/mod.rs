//! An HTTP/1.1 client that sends exactly the bytes it is given and keeps exactly what comes back.

mod request;

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::wire::{ChunkedScanner, head_end};

pub use request::RequestBuilder;

/// Where the writes of one message are cut. Each write leaves at once (TCP_NODELAY).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segmentation {
    /// One write.
    Whole,
    /// Writes of this many bytes each (at least 1).
    Every(usize),
    /// One write up to each offset, in rising order, and one for the rest.
    At(Vec<usize>),
}

/// A response and the bytes that it was read from.
#[derive(Debug, Clone)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Header lines in order, values trimmed.
    pub headers: Vec<(String, String)>,
    /// The body with any chunking removed.
    pub body: Vec<u8>,
    /// Everything as it came, head and body.
    pub raw: Vec<u8>,
}

impl Response {
    /// Value of the first header called `name`, in any case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(field, _)| field.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    /// The body as JSON.
    ///
    /// # Errors
    /// When it is none.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body)
            .with_context(|| format!("no JSON: {:?}", String::from_utf8_lossy(&self.body)))
    }
}

/// A connection with time limits on every operation.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    /// Read and not yet consumed.
    buffer: Vec<u8>,
    scratch: Vec<u8>,
}

impl Connection {
    /// Connects; `timeout` also bounds each later read and write.
    ///
    /// # Errors
    /// When the connection is refused or takes too long.
    pub fn open(addr: SocketAddr, timeout: Duration) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&addr, timeout)
            .with_context(|| format!("cannot connect to {addr}"))?;
        Self::over(stream, timeout)
    }

    /// Takes a connection that is open.
    ///
    /// # Errors
    /// When its options can't be set.
    pub fn over(stream: TcpStream, timeout: Duration) -> Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Ok(Self { stream, buffer: Vec::new(), scratch: vec![0; 256 << 10] })
    }

    /// The socket, e.g. for options or a second thread that writes.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// This end's address: how a recording server names the connection.
    ///
    /// # Errors
    /// When the socket is gone.
    pub fn local_addr(&self) -> Result<SocketAddr> {
        Ok(self.stream.local_addr()?)
    }

    /// Writes all bytes at once.
    ///
    /// # Errors
    /// When the peer has closed or the time limit passes.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context("write")
    }

    /// Writes `bytes` cut as asked, with a pause between the pieces (zero: none).
    ///
    /// # Errors
    /// As [`Connection::send`].
    pub fn send_segmented(&mut self, bytes: &[u8], cut: &Segmentation, pause: Duration) -> Result<()> {
        let mut start = 0;
        for end in cut_points(bytes.len(), cut) {
            if start > 0 && !pause.is_zero() {
                thread::sleep(pause);
            }
            self.send(bytes.get(start..end).unwrap_or_default())?;
            start = end;
        }
        Ok(())
    }

    /// Sends a request and reads its answer.
    ///
    /// # Errors
    /// As [`Connection::send`] and [`Connection::read_response`].
    pub fn roundtrip(&mut self, request: &[u8]) -> Result<Response> {
        self.send(request)?;
        self.read_response()
    }

    /// Reads one response: by `Content-Length`, by chunks, or until the peer closes. Interim (1xx)
    /// ones are skipped; 204 and 304 have no body.
    ///
    /// # Errors
    /// When the peer closes early, the time limit passes, or it is no HTTP.
    pub fn read_response(&mut self) -> Result<Response> {
        loop {
            let mut response = self.read_head()?;
            if (100..200).contains(&response.status) {
                continue;
            }
            self.read_body(&mut response)?;
            return Ok(response);
        }
    }

    /// Reads a response's head alone (`body` stays empty), e.g. of a stream of events.
    ///
    /// # Errors
    /// As [`Connection::read_response`].
    pub fn read_head(&mut self) -> Result<Response> {
        let end = loop {
            if let Some(end) = head_end(&self.buffer) {
                break end;
            }
            ensure!(self.buffer.len() < 1 << 20, "no end of head in the first MiB");
            if self.fill()? == 0 {
                bail!("closed in the head, after {:?}", String::from_utf8_lossy(&self.buffer));
            }
        };
        let raw = take_front(&mut self.buffer, end);
        let text = std::str::from_utf8(&raw).context("head is not UTF-8")?;
        let mut lines = text.split("\r\n");
        let status_line = lines.next().unwrap_or_default();
        let status = status_line
            .strip_prefix("HTTP/1.")
            .and_then(|rest| rest.split(' ').nth(1))
            .and_then(|code| code.parse().ok())
            .with_context(|| format!("no status line: {status_line:?}"))?;
        let headers = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect();
        Ok(Response { status, headers, body: Vec::new(), raw })
    }

    /// Reads the body that belongs to a head from [`Connection::read_head`].
    ///
    /// # Errors
    /// As [`Connection::read_response`].
    pub fn read_body(&mut self, response: &mut Response) -> Result<()> {
        if matches!(response.status, 204 | 304) {
            return Ok(());
        }
        let chunked =
            response.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
        if chunked {
            return self.read_chunked(response);
        }
        let length: Option<usize> =
            response.header("content-length").map(str::parse).transpose().context("Content-Length")?;
        loop {
            if let Some(length) = length.filter(|length| self.buffer.len() >= *length) {
                response.body = take_front(&mut self.buffer, length);
                break;
            }
            if self.fill()? == 0 {
                ensure!(length.is_none(), "closed after {} of {length:?} body bytes", self.buffer.len());
                response.body = std::mem::take(&mut self.buffer);
                break;
            }
        }
        response.raw.extend_from_slice(&response.body);
        Ok(())
    }

    fn read_chunked(&mut self, response: &mut Response) -> Result<()> {
        let mut scanner = ChunkedScanner::default();
        loop {
            let (used, end) = scanner.feed(&self.buffer, |data| response.body.extend_from_slice(data))?;
            response.raw.extend_from_slice(&take_front(&mut self.buffer, used));
            if end {
                return Ok(());
            }
            ensure!(self.fill()? > 0, "closed in a chunked body, after {} bytes", response.body.len());
        }
    }

    /// Reads whatever is there next, at most `limit` bytes; nothing at the end of the stream. For
    /// streams that are read piece by piece.
    ///
    /// # Errors
    /// When the time limit passes or the connection is reset.
    pub fn read_some(&mut self, limit: usize) -> Result<Vec<u8>> {
        if self.buffer.is_empty() {
            self.fill()?;
        }
        let count = limit.min(self.buffer.len());
        Ok(take_front(&mut self.buffer, count))
    }

    /// Says that nothing more will be sent (FIN).
    ///
    /// # Errors
    /// When the socket is gone.
    pub fn finish_sending(&self) -> Result<()> {
        Ok(self.stream.shutdown(Shutdown::Write)?)
    }

    /// Expects the peer to close, by FIN or by reset, with nothing more to read.
    ///
    /// # Errors
    /// When bytes arrive or the time limit passes.
    pub fn expect_closed(&mut self) -> Result<()> {
        match self.fill() {
            Ok(_) => {}
            Err(error) if is_reset(&error) => {}
            Err(error) => return Err(error).context("waiting for the peer to close"),
        }
        ensure!(self.buffer.is_empty(), "still to read: {:?}", String::from_utf8_lossy(&self.buffer));
        Ok(())
    }

    /// Resets the connection: the peer sees RST instead of FIN.
    ///
    /// # Errors
    /// When the socket option is refused.
    pub fn reset(self) -> Result<()> {
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        nix::sys::socket::setsockopt(&self.stream, nix::sys::socket::sockopt::Linger, &linger)?;
        Ok(())
    }

    fn fill(&mut self) -> io::Result<usize> {
        let outcome = loop {
            match self.stream.read(&mut self.scratch) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                outcome => break outcome,
            }
        };
        if let Ok(count) = outcome {
            self.buffer.extend_from_slice(self.scratch.get(..count).unwrap_or_default());
        }
        outcome
    }
}

/// One request on a connection of its own.
///
/// # Errors
/// As [`Connection::open`] and [`Connection::roundtrip`].
pub fn request(addr: SocketAddr, request: &[u8], timeout: Duration) -> Result<Response> {
    Connection::open(addr, timeout)?.roundtrip(request)
}

/// Splits off the first `count` bytes; by blocks, since a byte-wise drain of 64 MiB takes its time unoptimised.
fn take_front(buffer: &mut Vec<u8>, count: usize) -> Vec<u8> {
    let rest = buffer.split_off(count.min(buffer.len()));
    std::mem::replace(buffer, rest)
}

fn is_reset(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted)
}

fn cut_points(length: usize, cut: &Segmentation) -> Vec<usize> {
    let mut points: Vec<usize> = match cut {
        Segmentation::Whole => Vec::new(),
        Segmentation::Every(step) => {
            (1..).map(|count| count * (*step).max(1)).take_while(|at| *at < length).collect()
        }
        Segmentation::At(points) => points.iter().copied().filter(|at| (1..length).contains(at)).collect(),
    };
    points.push(length);
    points
}
