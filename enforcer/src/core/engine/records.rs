//! The records of the ring buffer: requests and the ends of connections.

use enforcer_common::abi::{
    Caller, Counter, Ends, Origin, PUNT_BARRED, PUNT_CHUNK_BYTES, PUNT_CLOSED, PUNT_DATA, PUNT_DEAD,
    PUNT_FENCED, PUNT_OBSERVED, PUNT_STRAY, PuntHeader,
};
use enforcer_common::flow::{Ctl, State};
use tracing::{info, warn};

use super::super::{Datapath, Endpoints, Now};
use super::{Engine, let_go};
use crate::keys::KeySnapshot;
use crate::workload::comm;

impl Engine {
    /// Takes one record of the ring buffer.
    pub fn record<D: Datapath>(
        &mut self,
        header: &PuntHeader,
        bytes: &[u8],
        now: Now,
        keys: &KeySnapshot,
        datapath: &mut D,
    ) {
        match header.kind {
            PUNT_DATA => {
                match self.data(header, bytes, now, keys, datapath) {
                    // A full record may be followed by others of the same packet; all others are handed back at once, before the
                    // client can have its answer and send more.
                    Ok(()) if bytes.len() < PUNT_CHUNK_BYTES => self.hand_back(header.cookie, datapath),
                    Ok(()) => {
                        self.touched.insert(header.cookie);
                    }
                    // Of a flow that an earlier daemon followed: its bytes have passed, and go on.
                    Err(_)
                        if header.flags & PUNT_OBSERVED != 0 && !self.flows.contains_key(&header.cookie) =>
                    {
                        let punted_bytes = header.offset_bytes + u64::from(header.len_bytes);
                        let ctl = Ctl::new(State::Punted, header.epoch, punted_bytes);
                        let_go(header.cookie, ctl, datapath);
                    }
                    Err(error) => {
                        self.give_up(header.cookie, header.netns_cookie, error, datapath);
                        self.touched.insert(header.cookie);
                    }
                }
            }
            PUNT_CLOSED => self.forget(header.cookie),
            PUNT_DEAD => {
                if header.reason == Counter::DeadUnjudged as u32 && self.log.admit() {
                    warn!(
                        cookie = header.cookie,
                        endpoint = header.endpoint_id,
                        "a server read bytes that were not judged (splice, zero-copy receive); from now on its connections get none before they are accepted"
                    );
                }
                self.forget(header.cookie);
                datapath.destroy(header.cookie, header.netns_cookie, 0);
            }
            PUNT_STRAY => {
                let Some(ends) = payload::<Ends>(bytes) else { return };
                datapath.count("unguarded-connection");
                if self.log.admit() {
                    info!(
                        cookie = header.cookie,
                        "a connection from before the enforcement is still there; it is destroyed"
                    );
                }
                datapath.destroy_stray(header.cookie, header.netns_cookie, header.interface, ends);
            }
            PUNT_BARRED => {
                datapath.count("connect-refused");
                let Some(caller) = payload::<Caller>(bytes) else { return };
                let origin = Origin::new(header.endpoint_id, &Endpoints::NOWHERE, &caller);
                let workload = datapath.holder(&origin).view().workload_name();
                if self.log.admit() {
                    let servers = self.endpoints.names(header.endpoint_id);
                    let (pid, uid, comm) = (caller.pid, caller.uid, comm(&caller));
                    warn!(workload, servers, pid, uid, comm, "a process that may not connect was not let");
                }
            }
            PUNT_FENCED => {
                warn!(cookie = header.cookie, "a connection could not be guarded and was cut off (MPTCP?)");
                datapath.destroy(header.cookie, header.netns_cookie, 0);
            }
            kind => warn!(kind, "unknown record in the ring buffer"),
        }
    }
}

/// What follows an event.
trait Payload: Copy {}
impl Payload for Ends {}
impl Payload for Caller {}

fn payload<T: Payload>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: `repr(C)`, integers only, and the slice is long enough.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}
