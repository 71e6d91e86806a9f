//! What is under the shield, and what it has dropped.

use std::collections::BTreeMap;

use enforcer_common::abi::Counter;
use enforcer_common::shield::verdict::reason_index;
use serde::Serialize;

use crate::datapath::shield::{Interface, ShieldMaps, shielded};
use crate::datapath::{LiveError, PinDir};

/// The interfaces under the shield.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(in crate::cli) struct Shielded {
    interfaces: Vec<Row>,
    /// Sources whose packets are dropped because too many of their requests were refused.
    quarantined: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Row {
    interface: String,
    index: u32,
    /// `native` (the driver runs the program) or `generic` (the kernel does).
    mode: &'static str,
    /// The program is on it. False: the interface went away since, and a new start is needed if it is back.
    attached: bool,
    dropped: u64,
    dropped_by_reason: BTreeMap<&'static str, u64>,
}

impl Shielded {
    pub(in crate::cli) fn of(maps: &ShieldMaps, pins: &PinDir, now_ns: u64) -> Result<Self, LiveError> {
        let attached = shielded(pins);
        let quarantined =
            maps.failing()?.iter().filter(|failing| failing.entry.blocked_until_ns > now_ns).count();
        let row = |interface: Interface| Row::of(&interface, attached.contains(&interface.index));
        Ok(Self { interfaces: maps.interfaces().into_iter().map(row).collect(), quarantined })
    }

    /// Whether the program is on any interface.
    pub(in crate::cli) fn is_on(&self) -> bool {
        self.interfaces.iter().any(|row| row.attached)
    }

    /// A line for each interface.
    pub(super) fn text(&self) -> Vec<String> {
        let mut lines: Vec<_> = self.interfaces.iter().map(Row::text).collect();
        if self.quarantined > 0 {
            lines.push(format!("{} sources quarantined; see `enforcer shield list`", self.quarantined));
        }
        lines
    }
}

impl Row {
    fn of(interface: &Interface, attached: bool) -> Self {
        let reasons = Counter::ALL.iter().filter_map(|reason| {
            let count = *interface.drops.get(reason_index(*reason) as usize)?;
            (count > 0).then_some((reason.name(), count))
        });
        Self {
            interface: interface.name.clone(),
            index: interface.index,
            mode: if interface.native { "native" } else { "generic" },
            attached,
            dropped: interface.drops.iter().sum(),
            dropped_by_reason: reasons.collect(),
        }
    }

    fn text(&self) -> String {
        let Self { interface, mode, dropped, .. } = self;
        if !self.attached {
            return format!(
                "{interface}: GONE, so nothing is dropped there; start the daemon again when it is back"
            );
        }
        let reasons: Vec<_> =
            self.dropped_by_reason.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        let reasons = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join(", ")) };
        format!("{interface}: {mode}, {dropped} packets dropped{reasons}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_says_what_it_dropped_and_whether_it_is_there() {
        let interface =
            Interface { index: 3, name: "eth0".to_owned(), native: true, drops: [1, 0, 20, 0, 300, 0, 0, 0] };
        assert_eq!(
            Row::of(&interface, true).text(),
            "eth0: native, 321 packets dropped (shield-datagram 300, shield-listed 1, shield-packets 20)"
        );
        let quiet = Interface { native: false, drops: [0; 8], ..interface.clone() };
        assert_eq!(Row::of(&quiet, true).text(), "eth0: generic, 0 packets dropped");
        assert!(Row::of(&interface, false).text().starts_with("eth0: GONE"));
    }
}
