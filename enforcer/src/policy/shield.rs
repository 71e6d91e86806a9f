//! The `shield` of a policy file.

use std::net::IpAddr;
use std::time::Duration;

use enforcer_common::abi::MAX_SHIELD_INTERFACES;
use enforcer_common::shield::quarantine::MAX_REFUSALS;
use ipnet::IpNet;
use serde_json::{Value, json};

use super::error::Defect;
use super::fields::{Field, Mapping, Report};
use super::rate::rate_field;
use super::{Quarantine, Rate, Shield, ShieldAttach, duration};

const FIELDS: &[&str] = &["interfaces", "attach", "connections", "packets", "quarantine", "exceptions"];

/// Most exceptions.
const MAX_EXCEPTIONS: usize = 1024;
/// Longest interface name, in bytes (`IFNAMSIZ` with its zero).
const MAX_INTERFACE_BYTES: usize = 15;
/// Longest window in which refusals are counted.
const MAX_WITHIN: Duration = Duration::from_secs(3_600);
/// Longest quarantine.
const MAX_QUARANTINE: Duration = Duration::from_secs(7 * 86_400);

pub(super) fn compile(report: &mut Report, field: &Field<'_>) -> Option<Shield> {
    let map = field.mapping(report, FIELDS)?;
    let interfaces = map.required(report, "interfaces").and_then(|field| interfaces(report, &field));
    let attach = map.or_default("attach", ShieldAttach::Auto, |field| attach(report, &field));
    let connections = map.or_default("connections", None, |field| rate_field(report, &field).map(Some));
    let packets = map.or_default("packets", None, |field| rate_field(report, &field).map(Some));
    let quarantine = map.or_default("quarantine", None, |field| quarantine(report, &field).map(Some));
    let exceptions = map.or_default("exceptions", Vec::new(), |field| exceptions(report, &field));
    Some(Shield {
        interfaces: interfaces?,
        attach: attach?,
        connections: connections?,
        packets: packets?,
        quarantine: quarantine?,
        exceptions: exceptions?,
    })
}

fn interfaces(report: &mut Report, field: &Field<'_>) -> Option<Vec<String>> {
    let found = field.texts(report, MAX_SHIELD_INTERFACES as usize, 64, |_, name| {
        let value = name.to_owned();
        // What the kernel takes for a name (`dev_valid_name`).
        let good = name.len() <= MAX_INTERFACE_BYTES
            && !matches!(name, "." | "..")
            && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
        match name {
            "lo" => Err(Defect::Loopback { value }),
            _ if good => Ok(value),
            _ => Err(Defect::Interface { value }),
        }
    })?;
    if found.is_empty() {
        field.error(report, Defect::EmptyList);
        return None;
    }
    Some(found)
}

fn attach(report: &mut Report, field: &Field<'_>) -> Option<ShieldAttach> {
    match field.text(report, 64)? {
        "auto" => Some(ShieldAttach::Auto),
        "native" => Some(ShieldAttach::Native),
        "generic" => Some(ShieldAttach::Generic),
        other => {
            field.error(report, Defect::Attach { found: other.to_owned() });
            None
        }
    }
}

fn quarantine(report: &mut Report, field: &Field<'_>) -> Option<Quarantine> {
    let map = field.mapping(report, &["refusals", "within", "for"])?;
    let refusals = map.required(report, "refusals").and_then(|field| field.number(report, 1, MAX_REFUSALS));
    let refusals = refusals.and_then(|refusals| u32::try_from(refusals).ok());
    let mut time = |map: &Mapping<'_>, name, max| {
        let field = map.required(report, name)?;
        field.duration(report, Duration::from_secs(1), max)
    };
    let within = time(&map, "within", MAX_WITHIN);
    let lasts = time(&map, "for", MAX_QUARANTINE);
    Some(Quarantine { refusals: refusals?, within: within?, lasts: lasts? })
}

fn exceptions(report: &mut Report, field: &Field<'_>) -> Option<Vec<IpNet>> {
    let texts = field.texts(report, MAX_EXCEPTIONS, 64, |_, text| match parse_prefix(text) {
        Ok(prefix) => Ok(prefix.to_string()),
        Err(reason) => Err(Defect::Prefix { value: text.to_owned(), reason }),
    })?;
    Some(texts.iter().filter_map(|text| parse_prefix(text).ok()).collect())
}

/// Reads a network, `10.0.0.0/8`, or a single address.
///
/// # Errors
/// What is wrong with it, and what it should be.
pub fn parse_prefix(text: &str) -> Result<IpNet, String> {
    let prefix = match text.parse::<IpAddr>() {
        Ok(address) => IpNet::from(address),
        Err(_) => text.parse::<IpNet>().map_err(|_| {
            "it is no network; write an address and the length of the prefix, 10.0.0.0/8".to_owned()
        })?,
    };
    if prefix != prefix.trunc() {
        return Err(format!("bits are set behind the prefix; did you mean {}?", prefix.trunc()));
    }
    if let IpNet::V6(v6) = prefix
        && let Some(v4) = v6.network().to_ipv4_mapped()
    {
        return Err(format!(
            "packets of IPv4 clients have IPv4 addresses; write {v4}/{}",
            v6.prefix_len().saturating_sub(96)
        ));
    }
    Ok(prefix)
}

/// The section for programs.
pub(super) fn json(shield: &Shield) -> Value {
    let rate = |rate: &Rate| json!({ "rate": rate.per_unit(), "burst": rate.burst });
    json!({
        "interfaces": shield.interfaces,
        "attach": shield.attach.name(),
        "connections": shield.connections.as_ref().map(rate),
        "packets": shield.packets.as_ref().map(rate),
        "quarantine": shield.quarantine.map(|quarantine| json!({
            "refusals": quarantine.refusals,
            "within_seconds": quarantine.within.as_secs(),
            "for_seconds": quarantine.lasts.as_secs(),
        })),
        "exceptions": shield.exceptions.iter().map(ToString::to_string).collect::<Vec<_>>(),
    })
}

/// The section in plain words: labels, and what belongs to them.
pub(super) fn describe(shield: &Shield) -> Vec<(&'static str, String)> {
    let rate = |rate: Option<Rate>| match rate {
        Some(rate) => format!("{rate}; others are dropped"),
        None => "not limited".to_owned(),
    };
    let quarantine = shield.quarantine.map_or_else(
        || "none".to_owned(),
        |quarantine| {
            format!(
                "{} for a source with more than {} refusals within {}",
                duration::format(quarantine.lasts),
                quarantine.refusals,
                duration::format(quarantine.within)
            )
        },
    );
    let exceptions: Vec<_> = shield.exceptions.iter().map(ToString::to_string).collect();
    let exceptions = if exceptions.is_empty() { "none".to_owned() } else { exceptions.join(", ") };
    vec![
        ("interfaces", format!("{} (attach: {})", shield.interfaces.join(", "), shield.attach.name())),
        ("connections", rate(shield.connections)),
        ("packets", rate(shield.packets)),
        ("quarantine", quarantine),
        ("exceptions", exceptions),
        ("UDP", "dropped, to every protected port".to_owned()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_written_one_way() {
        let good = |text: &str| parse_prefix(text).unwrap().to_string();
        assert_eq!(good("10.0.0.0/8"), "10.0.0.0/8");
        assert_eq!(good("192.0.2.7"), "192.0.2.7/32");
        assert_eq!(good("2001:db8::/32"), "2001:db8::/32");
        assert_eq!(good("::1"), "::1/128");
        assert_eq!(good("0.0.0.0/0"), "0.0.0.0/0");
        for (bad, hint) in [
            ("10.0.0.1/8", "did you mean 10.0.0.0/8?"),
            ("2001:db8::1/32", "did you mean 2001:db8::/32?"),
            ("::ffff:10.0.0.0/104", "write 10.0.0.0/8"),
            ("10.0.0.0/33", "no network"),
            ("10.0.0/8", "no network"),
            ("example.com", "no network"),
            ("", "no network"),
        ] {
            let reason = parse_prefix(bad).unwrap_err();
            assert!(reason.contains(hint), "{bad}: {reason}");
        }
    }
}
