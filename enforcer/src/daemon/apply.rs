//! A policy into the kernel's maps: at the start, and when another one takes its place.

use std::sync::Arc;

use anyhow::Context;
use enforcer_common::abi::{Config, DaemonState, Endpoint, MODE_ENFORCE, MODE_OBSERVE, ServerLabel, text};
use enforcer_common::limit::{RETRY_AFTER_SECS, RETRY_STEPS};
use tracing::{error, warn};

use super::kernel::Kernel;
use super::revocations::State;
use crate::core::{AllCarried, Consequences, Engine, Next, Now, Numbers};
use crate::http::answer;
use crate::keys::KeyManagerHandle;
use crate::policy::{self, Mode, Policy, PolicyDiff, PolicyText, Rate};
use crate::revocation::store::Recorded;

/// Retry-After of the answer that the kernel gives while no daemon lives.
const UNAVAILABLE_RETRY_SECS: u32 = 5;

/// Mode as the maps have it.
pub(super) const fn mode(policy: &Policy) -> u32 {
    match policy.mode {
        Mode::Enforce => MODE_ENFORCE,
        Mode::Observe => MODE_OBSERVE,
    }
}

/// Writes the labels of the policy's servers.
pub(super) fn write_labels(policy: &Policy, numbers: &Numbers, kernel: &mut Kernel) -> anyhow::Result<()> {
    for server in &policy.servers {
        let Some(id) = numbers.server(&server.name) else { continue };
        let listen: Vec<String> = server.listen.iter().map(ToString::to_string).collect();
        let label = ServerLabel {
            name: text(&server.name),
            resource: text(&server.resource),
            path: text(&server.path),
            listen: text(&listen.join(", ")),
        };
        kernel.maps().set_server_label(id, &label)?;
    }
    Ok(())
}

/// Protects the endpoints: connections that they accept from here on are guarded.
pub(super) fn write_endpoints(
    numbers: &Numbers,
    engine: &mut Engine,
    kernel: &mut Kernel,
) -> anyhow::Result<()> {
    let unavailable = answer::unavailable("daemon-unavailable", UNAVAILABLE_RETRY_SECS).finish("POST");
    let unavailable_reply_id =
        engine.replies().id(&unavailable, kernel).context("the answer for a dead daemon has no template")?;
    for (key, endpoint_id) in numbers.endpoints() {
        kernel.maps().set_endpoint(key, Endpoint { endpoint_id, unavailable_reply_id })?;
    }
    Ok(())
}

/// What the configuration says of the limits of requests without a grant. Writes the answers that they get.
pub(super) fn with_limits(
    config: Config,
    policy: &Policy,
    engine: &mut Engine,
    kernel: &mut Kernel,
) -> anyhow::Result<Config> {
    let mut limited_reply_ids = [0; RETRY_STEPS];
    for (id, secs) in limited_reply_ids.iter_mut().zip(RETRY_AFTER_SECS) {
        let answer = answer::over_limit("over-limit", secs).finish("POST");
        *id = engine
            .replies()
            .id(&answer, kernel)
            .context("the answer to who is over a limit has no template")?;
    }
    let refused = policy.refused.as_ref();
    Ok(Config {
        unknown_interval_ns: policy.unknown.interval_ns,
        unknown_burst_ns: policy.unknown.burst_ns(),
        refused_interval_ns: refused.map_or(0, |rate| rate.interval_ns),
        refused_burst_ns: refused.map_or(0, Rate::burst_ns),
        limited_reply_ids,
        ..config
    })
}

/// A policy in force.
pub(super) struct InForce {
    pub(super) policy: Arc<Policy>,
    pub(super) numbers: Numbers,
    pub(super) keys: KeyManagerHandle,
}

/// Another policy, ready to take its place.
pub(super) struct Prepared {
    pub(super) in_force: InForce,
    /// Its text.
    pub(super) text: PolicyText,
    pub(super) next: Next,
    pub(super) diff: PolicyDiff,
    pub(super) warnings: Vec<String>,
    /// The state directory, locked, and what it says: who revokes meanwhile waits, and finds the grants as they are then. Absent if
    /// nothing is to be switched.
    pub(super) revocations: Option<(State, Recorded)>,
}

/// Makes another policy the one in force; see [`crate::core::Engine::carry`] for the order of the steps.
///
/// # Errors
/// The old policy stays in force.
pub(super) fn switch(
    prepared: Prepared,
    in_force: &mut InForce,
    now: Now,
    engine: &mut Engine,
    kernel: &mut Kernel,
) -> anyhow::Result<Consequences> {
    let Prepared { in_force: new, text, next, revocations, .. } = prepared;
    let (revocations, recorded) = revocations.context("the revocations are not locked")?;
    let generation = now.boot_ns.max(engine.generation() + 1);
    let state = kernel.maps().daemon_state()?;
    // Should we be killed in the middle, the next daemon knows that it can't tell what the maps were filled by.
    kernel.maps().set_daemon_state(&DaemonState { policy_hash: [0; 32], ..state })?;
    let recorded = revocations.fill(&mut kernel.maps().live, recorded, &new.policy, now.unix_secs);
    let written =
        recorded.and_then(|recorded| Ok((recorded, write(&new, &next, generation, now, engine, kernel)?)));
    let (recorded, all) = match written {
        Ok(written) => written,
        Err(error) => {
            remove_endpoints(&new.numbers, &in_force.numbers, kernel);
            kernel.maps().set_daemon_state(&state)?;
            return Err(error);
        }
    };
    // From here on there is no way back: nothing of the old policy is allowed any more.
    let consequences = engine.switch(&next, &all, generation, now, kernel);
    remove_endpoints(&in_force.numbers, &new.numbers, kernel);
    clear_labels(&in_force.numbers, &new.numbers, kernel);
    if let Err(error) = write_labels(&new.policy, &new.numbers, kernel) {
        warn!(%error, "not all servers are shown by their new names");
    }
    // Still under the lock, as operators change what the shield says too.
    if let Err(error) = kernel.maps().live.shield.apply(&new.policy) {
        error!(%error, "the shield does not do all that the new policy asks of it; start the daemon again");
    }
    let policy = Arc::clone(&new.policy);
    // The disk may take its time. Until then the file says less of how long revocations stand, and each start says it anew; and the
    // policy that is recorded is not the one that the maps name, so a start would close the open connections.
    tokio::task::spawn_blocking(move || {
        if let Err(error) = revocations.write(&recorded) {
            error!(error = format!("{error:#}"), "after the policy changed");
        }
        revocations.keep_policy(text, &policy);
    });
    kernel.name_policy(consequences.is_ok().then(|| policy::hash(&new.policy)));
    *in_force = new;
    consequences.or_else(|error| {
        warn!(
            %error,
            "not all connections could be looked through; those of lost tokens are ended by the sweep, and a start closes all"
        );
        Ok(Consequences::default())
    })
}

/// All that must be in the maps when the new generation begins, and then that.
fn write(
    new: &InForce,
    next: &Next,
    generation: u64,
    now: Now,
    engine: &mut Engine,
    kernel: &mut Kernel,
) -> anyhow::Result<AllCarried> {
    write_endpoints(&new.numbers, engine, kernel)?;
    let all = engine.carry(next, generation, &new.keys.snapshot(), now, kernel)?;
    let config = kernel.maps().live.configuration()?;
    let heartbeat_limit_ns = new.policy.daemon_timeout.as_nanos() as u64;
    let mode = mode(&new.policy);
    let config = Config { generation, mode, heartbeat_limit_ns, ..config };
    let config = with_limits(config, &new.policy, engine, kernel)?;
    kernel.maps().set_config(config)?;
    Ok(all)
}

/// Takes away the endpoints that only `gone` has.
fn remove_endpoints(gone: &Numbers, stay: &Numbers, kernel: &mut Kernel) {
    let stay: std::collections::BTreeSet<_> = stay.endpoints().map(|(key, _)| key).collect();
    for (key, _) in gone.endpoints().filter(|(key, _)| !stay.contains(key)) {
        if let Err(error) = kernel.maps().remove_endpoint(key) {
            warn!(%error, "an endpoint could not be removed; its connections are cut off");
        }
    }
}

/// Takes away the names of servers whose numbers mean nothing any more.
fn clear_labels(gone: &Numbers, stay: &Numbers, kernel: &mut Kernel) {
    let none = ServerLabel { name: text(""), resource: text(""), path: text(""), listen: text("") };
    let stay: std::collections::BTreeSet<_> = stay.servers().map(|(_, id)| id).collect();
    for (_, id) in gone.servers().filter(|(_, id)| !stay.contains(id)) {
        if let Err(error) = kernel.maps().set_server_label(id, &none) {
            warn!(%error, "a server that is gone is still shown");
        }
    }
}
