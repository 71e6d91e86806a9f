//! One connection: its client, the kernel, its server, and the daemon's real [`Engine`].

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::rc::Rc;
use std::sync::Arc;

use enforcer_common::abi::{EndpointKey, FAMILY_V4};
use enforcer_common::digest::DigestKey;

use super::edge::Edge;
use super::kernel::{COOKIE, Fault, Kernel, Step};
use super::script::{Script, Tokens};
use super::search::Choices;
use crate::core::{EndpointPolicy, Endpoints, Engine, KeyRequest, Now, Orphan, Secrets};
use crate::http::answer;
use crate::keys::KeySnapshot;
use crate::policy::Mode;
use crate::token::Fingerprinter;
use crate::token::testing::{NOW, World as Issuer};

const GENERATION: u64 = 11;
const NOW_NS: u64 = 1_000_000_000_000;
/// Longer than a head may take.
const LONG_NS: u64 = 60_000_000_000;

/// What all worlds share.
pub(super) struct Setting {
    endpoints: Endpoints,
    keys: KeySnapshot,
    more_keys: KeySnapshot,
    pub(super) tokens: Tokens,
    pub(super) key: Box<DigestKey>,
}

impl Setting {
    pub(super) fn new() -> Self {
        let issuer = Issuer::new();
        let mut other = Issuer::new();
        other.header["kid"] = "k2".into();
        let tokens = Tokens::of(&issuer, &other);
        let keys = issuer.keys();
        other.jwks = Some(vec![issuer.key.jwk("k1"), other.key.jwk("k2")]);
        let endpoint = EndpointPolicy {
            key: EndpointKey { addr: [0; 16], port: 1, family: FAMILY_V4, zero: 0 },
            servers: vec![(0, Arc::new(issuer.server()))],
        };
        let words = std::array::from_fn(|k| (k as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Self {
            endpoints: Endpoints(BTreeMap::from([(0, endpoint)])),
            keys,
            more_keys: other.keys(),
            tokens,
            key: Box::new(DigestKey { words }),
        }
    }

    fn engine(&self) -> Engine {
        let secrets = Secrets { digest: self.key.clone(), fingerprint: Fingerprinter::new([1; 32]) };
        Engine::new((self.endpoints.clone(), Mode::Enforce), GENERATION, 100, secrets)
    }
}

/// What else may happen in a world.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Options {
    pub(super) fault: Fault,
    /// The daemon may be killed, at any instant, and is started again.
    pub(super) deaths: bool,
    /// The client may close.
    pub(super) close: bool,
    /// So many records of the ring buffer may be waiting.
    pub(super) ring_records: usize,
    /// The server blocks in `recv`.
    pub(super) server_blocks: bool,
}

#[derive(Clone)]
pub(super) struct World {
    setting: Rc<Setting>,
    kernel: Kernel,
    daemon: Option<Engine>,
    /// Records were taken whose batch is not over.
    in_batch: bool,
    key_requests: Vec<KeyRequest>,
    /// What a new daemon found in the hands of the one before.
    orphans: Option<Vec<Orphan>>,
    now: Now,
}

impl World {
    pub(super) fn new(setting: &Rc<Setting>, script: &Rc<Script>, options: Options) -> Self {
        let mut engine = setting.engine();
        let mut kernel = Kernel::new(setting, script, options, GENERATION, NOW_NS);
        let unavailable = answer::unavailable("daemon-unavailable", 5).finish("POST");
        let mut choices = Choices::default();
        let id = engine.replies().id(&unavailable, &mut Edge { kernel: &mut kernel, choices: &mut choices });
        kernel.unavailable_reply_id = id.expect("it has a template");
        Self {
            setting: Rc::clone(setting),
            kernel,
            daemon: Some(engine),
            in_batch: false,
            key_requests: Vec::new(),
            orphans: None,
            now: Now { boot_ns: NOW_NS, unix_secs: NOW, unix_subsec_ns: 0 },
        }
    }

    pub(super) fn history(&self) -> String {
        format!("{} {:?} in {}", self.kernel.what(), self.kernel.history, self.kernel.script.name)
    }

    /// What can happen now.
    fn enabled(&self) -> Vec<Step> {
        let mut steps = self.kernel.enabled();
        let kernel = &self.kernel;
        match &self.daemon {
            Some(_) => {
                if !kernel.ring.is_empty() {
                    steps.push(Step::Record);
                }
                if self.in_batch {
                    steps.push(Step::EndBatch);
                }
                if !self.key_requests.is_empty() {
                    steps.push(Step::Keys);
                }
                if kernel.destroy_due && kernel.queue.is_empty() {
                    steps.push(Step::Due);
                }
                if self.orphans.is_some() && kernel.ring.is_empty() {
                    steps.push(Step::Orphans);
                }
                if kernel.options.deaths && !kernel.died {
                    steps.push(Step::Die);
                }
            }
            None => {
                steps.push(Step::Start);
                if kernel.alive {
                    steps.push(Step::Lapse);
                }
            }
        }
        if kernel.options.close && kernel.flow.is_some() {
            steps.push(Step::Close);
        }
        steps
    }

    pub(super) fn steps(&self) -> usize {
        self.enabled().len()
    }

    /// Nothing happens any more unless somebody wants it.
    pub(super) fn is_over(&self) -> bool {
        self.enabled().iter().all(|step| matches!(step, Step::Die | Step::Close | Step::Lapse))
    }

    /// One step, and whatever happens in the middle of it.
    pub(super) fn step(&mut self, choices: &mut Choices) {
        let steps = self.enabled();
        let step = steps[choices.pick(steps.len())];
        self.kernel.history.push(step);
        match step {
            Step::Record => self.record(choices),
            Step::EndBatch => {
                self.in_batch = false;
                self.daemon(choices, |engine, _, _, edge| engine.end_batch(edge));
            }
            Step::Keys => {
                let request = self.key_requests.pop().expect("it is enabled");
                let setting = Rc::clone(&self.setting);
                self.daemon(choices, |engine, now, _, edge| {
                    engine.keys_refreshed(request.cookie, request.epoch, now, &setting.more_keys, edge);
                });
            }
            Step::Due => {
                self.kernel.destroy_due = false;
                self.kernel.destroy();
            }
            Step::Orphans => {
                let orphans = self.orphans.take().expect("it is enabled");
                if self.kernel.options.fault != Fault::OrphansForgotten {
                    self.daemon(choices, |engine, _, _, edge| engine.end_orphans(&orphans, edge));
                }
            }
            Step::Die => self.die(),
            Step::Start => self.start(),
            step => self.kernel.step(step),
        }
    }

    fn daemon(
        &mut self,
        choices: &mut Choices,
        act: impl FnOnce(&mut Engine, Now, &KeySnapshot, &mut Edge<'_>),
    ) {
        let engine = self.daemon.as_mut().expect("it lives");
        let mut edge = Edge { kernel: &mut self.kernel, choices };
        act(engine, self.now, &self.setting.keys, &mut edge);
        edge.flush();
        self.key_requests.extend(engine.take_key_requests());
        if self.kernel.dying {
            self.die();
        }
    }

    /// Takes a record out of the ring buffer, and only then does anything about it: a daemon that is killed loses the record, and its
    /// successor does not do it again.
    fn record(&mut self, choices: &mut Choices) {
        let (header, bytes) = self.kernel.ring.pop_front().expect("it is enabled");
        self.in_batch = true;
        self.daemon(choices, |engine, now, keys, edge| engine.record(&header, &bytes, now, keys, edge));
        if self.kernel.options.fault == Fault::ReadTwice && self.daemon.is_none() {
            self.kernel.ring.push_front((header, bytes));
        }
    }

    fn die(&mut self) {
        self.daemon = None;
        self.in_batch = false;
        self.key_requests.clear();
        self.orphans = None;
        self.kernel.dying = false;
        self.kernel.died = true;
        self.kernel.destroy_due = false;
    }

    /// A new daemon takes over: the same maps and key, none of the old one's memory.
    fn start(&mut self) {
        let mut engine = self.setting.engine();
        engine.replies().adopt(self.kernel.replies.values().map(|reply| **reply));
        let grants = self.kernel.grants.iter().map(|(slot, grant)| (*slot, *grant));
        engine.grants().adopt(grants, GENERATION, self.now);
        self.daemon = Some(engine);
        self.kernel.alive = true;
        let orphan = self.kernel.flow.as_ref().and_then(|flow| Orphan::of(COOKIE, flow));
        self.orphans = Some(orphan.into_iter().collect());
    }

    /// Two worlds with equal keys have the same future.
    pub(super) fn key(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.kernel.hash_into(&mut hasher);
        self.daemon.as_ref().map(Engine::state).hash(&mut hasher);
        self.in_batch.hash(&mut hasher);
        self.key_requests.len().hash(&mut hasher);
        self.orphans.as_ref().map(Vec::len).hash(&mut hasher);
        hasher.finish()
    }

    /// What must hold in each state.
    pub(super) fn check(&self) -> Result<(), String> {
        self.kernel.check()
    }

    /// What must hold when nothing is left to happen.
    pub(super) fn check_end(&self) -> Result<(), String> {
        let kernel = &self.kernel;
        if kernel.flow.is_none() {
            return Ok(());
        }
        if kernel.is_dead() && kernel.events_lost {
            // It gets nothing any more, and the daemon could not be told.
            return Ok(());
        }
        if kernel.script.complete {
            let answered = kernel.client.len() == kernel.script.requests.len();
            return if answered && !kernel.is_punted() {
                Ok(())
            } else {
                Err(format!("{} answers, and nobody goes on", kernel.client.len()))
            };
        }
        // A half head waits for its other half, but not for ever.
        let mut later = self.clone();
        later.now.boot_ns += LONG_NS;
        let mut choices = Choices::default();
        later.daemon(&mut choices, |engine, now, _, edge| engine.tick(now, edge));
        if later.kernel.flow.is_none() { Ok(()) } else { Err("a half head waits for ever".to_owned()) }
    }
}
