//! The core's [`Datapath`] on the real kernel.

use std::collections::BTreeMap;

use aya::programs::links::PinnedLink;
use enforcer_common::abi::{
    Ends, FLOW_PIPELINED, Flow, Grant, GrantLabel, HeadDigest, InjectHeader, REVOCATION_EPOCH,
    REVOCATION_GRANT_SLOTS, Reply, Verdict,
};
use enforcer_common::flow::Ctl;
use tracing::{error, warn};

use crate::cli::format;
use crate::core::{Datapath, HandBack};
use crate::datapath::{Injectors, LiveError, Maps, SocketDestroyer};
use crate::revocation::Revocations;

/// Why the kernel did not do it.
#[derive(Debug, thiserror::Error)]
pub(super) enum KernelError {
    #[error(transparent)]
    Map(#[from] LiveError),
    #[error(transparent)]
    Inject(#[from] crate::datapath::InjectError),
    #[error("map lookup: {0}")]
    Lookup(#[from] aya::maps::MapError),
}

/// Maps, injectors and the destroyer of sockets.
pub(super) struct Kernel {
    maps: Maps,
    injectors: Injectors,
    destroyer: SocketDestroyer,
    /// New connections are not guarded any more; whoever writes the configuration must not forget it.
    draining: bool,
    /// What keeps the programs attached even if their pins are deleted.
    links: Vec<PinnedLink>,
    /// Connections to destroy: when, which.
    due: BTreeMap<(u64, u64), u64>,
}

impl Kernel {
    pub(super) fn new(maps: Maps, injectors: Injectors) -> Self {
        Self {
            maps,
            injectors,
            destroyer: SocketDestroyer::default(),
            draining: false,
            links: Vec::new(),
            due: BTreeMap::new(),
        }
    }

    pub(super) fn maps(&mut self) -> &mut Maps {
        &mut self.maps
    }

    /// Keeps the links for as long as the daemon lives.
    pub(super) fn hold(&mut self, links: Vec<PinnedLink>) {
        self.links = links;
    }

    /// New connections are not guarded any more.
    pub(super) fn drain(&mut self) {
        self.draining = true;
    }

    /// Shows the kernel that the daemon lives.
    pub(super) fn heartbeat(&mut self, now_ns: u64) -> Result<(), LiveError> {
        let mut config = self.maps.live.configuration()?;
        config.heartbeat_ns = now_ns;
        config.draining |= u32::from(self.draining);
        self.maps.set_config(config)
    }

    /// Destroys the connections whose time has come.
    pub(super) fn destroy_due(&mut self, now_ns: u64) {
        while let Some((&(when_ns, cookie), &netns_cookie)) = self.due.first_key_value() {
            if when_ns > now_ns {
                break;
            }
            self.due.pop_first();
            let Ok(flow) = self.maps.live.flows.get(&cookie, 0) else { continue };
            let ends = Ends { local: flow.local, peer: flow.peer };
            if let Err(error) = self.destroyer.destroy(netns_cookie, cookie, flow.interface, ends) {
                warn!(cookie, %error, "a connection could not be destroyed; it is dead in the kernel");
            }
        }
    }
}

impl Datapath for Kernel {
    type Error = KernelError;

    fn to_server(
        &mut self,
        server_id: u32,
        cookie: u64,
        ctl: Ctl,
        grant_serial: u64,
        bytes: &[u8],
    ) -> Result<(), KernelError> {
        Ok(self.injectors.to_server(server_id, cookie, ctl, grant_serial, bytes)?)
    }

    fn to_client(&mut self, cookie: u64, ctl: Ctl, bytes: &[u8]) -> Result<(), KernelError> {
        Ok(self.injectors.to_client(cookie, ctl, bytes)?)
    }

    fn hand_back(&mut self, cookie: u64, expected: Ctl, to: HandBack) -> Result<(), KernelError> {
        Ok(self.injectors.hand_back(InjectHeader {
            cookie,
            expected_ctl: expected.0,
            new_ctl: to.ctl.0,
            remaining_bytes: to.remaining_bytes,
            chunked: to.chunked,
            grant_serial: to.grant_serial,
            kind: 0,
            write_seq_mark: to.write_seq_mark,
            flags: if to.pipelined { FLOW_PIPELINED } else { 0 },
            zero: 0,
        })?)
    }

    fn destroy(&mut self, cookie: u64, netns_cookie: u64, after_ns: u64) {
        let now_ns = super::now().boot_ns;
        self.due.insert((now_ns + after_ns, cookie), netns_cookie);
        if after_ns == 0 {
            self.destroy_due(now_ns);
        }
    }

    fn destroy_stray(&mut self, cookie: u64, netns_cookie: u64, interface: u32, ends: Ends) {
        if let Err(error) = self.destroyer.destroy(netns_cookie, cookie, interface, ends) {
            warn!(cookie, %error, "an unguarded connection could not be destroyed; it gets no bytes");
        }
    }

    fn revocation_epoch(&mut self) -> Result<u64, KernelError> {
        Ok(self.maps.live.revocation_word(REVOCATION_EPOCH)?)
    }

    fn revocations(&mut self) -> Result<Revocations, KernelError> {
        Ok(self.maps.live.revocations()?)
    }

    fn set_grant_slots(&mut self, slots: u32) -> Result<(), KernelError> {
        Ok(self.maps.live.set_revocation_word(REVOCATION_GRANT_SLOTS, u64::from(slots))?)
    }

    fn flows(&mut self, each: &mut dyn FnMut(u64, &Flow)) -> Result<(), KernelError> {
        Ok(self.maps.live.each_flow(each)?)
    }

    fn flow_exists(&mut self, cookie: u64) -> bool {
        self.maps.live.flows.get(&cookie, 0).is_ok()
    }

    fn peer(&mut self, cookie: u64) -> String {
        match self.maps.live.flows.get(&cookie, 0) {
            Ok(flow) => format::socket(&flow.peer),
            Err(_) => "gone".into(),
        }
    }

    fn set_verdict(&mut self, digest: HeadDigest, verdict: Verdict) -> Result<(), KernelError> {
        Ok(self.maps.set_verdict(digest, verdict)?)
    }

    fn grant(&mut self, slot: u32) -> Result<Grant, KernelError> {
        Ok(self.maps.live.grants.get(&slot, 0)?)
    }

    fn set_grant(&mut self, slot: u32, grant: &Grant) -> Result<(), KernelError> {
        Ok(self.maps.set_grant(slot, grant)?)
    }

    fn grant_label(&mut self, slot: u32) -> Result<GrantLabel, KernelError> {
        Ok(self.maps.live.grant_labels.get(&slot, 0)?)
    }

    fn set_grant_label(&mut self, slot: u32, label: &GrantLabel) -> Result<(), KernelError> {
        Ok(self.maps.set_grant_label(slot, label)?)
    }

    fn set_reply(&mut self, id: u32, reply: &Reply) -> Result<(), KernelError> {
        Ok(self.maps.set_reply(id, reply)?)
    }

    fn count(&mut self, reason: &'static str) {
        if let Err(error) = self.maps.add_reason(reason) {
            error!(reason, %error, "a refusal could not be counted");
        }
    }
}
