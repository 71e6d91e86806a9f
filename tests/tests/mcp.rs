//! The official SDK on both sides, in the newest protocol version and in the older ones.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use enforcer_tests::guard::{Deadline, Proc, bin_path, run};
use enforcer_tests::mcp::{CallOutcome, call_tool_blocking, newest_version, version};
use enforcer_tests::peers::listening_addr;
use enforcer_tests::recorder::{Answer, Config, Recorder};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);
const VERSIONS: [&str; 4] = ["2026-07-28", "2025-11-25", "2025-06-18", "2025-03-26"];

fn mcp_server() -> Result<(Proc, String)> {
    let mut command = Command::new(bin_path("enforcer-mcp")?);
    command.args(["server", "--listen", "127.0.0.1:0"]);
    let mut process = Proc::spawn("enforcer-mcp server", command)?;
    let addr = listening_addr(&mut process, LIMIT)?;
    Ok((process, format!("http://{addr}/mcp")))
}

#[test]
fn tools_answer_in_every_version() -> Result<()> {
    let _deadline = Deadline::new("mcp", LIMIT);
    let (mut process, url) = mcp_server()?;
    assert_eq!(newest_version().as_str(), VERSIONS[0]);
    for name in VERSIONS {
        let protocol = version(name)?;
        let call = |tool: &str, arguments: Value| {
            call_tool_blocking(&url, Some("any-token"), &protocol, tool, arguments, LIMIT)
        };
        let answered = |text: &str| CallOutcome::Answered {
            text: text.to_owned(),
            is_error: false,
            protocol: name.to_owned(),
        };
        assert_eq!(call("add", json!({ "a": 2, "b": 40 }))?, answered("42"));
        assert_eq!(call("echo", json!({ "text": "hällo" }))?, answered("hällo"));
        let unknown = call("no-such-tool", json!({}))?;
        assert!(matches!(unknown, CallOutcome::RpcError { .. }), "{unknown:?}");
    }
    assert!(process.terminate(LIMIT)?.success());
    Ok(())
}

#[test]
fn the_program_calls_tools_and_tells_by_its_exit_code() -> Result<()> {
    let _deadline = Deadline::new("mcp program", LIMIT);
    let (_process, url) = mcp_server()?;
    let client = |protocol: &str, tool: &str| -> Result<_> {
        let mut command = Command::new(bin_path("enforcer-mcp")?);
        command.args(["client", "--url", &url, "--token-env", "TEST_TOKEN", "--protocol", protocol]);
        command.args(["call", tool, r#"{"a":1,"b":2}"#]).env("TEST_TOKEN", "any-token");
        run("enforcer-mcp client", command, b"", LIMIT)
    };
    for protocol in VERSIONS {
        let finished = client(protocol, "add")?;
        assert_eq!(finished.status.code(), Some(0), "{finished:?}");
        let outcome: Value = serde_json::from_str(&finished.stdout)?;
        assert_eq!(
            outcome,
            json!({ "outcome": "answered", "text": "3", "is_error": false, "protocol": protocol })
        );
    }
    assert_eq!(client(VERSIONS[0], "subtract")?.status.code(), Some(3));
    assert_eq!(client("1999-01-01", "add")?.status.code(), Some(1));
    Ok(())
}

#[test]
fn a_refusal_in_http_is_reported_and_the_token_is_sent() -> Result<()> {
    let _deadline = Deadline::new("mcp refusal", LIMIT);
    let config = Config { answer: Answer::Status { code: 503 }, ..Config::default() };
    let recorder = Recorder::start(SocketAddr::from(([127, 0, 0, 1], 0)), config)?;
    let url = format!("http://{}/mcp", recorder.addr());
    for name in VERSIONS {
        let outcome =
            call_tool_blocking(&url, Some("the.token.sent"), &version(name)?, "add", json!({}), LIMIT)?;
        assert_eq!(outcome, CallOutcome::Refused { status: 503, www_authenticate: None }, "{name}");
    }
    for record in recorder.connections() {
        let text = String::from_utf8_lossy(&record.kept).to_lowercase();
        assert!(text.contains("authorization: bearer the.token.sent\r\n"), "{text}");
    }
    Ok(())
}

#[test]
fn a_challenge_is_reported_for_401_and_403() -> Result<()> {
    let _deadline = Deadline::new("mcp challenge", LIMIT);
    for status in [401, 403] {
        let challenge =
            "Bearer resource_metadata=\"http://h/.well-known/oauth-protected-resource/mcp\", scope=\"a\"";
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        let url = format!("http://{}/mcp", listener.local_addr()?);
        let answer = format!(
            "HTTP/1.1 {status} No\r\nWWW-Authenticate: {challenge}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                use std::io::{Read, Write};
                let mut request = [0; 8192];
                drop(stream.read(&mut request));
                drop(stream.write_all(answer.as_bytes()));
            }
        });
        for name in VERSIONS {
            let outcome = call_tool_blocking(&url, None, &version(name)?, "add", json!({}), LIMIT)?;
            let expected = CallOutcome::Refused { status, www_authenticate: Some(challenge.to_owned()) };
            assert_eq!(outcome, expected, "{name}");
        }
    }
    Ok(())
}
