//! Labels: the names behind the numbers. They lie beside the other maps, so that the CLI can read them while no daemon
//! runs; no program ever reads them.

use super::assert_layout;

/// Bytes of a text, zero-padded, cut at a character boundary.
pub type Text<const N: usize> = [u8; N];

/// Stands for a whole text where [`Text`] holds only its beginning: SHA-256, cut to 128 bits.
pub type NameHash = [u8; 16];

/// Names of a grant: `GRANT_LABELS`, an array by the grant's slot. Writer: the daemon. Reader: the CLI.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrantLabel {
    /// Serial of the grant that the label belongs to.
    pub serial: u64,
    /// Name of the issuer in the policy.
    pub issuer: Text<40>,
    /// `sub`.
    pub subject: Text<128>,
    /// `client_id` or `azp`; empty where the token has neither.
    pub client_id: Text<80>,
    /// The token's `iat`, in Unix seconds; 0: it has none.
    pub issued_at_unix_secs: u64,
    /// Hash of the issuer's name in the policy.
    pub issuer_name_hash: NameHash,
    /// Hash of the issuer identifier (`iss`).
    pub issuer_hash: NameHash,
    /// Hash of the subject.
    pub subject_hash: NameHash,
    /// Hash of the client's id; zero where the token has none.
    pub client_hash: NameHash,
    /// Hash of the server's name.
    pub server_hash: NameHash,
    /// Hashes of the names of the workload that presents the token: the one that lasts, and the one that is shown.
    pub workload_hashes: [NameHash; 2],
    /// Beginning of the name that lasts.
    pub workload: Text<80>,
}
assert_layout!(GrantLabel, 456, [
    serial: u64, issuer: Text<40>, subject: Text<128>, client_id: Text<80>, issued_at_unix_secs: u64,
    issuer_name_hash: NameHash, issuer_hash: NameHash, subject_hash: NameHash, client_hash: NameHash,
    server_hash: NameHash, workload_hashes: [NameHash; 2], workload: Text<80>,
]);

/// Names of a server: `SERVER_LABELS`, an array by server number. Writer: the daemon. Reader: the CLI.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerLabel {
    /// Name in the policy; empty: no such server.
    pub name: Text<64>,
    /// Resource URI.
    pub resource: Text<192>,
    /// Path of the MCP endpoint.
    pub path: Text<64>,
    /// Listen addresses, comma separated.
    pub listen: Text<192>,
}
assert_layout!(ServerLabel, 512, [name: Text<64>, resource: Text<192>, path: Text<64>, listen: Text<192>]);

/// The workload that presented the first token of a principal at a server: `FIRST_USERS`, a hash by the hash of both ([`NameHash`]). Writer:
/// the daemon. Readers: the daemon and the CLI. Deleter: the CLI. 16,384 entries; when it is full, no further principal that is bound to its
/// first use gets in.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirstUser {
    /// When that was, in Unix seconds.
    pub at_unix_secs: u64,
    /// Hash of the workload's name.
    pub workload_hash: NameHash,
    /// Beginning of the workload's name.
    pub workload: Text<128>,
    /// Beginning of the issuer's name in the policy and of the subject.
    pub principal: Text<160>,
    /// Name of the server.
    pub server: Text<64>,
}
assert_layout!(FirstUser, 376, [
    at_unix_secs: u64, workload_hash: NameHash, workload: Text<128>, principal: Text<160>, server: Text<64>,
]);

/// Size of `FIRST_USERS`.
pub const MAX_FIRST_USERS: u32 = 16_384;

/// Key of `REASONS`, a hash from a reason's name to its count. Writer: the daemon. Reader: the CLI.
pub type ReasonName = Text<48>;

/// Size of `SERVER_LABELS`.
pub const MAX_SERVERS: u32 = 1024;
/// Size of `REASONS`.
pub const MAX_REASONS: u32 = 512;

/// Puts a text into a label, cut at a character boundary.
#[must_use]
pub fn text<const N: usize>(value: &str) -> Text<N> {
    let mut out = [0; N];
    let mut end = value.len().min(N);
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    out[..end].copy_from_slice(&value.as_bytes()[..end]);
    out
}

/// Reads a text out of a label; bytes that are not UTF-8 end it.
#[must_use]
pub fn text_str(bytes: &[u8]) -> &str {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    match core::str::from_utf8(&bytes[..end]) {
        Ok(text) => text,
        Err(error) => core::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or(""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_at_a_character_boundary() {
        assert_eq!(text_str(&text::<4>("abc")), "abc");
        assert_eq!(text_str(&text::<4>("abcdef")), "abcd");
        assert_eq!(text_str(&text::<4>("abcé")), "abc");
        assert_eq!(text_str(&[0xff, b'a']), "");
    }
}
