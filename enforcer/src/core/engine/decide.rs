//! What a request is: its bytes are put together, its head is read, and policy is asked.

use enforcer_common::abi::{
    PUNT_LIMITED, PUNT_OBSERVED, PUNT_UNANSWERED, PuntHeader, VERDICT_PUBLIC, punt_retry_step,
};
use enforcer_common::limit::retry_step;

use crate::authz::{self, Decision, KeyLookup, Options};
use crate::core::{Datapath, KeyedVerifier, Now};
use crate::http::answer;
use crate::http::head::{DEFAULT_MAX_HEAD_BYTES, Framing, HeadError, find_head_end, may_become_head};
use crate::keys::KeySnapshot;
use crate::policy::Server;
use crate::token::VerifiedToken;

use super::outcome::{Asked, LONG_NS, NoGrant, retry_after_secs};
use super::punted::{Body, Punted, Stage};
use super::refuse::Refusal;
use super::{Engine, EngineError, FLOWS_MAX, HEAD_TIMEOUT_NS, KeyRequest, PARKED_MAX_BYTES};

impl Engine {
    pub(super) fn data<D: Datapath>(
        &mut self,
        header: &PuntHeader,
        bytes: &[u8],
        now: Now,
        keys: &KeySnapshot,
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        let known = self.flows.get(&header.cookie).is_some_and(|flow| flow.epoch == header.epoch);
        if !known {
            self.begin(header, now)?;
        }
        let flow = self.flows.get_mut(&header.cookie).ok_or(EngineError::RecordLost)?;
        if flow.received_bytes != header.offset_bytes {
            return Err(EngineError::RecordLost);
        }
        flow.received_bytes += bytes.len() as u64;
        flow.last_write_seq = header.write_seq;
        if let Stage::Done { .. } = flow.stage {
            // The client was faster than the hand-back: the next request begins.
            flow.next_request(header, now);
        }
        let bytes = match flow.discard(bytes)? {
            Some(rest) => {
                flow.next_request(header, now);
                rest
            }
            None => bytes,
        };
        match flow.stage {
            Stage::Head | Stage::Waiting => {
                if flow.parked.len() + bytes.len() > PARKED_MAX_BYTES {
                    return Err(EngineError::ParkedFull);
                }
                self.make_room(bytes.len(), header.cookie, datapath);
                let flow = self.flows.get_mut(&header.cookie).ok_or(EngineError::RecordLost)?;
                flow.parked.extend_from_slice(bytes);
                self.parked_bytes += bytes.len();
                if flow.stage == Stage::Head {
                    self.try_decide(header.cookie, KeyLookup::MayRefresh, now, keys, datapath)?;
                }
                Ok(())
            }
            Stage::Pass { .. } => flow.body(header.cookie, bytes, datapath),
            Stage::Discard { .. } | Stage::Done { .. } | Stage::Closing => Ok(()),
        }
    }

    fn begin(&mut self, header: &PuntHeader, now: Now) -> Result<(), EngineError> {
        if header.offset_bytes != 0 {
            return Err(EngineError::RecordLost);
        }
        let answers = self.flows.get(&header.cookie).map_or(0, |flow| flow.answers);
        self.forget(header.cookie);
        if self.flows.len() >= FLOWS_MAX {
            return Err(EngineError::FlowsFull);
        }
        let skips = header.skip_bytes != 0;
        self.flows.insert(
            header.cookie,
            Punted {
                epoch: header.epoch,
                endpoint_id: header.endpoint_id,
                netns_cookie: header.netns_cookie,
                origin: header.origin,
                // Of a head behind a body that is dropped the kernel says nothing: it has not looked for where it begins.
                limited: (!skips && header.flags & PUNT_LIMITED != 0).then(|| punt_retry_step(header.flags)),
                charged: !skips,
                received_bytes: 0,
                parked: Vec::new(),
                scanned: 0,
                stage: if skips {
                    Stage::Discard { body: Body::Length(header.skip_bytes) }
                } else {
                    Stage::Head
                },
                write_seq_mark: header.write_seq,
                last_write_seq: header.write_seq,
                unanswered: header.flags & PUNT_UNANSWERED != 0,
                pipelined: header.flags & PUNT_UNANSWERED != 0,
                skipping: skips,
                observed: header.flags & PUNT_OBSERVED != 0,
                since_ns: now.boot_ns,
                answers,
            },
        );
        Ok(())
    }

    /// Decides about the parked head if it is whole.
    pub(super) fn try_decide<D: Datapath>(
        &mut self,
        cookie: u64,
        key_lookup: KeyLookup,
        now: Now,
        keys: &KeySnapshot,
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        self.look_for_revocations(now, datapath);
        let flow = self.flows.get_mut(&cookie).ok_or(EngineError::RecordLost)?;
        if !may_become_head(&flow.parked) {
            return Err(EngineError::NotHttp);
        }
        // What was looked through before, less what an end could have begun with.
        let from = flow.scanned.saturating_sub(3).min(flow.parked.len());
        flow.scanned = flow.parked.len();
        let parked = match find_head_end(flow.parked.get(from..).unwrap_or_default()).map(|end| from + end) {
            Some(end) => {
                self.parked_bytes -= flow.parked.len();
                // Entries of decided heads would pile up until their time is over.
                self.timeouts.remove(&(flow.since_ns + HEAD_TIMEOUT_NS, cookie));
                flow.scanned = 0;
                let parked = std::mem::take(&mut flow.parked);
                (parked, end)
            }
            None if flow.parked.len() > DEFAULT_MAX_HEAD_BYTES => {
                let error =
                    HeadError::TooLarge { len_bytes: flow.parked.len(), max_bytes: DEFAULT_MAX_HEAD_BYTES };
                let answer = answer::broken_head(&error).finish("GET");
                return self.answer(cookie, &answer, None, datapath);
            }
            None => return Ok(()),
        };
        let (bytes, end) = parked;
        let (head_bytes, rest) = bytes.split_at(end);
        let (endpoint_id, origin) = (flow.endpoint_id, flow.origin);
        let caller = datapath.caller(cookie, &origin);
        let limited = match key_lookup {
            KeyLookup::MayRefresh => flow.over_limit(&caller, now, datapath),
            // It was charged before its key was asked for.
            KeyLookup::Final => None,
        };
        let endpoint = self.endpoints.0.get(&endpoint_id).ok_or(EngineError::EndpointRemoved)?;
        let served = endpoint.servers.clone();
        let servers: Vec<&Server> = served.iter().map(|(_, server)| server.as_ref()).collect();
        let server_id = |index: usize| served.get(index).map(|(id, _)| *id);
        let verifier = KeyedVerifier {
            keys,
            revocations: self.revoked.list(),
            fingerprinter: &self.secrets.fingerprint,
            workload: caller.view().name_hashes(),
            now_unix_secs: now.unix_secs,
        };
        let options = Options { key_lookup, ..Options::default() };
        let decision = match limited {
            Some(step) => authz::over_limit(head_bytes, retry_after_secs(step), &options),
            None => authz::decide(head_bytes, &servers, &verifier, &caller.view(), &options),
        };
        match decision {
            Decision::Allow { server_index, verified, token, framing, cacheable, first_use, .. } => {
                let (server_id, server) = served.get(server_index).ok_or(EngineError::RecordLost)?.clone();
                let asked = Asked {
                    token: &verified,
                    fingerprint: self.secrets.fingerprint.fingerprint(token.as_bytes()),
                    server_id,
                    server: &server,
                    caller: &caller,
                    first_use,
                    head_bytes,
                    framing,
                    cacheable,
                };
                match self.allow(cookie, &asked, now, datapath) {
                    Ok(serial) => self.pass(cookie, server_id, serial, head_bytes, rest, framing, datapath),
                    Err(NoGrant::Limited(wait_ns)) => {
                        let secs = retry_after_secs(retry_step(wait_ns));
                        match authz::over_limit::<VerifiedToken>(head_bytes, secs, &options) {
                            Decision::Answer { answer, framing, .. } => {
                                let refusal =
                                    Refusal { server: Some(&server.name), ..Refusal::of(&answer, framing) };
                                self.refuse(cookie, (head_bytes, rest), &refusal, &caller, now, datapath)
                            }
                            _ => Err(EngineError::NotHttp),
                        }
                    }
                    Err(why) => self.no_grant(cookie, &server, framing, why, datapath),
                }
            }
            Decision::Public { server_index, framing, cacheable, .. } => {
                let server_id = server_id(server_index).ok_or(EngineError::RecordLost)?;
                if cacheable {
                    let verdict = (VERDICT_PUBLIC, 0, 0, now.boot_ns + LONG_NS, server_id);
                    self.write_verdict(head_bytes, &origin, framing, verdict, datapath);
                }
                self.pass(cookie, server_id, 0, head_bytes, rest, framing, datapath)
            }
            Decision::Answer { server_index, answer, framing, cache, misplaced } => {
                let server = server_index.and_then(|index| servers.get(index));
                let refusal = Refusal {
                    server_id: server_index.and_then(server_id),
                    server: server.map(|server| server.name.as_str()),
                    cache,
                    misplaced: misplaced.as_ref(),
                    ..Refusal::of(&answer, framing)
                };
                self.refuse(cookie, (head_bytes, rest), &refusal, &caller, now, datapath)
            }
            Decision::NeedKey { issuer, kid, .. } => {
                let flow = self.flows.get_mut(&cookie).ok_or(EngineError::RecordLost)?;
                self.key_requests.push(KeyRequest { cookie, epoch: flow.epoch, issuer, kid });
                flow.stage = Stage::Waiting;
                self.parked_bytes += bytes.len();
                flow.parked = bytes;
                Ok(())
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one call, all of it needed")]
    fn pass<D: Datapath>(
        &mut self,
        cookie: u64,
        server_id: u32,
        grant_serial: u64,
        head_bytes: &[u8],
        rest: &[u8],
        framing: Framing,
        datapath: &mut D,
    ) -> Result<(), EngineError> {
        let flow = self.flows.get_mut(&cookie).ok_or(EngineError::RecordLost)?;
        flow.answers = 0;
        let mut body = Body::of(framing);
        // Everything that belongs to the request goes in one piece: servers like to read head and body at once.
        let (taken, end) = body.take(rest)?;
        if taken < rest.len() {
            return Err(EngineError::Pipelined);
        }
        flow.stage = Stage::Pass { server_id, body, grant_serial };
        if rest.is_empty() {
            flow.send(cookie, server_id, head_bytes, datapath)?;
        } else {
            flow.send(cookie, server_id, &[head_bytes, rest].concat(), datapath)?;
        }
        if end || body == Body::Length(0) {
            flow.stage = Stage::Done { grant_serial };
        }
        Ok(())
    }
}
