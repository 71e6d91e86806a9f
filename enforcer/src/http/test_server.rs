//! A typical server for tests.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use crate::policy::{Algorithm, Issuer, KeySource, Listen, Metadata, Server};

/// A server at `https://mcp.example.com` and this path.
pub(crate) fn server(path: &str) -> Server {
    let issuer = Issuer {
        name: "corp".into(),
        issuer: "https://login.example.com".into(),
        keys: KeySource::Discovery,
        ca_file: None,
        allow_http_loopback: false,
        algorithms: vec![Algorithm::ES256],
        leeway: Duration::from_secs(30),
        max_token_lifetime: Duration::from_secs(3600),
        token_types: vec!["at+jwt".into()],
        refresh_interval: Duration::from_secs(300),
        max_staleness: Duration::from_secs(3600),
    };
    Server {
        name: "tools".into(),
        listen: vec![Listen { addr: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 8080 }],
        resource: format!("https://mcp.example.com{path}"),
        aliases: Vec::new(),
        path: path.into(),
        public_paths: vec!["/healthz".into()],
        issuers: vec![Arc::new(issuer)],
        scopes: vec!["mcp:tools".into()],
        metadata: Metadata {
            serve: true,
            resource_name: Some("Tools".into()),
            scopes_supported: vec!["mcp:tools".into(), "mcp:admin".into()],
        },
        hosts: vec!["mcp.example.com".into(), "localhost:8080".into()],
        origins: vec!["https://app.example.com".into()],
        callers: None,
        bind: Vec::new(),
        limits: Vec::new(),
    }
}
