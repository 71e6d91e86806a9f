//! Limits: what they cost where nobody is over them, how exactly they hold, and whether one source can keep the daemon from another.

use std::fs;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use super::bed::Server;
use super::pinning::{Pinning, Place};
use super::rounds::CONNECTIONS;
use super::stats::median;
use super::{Pair, Plan, Side, interrupt};
use crate::enforcement::{Enforcement, IssuerSpec, PolicySpec, ServerSpec, any_number};
use crate::guard::Cgroup;
use crate::issuer::{Alg, Issuer};
use crate::load::{LoadConfig, LoadReport, Stop, run, typical_request};
use crate::raw::{Connection, RequestBuilder};

const RESOURCES: [&str; 2] = ["https://without.example.com", "https://with.example.com"];
const PATH: &str = "/mcp";
const TIMEOUT: Duration = Duration::from_secs(10);
/// Between two good tokens, so that they stay below the limit themselves.
const GOOD_PAUSE: Duration = Duration::from_millis(2);
/// Connections that flood, and how many heads each has: so many that none is known when it comes again.
const FLOODERS: usize = 4;
const BAD_HEADS: usize = 4000;
/// On each of its connections: the daemon gives 128 answers in a row, and closes with the last.
const ANSWERS: usize = 100;
/// The limit is this part of what 64 connections get through, so that well over ten times as many requests come, also from senders that
/// nobody pins.
const LIMIT_SHARE: f64 = 15.0;
/// The flood's burst is over by then.
const LEAD_IN: Duration = Duration::from_millis(1500);

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Limits {
    /// On one connection: `direct` is the guarded server without limits, `enforced` the one with five buckets.
    pub one_connection: Vec<Pair<LoadReport>>,
    /// The same on 64 connections.
    pub connections_64: Vec<Pair<LoadReport>>,
    /// What a limit lets pass.
    pub accuracy: Accuracy,
    /// Under the usual limit for unknown requests.
    pub flood: Flood,
    /// With no limit to speak of.
    pub flood_unlimited: Flood,
}

/// A load of much more than a limit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Accuracy {
    /// The limit.
    pub limit_per_s: u64,
    /// How many may come at once.
    pub burst: u64,
    /// How long.
    pub elapsed_s: f64,
    /// Requests that came.
    pub offered: u64,
    /// Requests that passed.
    pub admitted: u64,
}

impl Accuracy {
    /// How far what passed is from what the limit says, in percent.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    pub(super) fn off_percent(&self) -> f64 {
        let expected = self.limit_per_s as f64 * self.elapsed_s + self.burst as f64;
        (self.admitted as f64 / expected - 1.0).abs() * 100.0
    }

    /// Requests per second that came, and that passed.
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    pub(super) fn rates(&self) -> (f64, f64) {
        (self.offered as f64 / self.elapsed_s, self.admitted as f64 / self.elapsed_s)
    }
}

/// First-seen good tokens of one source, while another sends bad ones as fast as it can, and while it does not.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Flood {
    /// Microseconds from a request's first byte to the answer's last.
    pub quiet_us: Vec<f64>,
    /// The same in the flood.
    pub flooded_us: Vec<f64>,
    /// Requests of the flood, per second.
    pub flood_per_s: f64,
    /// Signatures of the flood's tokens that the daemon checked, per second.
    pub checks_per_s: f64,
}

struct Scene {
    /// Where the good tokens come from. The flood's sender is in no cgroup that is guarded. (Goes before the one around it.)
    good: Cgroup,
    without: Server,
    with: Server,
    enforcement: Enforcement,
    issuer: Issuer,
}

/// Five buckets that never refuse, places included.
fn five() -> Value {
    let limit = |per| {
        json!({"name": per, "per": per, "servers": "with",
               "rate": "1000000/s", "burst": 1_000_000, "streams": 1_000_000})
    };
    Value::from(["server", "source", "workload", "uid", "principal"].map(limit).to_vec())
}

impl Scene {
    fn start() -> Result<Self> {
        let cgroup = Cgroup::new("bench-limits")?;
        let without = Server::start(&cgroup, "the server without limits")?;
        let with = Server::start(&cgroup, "the server with limits")?;
        let good = cgroup.child("good")?;
        let issuer = Issuer::new("https://es256.example.com", Alg::Es256)?;
        let policy = policy(&issuer, [without.addr, with.addr], &five(), None);
        let enforcement = Enforcement::start_with(cgroup, &policy, &["--drain-timeout", "1", "--no-watch"])?;
        Ok(Self { without, with, enforcement, issuer, good })
    }

    fn switch(&self, limits: &Value, unknown: Option<&Value>) -> Result<()> {
        let policy = policy(&self.issuer, [self.without.addr, self.with.addr], limits, unknown);
        self.enforcement.write_policy(&policy)?;
        self.enforcement.cli_json(&["reload"]).map(drop)
    }

    fn pids(&self) -> [u32; 2] {
        [self.without.process.pid(), self.with.process.pid()]
    }

    fn addr(&self, side: Side) -> SocketAddr {
        match side {
            Side::Direct => self.without.addr,
            Side::Enforced => self.with.addr,
        }
    }

    fn token(&self, subject: &str) -> Result<String> {
        let mint = self.issuer.mint().audiences(&RESOURCES).scope("mcp:tools");
        mint.subject(subject).expires_in(3600).sign()
    }

    fn call(&self, side: Side, token: &str) -> Vec<u8> {
        typical_request(&self.addr(side).to_string(), PATH, Some(token))
    }

    /// A run of known requests, which must all pass.
    fn calls(&self, side: Side, token: &str, connections: usize, stop: Stop) -> Result<LoadReport> {
        interrupt::check()?;
        let mut config = LoadConfig::new(self.addr(side), connections, vec![self.call(side, token)], stop);
        config.watched_pids = self.pids().to_vec();
        let report = run(&config)?;
        interrupt::check()?;
        ensure!(
            report.errors + report.reconnects == 0
                && report.status_counts.keys().all(|status| *status == 200),
            "{side:?}: {report:?}"
        );
        Ok(report)
    }

    fn price(
        &self,
        token: &str,
        connections: usize,
        pairs: usize,
        run_ms: u64,
    ) -> Result<Vec<Pair<LoadReport>>> {
        for side in [Side::Direct, Side::Enforced] {
            self.calls(side, token, 1, Stop::Requests(1))?;
        }
        let stop = Stop::After(Duration::from_millis(run_ms));
        let punts = self.enforcement.counters()?.punts();
        let measured = (0..pairs)
            .map(|number| Pair::measure(number % 2 == 1, |side| self.calls(side, token, connections, stop)))
            .collect::<Result<_>>()?;
        let punts = self.enforcement.counters()?.punts() - punts;
        ensure!(punts == 0, "{punts} requests with a known head went to the daemon");
        Ok(measured)
    }

    fn accuracy(&self, token: &str, capacity_per_s: f64, run_ms: u64) -> Result<Accuracy> {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate of requests")]
        let limit_per_s = (capacity_per_s / LIMIT_SHARE) as u64;
        let burst = limit_per_s / 10;
        self.switch(
            &json!([{"name": "exact", "per": "server", "servers": "with",
                     "rate": format!("{limit_per_s}/s"), "burst": burst}]),
            None,
        )?;
        // Known again, and full again.
        self.calls(Side::Enforced, token, 1, Stop::Requests(1))?;
        thread::sleep(Duration::from_millis(500));
        let requests = vec![self.call(Side::Enforced, token)];
        let stop = Stop::After(Duration::from_millis(run_ms));
        let config = LoadConfig { threads: 2, ..LoadConfig::new(self.with.addr, 16, requests, stop) };
        let report = run(&config)?;
        let of = |status| report.status_counts.get(&status).copied().unwrap_or(0);
        ensure!(of(200) + of(429) == report.requests && report.errors == 0, "{report:?}");
        let (offered, admitted) = (report.requests, of(200));
        Ok(Accuracy { limit_per_s, burst, elapsed_s: report.elapsed_s, offered, admitted })
    }

    /// Two quiet phases and two in the flood, in turn.
    fn flood(&self, phase_ms: u64) -> Result<Flood> {
        let bad: Vec<_> = (0..FLOODERS).map(|number| self.bad(number)).collect::<Result<_>>()?;
        let phase = Duration::from_millis(phase_ms);
        let (mut quiet_us, mut flooded_us) = (Vec::new(), Vec::new());
        let (mut sent, mut checked, mut seconds) = (0, 0, 0.0);
        for round in 0..2 {
            let mut connection = self.good_connection()?;
            let calls = self.good_calls(&format!("quiet-{round}"), phase)?;
            good(&mut connection, &calls, phase, &mut quiet_us)?;
            let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
            let (stop, count) = (&stop, &count);
            thread::scope(|scope| -> Result<()> {
                let flooders: Vec<_> = bad
                    .iter()
                    .map(|heads| scope.spawn(move || self.send_until(stop, count, heads)))
                    .collect();
                let served = (|| {
                    let calls = self.good_calls(&format!("flood-{round}"), phase)?;
                    thread::sleep(LEAD_IN);
                    let before = (self.checks()?, count.load(Ordering::Relaxed), Instant::now());
                    good(&mut connection, &calls, phase, &mut flooded_us)?;
                    checked += self.checks()? - before.0;
                    sent += count.load(Ordering::Relaxed) - before.1;
                    seconds += before.2.elapsed().as_secs_f64();
                    anyhow::Ok(())
                })();
                stop.store(true, Ordering::Relaxed);
                for flooder in flooders {
                    flooder.join().map_err(|_| anyhow!("a flooder panicked"))??;
                }
                served
            })?;
        }
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let per_s = |count: u64| count as f64 / seconds;
        Ok(Flood { quiet_us, flooded_us, flood_per_s: per_s(sent), checks_per_s: per_s(checked) })
    }

    fn checks(&self) -> Result<u64> {
        Ok(self.enforcement.counters()?.daemon("signature-invalid"))
    }

    /// Requests with a bad token that differ in their heads.
    fn bad(&self, flooder: usize) -> Result<Vec<Vec<u8>>> {
        let mint = self.issuer.mint().audiences(&RESOURCES).scope("mcp:tools").expires_in(3600);
        let token = mint.corrupt_signature().sign()?;
        let host = self.with.addr.to_string();
        let head = |number| {
            RequestBuilder::mcp_call(&host, PATH, Some(&token), "echo")
                .header("X-Number", &format!("{flooder}-{number}"))
                .build()
        };
        Ok((0..BAD_HEADS).map(head).collect())
    }

    /// Sends heads in turn, and counts them.
    fn send_until(&self, stop: &AtomicBool, count: &AtomicU64, heads: &[Vec<u8>]) -> Result<()> {
        let mut connection = Connection::open(self.with.addr, TIMEOUT)?;
        for (number, head) in heads.iter().cycle().enumerate() {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            if number % ANSWERS == ANSWERS - 1 {
                connection = Connection::open(self.with.addr, TIMEOUT)?;
            }
            let status = connection.roundtrip(head)?.status;
            ensure!(matches!(status, 401 | 429), "a bad token got {status}");
            count.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Requests with good tokens that nobody has seen, as many as a phase has time for.
    fn good_calls(&self, name: &str, phase: Duration) -> Result<Vec<Vec<u8>>> {
        let count = phase.as_millis() / GOOD_PAUSE.as_millis() + 1;
        (0..count)
            .map(|number| Ok(self.call(Side::Enforced, &self.token(&format!("{name}-{number}"))?)))
            .collect()
    }

    /// From a workload of its own: who calls `connect` counts, and this process is there while it does.
    fn good_connection(&self) -> Result<Connection> {
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).context("in no cgroup")?;
        let back = Cgroup::mount_point()?.join(own).join("cgroup.procs");
        let pid = std::process::id();
        self.good.take(pid)?;
        let connection = Connection::open(self.with.addr, TIMEOUT);
        fs::write(&back, pid.to_string()).with_context(|| format!("cannot go back to {}", back.display()))?;
        connection
    }
}

/// Sends requests one by one, and times them.
fn good(
    connection: &mut Connection,
    calls: &[Vec<u8>],
    phase: Duration,
    latency_us: &mut Vec<f64>,
) -> Result<()> {
    let start = Instant::now();
    for call in calls {
        interrupt::check()?;
        let sent = Instant::now();
        if sent - start >= phase {
            break;
        }
        let status = connection.roundtrip(call)?.status;
        ensure!(status == 200, "a good token of another source got {status}");
        latency_us.push(sent.elapsed().as_secs_f64() * 1e6);
        thread::sleep(GOOD_PAUSE);
    }
    Ok(())
}

fn policy(issuer: &Issuer, addrs: [SocketAddr; 2], limits: &Value, unknown: Option<&Value>) -> PolicySpec {
    let servers =
        ["without", "with"].into_iter().zip(addrs).zip(RESOURCES).map(|((name, addr), resource)| {
            ServerSpec::new(name, &[addr], resource).with("issuers", vec!["es256"])
        });
    let issuers = vec![IssuerSpec::from_file("es256", issuer)];
    let policy = PolicySpec::new(issuers, servers.collect()).with("limits", limits.clone());
    match unknown {
        Some(unknown) => policy.with("unknown_requests", unknown.clone()),
        None => policy,
    }
}

/// Measures on two servers of its own, both guarded by one daemon.
///
/// # Errors
/// When something can't be started, or an answer is not the expected one.
pub fn measure(plan: Plan) -> Result<Limits> {
    let pinning = Pinning::choose()?;
    let mut scene = Scene::start()?;
    let token = scene.token("caller")?;
    pinning.apply(Place::Together, &scene.pids())?;
    let one_connection = scene.price(&token, 1, plan.limit_pairs, plan.run_ms)?;
    pinning.apply(Place::Apart, &scene.pids())?;
    let connections_64 = scene.price(&token, CONNECTIONS, plan.limit_pairs, plan.run_ms)?;
    pinning.apply(Place::Anywhere, &scene.pids())?;
    let capacity_per_s = median(connections_64.iter().map(|pair| pair.enforced.requests_per_s))?;
    let accuracy = scene.accuracy(&token, capacity_per_s, plan.accuracy_ms)?;
    scene.switch(&json!([]), None)?;
    let flood = scene.flood(plan.flood_phase_ms)?;
    scene.switch(&json!([]), Some(&any_number()))?;
    let flood_unlimited = scene.flood(plan.flood_phase_ms)?;
    for server in [&mut scene.without, &mut scene.with] {
        server.process.kill()?;
    }
    let status = scene.enforcement.stop().context("the daemon")?;
    ensure!(status.success(), "the daemon ended with {status}");
    Ok(Limits { one_connection, connections_64, accuracy, flood, flood_unlimited })
}
