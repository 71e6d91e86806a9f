//! What tells tokens apart by more than their bytes.

use enforcer_common::abi::NameHash;
use ring::digest::{SHA256, digest};

/// Stands for a whole name in the maps, where labels hold only its beginning.
#[must_use]
pub fn name_hash(name: &str) -> NameHash {
    let mut hash = NameHash::default();
    hash.iter_mut().zip(digest(&SHA256, name.as_bytes()).as_ref()).for_each(|(to, from)| *to = *from);
    hash
}
