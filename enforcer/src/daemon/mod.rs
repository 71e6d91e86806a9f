//! The daemon: brings the kernel programs to life, feeds the core, and takes them down again.

mod adopt;
mod apply;
mod bars;
mod control;
mod kernel;
mod lookout;
mod reload;
mod revocations;
pub mod selftest;
mod setup;
mod watch;
pub mod watcher;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use aya::maps::{MapData, RingBuf};
use enforcer_common::abi::{PUNT_SMALL_BYTES, PUNTS_BYTES, PuntHeader};
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use crate::core::{Datapath, Engine, KeyRequest, MEMORY_MAX_BYTES, Now};
use crate::datapath::{self, Living, PinDir, map_memory};
use crate::keys::{self, BootInstant, KeyManager, KeyManagerHandle};
use crate::lifecycle::lock::DaemonLock;
use crate::lifecycle::start::{self, Ours, Start};
use crate::lifecycle::{UnloadOptions, clock, paths, unload};
use crate::policy::{self, Policy, PolicyText};
use crate::privileges;
use crate::revocation::store::StateDir;
use apply::InForce;
use bars::Bars;
use kernel::Kernel;
use lookout::{Lookout, Seen};
use reload::Reloads;
use revocations::State;
use setup::Up;
use watcher::Watcher;

/// How often the daemon shows the kernel that it lives.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// How long the start waits for the issuers' keys.
const KEYS_TIMEOUT: Duration = Duration::from_secs(10);
/// When a new daemon ends what an earlier one had begun: once no program can be about to hand over what it began before.
const ORPHANS_AFTER: Duration = Duration::from_millis(100);
/// Records after which other work gets its turn.
const BATCH: usize = 512;

/// How the daemon is to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunOptions {
    /// The policy file.
    pub policy: PathBuf,
    /// Cgroup whose processes are guarded; the root of the cgroup2 hierarchy when absent.
    pub cgroup: Option<PathBuf>,
    /// Where a bpffs is mounted, or will be.
    pub bpffs: PathBuf,
    /// Name of the pin directory.
    pub pin_name: String,
    /// Where revocations are recorded.
    pub state: StateDir,
    /// SIGTERM leaves the enforcement in the kernel.
    pub keep: bool,
    /// The programs of an enforcement that is adopted are replaced even if they are the same.
    pub replace_programs: bool,
    /// How long connections may go on at the end, before they are destroyed.
    pub drain_timeout: Duration,
    /// The policy file is read again when it changes.
    pub watch: bool,
}

/// Both clocks, now.
fn now() -> Now {
    let unix = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Now {
        boot_ns: BootInstant::now().since_boot().as_nanos() as u64,
        unix_secs: unix.as_secs(),
        unix_subsec_ns: unix.subsec_nanos(),
    }
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// Whatever keeps the enforcement from standing; nothing stays attached then.
pub fn run(options: &RunOptions) -> anyhow::Result<()> {
    // From wherever it is started, and at a reload, the same file is the same policy.
    let policy_path = std::path::absolute(&options.policy)?;
    let text = PolicyText::read(&policy_path)?;
    let (policy, warnings) = text.compile()?;
    let policy = Arc::new(policy);
    for warning in &warnings {
        warn!("{warning}");
    }
    clock::check()?;
    if let Some(shield) = &policy.shield {
        datapath::shield::check_interfaces(shield)?;
    }
    // Before the lock, which a process that outlives us for an instant must not hold, and before any secret.
    keys::fetcher::start()?;
    let mut lock = DaemonLock::acquire(&options.pin_name)?;
    lock.record_policy(&policy_path)?;
    if paths::ensure_bpffs(&options.bpffs)? == paths::Bpffs::Mounted {
        info!(path = %options.bpffs.display(), "mounted a bpffs");
    }
    let cgroup = paths::cgroup(options.cgroup.as_deref())?;
    let pins = paths::pin_dir(&options.bpffs, &options.pin_name);
    let started_ns = now().boot_ns;
    let ours = Ours {
        cgroup_id: std::fs::metadata(&cgroup)?.ino(),
        policy_hash: policy::hash(&policy),
        object_hash: datapath::object_hash(),
    };
    start::settle(&pins)?;
    // Before anything can wait for us. What fails from here on ends like a crash.
    let watcher =
        Watcher::start(&options.bpffs, &options.pin_name, started_ns).context("cannot start the watcher")?;
    let living = Living::look(&pins);
    let former = living.and_then(|_| adopt::former(&options.state, &policy));
    let former_hash = former.as_ref().map(|(_, hash)| *hash);
    let mut start = start::plan(living.as_ref(), &ours, former_hash)?;
    if let Start::Adopt { replace_programs, .. } = &mut start {
        *replace_programs |= options.replace_programs;
        adopt::claim(&pins, started_ns)?;
    }
    if matches!(start, Start::Adopt { replace_programs: false, .. }) {
        info!("this kernel runs these very programs already; no self-test");
    } else {
        // Before any thread exists: the test forks.
        let report = selftest::run(&options.bpffs)
            .context("this kernel does not carry the datapath; not enforcing")?;
        info!(%report, "datapath self-test passed");
    }
    // Every thread has those of the one that starts it.
    privileges::raise_priority();
    privileges::drop_capabilities()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let filled_by = match (start, former) {
        (Start::Adopt { switch_policy: true, .. }, Some((former, _))) => Arc::new(former),
        _ => Arc::clone(&policy),
    };
    let plan = Plan { start, filled_by, policy, text, ours, started_ns, cgroup, pins };
    let result = runtime.block_on(enforce(options, &plan, watcher, &mut lock));
    // What is left may wait for a lock that somebody else has.
    runtime.shutdown_background();
    drop(lock);
    result
}

/// What was found out before the start.
struct Plan {
    start: Start,
    /// The policy that the maps which are adopted were filled by.
    filled_by: Arc<Policy>,
    policy: Arc<Policy>,
    text: PolicyText,
    ours: Ours,
    started_ns: u64,
    cgroup: PathBuf,
    pins: PinDir,
}

impl Plan {
    fn bring_up(&self, keys: &KeyManagerHandle, state_dir: &StateDir) -> anyhow::Result<Up> {
        // Locked until the maps are in their place: what is revoked meanwhile waits, and finds them there.
        let state = State::open(state_dir)?;
        let (pins, ours, started_ns) = (&self.pins, &self.ours, self.started_ns);
        let up = match self.start {
            Start::Adopt { replace_programs, switch_policy } => {
                info!(
                    replace_programs,
                    switch_policy,
                    "adopting what an earlier daemon left; connections, grants and counters go on"
                );
                let mut up = adopt::adopt(&self.filled_by, pins, ours, replace_programs, started_ns, &state)?;
                if switch_policy {
                    let next = (Arc::clone(&self.policy), self.text.clone());
                    adopt::switch(Arc::clone(&self.filled_by), next, keys, state, &mut up)?;
                    return Ok(up);
                }
                up
            }
            Start::TakeOver { reason } => {
                warn!(reason, "taking over from an earlier daemon; its connections are closed");
                setup::load(&self.policy, pins, &self.cgroup, ours, started_ns, &state)?
            }
            Start::Fresh => setup::load(&self.policy, pins, &self.cgroup, ours, started_ns, &state)?,
        };
        state.keep_policy(self.text.clone(), &self.policy);
        Ok(up)
    }

    /// Puts the shield on the policy's interfaces. If that fails, a start that found nothing leaves nothing; what was there goes on guarding.
    fn raise_shield(&self, kernel: &mut Kernel) -> anyhow::Result<()> {
        let shield = self.policy.shield.as_ref();
        let raised = datapath::shield::attach(&self.pins, shield, &mut kernel.maps().live.shield);
        if raised.is_err() && self.start == Start::Fresh {
            unload(&self.pins, &UnloadOptions { drain_timeout: Duration::ZERO, force: true })?;
        }
        Ok(raised?)
    }
}

async fn enforce(
    options: &RunOptions,
    plan: &Plan,
    mut watcher: Watcher,
    lock: &mut DaemonLock,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // What comes from here on is not lost, and does not end a daemon that is still starting.
    let hangup = signal(SignalKind::hangup())?;
    let policy = &plan.policy;
    let keys = KeyManager::start(Arc::clone(policy));
    // Guarded first, then keys: what comes meanwhile waits.
    let Up { mut engine, mut kernel, mut ring, numbers, mut orphans } =
        plan.bring_up(&keys, &options.state)?;
    plan.raise_shield(&mut kernel)?;
    // Before anybody is told that the servers are guarded, and before keys come.
    let (seen, mut seen_later) = mpsc::unbounded_channel();
    let (_lookout, closed) = Lookout::start(&plan.pins, seen)?;
    count_closed(&mut kernel, closed);
    let mut bars = Bars::start(&plan.cgroup, &engine, &mut kernel);
    let since = Instant::now();
    wait_for_keys(&keys, &mut engine, &mut kernel).await?;
    let mut reloads =
        Reloads::listen(options, hangup, InForce { policy: Arc::clone(policy), numbers, keys })?;
    // Programs are loaded and attached, sockets listen: from here on it is maps and files.
    privileges::restrict_daemon()?;
    // Bringing up may have taken longer than a heartbeat may be old.
    kernel.heartbeat(now().boot_ns)?;
    let (answers, mut refreshed) = mpsc::channel(1024);
    // What waited for a daemon is decided before anybody is told that there is one.
    read_all(&mut ring, &mut engine, &mut kernel, reloads.keys());
    ask_for_keys(&mut engine, reloads.keys(), &answers);
    let listeners = policy.servers.iter().map(|server| server.listen.len()).sum::<usize>();
    info!(
        servers = policy.servers.len(),
        listeners,
        mode = ?policy.mode,
        cgroup = %plan.cgroup.display(),
        pins = %plan.pins.path().display(),
        map_memory_bytes = map_memory(&plan.pins).ok().map(|maps| maps.iter().map(|map| map.bytes).sum::<u64>()),
        daemon_memory_max_bytes = MEMORY_MAX_BYTES,
        "ready"
    );
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);

    let drain = async {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    tokio::pin!(drain);
    let mut unloading = None;
    // SAFETY: the ring buffer keeps its descriptor, and is not replaced while it is registered.
    let mut ring = unsafe { AsyncFd::register(ring) }?;
    let orphans_due = tokio::time::sleep(ORPHANS_AFTER.saturating_sub(since.elapsed()));
    tokio::pin!(orphans_due);
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    loop {
        tokio::select! {
            biased;
            reason = &mut drain, if unloading.is_none() => {
                let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
                if options.keep {
                    kernel.destroy_all_due();
                    info!(
                        reason,
                        "stopping; the enforcement stays in the kernel and guards: known requests go on, others wait for the next \
                         daemon, or get 503 when the policy's daemon_timeout is over"
                    );
                    return Ok(());
                }
                warn!(reason, "stopping without --keep: new connections are NOT guarded any more, guarded ones may finish");
                kernel.drain();
                reloads.abandon();
                let (pins, drain_timeout) = (plan.pins.clone(), options.drain_timeout);
                unloading = Some(tokio::task::spawn_blocking(move || {
                    unload(&pins, &UnloadOptions { drain_timeout, force: false })
                }));
            }
            // Before all that clients and issuers can make much of.
            _ = heartbeat.tick() => {
                if let Err(error) = kernel.heartbeat(now().boot_ns) {
                    error!(%error, "cannot write the heartbeat; the kernel will refuse unknown requests");
                }
                watcher.keep_alive();
                engine.tick(now(), &mut kernel);
                kernel.destroy_due();
            }
            searched = kernel.searched() => {
                kernel.take_searched(searched);
                kernel.destroy_due();
            }
            Some(KeyRequest { cookie, epoch, .. }) = refreshed.recv() => {
                engine.keys_refreshed(cookie, epoch, now(), &reloads.keys().snapshot(), &mut kernel);
            }
            Some(seen) = seen_later.recv() => match seen {
                Seen::Closed(count) => count_closed(&mut kernel, count),
                Seen::Detached if unloading.is_none() => anyhow::bail!(
                    "the guarded cgroup {} was removed, so NOTHING IS GUARDED any more; start again when it exists, or guard a cgroup that stays",
                    plan.cgroup.display()
                ),
                Seen::Detached => {}
            },
            () = &mut orphans_due, if !orphans.is_empty() => {
                // Those whose first bytes are in the ring buffer still are no orphans.
                read_all(ring.get_mut(), &mut engine, &mut kernel, reloads.keys());
                ask_for_keys(&mut engine, reloads.keys(), &answers);
                engine.end_orphans(&std::mem::take(&mut orphans), &mut kernel);
            }
            report = async { unloading.as_mut().expect("guarded by the condition").await }, if unloading.is_some() => {
                let report = report??;
                info!(
                    drained = report.flows_drained,
                    destroyed = report.flows_destroyed,
                    "enforcement removed; the servers are NOT guarded any more"
                );
                watcher.dismiss();
                return Ok(());
            }
            event = reloads.next(), if unloading.is_none() => {
                reloads.handle(event, lock, &mut engine, &mut kernel);
                bars.hurry();
            }
            event = bars.next(), if unloading.is_none() => bars.handle(event, &engine, &mut kernel),
            // A busy ring must not keep the heartbeat from being written, nor the destructions that follow from what is in it.
            guard = ring.readable_mut() => {
                let mut guard = guard?;
                let more = read(guard.get_inner_mut(), &mut engine, &mut kernel, reloads.keys());
                if !more {
                    guard.clear_ready();
                }
                ask_for_keys(&mut engine, reloads.keys(), &answers);
                kernel.destroy_due();
            }
            () = std::future::ready(()), if kernel.has_due() => kernel.destroy_due(),
        }
    }
}

/// Counts connections that were closed because they were not guarded.
fn count_closed(kernel: &mut Kernel, count: usize) {
    for _ in 0..count {
        kernel.count("unguarded-connection");
    }
}

/// Gives the issuers' keys a while to come. The kernel must not think meanwhile that nobody is there.
async fn wait_for_keys(
    keys: &KeyManagerHandle,
    engine: &mut Engine,
    kernel: &mut Kernel,
) -> anyhow::Result<()> {
    let initial = keys.wait_initial(KEYS_TIMEOUT);
    tokio::pin!(initial);
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    let complete = loop {
        tokio::select! {
            complete = &mut initial => break complete,
            _ = heartbeat.tick() => {
                kernel.heartbeat(now().boot_ns)?;
                engine.tick(now(), kernel);
                kernel.destroy_due();
            }
            // What the policy does not allow ends now, and not when issuers please to answer.
            searched = kernel.searched() => {
                kernel.take_searched(searched);
                kernel.destroy_due();
            }
            () = std::future::ready(()), if kernel.has_due() => kernel.destroy_due(),
        }
    };
    if !complete {
        for status in keys.status().iter().filter(|status| status.key_count == 0) {
            warn!(issuer = status.name, error = ?status.last_error, "no keys yet; its tokens are refused with 503");
        }
    }
    Ok(())
}

/// Reads what is in the ring buffer; whether there may be more. A record is taken out before anything is done about it: a daemon
/// that dies in between leaves a request that nobody carries on, never one that the next daemon carries a second time.
fn read(
    ring: &mut RingBuf<MapData>,
    engine: &mut Engine,
    kernel: &mut Kernel,
    keys: &KeyManagerHandle,
) -> bool {
    let snapshot = keys.snapshot();
    let mut more = true;
    let mut taken = Vec::new();
    for _ in 0..BATCH {
        let Some(record) = ring.next() else {
            more = false;
            break;
        };
        let Some((header, bytes)) = split(&record) else {
            error!(length = record.len(), "malformed record in the ring buffer");
            continue;
        };
        taken.clear();
        taken.extend_from_slice(bytes);
        drop(record);
        engine.record(&header, &taken, now(), &snapshot, kernel);
    }
    engine.end_batch(kernel);
    more
}

/// Reads on until the ring buffer was empty once; a busy one is left after so many records as it can hold.
fn read_all(ring: &mut RingBuf<MapData>, engine: &mut Engine, kernel: &mut Kernel, keys: &KeyManagerHandle) {
    let most = PUNTS_BYTES as usize / PUNT_SMALL_BYTES / BATCH + 1;
    for _ in 0..most {
        if !read(ring, engine, kernel, keys) {
            break;
        }
    }
}

/// Header and bytes of a record.
fn split(record: &[u8]) -> Option<(PuntHeader, &[u8])> {
    let (header, bytes) = record.split_at_checked(size_of::<PuntHeader>())?;
    // SAFETY: the header is `repr(C)`, integers only, and the slice has its size.
    let header = unsafe { header.as_ptr().cast::<PuntHeader>().read_unaligned() };
    Some((header, bytes.get(..header.len_bytes as usize)?))
}

fn ask_for_keys(engine: &mut Engine, keys: &KeyManagerHandle, answers: &mpsc::Sender<KeyRequest>) {
    for request in engine.take_key_requests() {
        let (keys, answers) = (keys.clone(), answers.clone());
        tokio::spawn(async move {
            keys.refresh_for_unknown_kid(&request.issuer, &request.kid).await;
            let _ = answers.send(request).await;
        });
    }
}
