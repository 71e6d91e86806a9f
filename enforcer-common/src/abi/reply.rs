//! Response templates.

use super::assert_layout;

/// Longest response that the kernel sends by itself; also the longest request that it answers so, in bytes.
pub const REPLY_MAX_BYTES: usize = 4096;
/// Digits of a template's `Content-Length`.
pub const REPLY_DIGITS: usize = 4;

/// An HTTP response that takes the place of a refused request's bytes: `REPLIES`, an array. Writer: the daemon.
/// Reader: judge. The response must be exactly as long as the skb, so its JSON body is padded with spaces and the digits
/// of its `Content-Length` are patched.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Shortest request that it fits into, in bytes: head and unpadded body. 0: the entry is free.
    pub min_bytes: u32,
    /// Length of the head, in bytes.
    pub head_bytes: u32,
    /// Offset of the four characters of `Content-Length`.
    pub content_length_at: u32,
    /// HTTP status, for counters.
    pub status: u32,
    /// The response, padded with spaces.
    pub bytes: [u8; REPLY_MAX_BYTES],
}
assert_layout!(Reply, 4112, [
    min_bytes: u32, head_bytes: u32, content_length_at: u32, status: u32, bytes: [u8; REPLY_MAX_BYTES],
]);

/// Size of `REPLIES`.
pub const MAX_REPLIES: u32 = 4096;

/// The digits of a length in a template: right-aligned, padded with spaces (optional white space after the colon,
/// RFC 9110, section 5.5). `value` must be below 10,000.
#[must_use]
pub const fn reply_digits(value: u32) -> [u8; REPLY_DIGITS] {
    let mut out = [b' '; REPLY_DIGITS];
    out[3] = b'0' + (value % 10) as u8;
    if value >= 10 {
        out[2] = b'0' + (value / 10 % 10) as u8;
    }
    if value >= 100 {
        out[1] = b'0' + (value / 100 % 10) as u8;
    }
    if value >= 1000 {
        out[0] = b'0' + (value / 1000 % 10) as u8;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_right_aligned() {
        for value in 0..10_000_u32 {
            assert_eq!(&reply_digits(value)[..], format!("{value:>4}").as_bytes());
        }
    }
}
