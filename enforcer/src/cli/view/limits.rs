//! Limits: their buckets, and who is over the ones for requests without a grant.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use clap::Args;
use enforcer_common::abi::{
    Bucket, BucketLabel, Config, LOST_CGROUPS, Source, SourceKey, UNLIMITED, text_str,
};
use enforcer_common::limit::fill;
use serde::Serialize;

use crate::cli::format::NONE;
use crate::cli::output::{Render, table};
use crate::policy::Rate;
use crate::workload::Workload;

/// The buckets of the policy's limits, those that refused most first
///
/// Each limit has one bucket for each value of what it counts by. FILL: requests that would pass at once now, of how many at most. OPEN:
/// connections that have one of its places, of how many. REFUSED: requests that got 429 by it. A bucket of a limit that the policy has
/// no more is shown until it is used for another.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  enforcer limits
  enforcer limits --limit each --output json
  enforcer limits --sources                     who sends too much that nobody granted")]
pub(in crate::cli) struct Command {
    /// Only those of this limit
    #[arg(long, value_name = "NAME")]
    limit: Option<String>,
    /// Also the sources whose unknown or refused requests were over their limit: a workload of this host, else an address
    #[arg(long)]
    sources: bool,
}

impl Command {
    pub(super) const fn wants_sources(&self) -> bool {
        self.sources
    }
}

#[derive(Debug, Serialize)]
pub(super) struct Limits {
    /// By refusals, the most first.
    limits: Vec<Row>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sources: Option<Vec<SourceRow>>,
}

#[derive(Debug, Serialize)]
struct Row {
    limit: String,
    /// What it counts by.
    per: String,
    /// Whose bucket it is.
    value: String,
    /// Requests that would pass now.
    fill: Option<u64>,
    burst: Option<u64>,
    rate: Option<String>,
    admitted: u64,
    refused: u64,
    /// Connections that have a place.
    open: u64,
    max_open: Option<u64>,
}

#[derive(Debug, Serialize)]
struct SourceRow {
    /// Name of the workload, or an address.
    source: String,
    cgroup_id: Option<u64>,
    address: Option<IpAddr>,
    /// Requests that were over a limit since the source was last forgotten.
    limited: u64,
    /// Requests that the kernel does not know that would pass now.
    unknown_fill: Option<u64>,
    /// The same of requests that it refuses.
    refused_fill: Option<u64>,
}

impl Row {
    fn of(bucket: &Bucket, label: Option<&BucketLabel>, now_ns: u64) -> Self {
        let Bucket { tat_ns, interval_ns, burst_ns, .. } = *bucket;
        let text = |of: fn(&BucketLabel) -> &[u8]| {
            label.map_or_else(|| "?".to_owned(), |label| text_str(of(label)).to_owned())
        };
        let limited = interval_ns != 0;
        Self {
            limit: text(|label| &label.limit),
            per: text(|label| &label.per),
            value: text(|label| &label.value),
            fill: limited.then(|| fill(tat_ns, now_ns, interval_ns, burst_ns)),
            burst: limited.then(|| burst_ns / interval_ns),
            rate: limited.then(|| Rate { interval_ns, burst: 1 }.per_unit()),
            admitted: bucket.admitted,
            refused: bucket.limited,
            open: bucket.open,
            max_open: (bucket.max_open != UNLIMITED).then_some(bucket.max_open),
        }
    }
}

impl SourceRow {
    fn of(
        key: &SourceKey,
        source: &Source,
        workloads: &BTreeMap<u64, Arc<Workload>>,
        config: &Config,
        now_ns: u64,
    ) -> Self {
        let left = |tat_ns, interval_ns, burst_ns| {
            (interval_ns != 0).then(|| fill(tat_ns, now_ns, interval_ns, burst_ns))
        };
        let known = key.cgroup_id != 0;
        let mut octets = [0; 16];
        for (to, word) in octets.chunks_exact_mut(8).zip(key.addr) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        let address = IpAddr::from(Ipv6Addr::from(octets)).to_canonical();
        Self {
            source: match workloads.get(&key.cgroup_id) {
                _ if key.cgroup_id == LOST_CGROUPS => "cgroups that can't be found".to_owned(),
                Some(workload) => workload.name(),
                None if known => format!("cgroup {}", key.cgroup_id),
                None if address.is_ipv6() => format!("{address}/64"),
                None if address.is_loopback() => format!("{address}/8"),
                None => address.to_string(),
            },
            cgroup_id: known.then_some(key.cgroup_id),
            address: (!known).then_some(address),
            limited: source.limited,
            unknown_fill: left(source.unknown_tat_ns, config.unknown_interval_ns, config.unknown_burst_ns),
            refused_fill: left(source.refused_tat_ns, config.refused_interval_ns, config.refused_burst_ns),
        }
    }
}

impl Limits {
    pub(super) fn of(
        command: &Command,
        buckets: &BTreeMap<u32, Bucket>,
        labels: &BTreeMap<u32, BucketLabel>,
        now_ns: u64,
    ) -> Self {
        let rows = buckets.iter().map(|(index, bucket)| Row::of(bucket, labels.get(index), now_ns));
        let wanted = |row: &Row| command.limit.as_ref().is_none_or(|limit| *limit == row.limit);
        let mut limits: Vec<_> = rows.filter(wanted).collect();
        limits.sort_by(|a, b| {
            let names = |row: &Row| (row.limit.clone(), row.value.clone());
            b.refused.cmp(&a.refused).then_with(|| names(a).cmp(&names(b)))
        });
        Self { limits, sources: None }
    }

    /// With the sources that were over a limit.
    pub(super) fn with_sources(
        self,
        sources: &BTreeMap<SourceKey, Source>,
        workloads: &BTreeMap<u64, Arc<Workload>>,
        config: &Config,
        now_ns: u64,
    ) -> Self {
        let over = sources.iter().filter(|(_, source)| source.limited != 0);
        let mut rows: Vec<_> =
            over.map(|(key, source)| SourceRow::of(key, source, workloads, config, now_ns)).collect();
        rows.sort_by(|a, b| b.limited.cmp(&a.limited).then_with(|| a.source.cmp(&b.source)));
        Self { sources: Some(rows), ..self }
    }
}

/// A number, or a dash.
fn number(number: Option<u64>) -> String {
    number.map_or_else(|| NONE.to_owned(), |number| number.to_string())
}

impl Render for Limits {
    fn text(&self) -> String {
        let rows = self.limits.iter().map(|row| {
            let Row { fill, burst, .. } = row;
            let fill = fill.zip(*burst).map(|(fill, burst)| format!("{fill} of {burst}"));
            let open =
                row.max_open.map_or_else(|| row.open.to_string(), |max| format!("{} of {max}", row.open));
            [
                row.limit.clone(),
                row.per.clone(),
                row.value.clone(),
                fill.unwrap_or_else(|| NONE.to_owned()),
                row.rate.clone().unwrap_or_else(|| NONE.to_owned()),
                open,
                row.admitted.to_string(),
                row.refused.to_string(),
            ]
        });
        let mut text = table(["LIMIT", "PER", "VALUE", "FILL", "RATE", "OPEN", "ADMITTED", "REFUSED"], rows);
        if let Some(sources) = &self.sources {
            let rows = sources.iter().map(|row| {
                let [unknown, refused] = [row.unknown_fill, row.refused_fill].map(number);
                [row.source.clone(), row.limited.to_string(), unknown, refused]
            });
            text.push('\n');
            text.push_str(&table(["SOURCE", "LIMITED", "UNKNOWN FILL", "REFUSED FILL"], rows));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use enforcer_common::abi::text;

    use super::super::testing::{NOW_NS, config, workload};
    use super::*;

    const SEC_NS: u64 = 1_000_000_000;

    fn bucket(limited: u64) -> Bucket {
        Bucket {
            tat_ns: NOW_NS + 6 * SEC_NS,
            interval_ns: 2 * SEC_NS,
            burst_ns: 10 * SEC_NS,
            open: 1,
            max_open: UNLIMITED,
            admitted: 9,
            limited,
            serial: 3,
        }
    }

    fn label(limit: &str, value: &str) -> BucketLabel {
        let (limit, per, value) = (text(limit), text("principal"), text(value));
        BucketLabel { serial: 3, key: [0; 16], limit, per, value }
    }

    fn command(limit: Option<&str>) -> Command {
        Command { limit: limit.map(str::to_owned), sources: false }
    }

    #[test]
    fn who_is_refused_most_comes_first() {
        let open = Bucket { interval_ns: 0, burst_ns: 0, max_open: 5, ..bucket(0) };
        let buckets = BTreeMap::from([(1, bucket(0)), (2, bucket(7)), (3, open)]);
        let labels = BTreeMap::from([
            (1, label("each", "corp/alice")),
            (2, label("each", "corp/bob (app)")),
            (3, label("open", "corp/alice")),
        ]);
        let shown = Limits::of(&command(None), &buckets, &labels, NOW_NS);
        assert_eq!(
            shown.text(),
            "LIMIT  PER        VALUE           FILL    RATE  OPEN    ADMITTED  REFUSED\n\
             each   principal  corp/bob (app)  2 of 5  30/m  1       9         7\n\
             each   principal  corp/alice      2 of 5  30/m  1       9         0\n\
             open   principal  corp/alice      -       -     1 of 5  9         0\n"
        );
        let json = serde_json::to_value(&shown).unwrap();
        assert_eq!(json["limits"][0]["refused"], 7);
        assert_eq!((&json["limits"][0]["fill"], &json["limits"][0]["burst"]), (&2.into(), &5.into()));
        assert_eq!(json["limits"][2]["max_open"], 5);
        assert_eq!(json["limits"][2]["rate"], serde_json::Value::Null);
        assert_eq!(json.get("sources"), None);
        let one = Limits::of(&command(Some("open")), &buckets, &labels, NOW_NS);
        assert_eq!(one.limits.len(), 1);
        let unlabelled = Limits::of(&command(None), &buckets, &BTreeMap::new(), NOW_NS);
        assert_eq!(unlabelled.limits[0].value, "?");
    }

    #[test]
    fn sources_are_workloads_or_addresses() {
        let address = |address: &str| {
            let octets = match address.parse().unwrap() {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            let word = |k: usize| u64::from_ne_bytes(octets[8 * k..8 * k + 8].try_into().unwrap());
            SourceKey { cgroup_id: 0, addr: [word(0), word(1)] }
        };
        let cgroup = |cgroup_id| SourceKey { cgroup_id, addr: [0; 2] };
        let of = |limited| Source {
            unknown_tat_ns: NOW_NS + SEC_NS,
            refused_tat_ns: 0,
            answered_tat_ns: 0,
            limited,
        };
        let sources = BTreeMap::from([
            (cgroup(7), of(5)),
            (cgroup(8), of(4)),
            (cgroup(LOST_CGROUPS), of(3)),
            (address("192.0.2.7"), of(6)),
            (address("2001:db8::"), of(1)),
            (address("192.0.2.8"), of(0)),
        ]);
        let workloads = BTreeMap::from([(7, workload(7, "/agent.service"))]);
        let config = Config { unknown_interval_ns: SEC_NS / 10, unknown_burst_ns: 2 * SEC_NS, ..config() };
        let shown = Limits::of(&command(None), &BTreeMap::new(), &BTreeMap::new(), NOW_NS)
            .with_sources(&sources, &workloads, &config, NOW_NS);
        assert_eq!(
            shown.text(),
            "LIMIT  PER  VALUE  FILL  RATE  OPEN  ADMITTED  REFUSED\n\n\
             SOURCE                       LIMITED  UNKNOWN FILL  REFUSED FILL\n\
             192.0.2.7                    6        10            -\n\
             agent.service                5        10            -\n\
             cgroup 8                     4        10            -\n\
             cgroups that can't be found  3        10            -\n\
             2001:db8::/64                1        10            -\n"
        );
        let json = serde_json::to_value(&shown).unwrap();
        assert_eq!(json["sources"][0]["address"], "192.0.2.7");
        assert_eq!(json["sources"][1]["cgroup_id"], 7);
    }
}
