//! Switching to another policy: what asks for it, its preparation beside the daemon's other work, and what is told about it.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::signal::unix::Signal;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use super::apply::{InForce, Prepared, switch};
use super::control::{Control, Order};
use super::kernel::Kernel;
use super::revocations::State;
use super::{RunOptions, now, watch};
use crate::control::{Report, Request, Response};
use crate::core::{Claims, Consequences, Endpoints, Engine, Judged, Next, Transition};
use crate::datapath::{PinDir, shield};
use crate::keys::KeyManagerHandle;
use crate::lifecycle::lock::{DaemonLock, ReloadRecord};
use crate::lifecycle::paths;
use crate::policy::{self, Policy, PolicyDiff, PolicyErrors, PolicyText, Warning};
use crate::revocation::store::{StateDir, StateError};

/// How long a new policy waits for the keys of its issuers. Then it is in force all the same, as at the start.
const KEYS_TIMEOUT: Duration = Duration::from_secs(5);
/// Questions that wait for their turn.
const MAX_WAITING: usize = 16;

/// Why there is no other policy.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReloadError {
    #[error(transparent)]
    Rejected(#[from] PolicyErrors),
    #[error("{0:#}")]
    Failed(#[from] anyhow::Error),
}

/// Another policy, if it is another one.
type Outcome = Result<Option<Box<Prepared>>, ReloadError>;

/// Something to be prepared.
enum Job {
    /// The policy file is read again.
    Reload { triggers: Vec<&'static str>, answers: Vec<oneshot::Sender<Response>> },
    /// A policy is compared.
    Diff { policy: PolicyText, answer: oneshot::Sender<Response> },
}

/// What happened.
pub(super) enum Event {
    /// The file is to be read again.
    Asked(&'static str),
    /// Somebody asks at the control socket.
    Order(Order),
    /// A policy is prepared, or there is no other one.
    Prepared(Outcome),
}

/// Policy changes of a running daemon.
pub(super) struct Reloads {
    path: PathBuf,
    revocations: StateDir,
    hangup: Signal,
    watched: Option<mpsc::Receiver<()>>,
    orders: mpsc::Receiver<Order>,
    running: Option<(Job, JoinHandle<Outcome>)>,
    waiting: VecDeque<Job>,
    in_force: InForce,
    pins: PinDir,
    _control: Control,
}

impl Reloads {
    /// Listens for everything that may ask.
    pub(super) fn listen(options: &RunOptions, hangup: Signal, in_force: InForce) -> anyhow::Result<Self> {
        let path = std::path::absolute(&options.policy)?;
        let (control, orders) = Control::listen(&options.pin_name)?;
        let watched = if options.watch {
            Some(watch::start(path.clone()).context("cannot watch the policy file (see --no-watch)")?)
        } else {
            None
        };
        Ok(Self {
            path,
            revocations: options.state.clone(),
            hangup,
            watched,
            orders,
            running: None,
            waiting: VecDeque::new(),
            in_force,
            pins: paths::pin_dir(&options.bpffs, &options.pin_name),
            _control: control,
        })
    }

    /// The keys in force.
    pub(super) fn keys(&self) -> &KeyManagerHandle {
        &self.in_force.keys
    }

    /// Waits for the next event. Nothing is lost if it is dropped.
    pub(super) async fn next(&mut self) -> Event {
        let watched = async {
            match &mut self.watched {
                Some(watched) => watched.recv().await,
                None => std::future::pending().await,
            }
        };
        let prepared = async {
            match &mut self.running {
                Some((_, task)) => task.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            result = prepared => Event::Prepared(result.unwrap_or_else(|error| {
                Err(ReloadError::Failed(anyhow::Error::from(error).context("preparing the policy failed")))
            })),
            Some(()) = self.hangup.recv() => Event::Asked("SIGHUP"),
            Some(()) = watched => Event::Asked("file changed"),
            Some(order) = self.orders.recv() => Event::Order(order),
            else => std::future::pending().await,
        }
    }

    /// Does what is to be done about an event.
    pub(super) fn handle(
        &mut self,
        event: Event,
        lock: &mut DaemonLock,
        engine: &mut Engine,
        kernel: &mut Kernel,
    ) {
        match event {
            Event::Asked(trigger) => self.reload(trigger, None),
            Event::Order(Order { request: Request::Reload, answer }) => {
                self.reload("enforcer reload", Some(answer));
            }
            Event::Order(Order { request: Request::Diff { file, text }, answer }) => {
                self.queue(Job::Diff { policy: PolicyText { file, text }, answer });
            }
            Event::Prepared(result) => {
                if let Some((job, _)) = self.running.take() {
                    self.finish(job, result, lock, engine, kernel);
                }
            }
        }
        if self.running.is_none()
            && let Some(job) = self.waiting.pop_front()
        {
            self.start(job, engine);
        }
    }

    /// All that ask while none runs yet get the same answer. One that runs may have read the file already.
    fn reload(&mut self, trigger: &'static str, answer: Option<oneshot::Sender<Response>>) {
        let waiting = self.waiting.iter_mut().find_map(|job| match job {
            Job::Reload { triggers, answers } => Some((triggers, answers)),
            Job::Diff { .. } => None,
        });
        match waiting {
            Some((triggers, answers)) => {
                if !triggers.contains(&trigger) {
                    triggers.push(trigger);
                }
                answers.extend(answer);
            }
            None => {
                self.queue(Job::Reload { triggers: vec![trigger], answers: answer.into_iter().collect() });
            }
        }
    }

    fn queue(&mut self, job: Job) {
        match job {
            Job::Diff { answer, .. } if self.waiting.len() >= MAX_WAITING => {
                let _ = answer.send(Response::Failed { error: "too many questions are waiting".to_owned() });
            }
            // A reload waits at most once, so it always finds its place.
            job => self.waiting.push_back(job),
        }
    }

    fn start(&mut self, job: Job, engine: &Engine) {
        let source = match &job {
            Job::Reload { .. } => {
                Source::File { path: self.path.clone(), revocations: self.revocations.clone() }
            }
            Job::Diff { policy, .. } => Source::Text(policy.clone()),
        };
        let old = Old {
            policy: Arc::clone(&self.in_force.policy),
            numbers: self.in_force.numbers.clone(),
            endpoints: engine.endpoints().clone(),
            keys: self.in_force.keys.clone(),
            claims: engine.claims(),
        };
        self.running = Some((job, tokio::spawn(prepare(source, old))));
    }

    fn finish(
        &mut self,
        job: Job,
        result: Outcome,
        lock: &mut DaemonLock,
        engine: &mut Engine,
        kernel: &mut Kernel,
    ) {
        match job {
            Job::Diff { answer, .. } => {
                let _ =
                    answer.send(response(result.and_then(|prepared| self.compare(prepared, engine, kernel))));
            }
            Job::Reload { triggers, answers } => {
                let trigger = triggers.join(", ");
                let result = result.and_then(|prepared| self.take(prepared, engine, kernel));
                tell(&trigger, &result);
                let now = now();
                let record = ReloadRecord {
                    at_boot_ns: now.boot_ns,
                    at_unix_s: now.unix_secs,
                    trigger,
                    error: result.as_ref().err().map(ToString::to_string),
                };
                if let Err(error) = lock.record_reload(record) {
                    warn!(%error, "`enforcer status` will not show this");
                }
                let response = response(result);
                for answer in answers {
                    let _ = answer.send(response.clone());
                }
            }
        }
    }

    /// No other policy from here on: what is being prepared comes to nothing and lets go of its lock, and who waits is told.
    pub(super) fn abandon(&mut self) {
        if let Some((_, task)) = self.running.take() {
            task.abort();
        }
        self.waiting.clear();
        self.orders.close();
        while self.orders.try_recv().is_ok() {}
    }

    /// The new policy takes the old one's place.
    fn take(
        &mut self,
        prepared: Option<Box<Prepared>>,
        engine: &mut Engine,
        kernel: &mut Kernel,
    ) -> Result<Report, ReloadError> {
        let Some(prepared) = prepared else { return Ok(unchanged(engine)) };
        let (diff, warnings) = (prepared.diff.clone(), prepared.warnings.clone());
        let consequences = switch(*prepared, &mut self.in_force, now(), engine, kernel)?;
        let shield = self.in_force.policy.shield.as_ref();
        shield::detach_others(&self.pins, shield, &mut kernel.maps().live.shield);
        Ok(report(engine, diff, warnings, consequences))
    }

    fn compare(
        &mut self,
        prepared: Option<Box<Prepared>>,
        engine: &mut Engine,
        kernel: &mut Kernel,
    ) -> Result<Report, ReloadError> {
        let Some(prepared) = prepared else { return Ok(unchanged(engine)) };
        let keys = prepared.in_force.keys.snapshot();
        let consequences = engine
            .consequences(&prepared.next, &keys, now(), kernel)
            .map_err(|error| ReloadError::Failed(error.into()))?;
        Ok(report(engine, prepared.diff, prepared.warnings, consequences))
    }
}

fn unchanged(engine: &Engine) -> Report {
    Report { generation: engine.generation(), ..Report::default() }
}

pub(super) fn report(
    engine: &Engine,
    diff: PolicyDiff,
    warnings: Vec<String>,
    consequences: Consequences,
) -> Report {
    let Consequences { grants, flows, losses } = consequences;
    Report { changed: true, generation: engine.generation(), warnings, diff, grants, flows, losses }
}

fn response(result: Result<Report, ReloadError>) -> Response {
    match result {
        Ok(report) => Response::Done(Box::new(report)),
        Err(ReloadError::Rejected(errors)) => Response::Rejected { error: errors.to_string() },
        Err(ReloadError::Failed(error)) => Response::Failed { error: format!("{error:#}") },
    }
}

/// Says in the log what became of a reload.
pub(super) fn tell(trigger: &str, result: &Result<Report, ReloadError>) {
    match result {
        Err(ReloadError::Rejected(errors)) => {
            for defect in &errors.errors {
                error!(
                    trigger,
                    file = &*defect.file,
                    line = defect.line,
                    column = defect.column,
                    field = defect.field,
                    defect = %defect.defect,
                    "policy not taken; the old one stays in force"
                );
            }
        }
        Err(ReloadError::Failed(error)) => {
            error!(trigger, error = format!("{error:#}"), "policy not taken; the old one stays in force");
        }
        Ok(report) if !report.changed => info!(trigger, "the policy has not changed"),
        Ok(report) => {
            for warning in &report.warnings {
                warn!("{warning}");
            }
            info!(
                trigger,
                generation = report.generation,
                settings = json(&report.diff.settings),
                issuers = json(&report.diff.issuers),
                servers = json(&report.diff.servers),
                lost = json(&report.losses),
                "policy changed"
            );
        }
    }
}

/// A value as JSON, for a field of a log line.
fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// Where a policy comes from.
enum Source {
    /// To switch to it.
    File { path: PathBuf, revocations: StateDir },
    /// To compare it.
    Text(PolicyText),
}

/// What is in force while another policy is prepared. Only one is at a time, so it still is when that is done.
pub(super) struct Old {
    pub(super) policy: Arc<Policy>,
    pub(super) numbers: crate::core::Numbers,
    pub(super) endpoints: Endpoints,
    pub(super) keys: KeyManagerHandle,
    pub(super) claims: Vec<Claims>,
}

/// Reads, parses, compiles and compares a policy, has its keys fetched and the grants judged. `None`: it is the old one.
async fn prepare(source: Source, old: Old) -> Outcome {
    let failed = |error: tokio::task::JoinError| ReloadError::Failed(error.into());
    let read = tokio::task::spawn_blocking(move || {
        let (text, revocations) = match source {
            Source::File { path, revocations } => (PolicyText::read(&path)?, Some(revocations)),
            Source::Text(text) => (text, None),
        };
        // Who asks for a comparison has looked whether the files that it names are there.
        let compiled = match &revocations {
            Some(_) => text.compile()?,
            None => policy::parse(&text.file, &text.text)?,
        };
        Ok::<_, PolicyErrors>((text, compiled, revocations))
    });
    let (text, (policy, warnings), revocations) = read.await.map_err(failed)??;
    if policy == *old.policy {
        return Ok(None);
    }
    if revocations.is_some() {
        can_shield(&old.policy, &policy)?;
    }
    let keys = old.keys.following(&policy);
    let missing = if keys.wait_initial(KEYS_TIMEOUT).await { Vec::new() } else { without_keys(&keys) };
    let prepared = tokio::task::spawn_blocking(move || {
        let prepared = build((Arc::new(policy), text), &warnings, missing, keys, old)?;
        // Last, and not in the event loop: it may be somebody else's for a moment.
        let revocations = revocations.map(|revocations| {
            let state = State::open(&revocations)?;
            let recorded = state.read()?;
            Ok((state, recorded))
        });
        let revocations =
            revocations.transpose().map_err(|error: StateError| ReloadError::Failed(error.into()))?;
        Ok::<_, ReloadError>(Prepared { revocations, ..prepared })
    });
    Ok(Some(Box::new(prepared.await.map_err(failed)??)))
}

fn without_keys(keys: &KeyManagerHandle) -> Vec<String> {
    let missing = keys.status().into_iter().filter(|status| status.key_count == 0);
    missing
        .map(|status| {
            let why = status.last_error.map_or_else(|| "no answer yet".to_owned(), |(error, _)| error);
            format!("issuer \"{}\" has no keys yet, its tokens are refused with 503: {why}", status.name)
        })
        .collect()
}

/// Programs are attached by a daemon that starts; one that runs has given that up (`privileges/`).
fn can_shield(old: &Policy, new: &Policy) -> anyhow::Result<()> {
    let Some(new) = &new.shield else { return Ok(()) };
    let before = old.shield.as_ref().filter(|old| old.attach == new.attach);
    let interfaces = before.map(|old| old.interfaces.as_slice()).unwrap_or_default();
    let added: Vec<_> = new.interfaces.iter().filter(|name| !interfaces.contains(*name)).cloned().collect();
    ensure!(
        added.is_empty(),
        "a running daemon attaches no programs, and `shield` names interfaces anew or attaches in another way ({}): start the daemon again with          this policy (SIGTERM with --keep, then `enforcer run`); connections go on",
        added.join(", ")
    );
    Ok(())
}

/// Compares the policies, and judges the grants whose claims are known.
pub(super) fn build(
    (policy, text): (Arc<Policy>, PolicyText),
    warnings: &[Warning],
    missing: Vec<String>,
    keys: KeyManagerHandle,
    old: Old,
) -> Result<Prepared, ReloadError> {
    let diff = PolicyDiff::between(&old.policy, &policy);
    let numbers = old.numbers.next(&policy).map_err(|error| ReloadError::Failed(error.into()))?;
    let endpoints = Endpoints::of(&policy, &numbers);
    let transition = Transition::new(old.endpoints, (endpoints, policy.mode));
    let mut next = Next { transition, judged: Judged::new() };
    next.judge(&old.claims, &keys.snapshot(), now().unix_secs);
    let warnings = warnings.iter().map(ToString::to_string).chain(missing).collect();
    let in_force = InForce { policy, numbers, keys };
    Ok(Prepared { in_force, text, next, diff, warnings, revocations: None })
}
