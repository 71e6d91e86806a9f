//! Requests as exact bytes.

/// A request, built line by line: nothing is added, sorted or normalised.
#[derive(Debug, Clone)]
pub struct RequestBuilder {
    line: String,
    headers: Vec<u8>,
    body: Vec<u8>,
}

impl RequestBuilder {
    /// `METHOD TARGET HTTP/1.1`, without any header.
    #[must_use]
    pub fn new(method: &str, target: &str) -> Self {
        Self::with_request_line(&format!("{method} {target} HTTP/1.1"))
    }

    /// Any request line.
    #[must_use]
    pub fn with_request_line(line: &str) -> Self {
        Self { line: line.to_owned(), headers: Vec::new(), body: Vec::new() }
    }

    /// An MCP call as a client of 2026-07-28 sends it: POST, `Host`, `Accept`, the protocol headers,
    /// `Authorization` when there is a token, and a `tools/call` body with its length.
    #[must_use]
    pub fn mcp_call(host: &str, path: &str, token: Option<&str>, tool: &str) -> Self {
        let body = serde_json::json!({
            "jsonrpc": "2.0", "id": 1, "method": "tools/call",
            "params": {
                "name": tool,
                "arguments": { "text": "hello" },
                "_meta": {
                    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
                    "io.modelcontextprotocol/clientCapabilities": {},
                },
            },
        });
        let mut request = Self::new("POST", path)
            .header("Host", host)
            .header("User-Agent", "enforcer-tests/0.1")
            .header("Accept", "application/json, text/event-stream")
            .header("Content-Type", "application/json")
            .header("MCP-Protocol-Version", "2026-07-28")
            .header("Mcp-Method", "tools/call")
            .header("Mcp-Name", tool);
        if let Some(token) = token {
            request = request.bearer(token);
        }
        request.body(body.to_string().as_bytes())
    }

    /// Adds `Name: value`.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        self
    }

    /// Adds bytes to the head as they are (a broken line, a bare LF); no CRLF is put behind them.
    #[must_use]
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.headers.extend_from_slice(bytes);
        self
    }

    /// Adds `Authorization: Bearer TOKEN`.
    #[must_use]
    pub fn bearer(self, token: &str) -> Self {
        self.header("Authorization", &format!("Bearer {token}"))
    }

    /// Adds `Content-Length` and the body.
    #[must_use]
    pub fn body(self, body: &[u8]) -> Self {
        let mut request = self.header("Content-Length", &body.len().to_string());
        request.body = body.to_vec();
        request
    }

    /// Adds a body and no header for it.
    #[must_use]
    pub fn bare_body(mut self, body: &[u8]) -> Self {
        self.body = body.to_vec();
        self
    }

    /// Adds `Transfer-Encoding: chunked` and the body in chunks of `chunk_bytes` (at least 1).
    #[must_use]
    pub fn chunked_body(self, body: &[u8], chunk_bytes: usize) -> Self {
        let mut request = self.header("Transfer-Encoding", "chunked");
        for chunk in body.chunks(chunk_bytes.max(1)) {
            request.body.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            request.body.extend_from_slice(chunk);
            request.body.extend_from_slice(b"\r\n");
        }
        request.body.extend_from_slice(b"0\r\n\r\n");
        request
    }

    /// The head with its blank line.
    #[must_use]
    pub fn head(&self) -> Vec<u8> {
        [self.line.as_bytes(), b"\r\n", &self.headers, b"\r\n"].concat()
    }

    /// Head and body.
    #[must_use]
    pub fn build(&self) -> Vec<u8> {
        [self.head().as_slice(), &self.body].concat()
    }
}
