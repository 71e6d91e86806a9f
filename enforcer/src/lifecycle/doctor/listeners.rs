//! Listeners of the policy's servers whose connections will not be guarded, and connections that are open already.

use super::{Check, Options};
use crate::cli::format;
use crate::datapath::TcpSocket;
use crate::lifecycle::paths;
use crate::lifecycle::unguarded::{Gap, Unguarded, find, find_before, holder};

const NAME: &str = "listeners";

pub(super) fn check(options: &Options) -> Check {
    let found = match &options.endpoints {
        Some(endpoints) => match paths::cgroup(options.cgroup.as_deref()) {
            Ok(cgroup) => find_before(endpoints, &cgroup),
            Err(error) => Err(error.into()),
        },
        None if options.pins.exists() => find(&options.pins),
        None => return Check::pass(NAME, "no policy to look at: none is loaded, and --policy was not given"),
    };
    match found {
        Ok(found) => judge(&found),
        Err(error) => Check::warn(NAME, error.to_string(), "look at `enforcer status`"),
    }
}

fn judge(found: &Unguarded) -> Check {
    let mut parts: Vec<String> = found.listeners.iter().map(|(socket, gap)| describe(socket, *gap)).collect();
    parts.extend(found.errors.iter().cloned());
    let open = found.connections.len();
    if !parts.is_empty() {
        return Check::warn(
            NAME,
            parts.join("; "),
            "start these servers inside the guarded cgroup, on the addresses of the policy (docs/bypass.md)",
        );
    }
    if open > 0 {
        return Check::pass(NAME, format!("all are guarded; {open} open connections will be closed"));
    }
    Check::pass(NAME, "no connection to a protected endpoint is out of reach")
}

fn describe(socket: &TcpSocket, gap: Gap) -> String {
    let process = holder(socket.inode).unwrap_or_else(|| "an unknown process".into());
    let what = match gap {
        Gap::Outside => "was made outside the guarded cgroup: NOT GUARDED",
        Gap::Wider => "takes connections to addresses that the policy does not name: those are NOT GUARDED",
    };
    format!("the socket {} of {process} {what}", format::socket(&socket.ends.local))
}

#[cfg(test)]
mod tests {
    use enforcer_common::abi::{EndpointKey, Ends, FAMILY_V4};

    use super::super::Grade;
    use super::*;

    #[test]
    fn a_gap_is_a_warning_and_open_connections_are_none() {
        let end = EndpointKey { addr: [0; 16], port: 80, family: FAMILY_V4, zero: 0 };
        let socket = TcpSocket {
            cookie: 1,
            netns_cookie: 1,
            interface: 0,
            ends: Ends { local: end, peer: end },
            listens: true,
            v6_only: false,
            cgroup_id: None,
            inode: u32::MAX,
        };
        let found = |listeners, connections| judge(&Unguarded { listeners, connections, errors: Vec::new() });
        assert_eq!(found(vec![], vec![]).grade, Grade::Pass);
        assert_eq!(found(vec![], vec![socket]).grade, Grade::Pass);
        assert!(found(vec![], vec![socket]).detail.contains("1 open connections will be closed"));
        for gap in [Gap::Outside, Gap::Wider] {
            let check = found(vec![(socket, gap)], vec![]);
            assert_eq!(check.grade, Grade::Warn);
            assert!(check.detail.contains("0.0.0.0:80 of an unknown process"), "{}", check.detail);
        }
    }
}
