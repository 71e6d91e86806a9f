//! What the daemon may still do once it guards, and that it can do its work with that.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::{
    Enforcement, Guarded, IssuerSpec, PolicySpec, ServerSpec, enforcer_bin, skip,
};
use enforcer_tests::guard::{Cgroup, Deadline, Proc, run, wait_until};
use enforcer_tests::issuer::{Alg, Issuer};
use enforcer_tests::raw::{Connection, RequestBuilder};
use enforcer_tests::recorder::{Config, RemoteRecorder};
use rustls::pki_types::PrivatePkcs8KeyDer;

use common::{LIMIT, TIMEOUT, assert_nothing_is_left, status};

/// What the daemon keeps: names as systemd has them, numbers of linux/capability.h.
const KEPT: &[(&str, u32)] = &[
    ("CAP_DAC_READ_SEARCH", 2),
    ("CAP_NET_ADMIN", 12),
    ("CAP_SYS_PTRACE", 19),
    ("CAP_SYS_ADMIN", 21),
    ("CAP_PERFMON", 38),
    ("CAP_BPF", 39),
];
/// What it needs at its start besides.
const AT_START: &[&str] = &["CAP_DAC_OVERRIDE", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID"];
const NOBODY: &str = "65534";

/// A line of `/proc/PID/task/TID/status`.
fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

fn statuses(pid: u32) -> Result<Vec<String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))?;
    // A thread may end while we look.
    Ok(tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("status")).ok()).collect())
}

/// Processes that a process has forked and that live.
fn children(pid: u32) -> Result<Vec<u32>> {
    let mut children = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        children.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(children)
}

fn fetcher(daemon: u32) -> Result<u32> {
    let is_it = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "enforcer-keys")
    };
    children(daemon)?.into_iter().find(is_it).context("no process that fetches keys")
}

#[test]
fn no_thread_of_a_guarding_daemon_can_more_than_it_needs() -> Result<()> {
    let _deadline = Deadline::new("privileges", LIMIT);
    let mut guarded = Guarded::start("privileges")?;
    // The threads that serve requests exist by now.
    assert_eq!(status(&guarded, &guarded.call(Some(&guarded.token()?)).build())?, 200);
    let pid = guarded.enforcement.daemon()?.pid();
    let mask = KEPT.iter().fold(0_u64, |mask, (_name, number)| mask | 1 << number);
    let statuses = statuses(pid)?;
    ensure!(statuses.len() > 1, "one thread only");
    for status in statuses {
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            assert_eq!(u64::from_str_radix(&field(&status, set), 16)?, mask, "{set}: {status}");
        }
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(u64::from_str_radix(&field(&status, set), 16)?, 0, "{set}: {status}");
        }
        assert_eq!(field(&status, "NoNewPrivs"), "1");
        assert_eq!(field(&status, "Seccomp"), "2");
    }
    assert!(guarded.enforcement.stop()?.success());
    assert_nothing_is_left(&guarded)
}

#[test]
fn keys_come_over_https_through_a_process_without_rights() -> Result<()> {
    let _deadline = Deadline::new("unprivileged fetch", LIMIT);
    let issuer = Issuer::new("https://login.example.com/tools", Alg::Es256)?;
    let site = HttpsSite::start(&issuer.jwks().to_string())?;
    let directory = tempfile::tempdir()?;
    // For root alone: the process that fetches could not read it.
    let ca_file = directory.path().join("ca.pem");
    fs::write(&ca_file, &site.ca_pem)?;
    fs::set_permissions(&ca_file, fs::Permissions::from_mode(0o600))?;

    let cgroup = Cgroup::new("unprivileged-fetch")?;
    let recorder =
        RemoteRecorder::spawn((Ipv4Addr::LOCALHOST, 0).into(), &Config::default(), Some(&cgroup), None)?;
    let corp = IssuerSpec::from_url("corp", &issuer, &site.url)
        .with("ca_file", ca_file.to_str().context("a path that is no text")?);
    let server = ServerSpec::new("tools", &[recorder.addr()], Guarded::RESOURCE);
    let mut enforcement = Enforcement::start(cgroup, &PolicySpec::new(vec![corp], vec![server]))?;
    let daemon = enforcement.daemon()?.pid();

    let token = issuer.mint().audience(Guarded::RESOURCE).sign()?;
    let call = |token| RequestBuilder::mcp_call(&recorder.addr().to_string(), "/mcp", token, "echo").build();
    let mut connection = Connection::open(recorder.addr(), TIMEOUT)?;
    assert_eq!(connection.roundtrip(&call(Some(&token)))?.status, 200);
    assert_eq!(connection.roundtrip(&call(None))?.status, 401);

    let fetcher = fetcher(daemon)?;
    let status = fs::read_to_string(format!("/proc/{fetcher}/status"))?;
    for ids in ["Uid", "Gid"] {
        let all: BTreeSet<String> = field(&status, ids).split_whitespace().map(str::to_owned).collect();
        assert_eq!(all, BTreeSet::from([NOBODY.to_owned()]), "{ids}");
    }
    assert_eq!(field(&status, "Groups"), "");
    for set in ["CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&field(&status, set), 16)?, 0, "{set}: {status}");
    }
    assert_eq!((field(&status, "NoNewPrivs"), field(&status, "Seccomp")), ("1".into(), "2".into()));

    // It holds nothing that would outlive the daemon.
    enforcement.kill9()?;
    wait_until("the process that fetches keys ends with its daemon", TIMEOUT, || {
        let status = fs::read_to_string(format!("/proc/{fetcher}/status")).unwrap_or_default();
        (status.is_empty() || field(&status, "State").starts_with('Z')).then_some(())
    })
}

#[test]
fn keys_that_cannot_be_fetched_say_why() -> Result<()> {
    let _deadline = Deadline::new("failing fetch", LIMIT);
    let issuer = Issuer::new("https://login.example.com/tools", Alg::Es256)?;
    let site = HttpsSite::start(&issuer.jwks().to_string())?;
    let cgroup = Cgroup::new("failing-fetch")?;
    let recorder =
        RemoteRecorder::spawn((Ipv4Addr::LOCALHOST, 0).into(), &Config::default(), Some(&cgroup), None)?;
    // Its certificate is not of a system's authority.
    let corp = IssuerSpec::from_url("corp", &issuer, &site.url);
    let server = ServerSpec::new("tools", &[recorder.addr()], Guarded::RESOURCE);
    let enforcement = Enforcement::start(cgroup, &PolicySpec::new(vec![corp], vec![server]))?;
    let log = enforcement.log()?;
    ensure!(log.contains("invalid peer certificate") || log.contains("certificate authorities"), "{log}");
    let token = issuer.mint().audience(Guarded::RESOURCE).sign()?;
    let call = RequestBuilder::mcp_call(&recorder.addr().to_string(), "/mcp", Some(&token), "echo").build();
    assert_eq!(Connection::open(recorder.addr(), TIMEOUT)?.roundtrip(&call)?.status, 503);
    Ok(())
}

#[test]
fn the_units_capabilities_are_enough() -> Result<()> {
    let _deadline = Deadline::new("unit's capabilities", LIMIT);
    if Command::new("setpriv").arg("--version").output().is_err() {
        skip("the_units_capabilities_are_enough", "setpriv (util-linux) is not installed");
        return Ok(());
    }
    let unit = unit()?;
    let bounding: Vec<String> = unit
        .iter()
        .filter(|(name, _value)| name == "CapabilityBoundingSet")
        .flat_map(|(_name, value)| value.split_whitespace())
        .map(|name| format!("+{}", name.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    let issuer = Issuer::new("https://login.example.com/tools", Alg::Es256)?;
    let cgroup = Cgroup::new("unit")?;
    let recorder =
        RemoteRecorder::spawn((Ipv4Addr::LOCALHOST, 0).into(), &Config::default(), Some(&cgroup), None)?;
    let policy = PolicySpec::new(
        vec![IssuerSpec::from_file("corp", &issuer)],
        vec![ServerSpec::new("tools", &[recorder.addr()], Guarded::RESOURCE)],
    );
    let enforcement = Enforcement::prepare(cgroup, &policy, &[])?;
    let mut command = Command::new("setpriv");
    command.args(["--no-new-privs", "--inh-caps=-all"]);
    command.arg(format!("--bounding-set=-all,{}", bounding.join(",")));
    command
        .arg(enforcer_bin()?)
        .args(["run", "--drain-timeout", "1", "--policy"])
        .arg(enforcement.policy_path());
    command.arg("--cgroup").arg(enforcement.cgroup().path()).args(["--pin-name", enforcement.pin_name()]);
    let mut daemon = Proc::spawn("enforcer run", command)?;
    daemon.wait_for_line(" ready", TIMEOUT)?;
    let token = issuer.mint().audience(Guarded::RESOURCE).sign()?;
    let call = RequestBuilder::mcp_call(&recorder.addr().to_string(), "/mcp", Some(&token), "echo").build();
    let mut connection = Connection::open(recorder.addr(), TIMEOUT)?;
    assert_eq!(connection.roundtrip(&call)?.status, 200);
    assert!(daemon.terminate(TIMEOUT)?.success(), "{}", daemon.stderr());
    assert_eq!(enforcement.leftover_pins(), Vec::<PathBuf>::new());
    Ok(())
}

#[test]
fn the_unit_asks_for_what_the_daemon_keeps_and_is_documented() -> Result<()> {
    let unit = unit()?;
    let asked: BTreeSet<&str> = unit
        .iter()
        .filter(|(name, _value)| name == "CapabilityBoundingSet")
        .flat_map(|(_name, value)| value.split_whitespace())
        .collect();
    let needed = KEPT.iter().map(|(name, _number)| *name).chain(AT_START.iter().copied()).collect();
    assert_eq!(asked, needed);
    let start = unit.iter().find(|(name, _value)| name == "ExecStart").context("no ExecStart")?;
    ensure!(start.1.ends_with(" --keep"), "a restart must leave the guard: {}", start.1);
    let text = fs::read_to_string(repository().join("docs/privileges.md"))?;
    for (name, _value) in &unit {
        ensure!(
            text.contains(&format!("`{name}")),
            "docs/privileges.md does not say why the unit has {name}"
        );
    }
    for (name, _number) in KEPT {
        ensure!(text.contains(&format!("`{name}`")), "docs/privileges.md does not say what {name} is for");
    }
    Ok(())
}

#[test]
fn systemd_takes_the_unit() -> Result<()> {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        skip("systemd_takes_the_unit", "systemd-analyze is not installed");
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("enforcer.service");
    // It looks whether the program is there.
    let bin = enforcer_bin()?;
    let text = fs::read_to_string(unit_path())?;
    fs::write(&path, text.replace("/usr/local/bin/enforcer ", &format!("{} ", bin.display())))?;
    let mut verify = Command::new("systemd-analyze");
    verify.arg("verify").arg(&path);
    let verified = run("systemd-analyze verify", verify, b"", TIMEOUT)?;
    ensure!(
        verified.status.success() && !verified.stderr.contains("enforcer.service:"),
        "{}",
        verified.stderr
    );
    // Of ten; 9.6 is a service without any hardening.
    let mut security = Command::new("systemd-analyze");
    security.args(["security", "--offline=true", "--threshold=45", "--no-pager"]).arg(&path);
    let judged = run("systemd-analyze security", security, b"", TIMEOUT)?;
    ensure!(judged.status.success(), "{}{}", judged.stdout, judged.stderr);
    Ok(())
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn unit_path() -> PathBuf {
    repository().join("deploy/systemd/enforcer.service")
}

/// The unit's directives that concern the service, in order.
fn unit() -> Result<Vec<(String, String)>> {
    let text = fs::read_to_string(unit_path())?;
    let (_unit, rest) = text.split_once("[Service]").context("no [Service]")?;
    let (service, _install) = rest.split_once("[Install]").context("no [Install]")?;
    Ok(service
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect())
}

/// One document over https, from a certificate authority of its own. Its thread ends with the test's process.
struct HttpsSite {
    url: String,
    ca_pem: String,
}

impl HttpsSite {
    fn start(document: &str) -> Result<Self> {
        let mut parameters = rcgen::CertificateParams::new(Vec::new())?;
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca_key = rcgen::KeyPair::generate()?;
        let ca_pem = parameters.self_signed(&ca_key)?.pem();
        let authority = rcgen::Issuer::new(parameters, ca_key);
        let key = rcgen::KeyPair::generate()?;
        let leaf =
            rcgen::CertificateParams::new(vec!["localhost".to_owned()])?.signed_by(&key, &authority)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(
                vec![leaf.der().clone()],
                PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            )?;
        let config = Arc::new(config);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let url = format!("https://localhost:{}/jwks", listener.local_addr()?.port());
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{document}", document.len());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that does not trust us ends the handshake.
                drop(Self::serve(stream, Arc::clone(&config), &answer));
            }
        });
        Ok(Self { url, ca_pem })
    }

    fn serve(stream: TcpStream, config: Arc<rustls::ServerConfig>, answer: &str) -> Result<()> {
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut stream = rustls::StreamOwned::new(rustls::ServerConnection::new(config)?, stream);
        let mut head = Vec::new();
        let mut buffer = [0; 1024];
        while !head.ends_with(b"\r\n\r\n") {
            let length = stream.read(&mut buffer)?;
            ensure!(length > 0, "the client went away");
            head.extend_from_slice(&buffer[..length]);
        }
        stream.write_all(answer.as_bytes())?;
        stream.conn.send_close_notify();
        stream.flush()?;
        Ok(())
    }
}
