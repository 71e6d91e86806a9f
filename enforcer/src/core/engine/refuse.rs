//! Refusals: what is logged and remembered of them, and how they are answered.

use enforcer_common::abi::Origin;
use tracing::{debug, info, warn};

use crate::authz::{CacheFor, Misplaced};
use crate::core::{CallerFacts, Datapath, Now};
use crate::http::answer::Answer;
use crate::http::head::Framing;
use crate::token::{Fingerprint, VerifiedToken};

use super::punted::Stage;
use super::{Engine, EngineError};

/// A request that gets an answer of ours.
pub(super) struct Refusal<'a> {
    pub(super) server_id: Option<u32>,
    pub(super) server: Option<&'a str>,
    pub(super) answer: &'a Answer,
    pub(super) framing: Option<Framing>,
    pub(super) cache: CacheFor,
    /// Its token is good, and not its caller's.
    pub(super) misplaced: Option<&'a Misplaced<'a, VerifiedToken>>,
}

impl<'a> Refusal<'a> {
    /// By nobody's server, not to be remembered.
    pub(super) const fn of(answer: &'a Answer, framing: Option<Framing>) -> Self {
        Self { server_id: None, server: None, answer, framing, cache: CacheFor::Never, misplaced: None }
    }
}

impl Engine {
    /// Answers a request; what follows its head is its body, and nothing else.
    pub(super) fn refuse<D: Datapath>(
        &mut self,
        cookie: u64,
        (head_bytes, rest): (&[u8], &[u8]),
        refusal: &Refusal<'_>,
        caller: &CallerFacts,
        now: Now,
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        let &Refusal { answer, framing, .. } = refusal;
        let origin = self.flows.get(&cookie).ok_or(EngineError::RecordLost)?.origin;
        self.log_refusal(cookie, &origin, refusal, caller, datapath);
        datapath.count(answer.reason);
        self.remember_refusal(head_bytes, &origin, refusal, now, datapath);
        self.answer(cookie, answer, framing, datapath)?;
        let flow = self.flows.get_mut(&cookie).ok_or(EngineError::RecordLost)?;
        match flow.stage {
            Stage::Done { .. } if !rest.is_empty() => Err(EngineError::Pipelined),
            // The answer has only just been sent, so bytes behind the body are a request that did not wait for it.
            _ => match flow.discard(rest)? {
                Some(_) => Err(EngineError::Pipelined),
                None => Ok(()),
            },
        }
    }

    fn log_refusal<D: Datapath>(
        &mut self,
        cookie: u64,
        origin: &Origin,
        refusal: &Refusal<'_>,
        caller: &CallerFacts,
        datapath: &mut D,
    ) {
        let Refusal { answer, server, misplaced, .. } = refusal;
        let (status, reason) = (answer.status, answer.reason);
        let observed = self.flows.get(&cookie).is_some_and(|flow| flow.observed);
        if status < 400 {
            debug!(status, reason, server, "answered");
            return;
        }
        let admitted = if misplaced.is_some() { self.alarms.admit() } else { self.log.admit() };
        if !admitted {
            return;
        }
        let peer = datapath.peer(cookie);
        match misplaced {
            None => info!(status, reason, server, peer, observed, "refused"),
            Some(Misplaced { verified, token, fault: _ }) => {
                let fingerprint = self.secrets.fingerprint.fingerprint(token.as_bytes());
                let held_by = self.other_workloads(fingerprint, origin, caller, datapath).join(", ");
                warn!(
                    status,
                    reason,
                    server,
                    peer,
                    workload = caller.view().workload_name(),
                    held_by,
                    %fingerprint,
                    issuer = verified.issuer.name,
                    subject = verified.subject,
                    client_id = verified.client_id,
                    observed,
                    "refused: a token of another workload"
                );
            }
        }
    }

    /// A token has come from one more workload: by itself no reason to refuse it, but one to look.
    pub(super) fn look_for_sharing<D: Datapath>(
        &mut self,
        token: &VerifiedToken,
        fingerprint: Fingerprint,
        origin: &Origin,
        caller: &CallerFacts,
        datapath: &mut D,
    ) {
        let others = self.other_workloads(fingerprint, origin, caller, datapath);
        if others.is_empty() {
            return;
        }
        datapath.count("token-from-two-workloads");
        if self.alarms.admit() {
            warn!(
                workload = caller.view().workload_name(),
                held_by = others.join(", "),
                %fingerprint,
                issuer = token.issuer.name,
                subject = token.subject,
                client_id = token.client_id,
                "one token, two workloads: it was shared, or stolen; `bind` in the policy keeps it with one"
            );
        }
    }

    /// Names of the other workloads that hold a grant of the token.
    fn other_workloads<D: Datapath>(
        &self,
        fingerprint: Fingerprint,
        origin: &Origin,
        caller: &CallerFacts,
        datapath: &mut D,
    ) -> Vec<String> {
        /// Of a token that everybody has not all are named.
        const MAX_NAMED: usize = 8;
        let own = caller.view().workload_name();
        let others = self.grants.other_callers(fingerprint, &origin.caller());
        let mut names: Vec<_> = others
            .iter()
            .take(MAX_NAMED)
            .map(|other| datapath.holder(other).view().workload_name())
            .filter(|name| *name != own)
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}
