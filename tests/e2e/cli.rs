//! The command line on a live enforcement: what it shows, what it never shows, and its exit codes.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{Guarded, enforcer_bin, fresh_pin_name, remove_traces};
use enforcer_tests::guard::{Deadline, Finished, run, wait_until};
use enforcer_tests::issuer::Mint;
use serde_json::{Value, json};

use common::{LIMIT, NOT_LOADED, TIMEOUT};

const OK: i32 = 0;
const USAGE: i32 = 2;
const REJECTED: i32 = 4;
const BUSY: i32 = 6;

fn code(finished: &Finished) -> i32 {
    finished.status.code().unwrap_or(-1)
}

fn rows<'a>(document: &'a Value, table: &str) -> Result<&'a [Value]> {
    Ok(document.get(table).and_then(Value::as_array).with_context(|| format!("no {table}: {document}"))?)
}

fn enforcer(arguments: &[&str], input: &[u8]) -> Result<Finished> {
    let mut command = Command::new(enforcer_bin()?);
    command.args(arguments);
    run(&format!("enforcer {}", arguments.join(" ")), command, input, TIMEOUT)
}

#[test]
fn what_is_shown_is_what_has_happened_and_no_token_is_in_it() -> Result<()> {
    let _deadline = Deadline::new("views", LIMIT);
    let guarded =
        Guarded::builder("views").server("public_paths", json!(["/healthz"])).nonblocking().start()?;
    let alice = guarded.mint().subject("alice").client_id("editor").sign()?;
    let bob = guarded.mint().subject("bob").sign()?;
    let wrong = guarded.mint().audience("https://other.example").sign()?;
    let mut first = guarded.connect_accepted()?;
    let mut second = guarded.connect_accepted()?;
    for (connection, requests) in
        [(&mut first, vec![(Some(&alice), 200), (None, 401)]), (&mut second, vec![(Some(&bob), 200)])]
    {
        for (token, status) in requests {
            let request = guarded.call(token.map(String::as_str)).build();
            for _ in 0..3 {
                assert_eq!(connection.roundtrip(&request)?.status, status);
            }
        }
    }
    assert_eq!(guarded.connect()?.roundtrip(&guarded.call(Some(&wrong)).build())?.status, 401);
    let live = &guarded.enforcement;

    let status = live.cli_json(&["status"])?;
    assert_eq!(status.get("state"), Some(&json!("enforcing")));
    assert_eq!(status.pointer("/daemon/alive"), Some(&json!(true)));
    assert_eq!(status.pointer("/loaded/grants/used"), Some(&json!(2)));

    let servers = live.cli_json(&["servers"])?;
    let server = rows(&servers, "servers")?.first().context("no server")?;
    assert_eq!(server.get("name"), Some(&json!("tools")));
    assert_eq!(server.get("resource"), Some(&json!(Guarded::RESOURCE)));
    assert_eq!(server.get("path"), Some(&json!("/mcp")));
    assert_eq!(server.get("listen"), Some(&json!([guarded.host()])));

    let flows = wait_until("two flows are left", TIMEOUT, || {
        let flows = live.cli_json(&["flows"]).ok()?;
        (rows(&flows, "flows").ok()?.len() == 2).then_some(flows)
    })?;
    let clients: BTreeSet<_> =
        rows(&flows, "flows")?.iter().filter_map(|row| row.get("client_address")?.as_str()).collect();
    let (one, two) = (first.local_addr()?.to_string(), second.local_addr()?.to_string());
    assert_eq!(clients, BTreeSet::from([one.as_str(), two.as_str()]));
    for row in rows(&flows, "flows")? {
        assert_eq!(row.get("server_address"), Some(&json!(guarded.host())));
        assert_eq!(row.get("mode"), Some(&json!("enforce")));
        let count = |name| row.get(name).and_then(Value::as_u64).unwrap_or_default();
        assert!(count("allowed") + count("punts") + count("refused") >= 3, "{row}");
    }

    let grants = live.cli_json(&["grants"])?;
    let principals: BTreeSet<_> = rows(&grants, "grants")?
        .iter()
        .map(|row| {
            ["subject", "client_id", "server", "issuer", "state"]
                .map(|name| row.get(name).and_then(Value::as_str).unwrap_or_default())
        })
        .collect();
    let want =
        [["alice", "editor", "tools", "corp", "active"], ["bob", "test-client", "tools", "corp", "active"]];
    assert_eq!(principals, BTreeSet::from(want), "{grants}");

    let verdicts = live.cli_json(&["verdicts"])?;
    let mut kinds: Vec<_> =
        rows(&verdicts, "verdicts")?.iter().filter_map(|row| row.get("kind")?.as_str()).collect();
    kinds.sort_unstable();
    assert_eq!(kinds, ["allow", "allow", "deny", "deny"]);

    // In all tables, in both forms, in the log: fingerprints only.
    let mut shown = live.log()?;
    for command in ["status", "servers", "flows", "verdicts", "grants", "counters"] {
        for output in ["table", "json"] {
            let (once, again) =
                (live.cli(&[command, "--output", output])?, live.cli(&[command, "--output", output])?);
            assert_eq!((code(&once), once.stderr.as_str()), (OK, ""), "{command}");
            assert_eq!(once.stdout.lines().count(), again.stdout.lines().count(), "{command}: a stable form");
            shown.push_str(&once.stdout);
        }
    }
    for token in [&alice, &bob, &wrong] {
        for part in token.split('.') {
            assert!(!shown.contains(part), "a part of a token is shown");
        }
    }
    Ok(())
}

#[test]
fn without_an_enforcement_the_views_say_so() -> Result<()> {
    let _deadline = Deadline::new("not loaded", LIMIT);
    let name = fresh_pin_name();
    for command in ["status", "servers", "flows", "verdicts", "grants", "counters"] {
        let finished = enforcer(&[command, "--pin-name", &name], b"")?;
        assert_eq!(code(&finished), NOT_LOADED, "{command}: {}", finished.stderr);
    }
    let status = enforcer(&["status", "--output", "json", "--pin-name", &name], b"")?;
    let status: Value = serde_json::from_str(&status.stdout)?;
    assert_eq!(
        (status.get("state"), status.get("enforcing")),
        (Some(&json!("not-loaded")), Some(&json!(false)))
    );
    for _ in 0..2 {
        assert_eq!(code(&enforcer(&["unload", "--pin-name", &name], b"")?), OK, "nothing to unload is fine");
    }
    for wrong in [vec!["status", "--pin-name", "a/b"], vec!["flows", "--nonsense"], vec!["nonsense"], vec![]]
    {
        assert_eq!(code(&enforcer(&wrong, b"")?), USAGE, "{wrong:?}");
    }
    remove_traces(&name);
    Ok(())
}

#[test]
fn the_views_work_while_no_daemon_runs() -> Result<()> {
    let _deadline = Deadline::new("dead daemon", LIMIT);
    let mut guarded = Guarded::start("deaddaemon")?;
    let request = guarded.call(Some(&guarded.token()?)).build();
    let mut connection = guarded.connect()?;
    assert_eq!(connection.roundtrip(&request)?.status, 200);
    guarded.enforcement.kill9()?;
    let status = guarded.enforcement.cli_json(&["status"])?;
    assert_eq!(status.get("state"), Some(&json!("enforcing")));
    assert_eq!(status.pointer("/daemon/alive"), Some(&json!(false)));
    assert_eq!(status.pointer("/daemon/lock_held"), Some(&json!(false)));
    for (command, count) in [("flows", 1), ("grants", 1), ("verdicts", 1), ("servers", 1)] {
        assert_eq!(rows(&guarded.enforcement.cli_json(&[command])?, command)?.len(), count, "{command}");
    }
    let unload = guarded.enforcement.cli_json(&["unload", "--drain-timeout", "0"])?;
    assert_eq!(unload.get("flows_destroyed"), Some(&json!(1)), "{unload}");
    assert_eq!(code(&guarded.enforcement.cli(&["status"])?), NOT_LOADED);
    connection.expect_closed()
}

#[test]
fn explain_judges_as_the_daemon_does() -> Result<()> {
    let _deadline = Deadline::new("explain", LIMIT);
    let guarded = Guarded::builder("explain").server("scopes", json!(["a", "b"])).start()?;
    let sound = || guarded.mint().scope("a b");
    let cases: [(&str, Mint); 7] = [
        ("good", sound()),
        ("audience", sound().audience("https://other.example")),
        ("expired", sound().issued_in(-7200).expires_in(-3600)),
        ("signature", sound().corrupt_signature()),
        ("issuer", sound().claim("iss", "https://nobody.example")),
        ("alg", sound().alg_header("none").unsigned()),
        ("scope", guarded.mint().scope("a")),
    ];
    for (what, mint) in cases {
        let token = mint.sign()?;
        let explained = guarded
            .enforcement
            .cli_with_input(&["explain", "--server", "tools", "--output", "json"], token.as_bytes())?;
        let passes = guarded.connect()?.roundtrip(&guarded.call(Some(&token)).build())?.status == 200;
        assert_eq!(code(&explained), if passes { OK } else { REJECTED }, "{what}: {}", explained.stderr);
        assert_eq!(passes, what == "good");
        let document: Value = serde_json::from_str(&explained.stdout)?;
        assert_eq!(document.get("would_pass"), Some(&json!(passes)), "{what}");
        assert!(rows(&document, "checks")?.len() > 3, "{document}");
        for part in token.split('.').filter(|part| !part.is_empty()) {
            assert!(
                !explained.stdout.contains(part) && !explained.stderr.contains(part),
                "{what}: shows the token"
            );
        }
    }
    let live = &guarded.enforcement;
    assert_eq!(code(&live.cli_with_input(&["explain", "--server", "tools"], b"")?), USAGE);
    let nobody = live.cli_with_input(&["explain", "--server", "nobody"], sound().sign()?.as_bytes())?;
    assert_ne!(code(&nobody), OK);
    Ok(())
}

#[test]
fn check_prints_the_effective_policy_or_every_defect() -> Result<()> {
    let _deadline = Deadline::new("check", LIMIT);
    let guarded = Guarded::start("check")?;
    let path = guarded.enforcement.policy_path();
    let path = path.to_str().context("a path in UTF-8")?;
    let good = enforcer(&["check", path, "--output", "json"], b"")?;
    assert_eq!(code(&good), OK, "{}", good.stderr);
    assert!(good.stdout.contains(Guarded::RESOURCE) && good.stdout.contains(&guarded.host()));
    serde_json::from_str::<Value>(&good.stdout)?;
    let text = fs::read_to_string(path)?.replace("\"resource\"", "\"resuorce\"");
    fs::write(path, text)?;
    let bad = enforcer(&["check", path], b"")?;
    assert_eq!(code(&bad), REJECTED);
    let said = format!("{}{}", bad.stdout, bad.stderr);
    assert!(
        said.contains("resuorce") && said.contains("resource") && said.contains("policy.yaml:"),
        "{said}"
    );
    Ok(())
}

#[test]
fn doctor_finds_this_machine_fit_and_disturbs_nothing() -> Result<()> {
    let _deadline = Deadline::new("doctor", LIMIT);
    let guarded = Guarded::start("doctor")?;
    let mut connection = guarded.connect()?;
    let request = guarded.call(Some(&guarded.token()?)).build();
    assert_eq!(connection.roundtrip(&request)?.status, 200);
    let before: BTreeSet<_> = pins();
    let doctor = guarded.enforcement.cli(&["doctor"])?;
    ensure!(code(&doctor) == OK, "{}{}", doctor.stdout, doctor.stderr);
    assert_eq!(connection.roundtrip(&request)?.status, 200);
    // Others may be starting at this moment, so only what is new and stays counts.
    wait_until("the doctor's own pins are gone", TIMEOUT, || {
        let new: Vec<_> =
            pins().difference(&before).filter(|name| name.contains("doctor")).cloned().collect();
        new.is_empty().then_some(())
    })
}

fn pins() -> BTreeSet<String> {
    let entries = fs::read_dir("/sys/fs/bpf").into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn unload_does_not_take_the_maps_from_a_running_daemon() -> Result<()> {
    let _deadline = Deadline::new("unload", LIMIT);
    let guarded = Guarded::start("unload")?;
    let unload = guarded.enforcement.cli(&["unload"])?;
    assert_eq!(code(&unload), BUSY);
    assert!(unload.stderr.contains("daemon"), "{}", unload.stderr);
    assert_eq!(guarded.connect()?.roundtrip(&guarded.call(None).build())?.status, 401);
    Ok(())
}

#[test]
fn a_reader_that_goes_away_is_no_failure() -> Result<()> {
    let _deadline = Deadline::new("broken pipe", LIMIT);
    let guarded = Guarded::start("pipe")?;
    let script = "set -o pipefail; \"$1\" counters --all --pin-name \"$2\" | head -1";
    let mut command = Command::new("bash");
    command.args(["-c", script, "bash"]).arg(enforcer_bin()?).arg(guarded.enforcement.pin_name());
    let finished = run("a pipe", command, b"", TIMEOUT)?;
    assert_eq!((code(&finished), finished.stderr.as_str()), (OK, ""));
    Ok(())
}

#[test]
fn the_log_is_json_when_asked_for() -> Result<()> {
    let _deadline = Deadline::new("JSON log", LIMIT);
    let guarded = Guarded::builder("jsonlog").option("--log-format=json").option("--log-level=debug").start();
    let guarded = guarded?;
    let token = guarded.token()?;
    guarded.connect()?.roundtrip(&guarded.call(Some(&token)).build())?;
    guarded.connect()?.roundtrip(&guarded.call(Some("bad")).build())?;
    let log = guarded.enforcement.log()?;
    for line in log.lines() {
        serde_json::from_str::<Value>(line).with_context(|| line.to_owned())?;
    }
    assert!(log.contains("refused") && log.contains("allowed"), "{log}");
    assert!(token.split('.').all(|part| !log.contains(part)), "a part of the token is in the log");
    Ok(())
}
