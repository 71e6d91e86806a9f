//! All revocations, as the daemon looks them up.

use std::collections::{BTreeMap, HashMap};

use enforcer_common::abi::{
    NameHash, REVOKE_CLIENT, REVOKE_ISSUER, REVOKE_SERVER, REVOKE_SUBJECT, REVOKE_TOKEN, REVOKE_WORKLOAD,
    Revocation,
};

use super::{Subject, UNNAMED, is_over, matches};

/// Revocations by their numbers.
pub type Revocations = BTreeMap<u64, Revocation>;

/// Revocations, sorted by what makes each of them rare: 16,384 are not compared one by one with each new token.
#[derive(Debug, Default, Clone)]
pub struct RevocationList {
    by_value: HashMap<(u32, NameHash), Vec<(u64, Revocation)>>,
    len: usize,
}

impl RevocationList {
    /// Of these.
    #[must_use]
    pub fn new(revocations: &Revocations) -> Self {
        let mut by_value: HashMap<_, Vec<_>> = HashMap::new();
        for (id, revocation) in revocations {
            by_value.entry(place(revocation)).or_default().push((*id, *revocation));
        }
        Self { by_value, len: revocations.len() }
    }

    /// How many, those that are over included.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The revocation that means this token now, if there is one, and its number.
    #[must_use]
    pub fn find(&self, subject: &Subject, now_unix_secs: u64) -> Option<(u64, &Revocation)> {
        let places = [
            (REVOKE_TOKEN, subject.fingerprint.0),
            (REVOKE_SUBJECT, subject.subject),
            (REVOKE_CLIENT, subject.client),
            (REVOKE_ISSUER, subject.issuer),
            (REVOKE_ISSUER, subject.issuer_name),
            (REVOKE_WORKLOAD, subject.workload[0]),
            (REVOKE_WORKLOAD, subject.workload[1]),
            (REVOKE_SERVER, subject.server),
            (0, NameHash::default()),
        ];
        let unnamed = subject.workload == UNNAMED;
        let of_any_workload = self
            .by_value
            .iter()
            .filter(|(place, _)| unnamed && place.0 == REVOKE_WORKLOAD)
            .map(|(_, found)| found);
        places
            .iter()
            .filter_map(|place| self.by_value.get(place))
            .chain(of_any_workload)
            .flatten()
            .find(|(_, revocation)| !is_over(revocation, now_unix_secs) && matches(revocation, subject))
            .map(|(id, revocation)| (*id, revocation))
    }
}

/// Where a revocation is found: by the most telling thing that it asks for.
const fn place(revocation: &Revocation) -> (u32, NameHash) {
    let selectors = revocation.selectors;
    if selectors & REVOKE_TOKEN != 0 {
        (REVOKE_TOKEN, revocation.fingerprint)
    } else if selectors & REVOKE_SUBJECT != 0 {
        (REVOKE_SUBJECT, revocation.subject_hash)
    } else if selectors & REVOKE_CLIENT != 0 {
        (REVOKE_CLIENT, revocation.client_hash)
    } else if selectors & REVOKE_ISSUER != 0 {
        (REVOKE_ISSUER, revocation.issuer_hash)
    } else if selectors & REVOKE_WORKLOAD != 0 {
        (REVOKE_WORKLOAD, revocation.workload_hash)
    } else if selectors & REVOKE_SERVER != 0 {
        (REVOKE_SERVER, revocation.server_hash)
    } else {
        (0, [0; 16])
    }
}
