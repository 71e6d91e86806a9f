//! The revocations that the core knows.

use tracing::{error, info};

use super::Datapath;
use crate::revocation::RevocationList;

/// A copy of the list in the maps, as of an epoch of it.
#[cfg_attr(test, derive(Clone))]
#[derive(Debug, Default)]
pub struct Revoked {
    list: RevocationList,
    epoch: Option<u64>,
}

impl Revoked {
    /// Looks whether the list has changed, and reads it anew if so. Says whether it may mean other tokens than before.
    pub fn look<D: Datapath>(&mut self, datapath: &mut D) -> bool {
        // The epoch first: what changes while the list is read moves it again.
        let read = match datapath.revocation_epoch() {
            Ok(epoch) if Some(epoch) == self.epoch => return false,
            Ok(epoch) => datapath.revocations().map(|all| (epoch, all)),
            Err(error) => Err(error),
        };
        match read {
            Ok((epoch, all)) => {
                if self.epoch.is_some() || !all.is_empty() {
                    info!(revocations = all.len(), "the revocations have changed");
                }
                self.list = RevocationList::new(&all);
                self.epoch = Some(epoch);
            }
            Err(error) => {
                error!(%error, "the revocations can't be read; no token is accepted");
                self.epoch = None;
            }
        }
        true
    }

    /// The list; `None`: it can't be read, so no token may be accepted.
    #[must_use]
    pub fn list(&self) -> Option<&RevocationList> {
        self.epoch.is_some().then_some(&self.list)
    }
}
