//! The axum server: what a usual Rust service does with a request.

use std::convert::Infallible;

use anyhow::Result;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use futures::stream;
use http_body_util::BodyExt;
use ring::digest::{Context, SHA256};

use crate::wire::query_number;

/// Serves on `listener` until the task is dropped. See [`super`] for the answers.
///
/// # Errors
/// When accepting fails for good.
pub async fn serve_axum(listener: tokio::net::TcpListener) -> Result<()> {
    let router = Router::new().route("/sse", any(events)).fallback(echo);
    Ok(axum::serve(listener, router).await?)
}

async fn echo(request: Request) -> Response {
    let (parts, mut body) = request.into_parts();
    let (mut hash, mut length) = (Context::new(&SHA256), 0_u64);
    while let Some(frame) = body.frame().await {
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
        };
        // Anything but data is trailers.
        if let Ok(data) = frame.into_data() {
            hash.update(&data);
            length += data.len() as u64;
        }
    }
    let sha256: String = hash.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    axum::Json(serde_json::json!({
        "method": parts.method.as_str(), "path": parts.uri.to_string(), "len": length, "sha256": sha256,
    }))
    .into_response()
}

async fn events(request: Request) -> Response {
    let target = request.uri().to_string();
    let count = query_number(&target, "events").unwrap_or(1);
    let data = "x".repeat(query_number(&target, "bytes").and_then(|n| usize::try_from(n).ok()).unwrap_or(10));
    let events = (0..count)
        .map(move |number| Ok::<_, Infallible>(Bytes::from(format!("id: {number}\ndata: {data}\n\n"))));
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(stream::iter(events))).into_response()
}
