//! `enforcer shield`: whose packets never reach TCP.

use std::time::Duration;

use clap::{Args, Subcommand};
use enforcer_common::abi::{MAX_SHIELD_PREFIXES, SHIELD_DROP, SHIELD_EXEMPT, SHIELD_NONE, ShieldPrefix};
use enforcer_common::shield::quarantine::word_of;
use ipnet::IpNet;
use serde::Serialize;

use super::exit::{FAILURE, OK, failed};
use super::format::{NONE, duration, remaining_secs};
use super::output::{Render, print, say, table};
use super::view::shield::Shielded;
use super::{Global, live};
use crate::datapath::shield::{Failing, Prefix, ShieldMaps};
use crate::policy::{duration as policy_duration, parse_prefix};

/// Sources whose packets are dropped before TCP sees them, and exceptions
///
/// The shield stands on the interfaces that the policy's `shield` names, and looks at packets for protected endpoints alone. What
/// operators say goes before the policy's exceptions, a longer prefix before a shorter one, and both before limits and quarantine. It
/// lasts until it is taken back, its time is over, or the enforcement is unloaded. Works without a daemon, too. See docs/shield.md.
#[derive(Debug, Subcommand)]
#[command(after_long_help = "\
Examples:
  enforcer shield list
  enforcer shield add 192.0.2.0/24 --for 1h     drop what comes from there
  enforcer shield add 192.0.2.7 --exempt        except this one, which is not limited either
  enforcer shield remove 192.0.2.0/24")]
pub(super) enum Command {
    /// What operators and policy say, and who is quarantined
    List,
    Add(AddCommand),
    Remove(RemoveCommand),
}

/// Drop packets of a network or address, or exempt it
///
/// Replaces what an operator said of the same network before.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  enforcer shield add 192.0.2.0/24 --for 1h
  enforcer shield add 2001:db8::/48
  enforcer shield add 10.0.0.0/8 --exempt       neither limited nor quarantined")]
pub(super) struct AddCommand {
    /// A network, 192.0.2.0/24, or one address
    #[arg(value_name = "CIDR", value_parser = parse_prefix)]
    network: IpNet,
    /// How long: 30s, 5m, 24h, 7d; without it until it is taken back
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_duration)]
    lasts: Option<Duration>,
    /// Let its packets pass, whatever limits and quarantine say
    #[arg(long)]
    exempt: bool,
}

/// Take back what an operator said of a network, and end quarantines in it
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  enforcer shield remove 192.0.2.0/24
  enforcer shield remove 192.0.2.7              also ends its quarantine")]
pub(super) struct RemoveCommand {
    /// The network as `enforcer shield list` shows it, or one that holds the quarantined sources
    #[arg(value_name = "CIDR", value_parser = parse_prefix)]
    network: IpNet,
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    policy_duration::parse(text)
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "write a whole number and a unit: 30s, 5m, 24h, 7d".to_owned())
}

#[derive(Debug, Serialize)]
struct List {
    prefixes: Vec<PrefixRow>,
    quarantined: Vec<QuarantineRow>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct PrefixRow {
    network: String,
    /// `drop` or `exempt`.
    action: &'static str,
    /// `operator` or `policy`.
    by: &'static str,
    /// Absent: until it is taken back.
    ends_in_s: Option<i64>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct QuarantineRow {
    source: String,
    ends_in_s: i64,
}

impl List {
    fn of(prefixes: &[Prefix], failing: &[Failing], now_ns: u64) -> Self {
        let prefixes = prefixes.iter().flat_map(|prefix| rows(prefix, now_ns)).collect();
        let blocked = failing.iter().filter(|failing| failing.entry.blocked_until_ns > now_ns);
        let quarantined = blocked
            .map(|failing| QuarantineRow {
                source: failing.network.to_string(),
                ends_in_s: remaining_secs(failing.entry.blocked_until_ns, now_ns),
            })
            .collect();
        Self { prefixes, quarantined }
    }
}

/// What stands of a prefix; the operator's word and behind it the policy's, which is in force when that ends.
fn rows(prefix: &Prefix, now_ns: u64) -> Vec<PrefixRow> {
    let Prefix { network, entry } = prefix;
    let row = |word, by, ends_in_s| PrefixRow {
        network: network.to_string(),
        action: if word == SHIELD_DROP { "drop" } else { "exempt" },
        by,
        ends_in_s,
    };
    let mut rows = Vec::new();
    if is_in_force(entry, now_ns) {
        let ends_in_s = (entry.until_ns != 0).then(|| remaining_secs(entry.until_ns, now_ns));
        rows.push(row(entry.operator, "operator", ends_in_s));
    }
    if entry.policy != SHIELD_NONE {
        rows.push(row(entry.policy, "policy", None));
    }
    rows
}

/// Whether an operator's word stands.
fn is_in_force(entry: &ShieldPrefix, now_ns: u64) -> bool {
    word_of(&ShieldPrefix { policy: SHIELD_NONE, ..*entry }, now_ns) != SHIELD_NONE
}

impl Render for List {
    fn text(&self) -> String {
        let time = |secs: Option<i64>| {
            secs.map_or_else(|| NONE.to_owned(), |secs| duration(secs.unsigned_abs().saturating_mul(1000)))
        };
        let prefixes = self
            .prefixes
            .iter()
            .map(|row| [row.network.clone(), row.action.to_owned(), row.by.to_owned(), time(row.ends_in_s)]);
        let quarantined = self.quarantined.iter().map(|row| {
            [row.source.clone(), "drop".to_owned(), "quarantine".to_owned(), time(Some(row.ends_in_s))]
        });
        table(["SOURCE", "ACTION", "BY", "TIME LEFT"], prefixes.chain(quarantined))
    }
}

#[derive(Debug, Serialize)]
struct Added {
    network: String,
    action: &'static str,
    for_s: Option<u64>,
    /// The shield is on an interface.
    in_force: bool,
}

impl Render for Added {
    fn text(&self) -> String {
        let what = if self.action == "drop" { "packets are dropped" } else { "exempt" };
        let time = self.for_s.map_or_else(
            || "until it is taken back".to_owned(),
            |secs| format!("for {}", duration(secs.saturating_mul(1000))),
        );
        format!("{}: {what}, {time}\n", self.network)
    }
}

#[derive(Debug, Serialize)]
struct Removed {
    network: String,
    /// An operator's word was taken back.
    taken_back: bool,
    quarantines_ended: usize,
}

impl Render for Removed {
    fn text(&self) -> String {
        let taken_back = if self.taken_back { "taken back; " } else { "" };
        format!("{}: {taken_back}{} quarantines ended\n", self.network, self.quarantines_ended)
    }
}

pub(super) fn run(command: &Command, global: &Global) -> anyhow::Result<u8> {
    match command {
        Command::List => {
            let live = live::open(global)?;
            print(
                global.output,
                &List::of(&live.shield.prefixes()?, &live.shield.failing()?, live::now_ns()),
            )?;
        }
        Command::Add(command) => add(command, global)?,
        Command::Remove(command) => remove(command, global)?,
    }
    Ok(OK)
}

fn add(command: &AddCommand, global: &Global) -> anyhow::Result<()> {
    let mut live = live::open(global)?;
    let _lock = global.state().lock()?;
    let now_ns = live::now_ns();
    let network = command.network;
    let others = clear_ended(&mut live.shield, now_ns)?
        .into_iter()
        .filter(|prefix| prefix.network != network && is_v4(prefix.network) == is_v4(network))
        .count();
    if others >= MAX_SHIELD_PREFIXES as usize {
        return Err(failed(
            FAILURE,
            format!("there is no room for more than {MAX_SHIELD_PREFIXES} networks"),
        ));
    }
    let until_ns = command
        .lasts
        .map_or(0, |lasts| now_ns.saturating_add(u64::try_from(lasts.as_nanos()).unwrap_or(u64::MAX)));
    let operator = if command.exempt { SHIELD_EXEMPT } else { SHIELD_DROP };
    let entry = live.shield.prefix(network)?;
    live.shield.set_prefix(network, ShieldPrefix { until_ns, operator, ..entry })?;
    let in_force = Shielded::of(&live.shield, &global.pins(), now_ns)?.is_on();
    if !in_force {
        say(
            "enforcer: the shield is on no interface, so this changes nothing yet; see `shield` in docs/policy.md",
        );
    }
    let action = if command.exempt { "exempt" } else { "drop" };
    let for_s = command.lasts.map(|lasts| lasts.as_secs());
    print(global.output, &Added { network: network.to_string(), action, for_s, in_force })
}

fn remove(command: &RemoveCommand, global: &Global) -> anyhow::Result<()> {
    let mut live = live::open(global)?;
    let _lock = global.state().lock()?;
    let now_ns = live::now_ns();
    clear_ended(&mut live.shield, now_ns)?;
    let network = command.network;
    let entry = live.shield.prefix(network)?;
    let taken_back = entry.operator != SHIELD_NONE;
    if taken_back {
        let entry = ShieldPrefix { operator: SHIELD_NONE, until_ns: 0, ..entry };
        live.shield.set_prefix(network, entry)?;
    }
    let mut quarantines_ended = 0;
    for failing in live.shield.failing()? {
        let covered = network.contains(&failing.network) || failing.network.contains(&network);
        if covered && failing.entry.blocked_until_ns > now_ns {
            live.shield.release(&failing.entry.key)?;
            quarantines_ended += 1;
        }
    }
    if !taken_back && quarantines_ended == 0 {
        let why = if entry.policy == SHIELD_NONE { "" } else { "; it is an exception of the policy" };
        return Err(failed(
            FAILURE,
            format!(
                "no operator said anything of {network}, and nothing in it is quarantined{why}; see `enforcer shield list`"
            ),
        ));
    }
    print(global.output, &Removed { network: network.to_string(), taken_back, quarantines_ended })
}

const fn is_v4(network: IpNet) -> bool {
    matches!(network, IpNet::V4(_))
}

/// Takes away what operators said and what has ended since; gives what is left. The state directory is locked.
fn clear_ended(maps: &mut ShieldMaps, now_ns: u64) -> anyhow::Result<Vec<Prefix>> {
    for Prefix { network, entry } in maps.prefixes()? {
        if entry.operator != SHIELD_NONE && !is_in_force(&entry, now_ns) {
            maps.set_prefix(network, ShieldPrefix { operator: SHIELD_NONE, until_ns: 0, ..entry })?;
        }
    }
    Ok(maps.prefixes()?)
}

#[cfg(test)]
mod tests {
    use enforcer_common::abi::{FAMILY_V4, ShieldFailing};
    use enforcer_common::shield::source;

    use super::*;

    const SEC: u64 = 1_000_000_000;

    #[test]
    fn what_has_ended_is_not_shown_and_the_rest_says_by_whom_and_how_long() {
        let entry =
            |operator, policy, until_ns| ShieldPrefix { until_ns, operator, policy, bits: 8, zero: 0 };
        let prefix = |network: &str, entry| Prefix { network: network.parse().unwrap(), entry };
        let prefixes = [
            prefix("10.0.0.0/8", entry(SHIELD_DROP, SHIELD_EXEMPT, 190 * SEC)),
            prefix("192.0.2.0/24", entry(SHIELD_DROP, SHIELD_NONE, 100 * SEC)),
            prefix("2001:db8::/32", entry(SHIELD_EXEMPT, SHIELD_NONE, 0)),
        ];
        let failing = |last, blocked_until_ns| {
            let mut address = [0; 16];
            address[..4].copy_from_slice(&[198, 51, 100, last]);
            let key = source::key(FAMILY_V4, &address);
            let network = IpNet::from(std::net::IpAddr::from([198, 51, 100, last]));
            Failing { network, entry: ShieldFailing { key, refusals: 0, blocked_until_ns } }
        };
        let list =
            List::of(&prefixes, &[failing(7, 400 * SEC), failing(8, 0), failing(9, 99 * SEC)], 100 * SEC);
        assert_eq!(
            list.text(),
            "SOURCE           ACTION  BY          TIME LEFT\n\
             10.0.0.0/8       drop    operator    1m30s\n\
             10.0.0.0/8       exempt  policy      -\n\
             2001:db8::/32    exempt  operator    -\n\
             198.51.100.7/32  drop    quarantine  5m00s\n"
        );
    }
}
