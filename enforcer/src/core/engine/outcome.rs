//! What becomes of a request: a grant, a verdict for the kernel, an answer of ours.

use enforcer_common::abi::{FirstUser, Origin, VERDICT_ALLOW, VERDICT_DENY, Verdict, text, text_str};
use enforcer_common::flow::{Ctl, State};
use enforcer_common::head;
use enforcer_common::limit::retry_step;
use tracing::{debug, info, warn};

use crate::authz::CacheFor;
use crate::core::{CallerFacts, Datapath, GrantFor, GrantTable, Now, Payer};
use crate::http::answer::{self, Answer};
use crate::http::head::Framing;
use crate::policy::Server;
use crate::revocation::{RevocationList, Subject, name_hash};
use crate::token::{Fingerprint, VerifiedToken};
use crate::workload::BindFault;

use super::punted::Stage;
use super::refuse::Refusal;
use super::{Engine, EngineError, LINGER_NS};

/// Answers of the daemon on one connection in a row; the next one closes it. A client that does not read its answers can so
/// not fill the injection buffer.
const ANSWERS_MAX: u32 = 128;
/// How long the kernel repeats a refusal that time or new keys may change.
const SHORT_NS: u64 = 2_000_000_000;
/// How long the kernel repeats a refusal that only policy changes.
pub(super) const LONG_NS: u64 = 3_600_000_000_000;
/// `Retry-After` where a table is full.
const RETRY_AFTER_SECS: u32 = 5;

/// Why a good request got no grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoGrant {
    /// No slot is free, or the grant can't be written.
    Full,
    /// No bucket is free, or it can't be written.
    LimitsFull,
    /// It can't be remembered who presented the first token of its principal.
    FirstUsersFull,
    /// Another workload presented that.
    OtherFirstUser,
    /// Who presents it has no name of its own.
    Unnamed,
    /// Too many others present it.
    TooManyCallers,
    /// Its token was revoked since it was verified.
    Revoked,
    /// It is over a limit, for so many nanoseconds.
    Limited(u64),
}

/// A request that policy allows.
pub(super) struct Asked<'a> {
    pub(super) token: &'a VerifiedToken,
    pub(super) fingerprint: Fingerprint,
    pub(super) server_id: u32,
    pub(super) server: &'a Server,
    pub(super) caller: &'a CallerFacts,
    pub(super) first_use: bool,
    pub(super) head_bytes: &'a [u8],
    pub(super) framing: Framing,
    pub(super) cacheable: bool,
}

/// Seconds of a step of `Retry-After`.
pub(super) fn retry_after_secs(step: u32) -> u32 {
    enforcer_common::limit::RETRY_AFTER_SECS.get(step as usize).copied().unwrap_or(3600)
}

impl Engine {
    /// A principal's tokens stay with the workload that presented the first.
    fn keep_to_first_user<D: Datapath>(
        &mut self,
        cookie: u64,
        asked: &Asked<'_>,
        now: Now,
        datapath: &mut D,
    ) -> Result<(), NoGrant> {
        let &Asked { token, fingerprint, server: Server { name: server, .. }, caller, .. } = asked;
        let principal = token.principal();
        let client_id = principal.client_id.as_deref().unwrap_or_default();
        // Names and subjects hold no control characters.
        let key = name_hash(&format!("{server}\0{}\0{}\0{client_id}", principal.issuer, principal.subject));
        // A name that others can have just as well is nobody's.
        if !caller.view().has_name() {
            return Err(NoGrant::Unnamed);
        }
        let workload = caller.view().workload_name();
        let workload_hash = name_hash(&workload);
        match datapath.first_user(&key) {
            Ok(Some(first)) if first.workload_hash == workload_hash => Ok(()),
            Ok(Some(first)) => {
                if self.alarms.admit() {
                    let (first, principal) = (text_str(&first.workload), text_str(&first.principal));
                    let peer = datapath.peer(cookie);
                    warn!(
                        workload,
                        first,
                        principal,
                        %fingerprint,
                        server,
                        peer,
                        "refused: another workload presented the first token"
                    );
                }
                Err(NoGrant::OtherFirstUser)
            }
            Ok(None) => {
                let user = FirstUser {
                    at_unix_secs: now.unix_secs,
                    workload_hash,
                    workload: text(&workload),
                    principal: text(&format!("{}/{}", token.issuer.name, token.subject)),
                    server: text(server),
                };
                datapath.set_first_user(&key, &user).map_err(|_| NoGrant::FirstUsersFull)
            }
            Err(_) => Err(NoGrant::FirstUsersFull),
        }
    }

    /// Writes grant and verdict, and charges the request; the grant's serial. Without a grant the request must not pass: nothing could end
    /// what it opens.
    pub(super) fn allow<D: Datapath>(
        &mut self,
        cookie: u64,
        asked: &Asked<'_>,
        now: Now,
        datapath: &mut D,
    ) -> Result<u64, NoGrant> {
        let &Asked { token, fingerprint, server_id, server, caller, .. } = asked;
        let origin = self.flows.get(&cookie).ok_or(NoGrant::Full)?.origin;
        if asked.first_use {
            self.keep_to_first_user(cookie, asked, now, datapath)?;
        }
        if self.grants.has_too_many_callers(fingerprint, &origin.caller()) {
            return Err(NoGrant::TooManyCallers);
        }
        let view = caller.view();
        let payer = Payer::of_token(server, token, &view);
        let buckets = self.buckets.assign(&payer, now, datapath).ok_or(NoGrant::LimitsFull)?;
        let ask = GrantFor {
            token,
            fingerprint,
            server_id,
            server: &server.name,
            generation: self.generation,
            caller: origin.caller(),
            workload: &view.workload_name(),
            workload_hashes: view.name_hashes(),
            buckets,
        };
        let granted = self.grants.grant(ask, now, datapath).ok_or(NoGrant::Full)?;
        // Whoever revoked the token since it was verified may have looked for its grant before it was there.
        if self.look_for_revocations(now, datapath) {
            let subject = Subject::of_token(token, fingerprint, &server.name, view.name_hashes());
            let good = |list: &RevocationList| list.find(&subject, now.unix_secs).is_none();
            if !self.revoked.list().is_some_and(good) {
                GrantTable::revoke(granted, datapath);
                return Err(NoGrant::Revoked);
            }
        }
        if granted.is_new {
            self.look_for_sharing(token, fingerprint, &origin, caller, datapath);
        }
        if asked.cacheable {
            let verdict = (VERDICT_ALLOW, granted.slot, granted.serial, granted.deadline_ns, server_id);
            self.write_verdict(asked.head_bytes, &origin, asked.framing, verdict, datapath);
        }
        let observed = self.flows.get(&cookie).is_some_and(|flow| flow.observed);
        match datapath.charge(cookie, &buckets, now.boot_ns) {
            Err(wait_ns) if !observed => return Err(NoGrant::Limited(wait_ns)),
            Err(_) => datapath.count("would-limit"),
            Ok(()) => {}
        }
        if tracing::enabled!(tracing::Level::DEBUG) {
            debug!(
                %fingerprint,
                issuer = token.issuer.name,
                subject = token.subject,
                client_id = token.client_id,
                server = server.name,
                peer = datapath.peer(cookie),
                "allowed"
            );
        }
        datapath.count("allowed");
        Ok(granted.serial)
    }

    /// The answer to a good request that got no grant.
    pub(super) fn no_grant<D: Datapath>(
        &mut self,
        cookie: u64,
        server: &Server,
        framing: Framing,
        why: NoGrant,
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        let draft = match why {
            NoGrant::Full => answer::unavailable("grant-table-full", RETRY_AFTER_SECS),
            NoGrant::LimitsFull => answer::unavailable("limit-table-full", RETRY_AFTER_SECS),
            NoGrant::FirstUsersFull => answer::unavailable("first-user-table-full", RETRY_AFTER_SECS),
            NoGrant::OtherFirstUser => answer::invalid_token(server, BindFault::OtherFirstUser.name()),
            NoGrant::Unnamed => answer::invalid_token(server, BindFault::CallerUnknown.name()),
            NoGrant::TooManyCallers => answer::unavailable("token-of-too-many-callers", RETRY_AFTER_SECS),
            NoGrant::Limited(wait_ns) => {
                answer::over_limit("over-limit", retry_after_secs(retry_step(wait_ns)))
            }
            NoGrant::Revoked => answer::invalid_token(server, "revoked"),
        };
        let answer = draft.closing().finish("POST");
        datapath.count(answer.reason);
        if self.log.admit() {
            info!(status = answer.status, reason = answer.reason, peer = datapath.peer(cookie), "refused");
        }
        self.answer(cookie, &answer, Some(framing), datapath)
    }

    /// Lets the kernel repeat a refusal, where it can.
    pub(super) fn remember_refusal<D: Datapath>(
        &mut self,
        head_bytes: &[u8],
        origin: &Origin,
        refusal: &Refusal<'_>,
        now: Now,
        datapath: &mut D,
    ) {
        let Refusal { answer, framing, cache, server_id, .. } = refusal;
        let (Some(framing), false) = (framing, answer.close) else { return };
        let deadline_ns = match cache {
            CacheFor::Never => return,
            CacheFor::Short => now.boot_ns + SHORT_NS,
            CacheFor::UntilPolicyChange => now.boot_ns + LONG_NS,
        };
        if let Some(reply_id) = self.replies.id(answer, datapath) {
            let verdict = (VERDICT_DENY, reply_id, 0, deadline_ns, server_id.unwrap_or(u32::MAX));
            self.write_verdict(head_bytes, origin, *framing, verdict, datapath);
        }
    }

    /// Writes a verdict if the kernel reads the head's framing as the parser does.
    pub(super) fn write_verdict<D: Datapath>(
        &self,
        head_bytes: &[u8],
        origin: &Origin,
        framing: Framing,
        (kind, index, grant_serial, deadline_ns, server_id): (u32, u32, u64, u64, u32),
        datapath: &mut D,
    ) {
        let Ok((info, digest)) = head::analyze_bytes(head_bytes, &self.secrets.digest, origin) else {
            return;
        };
        let alike = info.head_bytes as usize == head_bytes.len()
            && match framing {
                Framing::None => info.has_content_length == 0,
                Framing::ContentLength(length) => {
                    info.has_content_length == 1 && info.content_length == length
                }
                Framing::Chunked => false,
            };
        if !alike {
            return;
        }
        let verdict = Verdict {
            digest,
            kind,
            index,
            grant_serial,
            generation: self.generation,
            deadline_ns,
            server_id,
            head_bytes: info.head_bytes,
        };
        if let Err(error) = datapath.set_verdict(digest, verdict) {
            warn!(%error, "a verdict could not be written; the head stays on the slow path");
        }
    }

    /// Sends an answer of ours in the server's place.
    pub(super) fn answer<D: Datapath>(
        &mut self,
        cookie: u64,
        answer: &Answer,
        framing: Option<Framing>,
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        let flow = self.flows.get_mut(&cookie).ok_or(EngineError::RecordLost)?;
        if flow.observed {
            // It has passed already; its body has to be followed all the same.
            let framing = framing.ok_or(EngineError::NotHttp)?;
            flow.stage = Stage::discard(framing);
            return Ok(());
        }
        if flow.unanswered {
            return Err(EngineError::Unanswered);
        }
        flow.answers += 1;
        let last;
        let answer = if flow.answers < ANSWERS_MAX {
            answer
        } else {
            last = answer.closing();
            &last
        };
        let ctl = Ctl::new(State::Punted, flow.epoch, flow.received_bytes);
        datapath.to_client(cookie, ctl, answer).map_err(|_| EngineError::InjectFailed)?;
        match framing {
            Some(framing) if !answer.close => {
                flow.stage = Stage::discard(framing);
            }
            _ => {
                flow.stage = Stage::Closing;
                self.parked_bytes -= flow.parked.len();
                flow.parked = Vec::new();
                datapath.destroy(cookie, flow.netns_cookie, LINGER_NS);
            }
        }
        Ok(())
    }
}
