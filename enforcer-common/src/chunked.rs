//! The framing of a chunked body (RFC 9112, section 7.1), in its strictest form: one to eight hexadecimal digits, CRLF, the
//! data, CRLF; the last chunk is `0` CRLF CRLF. No extensions, no trailers, no white space, no bare line feeds: every HTTP
//! implementation reads what is left in the same way.
//!
//! The kernel runs it over bytes that it passes, to know where an allowed request ends.

/// The most digits of a chunk size.
const MAX_DIGITS: u64 = 8;

/// Where the decoder stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Phase {
    Size = 0,
    SizeLf = 1,
    Data = 2,
    DataCr = 3,
    DataLf = 4,
    LastCr = 5,
    LastLf = 6,
}

/// A chunk decoder. Plain integers, so that it fits into a flow record.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunked {
    phase: u64,
    digits: u64,
    size: u64,
}

/// What one step of the decoder did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum ChunkStep {
    /// So many bytes were consumed; more are needed.
    Consumed(u64),
    /// So many bytes were consumed, and the body ends behind them.
    End(u64),
    /// The framing is broken.
    Broken,
}

impl Chunked {
    /// A decoder at the start of a body.
    #[must_use]
    pub const fn new() -> Self {
        Self { phase: Phase::Size as u64, digits: 0, size: 0 }
    }

    /// As one word: phase in bits 0 to 7, digits in bits 8 to 15, size in bits 16 to 63.
    #[must_use]
    #[inline(always)]
    pub const fn to_bits(self) -> u64 {
        self.phase | self.digits << 8 | self.size << 16
    }

    /// From [`Self::to_bits`].
    #[must_use]
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self { phase: bits & 0xff, digits: bits >> 8 & 0xff, size: bits >> 16 }
    }

    /// Whether the next bytes are chunk data, and how many: they need not be looked at.
    #[must_use]
    #[inline(always)]
    pub const fn data_left(&self) -> u64 {
        if self.phase == Phase::Data as u64 { self.size } else { 0 }
    }

    /// Consumes bytes: data if the decoder is in a chunk (up to `available`), else exactly `byte`, the next one.
    #[inline(always)]
    pub fn step(&mut self, byte: u8, available: u64) -> ChunkStep {
        const SIZE: u64 = Phase::Size as u64;
        const SIZE_LF: u64 = Phase::SizeLf as u64;
        const DATA: u64 = Phase::Data as u64;
        const DATA_CR: u64 = Phase::DataCr as u64;
        const DATA_LF: u64 = Phase::DataLf as u64;
        const LAST_CR: u64 = Phase::LastCr as u64;
        if self.phase == DATA {
            let taken = if self.size < available { self.size } else { available };
            self.size -= taken;
            if self.size == 0 {
                self.phase = DATA_CR;
            }
            return ChunkStep::Consumed(taken);
        }
        if self.phase == SIZE {
            if byte == b'\r' && self.digits != 0 {
                self.phase = SIZE_LF;
                return ChunkStep::Consumed(1);
            }
            let digit = hex(byte);
            if digit > 15 || self.digits >= MAX_DIGITS {
                return ChunkStep::Broken;
            }
            self.size = self.size << 4 | digit;
            self.digits += 1;
            return ChunkStep::Consumed(1);
        }
        let expected = if self.phase == DATA_CR || self.phase == LAST_CR { b'\r' } else { b'\n' };
        if byte != expected {
            return ChunkStep::Broken;
        }
        self.phase = match self.phase {
            SIZE_LF if self.size == 0 => LAST_CR,
            SIZE_LF => DATA,
            DATA_CR => DATA_LF,
            DATA_LF => {
                self.digits = 0;
                SIZE
            }
            LAST_CR => Phase::LastLf as u64,
            _ => return ChunkStep::End(1),
        };
        ChunkStep::Consumed(1)
    }

    /// Runs over bytes at hand: how many belong to the body, and whether it ends there. `None`: the framing is broken.
    #[must_use]
    pub fn run(&mut self, bytes: &[u8]) -> Option<(u64, bool)> {
        let mut at = 0_u64;
        while let Some(&byte) = bytes.get(at as usize) {
            match self.step(byte, bytes.len() as u64 - at) {
                ChunkStep::Consumed(taken) => at += taken,
                ChunkStep::End(taken) => return Some((at + taken, true)),
                ChunkStep::Broken => return None,
            }
        }
        Some((at, false))
    }
}

impl Default for Chunked {
    fn default() -> Self {
        Self::new()
    }
}

/// The value of a hexadecimal digit; above 15: not one.
#[inline(always)]
const fn hex(byte: u8) -> u64 {
    let digit = byte.wrapping_sub(b'0') as u64;
    if digit <= 9 {
        return digit;
    }
    let letter = (byte | 0x20).wrapping_sub(b'a') as u64;
    if letter <= 5 { letter + 10 } else { 16 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(chunks: &[Vec<u8>], upper: bool) -> Vec<u8> {
        let mut out = Vec::new();
        for chunk in chunks.iter().filter(|chunk| !chunk.is_empty()) {
            let size = if upper { format!("{:X}", chunk.len()) } else { format!("{:x}", chunk.len()) };
            out.extend_from_slice(size.as_bytes());
            out.extend_from_slice(b"\r\n");
            out.extend_from_slice(chunk);
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(b"0\r\n\r\n");
        out
    }

    #[test]
    fn anything_but_the_strictest_form_is_broken() {
        for bad in [
            "\r\n",
            "g\r\n",
            "-1\r\n",
            "+1\r\n",
            " 1\r\n",
            "1 \r\n",
            "0x1\r\n",
            "1\n",
            "1;a=b\r\n",
            "123456789\r\n",
            "1\r\nab",
            "1\r\na\n",
            "1\r\na\rx",
            "0\r\nTrailer: 1\r\n\r\n",
            "0\r\n\n",
            "\n",
            "1\r\r\n",
        ] {
            assert_eq!(Chunked::new().run(bad.as_bytes()), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn body_ends_where_it_was_made_to_end(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            upper in any::<bool>(),
            tail in prop::collection::vec(any::<u8>(), 0..40),
            cuts in prop::collection::vec(1_usize..40, 0..200),
        ) {
            let body = encode(&chunks, upper);
            let mut stream = body.clone();
            stream.extend_from_slice(&tail);
            let mut decoder = Chunked::new();
            let (mut at, mut cuts) = (0, cuts.into_iter());
            loop {
                let to = (at + cuts.next().unwrap_or(usize::MAX / 2)).min(stream.len());
                decoder = Chunked::from_bits(decoder.to_bits());
                let (used, end) = decoder.run(&stream[at..to]).unwrap();
                at += used as usize;
                if end {
                    break;
                }
                prop_assert_eq!(at, to);
            }
            prop_assert_eq!(at, body.len());
        }
    }
}
