//! Each request is judged by its own token: on shared connections, over time, and as keys change.

mod common;

use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use enforcer_tests::enforcement::{Enforcement, Guarded, IssuerSpec, PolicySpec, ServerSpec};
use enforcer_tests::guard::{Cgroup, Deadline, wait_until};
use enforcer_tests::issuer::{Alg, FailMode, Issuer, IssuerServer};
use enforcer_tests::raw::{Connection, RequestBuilder, Response};
use enforcer_tests::recorder::{Config, RemoteRecorder};

use common::{LIMIT, TIMEOUT, refused_unread};

#[test]
fn two_tokens_on_one_connection_are_judged_each_on_its_own() -> Result<()> {
    let _deadline = Deadline::new("two tokens", LIMIT);
    let guarded = Guarded::start("two")?;
    let alice = guarded.mint().subject("alice").sign()?;
    let bob = guarded.mint().subject("bob").sign()?;
    let bad = guarded.mint().audience("https://other.example").sign()?;
    // (token, is it good), in every order and repeated, so that each is met by the daemon and by the kernel.
    let (a, b, x, none) = ((Some(&alice), true), (Some(&bob), true), (Some(&bad), false), (None, false));
    for order in
        [vec![a, x, a, x, a], vec![x, a, x, a, x], vec![a, b, a, b, b, a], vec![none, a, none, b, x, none, a]]
    {
        let mut connection = guarded.connect()?;
        let mut passed = Vec::new();
        for (number, (token, good)) in order.iter().enumerate() {
            let request = guarded.call(token.map(String::as_str)).build();
            let response = connection.roundtrip(&request)?;
            assert_eq!(response.status, if *good { 200 } else { 401 }, "request {number}");
            if *good {
                passed.extend_from_slice(&request);
            }
        }
        assert_eq!(guarded.read_by_server(connection.local_addr()?)?, passed);
    }
    Ok(())
}

#[test]
fn bytes_of_a_good_head_do_not_vouch_for_any_other() -> Result<()> {
    let _deadline = Deadline::new("one bit", LIMIT);
    let guarded = Guarded::start("onebit")?;
    let token = guarded.token()?;
    let head = guarded.call(Some(&token)).build();
    let mut connection = guarded.connect()?;
    for _ in 0..2 {
        assert_eq!(connection.roundtrip(&head)?.status, 200);
    }
    let read = guarded.bytes_read()?;
    // The known head with one letter of its token changed, at every place.
    let start = head.windows(7).position(|window| window == b"Bearer ").unwrap_or_default() + 7;
    let mut wrong = 0;
    for at in (start..start + token.len()).step_by(3) {
        let mut changed = head.clone();
        let Some(byte) = changed.get_mut(at) else { continue };
        *byte = if *byte == b'A' { b'B' } else { b'A' };
        let status = guarded.connect()?.roundtrip(&changed)?.status;
        assert_eq!(status, 401, "byte {at}");
        wrong += 1;
    }
    ensure!(wrong > 100, "only {wrong} variants");
    assert_eq!(guarded.bytes_read()?, read);
    // Neither do the token's bytes in another head.
    let elsewhere = RequestBuilder::mcp_call(&guarded.host(), "/admin", Some(&token), "echo").build();
    assert_eq!(guarded.connect()?.roundtrip(&elsewhere)?.status, 404);
    assert_eq!(guarded.bytes_read()?, read);
    Ok(())
}

#[test]
fn a_token_that_expires_is_refused_and_its_connection_ends() -> Result<()> {
    let _deadline = Deadline::new("expiry", LIMIT);
    let guarded = Guarded::builder("expiry").issuer("leeway", "0s").start()?;
    let token = guarded.mint().expires_in(4).sign()?;
    let other = guarded.token()?;
    let request = guarded.call(Some(&token)).build();
    let mut connection = guarded.connect()?;
    let local = connection.local_addr()?;
    let (mut passed, mut refused) = (0, 0);
    // Until the second in which it expires, and not after it. Then the connection goes, which might still carry an answer.
    while let Ok(response) = connection.roundtrip(&request) {
        if response.status == 200 {
            passed += 1;
            ensure!(refused == 0, "passed after it was refused");
        } else {
            assert_expired(&response);
            refused += 1;
        }
        ensure!(passed + refused < 1000, "a connection of a token of four seconds goes on");
        thread::sleep(Duration::from_millis(50));
    }
    assert!(passed > 3, "it was good for {passed} requests only");
    let mut connection = guarded.connect()?;
    for _ in 0..3 {
        assert_expired(&connection.roundtrip(&request)?);
    }
    // The grant's own deadline did it: the kernel no longer passed what it knew.
    let counters = guarded.enforcement.counters()?;
    let stale = counters.kernel("punt-stale-grant") + counters.kernel("punt-stale-verdict");
    assert!(stale >= 1, "{counters:?}");
    // A connection on which nothing passed by it is as good as ever.
    assert_eq!(connection.roundtrip(&guarded.call(Some(&other)).build())?.status, 200);
    assert_eq!(guarded.read_by_server(local)?, request.repeat(passed));
    Ok(())
}

fn assert_expired(response: &Response) {
    assert_eq!(response.status, 401);
    assert!(response.header("www-authenticate").is_some_and(|value| value.contains("invalid_token")));
}

#[test]
fn leeway_is_granted_in_the_kernel_too() -> Result<()> {
    let _deadline = Deadline::new("leeway", LIMIT);
    let guarded = Guarded::builder("leeway").issuer("leeway", "60s").start()?;
    let token = guarded.mint().issued_in(-100).expires_in(-5).sign()?;
    let request = guarded.call(Some(&token)).build();
    for _ in 0..3 {
        assert_eq!(guarded.connect()?.roundtrip(&request)?.status, 200);
    }
    let late = guarded.mint().issued_in(-200).expires_in(-61).sign()?;
    assert_eq!(guarded.connect()?.roundtrip(&guarded.call(Some(&late)).build())?.status, 401);
    assert_eq!(guarded.enforcement.counter("allowed")?, 2);
    Ok(())
}

/// A server whose issuer's keys come over loopback http.
struct Served {
    recorder: RemoteRecorder,
    enforcement: Enforcement,
    issuer: Issuer,
    keys: IssuerServer,
}

impl Served {
    fn start(name: &str) -> Result<Self> {
        let (issuer, keys) = Issuer::served("/realm", Alg::Es256)?;
        let cgroup = Cgroup::new(name)?;
        let listen = (Ipv4Addr::LOCALHOST, 0).into();
        let recorder = RemoteRecorder::spawn(listen, &Config::default(), Some(&cgroup), None)?;
        let policy = PolicySpec::new(
            vec![IssuerSpec::from_url("corp", &issuer, &keys.jwks_url())],
            vec![ServerSpec::new("tools", &[recorder.addr()], Guarded::RESOURCE)],
        );
        let enforcement = Enforcement::start(cgroup, &policy)?;
        Ok(Self { recorder, enforcement, issuer, keys })
    }

    fn call(&self, token: &str) -> Vec<u8> {
        RequestBuilder::mcp_call(&self.recorder.addr().to_string(), "/mcp", Some(token), "echo").build()
    }

    fn token(&self) -> Result<String> {
        self.issuer.mint().audience(Guarded::RESOURCE).sign()
    }

    fn connect(&self) -> Result<Connection> {
        Connection::open(self.recorder.addr(), TIMEOUT)
    }

    /// Lets the pause pass that follows every fetch: no client can make us fetch more often.
    fn let_refetch_be_due() {
        thread::sleep(Duration::from_secs(11));
    }

    fn fetches(&self) -> u64 {
        self.keys.hits("/realm/jwks.json")
    }
}

#[test]
fn a_rotated_key_is_fetched_once_and_the_token_passes() -> Result<()> {
    let _deadline = Deadline::new("rotation", LIMIT);
    let served = Served::start("rotation")?;
    let mut connection = served.connect()?;
    assert_eq!(connection.roundtrip(&served.call(&served.token()?))?.status, 200);
    let fetches = served.fetches();
    Served::let_refetch_be_due();
    served.issuer.rotate(true)?;
    let (first, second) = (served.token()?, served.token()?);
    assert_eq!(connection.roundtrip(&served.call(&first))?.status, 200);
    assert_eq!(connection.roundtrip(&served.call(&second))?.status, 200);
    assert_eq!(served.fetches(), fetches + 1);
    assert_eq!(served.enforcement.counters()?.dead(), 0);
    Ok(())
}

#[test]
fn invented_key_ids_are_refused_and_do_not_make_us_fetch_for_each() -> Result<()> {
    let _deadline = Deadline::new("invented key ids", LIMIT);
    let served = Served::start("kids")?;
    let fetches = served.fetches();
    let mut connection = served.connect()?;
    for number in 0..40 {
        let token = served.issuer.mint().audience(Guarded::RESOURCE).kid(&format!("kid-{number}")).sign()?;
        assert_eq!(connection.roundtrip(&served.call(&token))?.status, 401, "kid-{number}");
    }
    assert!(served.fetches() <= fetches + 2, "{} fetches", served.fetches() - fetches);
    let good = served.call(&served.token()?);
    assert_eq!(connection.roundtrip(&good)?.status, 200);
    let read = served.recorder.connection(connection.local_addr()?)?.map(|record| record.kept);
    assert_eq!(read, Some(good));
    Ok(())
}

#[test]
fn an_issuer_that_hangs_holds_up_nobody_elses_requests() -> Result<()> {
    let _deadline = Deadline::new("hanging issuer", LIMIT);
    let served = Served::start("hang")?;
    let known = served.call(&served.token()?);
    assert_eq!(served.connect()?.roundtrip(&known)?.status, 200);
    let fresh = served.call(&served.token()?);
    Served::let_refetch_be_due();
    served.keys.set_fail_mode(FailMode::Hang);
    served.issuer.rotate(true)?;
    let mut waiting = served.connect()?;
    waiting.send(&served.call(&served.token()?))?;
    // With keys that are at hand, known heads and unknown ones are judged meanwhile.
    for request in [&known, &fresh, &known] {
        assert_eq!(served.connect()?.roundtrip(request)?.status, 200);
    }
    served.keys.set_fail_mode(FailMode::None);
    assert_eq!(waiting.read_response()?.status, 200);
    Ok(())
}

#[test]
fn keys_in_a_file_are_read_again_when_the_file_changes() -> Result<()> {
    let _deadline = Deadline::new("key file", LIMIT);
    let guarded = Guarded::start("keyfile")?;
    assert_eq!(guarded.connect()?.roundtrip(&guarded.call(Some(&guarded.token()?)).build())?.status, 200);
    guarded.issuer.rotate(true)?;
    let token = guarded.token()?;
    guarded.issuer.write_jwks(&guarded.enforcement.key_file("corp"))?;
    // The file is looked at every two seconds.
    let call = guarded.call(Some(&token)).build();
    wait_until("a token of the new key passes", TIMEOUT, || {
        let status = guarded.connect().and_then(|mut connection| Ok(connection.roundtrip(&call)?.status));
        status.is_ok_and(|status| status == 200).then_some(())
    })
}

#[test]
fn a_flood_of_different_bad_tokens_is_refused_one_by_one() -> Result<()> {
    let _deadline = Deadline::new("bad tokens", LIMIT);
    let guarded = Guarded::start("flood")?;
    let mut connection = guarded.connect()?;
    let mut last = Vec::new();
    for number in 0..500 {
        let token = guarded.mint().audience(&format!("https://{number}.example")).sign()?;
        let answer = connection.roundtrip(&guarded.call(Some(&token)).build())?;
        assert_eq!(answer.status, 401, "{number}");
        if answer.header("connection") == Some("close") {
            last.push(number);
            connection = guarded.connect()?;
        }
    }
    // So many in a row on one connection, of which the last says so.
    assert_eq!(last, [127, 255, 383]);
    refused_unread(&guarded, "")
}
