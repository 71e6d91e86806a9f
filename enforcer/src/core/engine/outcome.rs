//! What becomes of a request: a grant, a verdict for the kernel, an answer of ours.

use enforcer_common::abi::{VERDICT_ALLOW, VERDICT_DENY, Verdict};
use enforcer_common::flow::{Ctl, State};
use enforcer_common::head;
use tracing::{debug, info, warn};

use crate::authz::CacheFor;
use crate::core::{Datapath, GrantFor, GrantTable, Now};
use crate::http::answer::{self, Answer};
use crate::http::head::Framing;
use crate::policy::Server;
use crate::revocation::{RevocationList, Subject};

use super::punted::Stage;
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
    /// Its token was revoked since it was verified.
    Revoked,
}

impl Engine {
    /// Writes grant and verdict; the grant's serial. Without a grant the request must not pass: nothing could end what it opens.
    #[expect(clippy::too_many_arguments, reason = "one call, all of it needed")]
    pub(super) fn allow<D: Datapath>(
        &mut self,
        cookie: u64,
        head_bytes: &[u8],
        ask: GrantFor<'_>,
        framing: Framing,
        cacheable: bool,
        now: Now,
        datapath: &mut D,
    ) -> Result<u64, NoGrant> {
        let endpoint_id = self.flows.get(&cookie).ok_or(NoGrant::Full)?.endpoint_id;
        let granted = self.grants.grant(ask, now, datapath).ok_or(NoGrant::Full)?;
        // Whoever revoked the token since it was verified may have looked for its grant before it was there.
        if self.look_for_revocations(now, datapath) {
            let subject = Subject::of_token(ask.token, ask.fingerprint, ask.server);
            let good = |list: &RevocationList| list.find(&subject, now.unix_secs).is_none();
            if !self.revoked.list().is_some_and(good) {
                GrantTable::revoke(granted, datapath);
                return Err(NoGrant::Revoked);
            }
        }
        if tracing::enabled!(tracing::Level::DEBUG) {
            debug!(
                fingerprint = %ask.fingerprint,
                issuer = ask.token.issuer.name,
                subject = ask.token.subject,
                client_id = ask.token.client_id,
                server = ask.server,
                peer = datapath.peer(cookie),
                "allowed"
            );
        }
        datapath.count("allowed");
        if cacheable {
            let verdict = (VERDICT_ALLOW, granted.slot, granted.serial, granted.deadline_ns, ask.server_id);
            self.write_verdict(head_bytes, endpoint_id, framing, verdict, datapath);
        }
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
    #[expect(clippy::too_many_arguments, reason = "one call, all of it needed")]
    pub(super) fn remember_refusal<D: Datapath>(
        &mut self,
        head_bytes: &[u8],
        endpoint_id: u32,
        framing: Option<Framing>,
        answer: &Answer,
        cache: CacheFor,
        server_id: Option<u32>,
        now: Now,
        datapath: &mut D,
    ) {
        let (Some(framing), false) = (framing, answer.close) else { return };
        let deadline_ns = match cache {
            CacheFor::Never => return,
            CacheFor::Short => now.boot_ns + SHORT_NS,
            CacheFor::UntilPolicyChange => now.boot_ns + LONG_NS,
        };
        if let Some(reply_id) = self.replies.id(answer, datapath) {
            let verdict = (VERDICT_DENY, reply_id, 0, deadline_ns, server_id.unwrap_or(u32::MAX));
            self.write_verdict(head_bytes, endpoint_id, framing, verdict, datapath);
        }
    }

    /// Writes a verdict if the kernel reads the head's framing as the parser does.
    pub(super) fn write_verdict<D: Datapath>(
        &self,
        head_bytes: &[u8],
        endpoint_id: u32,
        framing: Framing,
        (kind, index, grant_serial, deadline_ns, server_id): (u32, u32, u64, u64, u32),
        datapath: &mut D,
    ) {
        let Ok((info, digest)) = head::analyze_bytes(head_bytes, &self.secrets.digest, endpoint_id) else {
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
        let ctl = Ctl::new(State::Punted, flow.epoch, flow.received_bytes);
        datapath.to_client(cookie, ctl, &answer.bytes).map_err(|_| EngineError::InjectFailed)?;
        match framing {
            Some(framing) if !answer.close && flow.answers < ANSWERS_MAX => {
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
