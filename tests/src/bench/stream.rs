//! A large response.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::bed::Bed;
use super::pinning::{Pinning, Place};
use super::{Pair, Side, interrupt};
use crate::wire::{content_length, head_end};

const SIZE_BYTES: u64 = 64 << 20;
const READ_BYTES: usize = 256 << 10;
const TIMEOUT: Duration = Duration::from_secs(30);

/// Seconds per response, each pair on two warm connections.
pub(super) fn measure(bed: &Bed, pinning: &Pinning, pairs: usize) -> Result<Vec<Pair<f64>>> {
    pinning.apply(Place::Apart, &bed.server_pids())?;
    let mut ends = Pair::measure(false, |side| {
        let stream = TcpStream::connect_timeout(&bed.addr(side), TIMEOUT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok((stream, bed.blob(side, SIZE_BYTES)?))
    })?;
    let mut buffer = vec![0; READ_BYTES];
    let mut times = Vec::with_capacity(pairs);
    // The first pair opens the congestion windows and is not counted.
    for number in 0..=pairs {
        interrupt::check()?;
        let pair = Pair::measure(number % 2 == 1, |side| {
            let (stream, request) = match side {
                Side::Direct => &mut ends.direct,
                Side::Enforced => &mut ends.enforced,
            };
            fetch(stream, request, &mut buffer).with_context(|| format!("64 MiB from the {side:?} server"))
        })?;
        if number > 0 {
            times.push(pair);
        }
    }
    Ok(times)
}

/// Reads a whole response and throws it away.
fn fetch(stream: &mut TcpStream, request: &[u8], buffer: &mut [u8]) -> Result<f64> {
    let start = Instant::now();
    stream.write_all(request)?;
    let mut head = Vec::new();
    let body_in_head = loop {
        let count = read(stream, buffer)?;
        head.extend_from_slice(buffer.get(..count).unwrap_or_default());
        if let Some(end) = head_end(&head) {
            break head.len() - end;
        }
    };
    ensure!(head.starts_with(b"HTTP/1.1 200 "), "the answer is not 200");
    ensure!(content_length(&head) == Some(SIZE_BYTES), "the answer has another length");
    let mut left = SIZE_BYTES.checked_sub(body_in_head as u64).context("more bytes than announced")?;
    while left > 0 {
        left = left.checked_sub(read(stream, buffer)? as u64).context("more bytes than announced")?;
    }
    Ok(start.elapsed().as_secs_f64())
}

fn read(stream: &mut TcpStream, buffer: &mut [u8]) -> Result<usize> {
    loop {
        match stream.read(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(0) => bail!("closed in the middle"),
            outcome => return Ok(outcome?),
        }
    }
}
