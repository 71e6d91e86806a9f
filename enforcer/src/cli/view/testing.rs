//! Map values for tests.

use std::sync::Arc;

use enforcer_common::abi::{
    ABI_VERSION, Config, Endpoint, EndpointKey, FAMILY_V4, FAMILY_V6, Flow, Grant, GrantLabel, HeadDigest,
    MODE_ENFORCE, ServerLabel, VERDICT_ALLOW, Verdict, text,
};
use enforcer_common::flow::{Ctl, State};

use crate::workload::Workload;

pub(super) const NOW_NS: u64 = 100_000_000_000;

pub(super) fn config() -> Config {
    Config {
        abi_version: ABI_VERSION,
        mode: MODE_ENFORCE,
        generation: 1,
        heartbeat_ns: NOW_NS - 400_000_000,
        heartbeat_limit_ns: 5_000_000_000,
        loaded_ns: NOW_NS - 90_000_000_000,
        daemon_started_ns: NOW_NS - 60_000_000_000,
        daemon_pid: 42,
        draining: 0,
        ..Config::NONE
    }
}

pub(super) fn v4(ip: [u8; 4], port: u16) -> EndpointKey {
    let mut addr = [0; 16];
    addr[..4].copy_from_slice(&ip);
    EndpointKey { addr, port, family: FAMILY_V4, zero: 0 }
}

pub(super) fn v6(groups: [u16; 8], port: u16) -> EndpointKey {
    EndpointKey { addr: std::net::Ipv6Addr::from(groups).octets(), port, family: FAMILY_V6, zero: 0 }
}

pub(super) fn endpoint(key: EndpointKey, endpoint_id: u32) -> (EndpointKey, Endpoint) {
    (key, Endpoint { endpoint_id, unavailable_reply_id: 0 })
}

pub(super) fn flow(endpoint_id: u32) -> Flow {
    Flow {
        ctl: Ctl::new(State::Head, 0, 0).0,
        netns_cookie: 1,
        local: v4([127, 0, 0, 1], 80),
        peer: v4([192, 0, 2, 7], 5555),
        endpoint_id,
        ..Flow::BLANK
    }
}

pub(super) fn grant(serial: u64) -> Grant {
    Grant {
        serial,
        deadline_ns: NOW_NS + 60_000_000_000,
        generation: 1,
        caller: enforcer_common::abi::Origin::NONE,
        principal_id: 1,
        granted_ns: NOW_NS - 1_000_000_000,
        expires_at_unix_secs: 1_800_000_000,
        ends_at_unix_secs: 1_800_000_060,
        requests: 0,
        fingerprint: [0xab; 16],
        buckets: [0; 8],
        server_id: 0,
        revoked: 0,
    }
}

pub(super) fn label(serial: u64, subject: &str, client_id: &str) -> GrantLabel {
    let hash = crate::revocation::name_hash;
    GrantLabel {
        serial,
        issuer: text("corp"),
        subject: text(subject),
        client_id: text(client_id),
        issued_at_unix_secs: 1_799_999_000,
        issuer_name_hash: hash("corp"),
        issuer_hash: hash("https://login.example.com"),
        subject_hash: hash(subject),
        client_hash: hash(client_id),
        server_hash: hash("files"),
        workload_hashes: [[0; 16]; 2],
        workload: text("agent.service"),
    }
}

/// An allow by the grant in slot 4.
pub(super) fn verdict(grant_serial: u64) -> Verdict {
    Verdict {
        digest: HeadDigest { lo: 0, hi: 0 },
        kind: VERDICT_ALLOW,
        index: 4,
        grant_serial,
        generation: 1,
        deadline_ns: NOW_NS + 60_000_000_000,
        server_id: 0,
        head_bytes: 900,
    }
}

pub(super) fn server(name: &str, listen: &str) -> ServerLabel {
    ServerLabel {
        name: text(name),
        resource: text("https://example.com/mcp"),
        path: text("/mcp"),
        listen: text(listen),
    }
}

pub(super) fn workload(cgroup_id: u64, path: &str) -> Arc<Workload> {
    Arc::new(Workload::of(cgroup_id, Some(path.to_owned())))
}
