//! The MCP client: the SDK's, with the refusals of the HTTP layer made visible.

use std::error::Error;
use std::time::Duration;

use rmcp::model::{CallToolRequestParams, CallToolResult, ClientConfig, JsonObject, ProtocolVersion};
use rmcp::service::{ClientInitializeError, RunningService, ServiceError};
use rmcp::transport::StreamableHttpClientTransport;
use rmcp::transport::streamable_http_client::{
    AuthRequiredError, HttpStatusError, InsufficientScopeError, StreamableHttpClientTransportConfig,
    StreamableHttpError,
};
use rmcp::{ClientLifecycleMode, ClientServiceExt, RoleClient};
use serde::Serialize;
use serde_json::Value;
use thiserror::Error;

/// How a tool call ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum CallOutcome {
    /// The tool answered.
    Answered {
        /// Its text contents, joined by line ends.
        text: String,
        /// The tool says that it failed.
        is_error: bool,
        /// The protocol version in use.
        protocol: String,
    },
    /// The request was refused in HTTP.
    Refused {
        /// The status code.
        status: u16,
        /// The challenge. The SDK hands it out for 401 and 403 only.
        www_authenticate: Option<String>,
    },
    /// A JSON-RPC error came back. The SDK does not say with which status: a 400 or 404 with an
    /// error object as its body ends here too.
    RpcError {
        /// The error's code.
        code: i32,
        /// Its message.
        message: String,
    },
}

/// A call that came to no outcome.
#[derive(Debug, Error)]
pub enum CallError {
    /// The arguments are no JSON object.
    #[error("tool arguments must be a JSON object, not {0}")]
    Arguments(Value),
    /// The HTTP client can't be made.
    #[error("cannot set up the HTTP client: {0}")]
    Setup(#[source] reqwest::Error),
    /// Connecting, the handshake or discovery failed.
    #[error("cannot start a session: {0}")]
    Start(#[source] Box<ClientInitializeError>),
    /// The call failed on its way.
    #[error("tool call: {0}")]
    Call(#[source] ServiceError),
    /// Nothing came back in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The blocking form could not start its runtime.
    #[error("cannot start a runtime: {0}")]
    Runtime(#[source] std::io::Error),
}

/// A session (or what stands for one since 2026-07-28) that several calls can use.
pub struct Session {
    service: RunningService<RoleClient, ClientConfig>,
    protocol: ProtocolVersion,
}

/// Either a session or how the attempt to get one was refused.
type Started = Result<Session, CallOutcome>;

impl Session {
    /// Connects to `url` with a bearer token (or none): by `initialize` for a protocol version that
    /// has it, else by `server/discover`.
    ///
    /// # Errors
    /// When there is no answer in HTTP. A refusal is the inner `Err`.
    pub async fn start(
        url: &str,
        token: Option<&str>,
        protocol: &ProtocolVersion,
    ) -> Result<Started, CallError> {
        // A second call finds a provider installed, which is as good.
        drop(rustls::crypto::ring::default_provider().install_default());
        let http = reqwest::Client::builder().no_proxy().build().map_err(CallError::Setup)?;
        let mut config = StreamableHttpClientTransportConfig::with_uri(url);
        config.auth_header = token.map(str::to_owned);
        let transport = StreamableHttpClientTransport::with_client(http, config);
        let lifecycle = if protocol.has_initialize() {
            ClientLifecycleMode::Initialize
        } else {
            ClientLifecycleMode::Discover { preferred_versions: vec![protocol.clone()] }
        };
        let info = ClientConfig::default().with_protocol_version(protocol.clone());
        match info.serve_with_lifecycle(transport, lifecycle).await {
            Ok(service) => Ok(Ok(Self { service, protocol: protocol.clone() })),
            Err(ClientInitializeError::JsonRpcError(error)) => {
                Ok(Err(CallOutcome::RpcError { code: error.code.0, message: error.message.into_owned() }))
            }
            Err(error) => match refusal(&error) {
                Some(outcome) => Ok(Err(outcome)),
                None => Err(CallError::Start(Box::new(error))),
            },
        }
    }

    /// Calls a tool.
    ///
    /// # Errors
    /// When `arguments` is no object, or there is no answer in HTTP.
    pub async fn call(&self, tool: &str, arguments: Value) -> Result<CallOutcome, CallError> {
        let Value::Object(arguments) = arguments else { return Err(CallError::Arguments(arguments)) };
        let arguments: JsonObject = arguments;
        let request = CallToolRequestParams::new(tool.to_owned()).with_arguments(arguments);
        match self.service.call_tool(request).await {
            Ok(result) => Ok(self.answered(&result)),
            Err(ServiceError::McpError(error)) => {
                Ok(CallOutcome::RpcError { code: error.code.0, message: error.message.into_owned() })
            }
            Err(error) => refusal(&error).ok_or(CallError::Call(error)),
        }
    }

    /// Ends the session (a legacy one by DELETE).
    pub async fn close(self) {
        // The peer may be gone already; that is as closed as it gets.
        drop(self.service.cancel().await);
    }

    fn answered(&self, result: &CallToolResult) -> CallOutcome {
        let texts: Vec<&str> = result
            .content
            .iter()
            .filter_map(|block| block.as_text())
            .map(|text| text.text.as_str())
            .collect();
        let negotiated = self.service.peer_info().map(|info| info.protocol_version.clone());
        CallOutcome::Answered {
            text: texts.join("\n"),
            is_error: result.is_error.unwrap_or(false),
            protocol: negotiated.unwrap_or_else(|| self.protocol.clone()).to_string(),
        }
    }
}

/// Session, one tool call, end of session.
///
/// # Errors
/// As [`Session::start`] and [`Session::call`]; [`CallError::Timeout`] when all that takes longer than `timeout`.
pub async fn call_tool(
    url: &str,
    token: Option<&str>,
    protocol: &ProtocolVersion,
    tool: &str,
    arguments: Value,
    timeout: Duration,
) -> Result<CallOutcome, CallError> {
    let work = async {
        let session = match Session::start(url, token, protocol).await? {
            Ok(session) => session,
            Err(refused) => return Ok(refused),
        };
        let outcome = session.call(tool, arguments).await;
        session.close().await;
        outcome
    };
    tokio::time::timeout(timeout, work).await.map_err(|_| CallError::Timeout(timeout))?
}

/// [`call_tool`] for callers without a runtime.
///
/// # Errors
/// As [`call_tool`].
pub fn call_tool_blocking(
    url: &str,
    token: Option<&str>,
    protocol: &ProtocolVersion,
    tool: &str,
    arguments: Value,
    timeout: Duration,
) -> Result<CallOutcome, CallError> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CallError::Runtime)?;
    runtime.block_on(call_tool(url, token, protocol, tool, arguments, timeout))
}

/// Looks for the HTTP layer's refusal among an error's causes.
fn refusal(error: &(dyn Error + 'static)) -> Option<CallOutcome> {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(found) = http_refusal(cause) {
            return Some(found);
        }
        // The SDK's boxed transport errors are not all linked as sources.
        next = match cause.downcast_ref::<ClientInitializeError>() {
            Some(ClientInitializeError::TransportError { error, .. }) => Some(error.error.as_ref()),
            Some(ClientInitializeError::LegacyFallbackFailed { fallback, .. }) => Some(fallback.as_ref()),
            _ => match cause.downcast_ref::<ServiceError>() {
                Some(ServiceError::TransportSend(error)) => Some(error.error.as_ref()),
                _ => cause.source(),
            },
        };
    }
    None
}

fn http_refusal(cause: &(dyn Error + 'static)) -> Option<CallOutcome> {
    let refused = |status, challenge: Option<&String>| {
        Some(CallOutcome::Refused { status, www_authenticate: challenge.cloned() })
    };
    if let Some(error) = cause.downcast_ref::<AuthRequiredError>() {
        return refused(401, Some(&error.www_authenticate_header));
    }
    if let Some(error) = cause.downcast_ref::<InsufficientScopeError>() {
        return refused(403, Some(&error.www_authenticate_header));
    }
    if let Some(error) = cause.downcast_ref::<HttpStatusError>() {
        return refused(error.status, None);
    }
    match cause.downcast_ref::<StreamableHttpError<reqwest::Error>>()? {
        StreamableHttpError::AuthRequired(error) => refused(401, Some(&error.www_authenticate_header)),
        StreamableHttpError::InsufficientScope(error) => refused(403, Some(&error.www_authenticate_header)),
        StreamableHttpError::HttpStatus(error) => refused(error.status, None),
        StreamableHttpError::Client(error) => refused(error.status()?.as_u16(), None),
        // The SDK's text for every other status: "HTTP 400 Bad Request: <body>".
        StreamableHttpError::UnexpectedServerResponse(text) => {
            refused(text.strip_prefix("HTTP ")?.split(' ').next()?.parse().ok()?, None)
        }
        _ => None,
    }
}
