//! Answers in a form that the kernel can stretch to a request's own length.

use super::Answer;

/// Longest reply that a template can be stretched to: the kernel's limit for a head.
pub const MAX_TEMPLATE_BYTES: usize = 4096;

/// Digits of the patched field; [`MAX_TEMPLATE_BYTES`] fits.
const LENGTH_DIGITS: usize = 4;
const LENGTH_HEADER: &[u8] = b"Content-Length:";

/// An answer whose length can be chosen: patch the digits of Content-Length, put spaces behind the body.
///
/// White space after a JSON text is insignificant (RFC 8259, section 2), and so are the spaces before the number
/// in a header's value (RFC 9110, section 5.5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplyTemplate {
    /// Head and shortest body.
    pub bytes: Vec<u8>,
    /// Offset of the four bytes for Content-Length's digits: right-aligned, spaces on the left. A space goes
    /// before them.
    pub content_length_at: usize,
    /// Bytes of the head with its last CRLFCRLF; the body starts here.
    pub head_len: usize,
    /// Bytes of the shortest reply: `bytes.len()`.
    pub min_len: usize,
}

impl ReplyTemplate {
    /// The reply in exactly `total_len` bytes: what the kernel must send. `None` outside
    /// `min_len..=MAX_TEMPLATE_BYTES`.
    #[must_use]
    pub fn stretched(&self, total_len: usize) -> Option<Vec<u8>> {
        if total_len < self.min_len || total_len > MAX_TEMPLATE_BYTES {
            return None;
        }
        let mut reply = self.bytes.clone();
        reply.resize(total_len, b' ');
        let digits = digits(total_len.checked_sub(self.head_len)?);
        let end = self.content_length_at.checked_add(LENGTH_DIGITS)?;
        reply.get_mut(self.content_length_at..end)?.copy_from_slice(digits.as_bytes());
        Some(reply)
    }
}

fn digits(len: usize) -> String {
    format!("{len:>LENGTH_DIGITS$}")
}

/// The answer as a template. `None` when the kernel could not send it: it closes the connection, has no body, or
/// is longer than [`MAX_TEMPLATE_BYTES`].
#[must_use]
pub fn template(answer: &Answer) -> Option<ReplyTemplate> {
    let bytes = answer.bytes.as_ref();
    let head_len = crate::http::head::find_head_end(bytes)?;
    let (head, body) = bytes.split_at_checked(head_len)?;
    if answer.close || body.is_empty() {
        return None;
    }
    // No header's value can hold a line break, so a line that starts like this is the header itself.
    let line =
        head.windows(LENGTH_HEADER.len() + 2).position(|w| w.strip_prefix(b"\r\n") == Some(LENGTH_HEADER))?;
    let after_colon = line.checked_add(2 + LENGTH_HEADER.len())?;
    let (before, rest) = head.split_at_checked(after_colon)?;
    let value_len = rest.iter().position(|b| *b == b'\r')?;
    let after = rest.get(value_len..)?;

    let mut out = Vec::with_capacity(bytes.len() + LENGTH_DIGITS);
    out.extend_from_slice(before);
    out.push(b' ');
    let content_length_at = out.len();
    out.extend_from_slice(digits(body.len()).as_bytes());
    out.extend_from_slice(after);
    let head_len = out.len();
    out.extend_from_slice(body);
    let min_len = out.len();
    (min_len <= MAX_TEMPLATE_BYTES).then_some(ReplyTemplate {
        bytes: out,
        content_length_at,
        head_len,
        min_len,
    })
}
