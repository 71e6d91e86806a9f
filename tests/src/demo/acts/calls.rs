//! Calls that are allowed, and a connection that several callers share.

use std::io::Write;

use anyhow::Result;

use super::{CALL_LIMIT, LEGACY_VERSION, Show};
use crate::mcp;
use crate::raw::{Connection, RequestBuilder};

impl<W: Write> Show<'_, W> {
    pub(super) async fn good_token(&mut self) -> Result<()> {
        self.narrator.step("A tool call with a token for this server").await?;
        for (index, protocol) in [mcp::newest_version(), mcp::version(LEGACY_VERSION)?].iter().enumerate() {
            let how =
                if protocol.has_initialize() { "legacy: with handshake and session" } else { "the newest" };
            self.narrator
                .done(&format!("alice's client calls `add` with 2 and 3 in MCP {protocol} ({how})"))?;
            if index == 0 {
                self.narrator.promised("the server's answer")?;
            }
            let mint = self.sound("alice")?;
            let token = self.sign(&mint)?;
            let outcome = self.add(Some(&token), protocol).await?;
            self.should_be_answered(&outcome, protocol)?;
        }
        Ok(())
    }

    /// Alice, bob and carol take turns twice: the first time the kernel knows none of the three heads, the second time all.
    pub(super) async fn two_tokens_on_one_connection(&mut self) -> Result<Connection> {
        self.narrator.step("Other tokens on the same connection").await?;
        let (addr, host) = (self.stage.addr()?, self.stage.addr()?.to_string());
        let turns = [
            ("alice", "a token for this server", 200, self.sound("alice")?),
            ("bob", "another token for this server", 200, self.sound("bob")?),
            ("carol", "a token for another server", 401, self.for_another_server("carol")?),
        ];
        let mut requests = Vec::new();
        for (who, _, status, mint) in &turns {
            let token = self.sign(mint)?;
            let request = RequestBuilder::mcp_call(&host, "/mcp", Some(&token), "echo").build();
            requests.push((*who, *status, request));
        }
        self.narrator.done("one keep-alive connection, on which six requests follow each other:")?;
        self.narrator.line(
            "            alice, bob and carol (her token is for another server), and all three again",
        )?;
        self.narrator
            .promised("each is judged by its own token: 200, 200, 401, 200, 200, 401, on one connection")?;
        let mut connection = Connection::open(addr, CALL_LIMIT)?;
        let mut kept = true;
        let mut answers = Vec::new();
        for (who, status, request) in requests.iter().chain(&requests) {
            let response = connection.roundtrip(request)?;
            let echoed = String::from_utf8_lossy(&response.body).contains("hello");
            // An answer of the server holds the echoed text, a refusal must not.
            kept &= response.status == *status && echoed == (*status == 200);
            answers.push(format!("{who} {}", response.status));
        }
        self.narrator.happened(kept, &answers.join(", "))?;
        Ok(connection)
    }
}
