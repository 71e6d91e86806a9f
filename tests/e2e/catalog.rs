//! The ways around an HTTP check that are known from other projects: each is refused in HTTP or by closing the connection,
//! and the server reads none of it.

mod common;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use enforcer_tests::enforcement::Guarded;
use enforcer_tests::guard::Deadline;
use enforcer_tests::raw::{Connection, RequestBuilder, Segmentation};

use common::{LIMIT, refused_unread};

/// What the client sees.
#[derive(Debug, Clone, Copy)]
enum Expect {
    /// An answer with this status.
    Status(u16),
    /// No answer: the connection ends.
    Closed,
}

use Expect::{Closed, Status};

/// Sends each row on a connection of its own, twice (the second time it may be known), and cut in two.
fn refuse(guarded: &Guarded, rows: &[(&str, Vec<u8>, Expect)]) -> Result<()> {
    for round in 0..3 {
        // A refusal that closes leaves the client a second to read it, so all rows wait together.
        let mut open = Vec::new();
        for (what, bytes, expect) in rows {
            let halves = vec![bytes.len() / 2];
            let cut = if round < 2 { Segmentation::Whole } else { Segmentation::At(halves) };
            let mut connection = guarded.connect()?;
            // An early refusal may end the connection before the second half is written.
            drop(connection.send_segmented(bytes, &cut, Duration::from_millis(10)));
            open.push((*what, connection, *expect));
        }
        for (what, mut connection, expect) in open {
            refused(&mut connection, expect).with_context(|| format!("{what}, round {round}"))?;
            let read = guarded.read_by_server(connection.local_addr()?)?;
            ensure!(read.is_empty(), "{what}, round {round}: the server read {} bytes of it", read.len());
        }
    }
    refused_unread(guarded, "")
}

fn refused(connection: &mut Connection, expect: Expect) -> Result<()> {
    match expect {
        Status(status) => {
            let response = connection.read_response()?;
            ensure!(response.status == status, "{status} was expected: {response:?}");
            if response.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
                connection.expect_closed()?;
            }
            Ok(())
        }
        Closed => connection.expect_closed(),
    }
}

fn call(guarded: &Guarded) -> Result<RequestBuilder> {
    Ok(RequestBuilder::new("POST", "/mcp").header("Host", &guarded.host()).bearer(&guarded.token()?))
}

/// Row 12.
#[test]
fn content_length_and_transfer_encoding_have_one_reading() -> Result<()> {
    let _deadline = Deadline::new("framing", LIMIT);
    let guarded = Guarded::start("framing")?;
    let base = call(&guarded)?;
    let length = |value: &str| base.clone().raw(format!("Content-Length: {value}\r\n").as_bytes());
    let both = |first: &str, second: &str| base.clone().raw(format!("{first}\r\n{second}\r\n").as_bytes());
    let coded = |value: &str| base.clone().header("Transfer-Encoding", value);
    let body = b"0\r\n\r\n";
    let mut rows = Vec::new();
    for value in [
        "+5", "0x5", "-1", "5 ", "5\t", " 5", "5,5", "5, 5", "5;5", "05", "00", "5.0", "5e0", "", " ",
        "five", "\u{665}",
    ] {
        rows.push((format!("Content-Length {value:?}"), length(value), Status(400)));
    }
    for value in ["4294967296000", "18446744073709551616", "99999999999999999999999"] {
        rows.push((format!("Content-Length {value}"), length(value), Status(413)));
    }
    for (first, second) in [
        ("Content-Length: 5", "Content-Length: 5"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: 5", "content-length: 0"),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("Content_Length: 5", "X: y"),
        ("Content-Length : 5", "X: y"),
        ("Content-Length\t: 5", "X: y"),
        ("Content-Length:\u{a0}5", "X: y"),
    ] {
        rows.push((format!("{first}, {second}"), both(first, second), Status(400)));
    }
    for value in [
        "xchunked",
        "chunked, identity",
        "identity",
        "identity, chunked",
        "gzip, chunked",
        "chunked;q=1",
        "\"chunked\"",
        "chunked,",
    ] {
        rows.push((format!("Transfer-Encoding {value:?}"), coded(value), Status(501)));
    }
    let rows: Vec<_> = rows
        .iter()
        .map(|(what, request, expect)| (what.as_str(), request.clone().bare_body(body).build(), *expect))
        .collect();
    refuse(&guarded, &rows)
}

/// Row 12, second half: chunk extensions and trailers could carry what the head was judged without.
#[test]
fn broken_chunks_end_the_connection_and_nothing_follows_them() -> Result<()> {
    let _deadline = Deadline::new("chunks", LIMIT);
    let guarded = Guarded::start("chunks")?;
    let smuggled = guarded.call(None).build();
    for broken in [
        "5\nhello\n0\n\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "0x5\r\nhello\r\n",
        "5 \r\nhello\r\n",
        "g\r\n",
        "-1\r\n",
        "5\r\nhelloX\r\n",
        "5\r\nhello0\r\n\r\n",
        "\r\n5\r\nhello\r\n",
        "ffffffffffffffffff\r\n",
    ] {
        let request = call(&guarded)?.header("Transfer-Encoding", "chunked").bare_body(broken.as_bytes());
        let mut connection = guarded.connect()?;
        let bytes = [request.build(), smuggled.clone()].concat();
        drop(connection.send(&bytes));
        connection.expect_closed().with_context(|| format!("{broken:?}"))?;
        // The head was allowed; but nothing of the request behind it got through.
        let read = guarded.recorder.connection(connection.local_addr()?)?.map(|record| record.kept);
        let read = read.unwrap_or_default();
        ensure!(bytes.starts_with(&read), "{broken:?}: other bytes arrived");
        ensure!(read.len() <= request.build().len(), "{broken:?}: {} bytes behind it", read.len());
    }
    Ok(())
}

/// Row 13.
#[test]
fn header_lines_have_one_reading() -> Result<()> {
    let _deadline = Deadline::new("header lines", LIMIT);
    let guarded = Guarded::start("lines")?;
    let token = guarded.token()?;
    let host = guarded.host();
    let base = RequestBuilder::new("POST", "/mcp").header("Host", &host);
    let with = |bytes: &[u8]| base.clone().raw(bytes).bearer(&token).header("Content-Length", "0").build();
    let authorization = |line: &str| {
        let line = line.replace("TOKEN", &token);
        base.clone().raw(line.as_bytes()).header("Content-Length", "0").build()
    };
    refuse(
        &guarded,
        &[
            ("folded header", with(b"X-A: b\r\n c\r\n"), Status(400)),
            ("folded with a tab", with(b"X-A: b\r\n\tc\r\n"), Status(400)),
            ("folded authorization", authorization("Authorization: Bearer\r\n TOKEN\r\n"), Status(400)),
            ("bare LF", with(b"X-A: b\nX-C: d\r\n"), Status(400)),
            ("bare LF hides a length", with(b"X-A: b\nContent-Length: 50\r\n"), Status(400)),
            ("bare CR", with(b"X-A: b\rX-C: d\r\n"), Status(400)),
            ("CR CR LF", with(b"X-A: b\r\r\n"), Status(400)),
            ("NUL in a value", with(b"X-A: b\0c\r\n"), Status(400)),
            ("NUL in a name", with(b"X-\0A: b\r\n"), Status(400)),
            ("DEL", with(b"X-A: b\x7f\r\n"), Status(400)),
            ("escape", with(b"X-A: \x1b[0m\r\n"), Status(400)),
            ("space before the colon", with(b"X-A : b\r\n"), Status(400)),
            ("no colon", with(b"X-A\r\n"), Status(400)),
            ("no name", with(b": b\r\n"), Status(400)),
            ("a name that is no token", with(b"X(A): b\r\n"), Status(400)),
            (
                "authorization, space before the colon",
                authorization("Authorization : Bearer TOKEN\r\n"),
                Status(400),
            ),
            (
                "authorization twice",
                authorization("Authorization: Bearer x\r\nAUTHORIZATION: Bearer TOKEN\r\n"),
                Status(400),
            ),
            ("bearer, two spaces", authorization("Authorization: Bearer  TOKEN\r\n"), Status(400)),
            ("bearer, a tab", authorization("Authorization: Bearer\tTOKEN\r\n"), Status(400)),
            ("authorization, underscore", authorization("Authorization_: Bearer TOKEN\r\n"), Status(401)),
            ("proxy authorization", authorization("Proxy-Authorization: Bearer TOKEN\r\n"), Status(401)),
            ("a cookie", authorization("Cookie: access_token=TOKEN\r\n"), Status(401)),
            ("host twice", with(format!("Host: {host}\r\n").as_bytes()), Status(400)),
            ("method override", with(b"X-HTTP-Method-Override: DELETE\r\n"), Status(400)),
            ("path override", with(b"X-Original-URL: /admin\r\n"), Status(400)),
            ("trailer announced", with(b"Trailer: Authorization\r\n"), Status(400)),
            ("hop-by-hop authorization", with(b"Connection: Authorization\r\n"), Status(400)),
            (
                "no host",
                RequestBuilder::new("POST", "/mcp").bearer(&token).header("Content-Length", "0").build(),
                Status(400),
            ),
        ],
    )
}

/// Row 13, what is fine: names in any case, `bearer` in any case, no space after the colon.
#[test]
fn harmless_spellings_pass_as_they_are() -> Result<()> {
    let _deadline = Deadline::new("spellings", LIMIT);
    let guarded = Guarded::start("spellings")?;
    let token = guarded.token()?;
    let mut passed = 0;
    for line in ["AUTHORIZATION: Bearer TOKEN", "authorization:bearer TOKEN", "aUtHoRiZaTiOn: BEARER TOKEN"] {
        let line = format!("{}\r\n", line.replace("TOKEN", &token));
        let request = RequestBuilder::new("POST", "/mcp")
            .header("HOST", &guarded.host())
            .raw(line.as_bytes())
            .header("cOnTeNt-LeNgTh", "0")
            .build();
        for _ in 0..2 {
            let mut connection = guarded.connect()?;
            assert_eq!(
                connection.roundtrip(&request)?.status,
                200,
                "{}",
                line.split(' ').next().unwrap_or_default()
            );
            assert_eq!(guarded.read_by_server(connection.local_addr()?)?, request);
            passed += 1;
        }
    }
    assert_eq!(guarded.enforcement.counter("allowed")?, passed / 2);
    Ok(())
}

/// Row 14.
#[test]
fn other_versions_protocols_and_targets_are_refused() -> Result<()> {
    let _deadline = Deadline::new("versions", LIMIT);
    let guarded = Guarded::start("versions")?;
    let token = guarded.token()?;
    let host = guarded.host();
    let line =
        |line: &str| RequestBuilder::with_request_line(line).header("Host", &host).bearer(&token).build();
    let with =
        |name: &str, value: &str| -> Result<Vec<u8>> { Ok(call(&guarded)?.header(name, value).build()) };
    refuse(
        &guarded,
        &[
            ("HTTP/1.0", line("POST /mcp HTTP/1.0"), Status(505)),
            ("HTTP/0.9", b"GET /mcp\r\n\r\n".to_vec(), Status(505)),
            ("HTTP/2.0", line("POST /mcp HTTP/2.0"), Status(505)),
            ("HTTP/1.2", line("POST /mcp HTTP/1.2"), Status(505)),
            ("http/1.1", line("POST /mcp http/1.1"), Status(400)),
            ("no version", line("POST /mcp"), Status(400)),
            ("two spaces", line("POST  /mcp HTTP/1.1"), Status(400)),
            ("a tab", line("POST\t/mcp HTTP/1.1"), Closed),
            ("a leading space", line(" POST /mcp HTTP/1.1"), Closed),
            ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), Status(505)),
            ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec(), Closed),
            ("SSH", b"SSH-2.0-OpenSSH_9.9\r\n\r\n".to_vec(), Closed),
            ("h2c", with("Upgrade", "h2c")?, Status(501)),
            ("websocket", with("Upgrade", "websocket")?, Status(501)),
            ("connection upgrade", with("Connection", "Upgrade")?, Status(501)),
            ("HTTP2-Settings", with("HTTP2-Settings", "AAMAAABkAAQAAP__")?, Status(501)),
            ("CONNECT", line(&format!("CONNECT {host} HTTP/1.1")), Status(501)),
            ("absolute form", line(&format!("POST http://{host}/mcp HTTP/1.1")), Status(400)),
            ("asterisk form", line("OPTIONS * HTTP/1.1"), Status(400)),
            ("authority form", line("GET example.com:80 HTTP/1.1"), Status(501)),
            ("another expectation", with("Expect", "200-ok")?, Status(417)),
            ("TE", with("TE", "gzip")?, Status(400)),
        ],
    )
}

/// Row 14: a client that waits for 100 Continue gets it from the server, once it is allowed.
#[test]
fn expect_continue_works_for_good_tokens_and_is_refused_at_once_for_bad_ones() -> Result<()> {
    let _deadline = Deadline::new("expect", LIMIT);
    let guarded = Guarded::start("expect")?;
    let head = call(&guarded)?.header("Expect", "100-continue").header("Content-Length", "5");
    for _ in 0..2 {
        let mut connection = guarded.connect()?;
        connection.send(&head.head())?;
        assert_eq!(connection.read_head()?.status, 100);
        connection.send(b"hello")?;
        assert_eq!(connection.read_response()?.status, 200);
        let read = guarded.read_by_server(connection.local_addr()?)?;
        assert_eq!(read, [head.head().as_slice(), b"hello"].concat());
    }
    let read = guarded.bytes_read()?;
    let refused = RequestBuilder::new("POST", "/mcp")
        .header("Host", &guarded.host())
        .header("Expect", "100-continue")
        .header("Content-Length", "5");
    for _ in 0..2 {
        let mut connection = guarded.connect()?;
        let response = connection.roundtrip(&refused.head())?;
        assert_eq!((response.status, response.header("connection")), (401, Some("close")));
        drop(connection.send(b"hello"));
        connection.expect_closed()?;
    }
    assert_eq!(guarded.bytes_read()?, read);
    Ok(())
}

/// Row 15.
#[test]
fn paths_are_compared_as_they_are_and_never_normalised() -> Result<()> {
    let _deadline = Deadline::new("paths", LIMIT);
    let guarded =
        Guarded::builder("pathtricks").server("public_paths", serde_json::json!(["/healthz"])).start()?;
    let at = |path: &str| -> Result<Vec<u8>> {
        Ok(RequestBuilder::mcp_call(&guarded.host(), path, Some(&guarded.token()?), "echo").build())
    };
    let mut rows = Vec::new();
    for path in [
        "//mcp",
        "/./mcp",
        "/mcp/.",
        "/mcp/..",
        "/mcp/../admin",
        "/healthz/../mcp",
        "/%6dcp",
        "/mcp%2f",
        "/mcp%00",
        "/mcp;x=y",
        "/mcp\\admin",
        "/mcp#x",
        "/mcp//x",
        "/mcp/|",
        "/mc\u{70}\u{301}",
        "/healthz;x",
        "/healthz%20",
    ] {
        rows.push((path, at(path)?, Status(400)));
    }
    for path in ["/Mcp", "/mcpx", "/healthz/", "/healthz?token=x", "/admin"] {
        rows.push((path, at(path)?, Status(404)));
    }
    let rows: Vec<_> = rows.iter().map(|(what, bytes, expect)| (*what, bytes.clone(), *expect)).collect();
    refuse(&guarded, &rows)
}
