//! Whether a caller may present a token, and whether it may call a server at all.

use std::sync::Arc;

use super::CallerView;
use crate::policy::{BindRule, BindTo, Server, WorkloadRule};
use crate::token::VerifiedToken;

/// Why a caller may not present a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BindFault {
    /// The token belongs to another workload.
    OtherWorkload,
    /// Who is calling is not known, so it is nobody's token.
    CallerUnknown,
    /// The rule needs a claim that the token does not have.
    ClaimMissing,
    /// Another workload presented a token of this principal before. Not found by [`bind`], which remembers nothing.
    OtherFirstUser,
}

impl BindFault {
    /// Every fault.
    pub const ALL: [Self; 4] =
        [Self::OtherWorkload, Self::CallerUnknown, Self::ClaimMissing, Self::OtherFirstUser];

    /// Stable kebab-case name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::OtherWorkload => "token-of-another-workload",
            Self::CallerUnknown => "caller-unknown",
            Self::ClaimMissing => "workload-claim-missing",
            Self::OtherFirstUser => "token-of-another-first-user",
        }
    }
}

/// What holds of a token that its caller may present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// Only if no other workload presented a token of its principal before.
    pub first_use: bool,
}

/// Whether the caller may present the token: every rule that is about it must hold. Pure.
///
/// # Errors
/// The fault of the first rule that does not hold.
pub fn bind(rules: &[BindRule], token: &VerifiedToken, caller: &CallerView<'_>) -> Result<Bound, BindFault> {
    let mut bound = Bound { first_use: false };
    for rule in rules.iter().filter(|rule| is_about(rule, token)) {
        match &rule.to {
            BindTo::Workloads(workloads) => one_of(workloads.iter(), caller)?,
            BindTo::KubernetesPod => pod(token, caller)?,
            BindTo::SpiffeId(workloads) => {
                if !token.subject.starts_with("spiffe://") {
                    return Err(BindFault::ClaimMissing);
                }
                one_of(workloads.iter().filter(|rule| rule.spiffe_ids.contains(&token.subject)), caller)?;
            }
            BindTo::FirstUse => bound.first_use = true,
        }
    }
    Ok(bound)
}

/// Whether the caller may send anything to the server, whatever it asks for. Pure.
#[must_use]
pub fn callers_allow(server: &Server, caller: &CallerView<'_>) -> bool {
    server.callers.as_ref().is_none_or(|rules| rules.iter().any(|rule| rule.matches(caller)))
}

/// Whether a rule says something about a token.
pub(crate) fn is_about(rule: &BindRule, token: &VerifiedToken) -> bool {
    let BindRule { issuer, subject, client_id, to: _ } = rule;
    issuer.as_ref().is_none_or(|name| *name == token.issuer.name)
        && subject.as_ref().is_none_or(|subject| *subject == token.subject)
        && (client_id.is_none() || *client_id == token.client_id)
}

fn one_of<'w>(
    workloads: impl Iterator<Item = &'w Arc<WorkloadRule>>,
    caller: &CallerView<'_>,
) -> Result<(), BindFault> {
    let mut unknown = false;
    for rule in workloads {
        if rule.matches(caller) {
            return Ok(());
        }
        let path = caller.workload.is_some_and(|workload| workload.cgroup_path.is_some());
        unknown |= (rule.needs_known_caller() && caller.workload.is_none()) || (rule.needs_path() && !path);
    }
    Err(if unknown { BindFault::CallerUnknown } else { BindFault::OtherWorkload })
}

fn pod(token: &VerifiedToken, caller: &CallerView<'_>) -> Result<(), BindFault> {
    let claimed = token.pod_uid.as_ref().ok_or(BindFault::ClaimMissing)?;
    let workload =
        caller.workload.filter(|workload| workload.cgroup_path.is_some()).ok_or(BindFault::CallerUnknown)?;
    if workload.identity.pod_uid.as_ref() == Some(claimed) { Ok(()) } else { Err(BindFault::OtherWorkload) }
}
