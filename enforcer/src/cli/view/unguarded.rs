//! Connections and listeners at protected endpoints that the kernel programs do not see.

use std::path::Path;

use serde::Serialize;

use crate::cli::format::socket;
use crate::datapath::{LINK_PIN, PinDir, TcpSocket, attached_cgroup};
use crate::lifecycle::unguarded::{Gap, Unguarded, UnguardedError, find, holder};

/// A connection without a flow record.
#[derive(Debug, Serialize)]
pub(super) struct Connection {
    pub(super) cookie: u64,
    pub(super) netns_cookie: u64,
    pub(super) client_address: String,
    pub(super) server_address: String,
}

impl From<&TcpSocket> for Connection {
    fn from(found: &TcpSocket) -> Self {
        Self {
            cookie: found.cookie,
            netns_cookie: found.netns_cookie,
            client_address: socket(&found.ends.peer),
            server_address: socket(&found.ends.local),
        }
    }
}

/// A listener of which not every connection is guarded.
#[derive(Debug, Serialize)]
struct Listener {
    address: String,
    netns_cookie: u64,
    /// `outside-cgroup`: none is guarded; `wider-than-policy`: only those to addresses that the policy names.
    gap: &'static str,
    /// A process that has it, if one was found.
    process: Option<String>,
}

/// What `status` says about it.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    connections: usize,
    listeners: Vec<Listener>,
    /// Why this may not be all.
    errors: Vec<String>,
}

/// Name of a gap, in JSON.
fn name(gap: Gap) -> &'static str {
    match gap {
        Gap::Outside => "outside-cgroup",
        Gap::Wider => "wider-than-policy",
    }
}

impl Summary {
    pub(super) fn of(found: Result<Unguarded, UnguardedError>) -> Self {
        let (found, error) = match found {
            Ok(found) => (found, None),
            Err(error) => (Unguarded::default(), Some(error.to_string())),
        };
        let listener = |(found, gap): &(TcpSocket, Gap)| Listener {
            address: socket(&found.ends.local),
            netns_cookie: found.netns_cookie,
            gap: name(*gap),
            process: holder(found.inode),
        };
        Self {
            connections: found.connections.len(),
            listeners: found.listeners.iter().map(listener).collect(),
            errors: found.errors.into_iter().chain(error).collect(),
        }
    }

    /// In one line; nothing when all is guarded.
    pub(super) fn text(&self) -> Option<String> {
        let mut parts = Vec::new();
        if self.connections > 0 {
            parts.push(format!("{} connections (`enforcer flows` lists them)", self.connections));
        }
        parts.extend(self.listeners.iter().map(|listener| {
            let process = listener.process.as_deref().unwrap_or("unknown process");
            format!("listener {} of {process}: {}", listener.address, listener.gap)
        }));
        parts.extend(self.errors.iter().cloned());
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}

/// Connections without a flow record; none if that can't be told.
pub(super) fn connections(pins: &PinDir) -> Vec<Connection> {
    find(pins).map(|found| found.connections.iter().map(Connection::from).collect()).unwrap_or_default()
}

/// Whether the link is there and its cgroup still exists: the kernel detaches the programs of one that was removed.
pub(super) fn is_attached(pins: &PinDir) -> bool {
    let pin = pins.pin(LINK_PIN);
    // Who may not look at the link sees at least whether it is there.
    let seen = |pin: &Path| attached_cgroup(pin).map(|cgroup| cgroup.is_some());
    pin.exists() && seen(&pin).unwrap_or(true)
}

#[cfg(test)]
mod tests {
    use enforcer_common::abi::Ends;

    use super::super::testing::v4;
    use super::*;

    #[test]
    fn what_is_unguarded_is_said_in_a_line_and_nothing_when_there_is_none() {
        assert_eq!(Summary::of(Ok(Unguarded::default())).text(), None);
        let found = TcpSocket {
            cookie: 5,
            netns_cookie: 6,
            interface: 0,
            ends: Ends { local: v4([127, 0, 0, 1], 80), peer: v4([192, 0, 2, 7], 5555) },
            listens: false,
            v6_only: false,
            cgroup_id: None,
            inode: u32::MAX,
        };
        let summary = Summary::of(Ok(Unguarded {
            connections: vec![found],
            listeners: vec![(found, Gap::Outside), (found, Gap::Wider)],
            errors: vec!["a namespace".into()],
        }));
        assert_eq!(
            summary.text().unwrap(),
            "1 connections (`enforcer flows` lists them); listener 127.0.0.1:80 of unknown process: outside-cgroup; \
             listener 127.0.0.1:80 of unknown process: wider-than-policy; a namespace"
        );
        assert!(Summary::of(Err(UnguardedError::Detached)).text().unwrap().contains("was removed"));
        let row = serde_json::to_value(Connection::from(&found)).unwrap();
        assert_eq!((&row["cookie"], &row["client_address"]), (&5.into(), &"192.0.2.7:5555".into()));
    }
}
