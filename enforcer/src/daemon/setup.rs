//! From a policy to programs that guard its servers.

use anyhow::Context;
use aya::maps::{MapData, RingBuf};
use enforcer_common::abi::{ABI_VERSION, Config, DaemonState};
use enforcer_common::digest::{DigestKey, KEY_WORDS};
use ring::rand::{SecureRandom, SystemRandom};
use std::path::Path;
use std::time::Duration;

use super::apply::{mode, with_limits, write_endpoints, write_labels};
use super::kernel::Kernel;
use super::revocations::State;
use crate::core::{Endpoints, Engine, Numbers, Orphan, Secrets};
use crate::datapath::{self, Injectors, Maps, PinDir, shield};
use crate::lifecycle::start::Ours;
use crate::lifecycle::{UnloadOptions, unload};
use crate::policy::Policy;
use crate::token::Fingerprinter;

/// What guards, and what the daemon works with.
pub(super) struct Up {
    pub(super) engine: Engine,
    pub(super) kernel: Kernel,
    pub(super) ring: RingBuf<MapData>,
    /// The policy's servers and endpoints in the maps.
    pub(super) numbers: Numbers,
    /// What an earlier daemon had in its hands.
    pub(super) orphans: Vec<Orphan>,
}

/// Loads the programs, writes the policy into their maps, and attaches them. On an error nothing stays.
pub(super) fn load(
    policy: &Policy,
    pins: &PinDir,
    cgroup: &Path,
    ours: &Ours,
    started_ns: u64,
    state: &State,
) -> anyhow::Result<Up> {
    let (staging, retired) = (pins.staging(), pins.retired());
    let mut loaded = datapath::load(&staging)?;
    let mut maps = Maps::open(&staging)?;
    let ring = Maps::punts(&staging)?;
    let fingerprint_key = state.fingerprint_key()?;
    let secrets = secrets(fingerprint_key)?;
    maps.set_digest_key(&secrets.digest)?;
    maps.set_daemon_state(&DaemonState {
        fingerprint_key,
        policy_hash: ours.policy_hash,
        object_hash: ours.object_hash,
    })?;
    let injectors = Injectors::new(&mut maps)?;

    let now_ns = super::now().boot_ns;
    // Grants and verdicts of another load are in other maps; a generation from the clock keeps even a mix-up harmless.
    let generation = now_ns;
    let numbers = Numbers::default().next(policy)?;
    let endpoints = Endpoints::of(policy, &numbers);
    let mut engine = Engine::new((endpoints, policy.mode), generation, now_ns, secrets);
    let mut kernel = Kernel::new(maps, injectors)?;
    write_labels(policy, &numbers, &mut kernel)?;
    write_endpoints(&numbers, &mut engine, &mut kernel)?;
    let config = Config {
        abi_version: ABI_VERSION,
        mode: mode(policy),
        generation,
        heartbeat_ns: now_ns,
        heartbeat_limit_ns: policy.daemon_timeout.as_nanos() as u64,
        loaded_ns: now_ns,
        daemon_started_ns: started_ns,
        daemon_pid: std::process::id(),
        draining: 0,
        ..Config::NONE
    };
    let config = with_limits(config, policy, &mut engine, &mut kernel)?;
    kernel.maps().set_config(config)?;
    state.inherit(pins, &mut kernel.maps().live)?;
    let first_users = datapath::first_users_left_behind(pins).context(
        "cannot read who presented first tokens, so whoever comes next would be the first; to begin anew, run `enforcer unload`",
    )?;
    for (key, user) in first_users {
        kernel.maps().live.first_users.insert(key, user, 0)?;
    }
    state.bring_together(&mut kernel.maps().live, policy, super::now().unix_secs)?;
    kernel.maps().live.shield.apply(policy)?;
    loaded.attach(cgroup)?;
    // Ours guards already. What an earlier daemon left keeps guarding its connections until they are closed; a connection that
    // both would tag in between is cut off.
    if pins.path().exists() {
        std::fs::rename(pins.path(), retired.path())
            .with_context(|| format!("cannot move {} aside", pins.path().display()))?;
    }
    kernel.hold(loaded.commit(pins)?);
    shield::inherit(&retired, pins, &mut kernel.maps().live.shield);
    unload(&retired, &UnloadOptions { drain_timeout: Duration::ZERO, force: true })?;
    Ok(Up { engine, kernel, ring, numbers, orphans: Vec::new() })
}

/// With a digest key that is drawn anew.
fn secrets(fingerprint_key: [u8; 32]) -> anyhow::Result<Secrets> {
    let mut words = vec![0_u8; KEY_WORDS * 8];
    SystemRandom::new().fill(&mut words).map_err(|_| anyhow::anyhow!("the kernel gave no random bytes"))?;
    let mut digest = Box::new(DigestKey { words: [0; KEY_WORDS] });
    for (word, bytes) in digest.words.iter_mut().zip(words.chunks_exact(8)) {
        *word = bytes.iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
    }
    Ok(Secrets { digest, fingerprint: Fingerprinter::new(fingerprint_key) })
}
