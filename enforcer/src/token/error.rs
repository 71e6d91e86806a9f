//! Why a token is refused.

use std::fmt;

/// Text from outside, made safe to show: escaped to printable ASCII and cut to 128 characters.
#[derive(Clone, PartialEq, Eq)]
pub struct Quoted(String);

impl Quoted {
    /// Longest text kept, in characters after escaping.
    pub const MAX_CHARS: usize = 128;

    /// Escapes and cuts `text`.
    #[must_use]
    pub fn new(text: &str) -> Self {
        // Escapes never lengthen a cut text past the bound: the cut is made after escaping.
        let mut shown: String =
            text.chars().flat_map(char::escape_default).take(Self::MAX_CHARS + 1).collect();
        if shown.len() > Self::MAX_CHARS {
            shown.truncate(Self::MAX_CHARS - 2);
            shown.push_str("..");
        }
        Self(shown)
    }

    /// Several texts as one, separated by a space.
    pub(crate) fn list<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut joined = String::new();
        for text in texts {
            if !joined.is_empty() {
                joined.push(' ');
            }
            joined.push_str(text);
            if joined.len() > Self::MAX_CHARS {
                break;
            }
        }
        Self::new(&joined)
    }
}

impl fmt::Display for Quoted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

impl fmt::Debug for Quoted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! token_errors {
    ($(
        $(#[doc = $doc:literal])+
        #[error($($message:tt)+)]
        $variant:ident $({ $($field:ident: $ty:ty),+ $(,)? })? => $name:literal,
    )+) => {
        /// One variant per defect. Messages name both sides of a mismatch; they never hold the token, and nothing from
        /// it beyond 128 escaped characters.
        #[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
        pub enum TokenError {
            $(
                $(#[doc = $doc])+
                #[error($($message)+)]
                $variant $({
                    $(#[expect(missing_docs, reason = "the message names the field")] $field: $ty,)+
                })?,
            )+
        }

        /// The kinds of [`TokenError`], for counters and logs.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum TokenReason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl TokenReason {
            /// Every reason, in a stable order.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The stable kebab-case name.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }

        impl TokenError {
            /// The kind of this error.
            #[must_use]
            pub fn reason(&self) -> TokenReason {
                match self {
                    $(Self::$variant { .. } => TokenReason::$variant,)+
                }
            }
        }
    };
}

token_errors! {
    /// Larger than any token we read.
    #[error("the token has {size_bytes} bytes, at most {limit_bytes} are accepted")]
    TooLarge { size_bytes: usize, limit_bytes: usize } => "too-large",
    /// Not a compact JWS (RFC 7515, section 7.1): that has three segments.
    #[error("the token has {found} dot-separated segments, a signed token has 3")]
    SegmentCount { found: usize } => "segment-count",
    /// A segment is empty; an empty signature is what `none` looks like.
    #[error("the token's {segment} segment is empty")]
    EmptySegment { segment: &'static str } => "empty-segment",
    /// Padding, characters outside the alphabet or set trailing bits (RFC 7515, section 2).
    #[error("the token's {segment} segment is not base64url without padding")]
    NotBase64Url { segment: &'static str } => "not-base64url",
    /// Header or payload is not one JSON object.
    #[error("the token's {segment} is not a JSON object: {defect}")]
    NotJsonObject { segment: &'static str, defect: String } => "not-json-object",
    /// A member name twice in one object (RFC 7515, section 4; RFC 7519, section 4).
    #[error("the token's {segment} names the member {name} twice")]
    DuplicateMember { segment: &'static str, name: Quoted } => "duplicate-member",
    /// `crit` is present; no extension is understood here (RFC 7515, section 4.1.11).
    #[error("the header has \"crit\", and no critical extension is supported")]
    CriticalExtension => "critical-extension",
    /// `jku`, `jwk` or `x5u`: the token brings its own key.
    #[error("the header has \"{parameter}\": keys come from the issuer's key set, never from the token")]
    KeyInHeader { parameter: &'static str } => "key-in-header",
    /// `b64` (RFC 7797): the payload's encoding is changed.
    #[error("the header has \"b64\": only encoded payloads (RFC 7515) are accepted")]
    UnencodedPayload => "unencoded-payload",
    /// `zip` or `enc`: an encrypted token's parameters.
    #[error("the header has \"{parameter}\", which belongs to encrypted tokens; only signed ones are accepted")]
    EncryptionParameter { parameter: &'static str } => "encryption-parameter",
    /// `alg` is missing.
    #[error("the header has no \"alg\"")]
    AlgorithmMissing => "algorithm-missing",
    /// `alg` is `none` in any case: unsigned (RFC 8725, section 3.1).
    #[error("the algorithm is \"none\": an unsigned token proves nothing, accepted are {accepted}")]
    AlgorithmNone { accepted: String } => "algorithm-none",
    /// An HMAC algorithm: a public key would be the secret (RFC 8725, section 2.1).
    #[error("the algorithm {found} is symmetric, accepted are {accepted}")]
    AlgorithmSymmetric { found: Quoted, accepted: String } => "algorithm-symmetric",
    /// `alg` is not on the issuer's list.
    #[error("the algorithm {found} is not accepted from issuer {issuer:?}, accepted are {accepted}")]
    AlgorithmNotAccepted { found: Quoted, issuer: String, accepted: String } => "algorithm-not-accepted",
    /// `typ` is missing; then an ID token can't be told from an access token.
    #[error("the header has no \"typ\", accepted from issuer {issuer:?} are {accepted}")]
    TypeMissing { issuer: String, accepted: String } => "type-missing",
    /// `typ` is not on the issuer's list (RFC 9068, section 4; RFC 8725, section 3.11).
    #[error("the token type {found} is not accepted from issuer {issuer:?}, accepted are {accepted}")]
    TypeNotAccepted { found: Quoted, issuer: String, accepted: String } => "type-not-accepted",
    /// `kid` is no string of 1 to 256 bytes.
    #[error("\"kid\" is {found}, expected a string of 1 to 256 bytes without control characters")]
    KeyIdMalformed { found: &'static str } => "key-id-malformed",
    /// `iss` is missing.
    #[error("the token has no \"iss\"")]
    IssuerMissing => "issuer-missing",
    /// `iss` is not, byte for byte, one of the server's issuers (RFC 9068, section 4).
    #[error("the issuer {found} is not accepted, this server's are {accepted}")]
    IssuerUnknown { found: Quoted, accepted: Quoted } => "issuer-unknown",
    /// `aud` is missing.
    #[error("the token has no \"aud\", this server is {expected}")]
    AudienceMissing { expected: Quoted } => "audience-missing",
    /// `aud` is neither a string nor a non-empty array of strings, or holds an empty string.
    #[error("\"aud\" is {found}, expected a non-empty string or a non-empty array of them")]
    AudienceMalformed { found: &'static str } => "audience-malformed",
    /// The token is for somebody else (RFC 8707; RFC 9068, section 4).
    #[error("the audience {found} does not name this server, which is {expected}")]
    AudienceMismatch { found: Quoted, expected: Quoted } => "audience-mismatch",
    /// `exp` is missing.
    #[error("the token has no \"exp\"")]
    ExpiryMissing => "expiry-missing",
    /// `exp`, `nbf` or `iat` is no whole number of seconds between the years 1970 and 9999.
    #[error("\"{claim}\" is {found}, expected whole seconds from 0 to 253402300799")]
    DateMalformed { claim: &'static str, found: &'static str } => "date-malformed",
    /// `exp` plus leeway has come (RFC 7519, section 4.1.4).
    #[error("the token expired at {expires_at} (leeway {leeway_secs} s), it is {now}")]
    Expired { expires_at: u64, leeway_secs: u64, now: u64 } => "expired",
    /// `nbf` minus leeway is still ahead (RFC 7519, section 4.1.5).
    #[error("the token is not valid before {not_before} (leeway {leeway_secs} s), it is {now}")]
    NotYetValid { not_before: u64, leeway_secs: u64, now: u64 } => "not-yet-valid",
    /// `iat` is missing; RFC 9068, section 2.2 requires it, and the lifetime can't be bounded without it.
    #[error("the token has no \"iat\"")]
    IssuedAtMissing => "issued-at-missing",
    /// `iat` minus leeway is still ahead.
    #[error("the token is issued at {issued_at} (leeway {leeway_secs} s), it is {now}")]
    IssuedInFuture { issued_at: u64, leeway_secs: u64, now: u64 } => "issued-in-future",
    /// `exp` is not after `iat`.
    #[error("the token expires at {expires_at}, which is not after its issue at {issued_at}")]
    ExpiryBeforeIssue { expires_at: u64, issued_at: u64 } => "expiry-before-issue",
    /// `exp - iat` is above the issuer's maximum.
    #[error("the token lives {lifetime_secs} s, issuer {issuer:?} may give at most {maximum_secs} s")]
    LifetimeTooLong { lifetime_secs: u64, issuer: String, maximum_secs: u64 } => "lifetime-too-long",
    /// `sub` is missing (RFC 9068, section 2.2).
    #[error("the token has no \"sub\"")]
    SubjectMissing => "subject-missing",
    /// A claim that is used has the wrong form.
    #[error("\"{claim}\" is {found}, expected {expected}")]
    ClaimMalformed { claim: &'static str, found: &'static str, expected: &'static str } => "claim-malformed",
    /// `cnf` is present: usable only with a proof (RFC 9449, RFC 8705). It is never downgraded to a plain bearer.
    #[error("the token is bound to its sender by \"cnf\", and no proof of possession is supported")]
    SenderConstrained => "sender-constrained",
    /// A claim says that this is an ID token, refresh token or the like.
    #[error("the claim \"{claim}\" marks a token that is not an access token")]
    NotAccessToken { claim: &'static str } => "not-access-token",
    /// The issuer's keys were never loaded or are past the staleness limit: 503, not 401.
    #[error("the keys of issuer {issuer:?} are not available")]
    KeysUnavailable { issuer: String } => "keys-unavailable",
    /// No key of the issuer has this `kid`. The caller may ask for one bounded refresh and verify again.
    #[error("issuer {issuer:?} has no key {}", Quoted::new(kid))]
    UnknownKey { issuer: String, kid: String } => "unknown-key",
    /// No `kid`, and not exactly one key that fits the algorithm.
    #[error("the header has no \"kid\", and {fitting} keys of issuer {issuer:?} fit {algorithm}")]
    KeyAmbiguous { issuer: String, algorithm: &'static str, fitting: usize } => "key-ambiguous",
    /// The selected key is of another kind, or its `alg` names another algorithm.
    #[error("the key {} of issuer {issuer:?} is for {key}, the token's algorithm is {algorithm}", Quoted::new(kid))]
    KeyUnfit { issuer: String, kid: String, key: String, algorithm: &'static str } => "key-unfit",
    /// The signature is not the selected key's.
    #[error("the signature does not verify with issuer {issuer:?}'s key")]
    SignatureInvalid { issuer: String } => "signature-invalid",
    /// A check did not run although none failed. Can't happen, and refuses if it does.
    #[error("the verification did not run to its end")]
    Incomplete => "incomplete",
}

impl TokenReason {
    /// Must the caller answer 503 (`true`) instead of 401 `invalid_token`?
    #[must_use]
    pub fn is_unavailable(self) -> bool {
        matches!(self, Self::KeysUnavailable)
    }
}

impl fmt::Display for TokenReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
