//! Counters.

use std::collections::BTreeMap;

use enforcer_common::abi::Counter;
use serde::Serialize;

use crate::cli::output::{Render, table};

#[derive(Debug, Serialize)]
pub(super) struct Counters {
    /// Outcomes in the kernel, in the ABI's order.
    kernel: Vec<Count>,
    /// The daemon's refusals, by reason.
    daemon: Vec<Count>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Count {
    name: String,
    count: u64,
}

impl Counters {
    pub(super) fn of(kernel: &[(Counter, u64)], reasons: BTreeMap<String, u64>, all: bool) -> Self {
        let kernel = kernel.iter().map(|(counter, count)| (counter.name().to_owned(), *count));
        let shown = |(name, count): (String, u64)| (all || count > 0).then_some(Count { name, count });
        Self {
            kernel: kernel.filter_map(shown).collect(),
            daemon: reasons.into_iter().filter_map(shown).collect(),
        }
    }
}

impl Render for Counters {
    fn text(&self) -> String {
        let rows = |source: &'static str, counts: &[Count]| {
            counts
                .iter()
                .map(|count| [source.to_owned(), count.name.clone(), count.count.to_string()])
                .collect::<Vec<_>>()
        };
        let all = rows("kernel", &self.kernel).into_iter().chain(rows("daemon", &self.daemon));
        table(["SOURCE", "NAME", "COUNT"], all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_shown_only_when_asked_for() {
        let kernel = [(Counter::FlowTagged, 3), (Counter::FlowClosed, 0)];
        let reasons = BTreeMap::from([("token-expired".to_owned(), 2), ("audience".to_owned(), 1)]);
        let text = Counters::of(&kernel, reasons.clone(), false).text();
        assert_eq!(
            text,
            "SOURCE  NAME           COUNT\n\
             kernel  flow-tagged    3\n\
             daemon  audience       1\n\
             daemon  token-expired  2\n"
        );
        let all = Counters::of(&kernel, reasons, true);
        assert_eq!(all.kernel.len(), 2);
        assert_eq!(
            serde_json::to_value(&all).unwrap()["kernel"][1],
            serde_json::json!({"name": "flow-closed", "count": 0})
        );
    }
}
