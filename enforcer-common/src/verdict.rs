//! When a known head is allowed.

use crate::abi::{ABI_VERSION, Config, Counter, Grant, VERDICT_ALLOW, VERDICT_DENY, VERDICT_PUBLIC, Verdict};

/// What becomes of a request whose head has a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Known {
    /// It passes.
    Allow(Counter),
    /// It is answered with this reply.
    Deny(u32),
    /// The daemon must judge again.
    Stale(Counter),
}

/// Judges by a verdict and the grant in its slot. An allow needs every condition to hold; whatever is missing, void or
/// unknown makes the daemon judge again.
#[inline(always)]
pub fn judge(verdict: &Verdict, grant: Option<&Grant>, config: &Config, now_ns: u64) -> Known {
    if config.abi_version != ABI_VERSION
        || verdict.generation != config.generation
        || now_ns >= verdict.deadline_ns
    {
        return Known::Stale(Counter::PuntStaleVerdict);
    }
    if verdict.kind == VERDICT_DENY {
        return Known::Deny(verdict.index);
    }
    if verdict.kind == VERDICT_PUBLIC {
        return Known::Allow(Counter::AllowedPublic);
    }
    let Some(grant) = grant else { return Known::Stale(Counter::PuntStaleGrant) };
    let alive = verdict.kind == VERDICT_ALLOW
        && grant.serial != 0
        && grant.serial == verdict.grant_serial
        && grant.generation == config.generation
        && grant.revoked == 0
        && now_ns < grant.deadline_ns;
    if alive { Known::Allow(Counter::Allowed) } else { Known::Stale(Counter::PuntStaleGrant) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{HeadDigest, Origin};

    const NOW_NS: u64 = 1_000;

    fn config() -> Config {
        Config { abi_version: ABI_VERSION, generation: 7, ..Config::NONE }
    }

    fn verdict() -> Verdict {
        Verdict {
            digest: HeadDigest { lo: 0, hi: 0 },
            kind: VERDICT_ALLOW,
            index: 3,
            grant_serial: 11,
            generation: 7,
            deadline_ns: NOW_NS + 1,
            server_id: 0,
            head_bytes: 0,
        }
    }

    fn grant() -> Grant {
        Grant {
            serial: 11,
            deadline_ns: NOW_NS + 1,
            generation: 7,
            caller: Origin::NONE,
            principal_id: 1,
            granted_ns: 0,
            expires_at_unix_secs: 0,
            ends_at_unix_secs: 0,
            requests: 0,
            fingerprint: [0; 16],
            buckets: [0; 8],
            server_id: 0,
            revoked: 0,
        }
    }

    fn stale(verdict: Verdict, grant: Option<Grant>, config: Config) -> bool {
        matches!(judge(&verdict, grant.as_ref(), &config, NOW_NS), Known::Stale(_))
    }

    #[test]
    fn allow_needs_every_condition() {
        assert_eq!(judge(&verdict(), Some(&grant()), &config(), NOW_NS), Known::Allow(Counter::Allowed));
        assert!(stale(verdict(), None, config()));
        assert!(stale(verdict(), Some(Grant { serial: 12, ..grant() }), config()));
        assert!(stale(verdict(), Some(Grant { generation: 6, ..grant() }), config()));
        assert!(stale(verdict(), Some(Grant { revoked: 1, ..grant() }), config()));
        assert!(stale(verdict(), Some(Grant { deadline_ns: NOW_NS, ..grant() }), config()));
        assert!(stale(Verdict { deadline_ns: NOW_NS, ..verdict() }, Some(grant()), config()));
        assert!(stale(Verdict { generation: 6, ..verdict() }, Some(grant()), config()));
        assert!(stale(Verdict { kind: 9, ..verdict() }, Some(grant()), config()));
        assert!(stale(verdict(), Some(grant()), Config { abi_version: 0, ..config() }));
        let free = Verdict { grant_serial: 0, ..verdict() };
        assert!(stale(free, Some(Grant { serial: 0, ..grant() }), config()));
    }

    #[test]
    fn deny_and_public_hold_only_in_their_generation_and_time() {
        let deny = Verdict { kind: VERDICT_DENY, ..verdict() };
        assert_eq!(judge(&deny, None, &config(), NOW_NS), Known::Deny(3));
        assert!(stale(Verdict { generation: 8, ..deny }, None, config()));
        let public = Verdict { kind: VERDICT_PUBLIC, ..verdict() };
        assert_eq!(judge(&public, None, &config(), NOW_NS), Known::Allow(Counter::AllowedPublic));
        assert!(stale(Verdict { deadline_ns: 0, ..public }, None, config()));
    }
}
