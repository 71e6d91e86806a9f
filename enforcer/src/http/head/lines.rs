//! The raw bytes of a head, split into lines by the narrowest rules.

use super::HeadError;

/// One header line: a name that is a token, and everything after the colon.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field<'a> {
    pub(super) name: &'a str,
    pub(super) raw_value: &'a [u8],
}

/// A head's request line and header lines.
pub(super) struct Lines<'a> {
    pub(super) request_line: &'a [u8],
    pub(super) fields: Vec<&'a [u8]>,
}

/// `tchar` of RFC 9110, section 5.6.2.
pub(super) const fn is_tchar(b: u8) -> bool {
    b.is_ascii_alphanumeric()
        || matches!(
            b,
            b'!' | b'#'
                | b'$'
                | b'%'
                | b'&'
                | b'\''
                | b'*'
                | b'+'
                | b'-'
                | b'.'
                | b'^'
                | b'_'
                | b'`'
                | b'|'
                | b'~'
        )
}

/// Splits a head at its CRLFs; refuses every other line end and every control byte but HTAB.
pub(super) fn split(bytes: &[u8], max_headers: usize) -> Result<Lines<'_>, HeadError> {
    let mut previous = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        match byte {
            b'\n' if previous == b'\r' => {}
            b'\n' => return Err(HeadError::BareLf { at }),
            _ if previous == b'\r' => return Err(HeadError::BareCr { at: at.saturating_sub(1) }),
            b'\r' | b'\t' => {}
            0..0x20 | 0x7f => return Err(HeadError::Control { at, byte }),
            _ => {}
        }
        previous = byte;
    }
    let content = bytes.strip_suffix(b"\r\n\r\n").ok_or(HeadError::NoEnd)?;
    // Each LF has its CR, so what is left of a line ends in CR, except for the last.
    let mut lines = content.split(|b| *b == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let request_line = lines.next().unwrap_or_default();
    let mut fields = Vec::new();
    for line in lines {
        if line.is_empty() {
            return Err(HeadError::NoEnd);
        }
        if fields.len() == max_headers {
            return Err(HeadError::TooManyHeaders { max: max_headers });
        }
        fields.push(line);
    }
    Ok(Lines { request_line, fields })
}

/// Splits a header line at its colon.
pub(super) fn field(line: &[u8]) -> Result<Field<'_>, HeadError> {
    if line.first().is_some_and(|b| matches!(b, b' ' | b'\t')) {
        return Err(HeadError::ObsFold);
    }
    let colon = line.iter().position(|b| *b == b':').ok_or(HeadError::MissingColon)?;
    let (name, rest) = line.split_at(colon);
    match name.last() {
        None => return Err(HeadError::EmptyName),
        Some(b' ' | b'\t') => return Err(HeadError::SpaceBeforeColon),
        Some(_) if !name.iter().copied().all(is_tchar) => return Err(HeadError::Name),
        Some(_) => {}
    }
    let name = str::from_utf8(name).map_err(|_| HeadError::Name)?;
    Ok(Field { name, raw_value: rest.get(1..).unwrap_or_default() })
}

/// A value without the optional white space around it (RFC 9110, section 5.5).
pub(super) fn trim(value: &[u8]) -> &[u8] {
    let mut rest = value;
    while let [b' ' | b'\t', tail @ ..] = rest {
        rest = tail;
    }
    while let [front @ .., b' ' | b'\t'] = rest {
        rest = front;
    }
    rest
}
