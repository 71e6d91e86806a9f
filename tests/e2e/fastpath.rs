//! What the kernel knows, the kernel decides: the second time, ten thousand times, and on every connection.

mod common;

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{
    Counters, Enforcement, Guarded, GuardedBuilder, IssuerSpec, PolicySpec, ServerSpec,
};
use enforcer_tests::guard::{Cgroup, Deadline, Proc, bin_path, spawn_in};
use enforcer_tests::issuer::{Alg, Issuer};
use enforcer_tests::load::{self, LoadConfig, Stop, typical_request};
use enforcer_tests::peers::listening_addr;
use enforcer_tests::raw::{Connection, RequestBuilder};
use ring::digest::{Context as Hash, SHA256};
use serde_json::Value;

use common::{LIMIT, TIMEOUT, assert_refusal};

/// The kernel answers in place of the request, in as many bytes; longer ones go to the daemon.
const REPLY_MAX_BYTES: usize = 4096;

/// Skbs that went to the daemon, for whatever reason.
fn handed_over(counters: &Counters) -> u64 {
    counters.punts() + counters.kernel("punt-continued")
}

#[test]
fn the_second_time_the_kernel_refuses_and_answers_in_http() -> Result<()> {
    let _deadline = Deadline::new("second refusal", LIMIT);
    let guarded = Guarded::builder("second").nonblocking().start()?;
    let wrong = guarded.mint().audience("https://other.example").sign()?;
    let requests = [
        ("no credentials", guarded.call(None), 401),
        ("wrong audience", guarded.call(Some(&wrong)), 401),
        ("two bearers", guarded.call(Some("abc")).bearer("abc"), 400),
        ("foreign origin", guarded.call(Some("abc")).header("Origin", "https://evil.example"), 403),
        ("off the path", RequestBuilder::mcp_call(&guarded.host(), "/admin", None, "echo"), 404),
        ("put", long(RequestBuilder::new("PUT", "/mcp").header("Host", &guarded.host())), 405),
        ("get", long(RequestBuilder::new("GET", "/mcp").header("Host", &guarded.host())), 401),
    ];
    for (what, request, status) in requests {
        let request = long(request).build();
        let first = guarded.connect()?.roundtrip(&request)?;
        assert_refusal(&first, status, first.header("www-authenticate"));
        let before = guarded.enforcement.counters()?;
        let second = guarded.connect_accepted()?.roundtrip(&request)?;
        let after = guarded.enforcement.counters()?;
        assert_refusal(&second, status, first.header("www-authenticate"));
        assert_eq!(second.raw.len(), request.len(), "{what}: in the request's place");
        assert_eq!(after.kernel("refused"), before.kernel("refused") + 1, "{what}");
        assert_eq!(handed_over(&after), handed_over(&before), "{what}");
        let names = |response: &enforcer_tests::raw::Response| -> Vec<String> {
            response.headers.iter().map(|(name, _)| name.clone()).collect()
        };
        assert_eq!(names(&second), names(&first), "{what}");
    }
    assert_eq!(guarded.bytes_read()?, 0);
    Ok(())
}

/// Long enough to be overwritten by any of our refusals; the line is one that decides nothing.
fn long(request: RequestBuilder) -> RequestBuilder {
    request.header("X-Filler", &"x".repeat(400))
}

#[test]
fn the_kernels_refusal_is_sound_http_at_every_request_size() -> Result<()> {
    let _deadline = Deadline::new("refusal sizes", LIMIT);
    let guarded = Guarded::builder("sizes").nonblocking().start()?;
    let host = guarded.host();
    // The digits of Content-Length are left out of the digest, so all sizes are a few known heads.
    let sized = |size: usize| -> Vec<u8> {
        let with = |length: usize| {
            RequestBuilder::new("POST", "/mcp").header("Host", &host).body(&vec![b'x'; length]).build()
        };
        let head = with(0).len();
        let length = size - head;
        // Further digits count for the size, too.
        let digits = length.checked_ilog10().unwrap_or(0) as usize;
        with(length - digits)
    };
    let first = guarded.connect()?.roundtrip(&sized(500))?;
    let challenge = format!("Bearer resource_metadata=\"{}\"", Guarded::METADATA_URL);
    assert_refusal(&first, 401, Some(&challenge));
    guarded.connect()?.roundtrip(&sized(3000))?;
    let mut connection = guarded.connect_accepted()?;
    let before = guarded.enforcement.counters()?;
    // The kernel's form has four digits of Content-Length, where the daemon wrote two.
    let smallest = first.raw.len() + 2;
    let mut count = 0;
    for request in (smallest..=REPLY_MAX_BYTES).map(sized) {
        let size = request.len();
        let response = connection.roundtrip(&request).with_context(|| format!("at {size} bytes"))?;
        assert_refusal(&response, 401, Some(&challenge));
        assert_eq!(response.raw.len(), size);
        count += 1;
    }
    let after = guarded.enforcement.counters()?;
    assert_eq!(after.kernel("refused") - before.kernel("refused"), count);
    assert_eq!(handed_over(&after), handed_over(&before));
    // One byte less does not hold the answer, one more is more than the kernel overwrites: the daemon says it then.
    for size in [smallest - 1, 150, REPLY_MAX_BYTES + 1, 8000] {
        let response = connection.roundtrip(&sized(size)).with_context(|| format!("at {size} bytes"))?;
        assert_refusal(&response, 401, Some(&challenge));
    }
    assert_eq!(guarded.enforcement.counter("refused")?, after.kernel("refused"));
    assert_eq!(guarded.bytes_read()?, 0);
    Ok(())
}

#[test]
fn heads_of_every_size_are_refused_by_the_kernel_when_they_come_again() -> Result<()> {
    let _deadline = Deadline::new("head sizes", LIMIT);
    let guarded = Guarded::builder("heads").nonblocking().start()?;
    let sized = |size: usize| -> Vec<u8> {
        let with = |filler: &str| {
            RequestBuilder::new("GET", "/mcp")
                .header("Host", &guarded.host())
                .header("X-Filler", filler)
                .build()
        };
        with(&"f".repeat(size - with("").len()))
    };
    for size in
        (300..=REPLY_MAX_BYTES).step_by(73).chain(4024..4096).chain([REPLY_MAX_BYTES - 1, REPLY_MAX_BYTES])
    {
        let request = sized(size);
        assert_refusal_again(&guarded, &request).with_context(|| format!("at {size} bytes"))?;
    }
    assert_eq!(guarded.bytes_read()?, 0);
    Ok(())
}

/// The daemon refuses it, then the kernel.
fn assert_refusal_again(guarded: &Guarded, request: &[u8]) -> Result<()> {
    let mut connection = guarded.connect_accepted()?;
    let first = connection.roundtrip(request)?;
    // A connection of its own: on the first the daemon may still be about to hand the flow back.
    let second = guarded.connect_accepted()?.roundtrip(request)?;
    ensure!(
        second.raw.len() == request.len(),
        "{} bytes came back {:?}",
        second.raw.len(),
        guarded.enforcement.counters()?
    );
    assert_refusal(&second, first.status, first.header("www-authenticate"));
    Ok(())
}

#[test]
fn a_refused_body_of_any_length_is_dropped_and_the_connection_goes_on() -> Result<()> {
    refused_bodies(Guarded::builder("bodies").nonblocking())
}

#[test]
fn a_blocking_server_never_notices_what_is_refused() -> Result<()> {
    refused_bodies(Guarded::builder("blocking"))
}

fn refused_bodies(builder: GuardedBuilder) -> Result<()> {
    let _deadline = Deadline::new("refused bodies", LIMIT);
    let guarded = builder.start()?;
    let token = guarded.token()?;
    let good = guarded.call(Some(&token)).build();
    let mut connection = guarded.connect()?;
    let mut sent = Vec::new();
    for length in [0, 1, 500, 3000, 10_000, 100_000, 1 << 20, 0, 7] {
        let refused = RequestBuilder::new("POST", "/mcp").header("Host", &guarded.host());
        let refused = long(refused).body(&vec![b'x'; length]);
        for _ in 0..2 {
            let response =
                connection.roundtrip(&refused.build()).with_context(|| format!("{length} bytes"))?;
            assert_eq!(response.status, 401);
            let after = connection.roundtrip(&good);
            let after = after.with_context(|| {
                format!("after a refused body of {length} bytes: {:?}", guarded.enforcement.counters())
            })?;
            assert_eq!(after.status, 200, "after a refused body of {length} bytes");
            sent.extend_from_slice(&good);
        }
    }
    assert_eq!(guarded.read_by_server(connection.local_addr()?)?, sent);
    Ok(())
}

#[test]
fn thousands_of_requests_on_one_connection_arrive_as_they_were_sent() -> Result<()> {
    let _deadline = Deadline::new("keep-alive", LIMIT);
    let guarded = Guarded::start("keepalive")?;
    let token = guarded.token()?;
    let call = |body: &[u8]| {
        RequestBuilder::new("POST", "/mcp").header("Host", &guarded.host()).bearer(&token).body(body).build()
    };
    // The digits of Content-Length are left out of the digest, but not how many there are.
    for body in [1, 10, 100] {
        ensure!(guarded.connect()?.roundtrip(&call(&vec![b'x'; body]))?.status == 200);
    }
    let before = guarded.enforcement.counters()?;
    let mut connection = guarded.connect()?;
    let mut hash = Hash::new(&SHA256);
    for number in 0..5000_usize {
        let body = number.to_string().repeat(number % 97);
        let request = call(body.as_bytes());
        let response = connection.roundtrip(&request).with_context(|| format!("request {number}"))?;
        assert_eq!(response.status, 200, "request {number}");
        hash.update(&request);
    }
    let want: String = hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let record = guarded.recorder.connection(connection.local_addr()?)?.context("no record")?;
    assert_eq!((record.requests.len(), record.sha256), (5000, want));
    let after = guarded.enforcement.counters()?;
    assert_eq!(after.kernel("allowed") - before.kernel("allowed"), 5000, "{after:?}");
    assert_eq!(handed_over(&after), handed_over(&before));
    Ok(())
}

/// The benchmark's server in a guarded cgroup.
struct Bench {
    _server: Proc,
    addr: SocketAddr,
    issuer: Issuer,
    enforcement: Enforcement,
}

impl Bench {
    fn start(name: &str) -> Result<Self> {
        let cgroup = Cgroup::new(name)?;
        let mut command = Command::new(bin_path("enforcer-upstream")?);
        command.args(["bench", "--listen", "127.0.0.1:0"]);
        let mut server = spawn_in(&cgroup, "bench server", command)?;
        let addr = listening_addr(&mut server, TIMEOUT)?;
        let issuer = Issuer::new("https://login.example.com/tools", Alg::Es256)?;
        let policy = PolicySpec::new(
            vec![IssuerSpec::from_file("corp", &issuer)],
            vec![ServerSpec::new("tools", &[addr], Guarded::RESOURCE)],
        );
        let enforcement = Enforcement::start(cgroup, &policy)?;
        Ok(Self { _server: server, addr, issuer, enforcement })
    }

    fn request(&self, token: &str) -> Vec<u8> {
        typical_request(&self.addr.to_string(), "/mcp", Some(token))
    }

    fn token(&self, subject: &str) -> Result<String> {
        self.issuer.mint().audience(Guarded::RESOURCE).subject(subject).sign()
    }
}

#[test]
fn a_hundred_thousand_known_requests_wake_nobody_in_userspace() -> Result<()> {
    let _deadline = Deadline::new("known heads", LIMIT);
    let mut bench = Bench::start("known")?;
    let refused = typical_request(&bench.addr.to_string(), "/mcp", None);
    let mut requests = vec![refused];
    for number in 0..9 {
        requests.push(bench.request(&bench.token(&format!("user-{number}"))?));
    }
    for request in &requests {
        Connection::open(bench.addr, TIMEOUT)?.roundtrip(request)?;
    }
    let before = bench.enforcement.counters()?;
    assert_eq!(before.punts(), requests.len() as u64, "one for each distinct head");
    let cpu_before = bench.enforcement.daemon()?.cpu_time()?;
    let report = load::run(&LoadConfig::new(bench.addr, 10, requests, Stop::Requests(100_000)))?;
    let cpu = bench.enforcement.daemon()?.cpu_time()? - cpu_before;
    let after = bench.enforcement.counters()?;
    assert_eq!((report.requests, report.errors, report.reconnects), (100_000, 0, 0), "{report:?}, {after:?}");
    let statuses: Vec<u16> = report.status_counts.keys().copied().collect();
    assert_eq!(statuses, [200, 401], "{:?}", report.status_counts);
    let refused = after.kernel("refused") - before.kernel("refused");
    let allowed = after.kernel("allowed") - before.kernel("allowed");
    assert_eq!(handed_over(&after), handed_over(&before), "known heads went to the daemon: {after:?}");
    // When the last answer is counted, each connection has another request in flight.
    assert!((100_000..=100_010).contains(&(refused + allowed)), "{refused} refused, {allowed} allowed");
    assert!(refused >= report.status_counts.get(&401).copied().unwrap_or(u64::MAX));
    // Its heartbeat goes on: twice a second, some microseconds each. A tick is 10 ms.
    assert!(cpu <= Duration::from_millis(50), "the daemon used {cpu:?} of CPU time");
    Ok(())
}

#[test]
fn a_thousand_tokens_are_each_judged_once() -> Result<()> {
    let _deadline = Deadline::new("1,000 tokens", LIMIT);
    let bench = Bench::start("thousand")?;
    let tokens =
        (0..1000).map(|number| bench.token(&format!("user-{number}"))).collect::<Result<Vec<_>>>()?;
    let requests: Vec<Vec<u8>> = tokens.iter().map(|token| bench.request(token)).collect();
    let mut connection = Connection::open(bench.addr, TIMEOUT)?;
    for request in &requests {
        assert_eq!(connection.roundtrip(request)?.status, 200);
    }
    assert_eq!(bench.enforcement.reason("allowed")?, 1000);
    let before = bench.enforcement.counters()?;
    for request in &requests {
        assert_eq!(Connection::open(bench.addr, TIMEOUT)?.roundtrip(request)?.status, 200);
    }
    let after = bench.enforcement.counters()?;
    assert_eq!(after.kernel("allowed") - before.kernel("allowed"), 1000);
    assert_eq!(handed_over(&after), handed_over(&before));
    let grants = bench.enforcement.cli_json(&["grants"])?;
    let grants = rows(&grants);
    assert_eq!(grants.len(), 1000);
    let subjects: std::collections::BTreeSet<_> =
        grants.iter().filter_map(|grant| grant.get("subject")?.as_str()).collect();
    assert_eq!(subjects.len(), 1000);
    let log = bench.enforcement.log()?;
    assert!(tokens.iter().all(|token| !log.contains(token.as_str())), "a token is in the log");
    Ok(())
}

/// The rows of a table in JSON: an array, or the only array in an object.
fn rows(value: &Value) -> &[Value] {
    let array = match value {
        Value::Object(fields) => fields.values().find_map(Value::as_array),
        other => other.as_array(),
    };
    array.map(Vec::as_slice).unwrap_or_default()
}
