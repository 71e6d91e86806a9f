//! Why a request head is refused.

/// A defect of a request's path. Paths are judged as sent and never normalised (RFC 3986, section 6 allows
/// parsers to differ there): a path that some server might rewrite is refused instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathFault {
    /// An empty segment, as in `//mcp`.
    #[error("the path has an empty segment")]
    EmptySegment,
    /// A segment that is `.` or `..`.
    #[error("the path has a dot segment")]
    DotSegment,
    /// A percent-encoded byte.
    #[error("the path has a percent-encoded byte")]
    Percent,
    /// A `;` (path parameters, RFC 3986, section 3.3).
    #[error("the path has parameters")]
    Parameters,
    /// A backslash.
    #[error("the path has a backslash")]
    Backslash,
    /// Another character that RFC 3986 does not allow in a path.
    #[error("the path has a character that is not allowed")]
    Character,
}

/// Why a request head is refused. No variant holds bytes of the request: they may be a token's.
///
/// The answer to each of them closes the connection: where a head cannot be read with certainty, neither can the
/// place where the next one starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// The head is longer than the limit.
    #[error("the head is {len_bytes} bytes long, the limit is {max_bytes}")]
    TooLarge {
        /// Length seen.
        len_bytes: usize,
        /// The limit.
        max_bytes: usize,
    },
    /// The bytes do not end at their first CRLFCRLF.
    #[error("the bytes do not end with their first empty line")]
    NoEnd,
    /// A CR that no LF follows (RFC 9112, section 2.2).
    #[error("a bare CR at byte {at}")]
    BareCr {
        /// Offset in the head.
        at: usize,
    },
    /// An LF that no CR precedes.
    #[error("a bare LF at byte {at}")]
    BareLf {
        /// Offset in the head.
        at: usize,
    },
    /// NUL, DEL or another control byte.
    #[error("control byte {byte:#04x} at byte {at}")]
    Control {
        /// Offset in the head.
        at: usize,
        /// The byte.
        byte: u8,
    },
    /// The request line is not `METHOD SP target SP version`.
    #[error("the request line is not a method, a target and a version with one space between them")]
    RequestLine,
    /// The method is no token, or longer than the limit.
    #[error("the method is not a token of at most {max_bytes} bytes")]
    Method {
        /// The limit.
        max_bytes: usize,
    },
    /// A request line without a version: HTTP/0.9.
    #[error("HTTP/0.9")]
    Http09,
    /// HTTP/1.0, whose framing and keep-alive rules differ.
    #[error("HTTP/1.0")]
    Http10,
    /// The HTTP/2 connection preface (RFC 9113, section 3.4).
    #[error("the HTTP/2 connection preface")]
    Http2Preface,
    /// Another HTTP version.
    #[error("a version other than HTTP/1.1")]
    Version,
    /// The absolute-form of a target (RFC 9112, section 3.2.2): it would take the Host header's place.
    #[error("a target in absolute-form")]
    AbsoluteForm,
    /// CONNECT, or a target in authority-form.
    #[error("CONNECT or a target in authority-form")]
    AuthorityForm,
    /// `*`.
    #[error("a target in asterisk-form")]
    AsteriskForm,
    /// The target has a byte that is not visible ASCII, or a `#`.
    #[error("the target has a byte that is not allowed")]
    Target,
    /// The path could be read in two ways.
    #[error(transparent)]
    Path(#[from] PathFault),
    /// More header lines than the limit.
    #[error("more than {max} headers")]
    TooManyHeaders {
        /// The limit.
        max: usize,
    },
    /// A line that starts with white space (obs-fold, RFC 9112, section 5.2).
    #[error("a folded header line")]
    ObsFold,
    /// A header line without a colon.
    #[error("a header line without a colon")]
    MissingColon,
    /// A header line that starts with its colon.
    #[error("a header without a name")]
    EmptyName,
    /// White space between name and colon (RFC 9112, section 5.1).
    #[error("white space before a header's colon")]
    SpaceBeforeColon,
    /// A header name that is no token.
    #[error("a header name that is not a token")]
    Name,
    /// A header that matters, written with an underscore: gateways that build variables from names read it alike.
    #[error("the header {header} written with an underscore")]
    Underscore {
        /// The header that it imitates.
        header: &'static str,
    },
    /// A header that asks frameworks to judge another method or path than the request line's.
    #[error("the header {header} would replace the method or the path")]
    Rewrite {
        /// Its name.
        header: &'static str,
    },
    /// A header that matters, twice.
    #[error("the header {header} is repeated")]
    Repeated {
        /// Its name.
        header: &'static str,
    },
    /// A byte outside ASCII in a header that matters.
    #[error("the header {header} holds a byte outside ASCII")]
    ObsText {
        /// Its name.
        header: &'static str,
    },
    /// White space around a value that matters, other than one space after the colon.
    #[error("the value of the header {header} has needless white space around it")]
    Whitespace {
        /// Its name.
        header: &'static str,
    },
    /// No Host (RFC 9112, section 3.2).
    #[error("no Host header")]
    HostMissing,
    /// Host is not a host with an optional port.
    #[error("the Host header is not a host with an optional port")]
    HostSyntax,
    /// Content-Length is not a plain decimal number.
    #[error("the Content-Length is not a plain decimal number")]
    ContentLength,
    /// Content-Length is over the limit.
    #[error("the Content-Length is over {max_bytes} bytes")]
    BodyTooLarge {
        /// The limit.
        max_bytes: u64,
    },
    /// Both Content-Length and Transfer-Encoding (RFC 9112, section 6.1).
    #[error("both Content-Length and Transfer-Encoding")]
    LengthAndEncoding,
    /// A Transfer-Encoding other than `chunked`.
    #[error("a Transfer-Encoding other than chunked")]
    TransferEncoding,
    /// Upgrade, HTTP2-Settings or `Connection: upgrade`.
    #[error("a protocol upgrade")]
    Upgrade,
    /// Trailer fields announced: they could carry what the head was judged without.
    #[error("trailer fields announced")]
    Trailer,
    /// A TE other than `trailers`.
    #[error("a TE other than trailers")]
    Te,
    /// An Expect other than `100-continue` (RFC 9110, section 10.1.1).
    #[error("an Expect other than 100-continue")]
    Expect,
    /// A Connection option other than close, keep-alive and TE; above all the name of a header that matters.
    #[error("a Connection option other than close, keep-alive and TE")]
    ConnectionOption,
    /// Both close and keep-alive.
    #[error("a Connection header with both close and keep-alive")]
    ConnectionConflict,
    /// The second parser refuses the head.
    #[error("the second parser refuses the head: {0}")]
    SecondParser(httparse::Error),
    /// The second parser reads the head differently.
    #[error("two parsers read the head differently")]
    Disagreement,
}

impl HeadError {
    /// A stable name for counters and logs.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "head-too-large",
            Self::NoEnd => "head-no-end",
            Self::BareCr { .. } => "head-bare-cr",
            Self::BareLf { .. } => "head-bare-lf",
            Self::Control { .. } => "head-control-byte",
            Self::RequestLine => "request-line",
            Self::Method { .. } => "method-syntax",
            Self::Http09 => "http-0-9",
            Self::Http10 => "http-1-0",
            Self::Http2Preface => "http-2-preface",
            Self::Version => "http-version",
            Self::AbsoluteForm => "target-absolute-form",
            Self::AuthorityForm => "target-authority-form",
            Self::AsteriskForm => "target-asterisk-form",
            Self::Target => "target-syntax",
            Self::Path(fault) => match fault {
                PathFault::EmptySegment => "path-empty-segment",
                PathFault::DotSegment => "path-dot-segment",
                PathFault::Percent => "path-percent",
                PathFault::Parameters => "path-parameters",
                PathFault::Backslash => "path-backslash",
                PathFault::Character => "path-character",
            },
            Self::TooManyHeaders { .. } => "too-many-headers",
            Self::ObsFold => "header-folded",
            Self::MissingColon => "header-no-colon",
            Self::EmptyName => "header-no-name",
            Self::SpaceBeforeColon => "header-space-before-colon",
            Self::Name => "header-name",
            Self::Underscore { .. } => "header-underscore",
            Self::Rewrite { .. } => "header-rewrite",
            Self::Repeated { .. } => "header-repeated",
            Self::ObsText { .. } => "header-obs-text",
            Self::Whitespace { .. } => "header-whitespace",
            Self::HostMissing => "host-missing",
            Self::HostSyntax => "host-syntax",
            Self::ContentLength => "content-length",
            Self::BodyTooLarge { .. } => "body-too-large",
            Self::LengthAndEncoding => "length-and-encoding",
            Self::TransferEncoding => "transfer-encoding",
            Self::Upgrade => "upgrade",
            Self::Trailer => "trailer",
            Self::Te => "te",
            Self::Expect => "expect",
            Self::ConnectionOption => "connection-option",
            Self::ConnectionConflict => "connection-conflict",
            Self::SecondParser(_) => "head-second-parser",
            Self::Disagreement => "head-disagreement",
        }
    }

    /// The HTTP status of the answer.
    #[must_use]
    pub const fn status(&self) -> u16 {
        match self {
            Self::TooLarge { .. } | Self::TooManyHeaders { .. } => 431,
            Self::Http09 | Self::Http10 | Self::Http2Preface | Self::Version => 505,
            Self::AuthorityForm | Self::Upgrade | Self::TransferEncoding => 501,
            Self::BodyTooLarge { .. } => 413,
            Self::Expect => 417,
            _ => 400,
        }
    }
}
