//! Policies, field by field.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::issuer::Issuer;

/// A policy in the making; written as JSON, which is YAML.
#[derive(Debug, Clone)]
pub struct PolicySpec {
    mode: &'static str,
    fields: Map<String, Value>,
    issuers: Vec<IssuerSpec>,
    servers: Vec<ServerSpec>,
}

impl PolicySpec {
    /// An enforcing policy.
    #[must_use]
    pub fn new(issuers: Vec<IssuerSpec>, servers: Vec<ServerSpec>) -> Self {
        Self { mode: "enforce", fields: Map::new(), issuers, servers }
    }

    /// Lets everything pass, and counts what would have been refused.
    #[must_use]
    pub fn observing(mut self) -> Self {
        self.mode = "observe";
        self
    }

    /// Sets `daemon_timeout`, a duration as policies write it.
    #[must_use]
    pub fn daemon_timeout(self, timeout: &str) -> Self {
        self.with("daemon_timeout", timeout)
    }

    /// Sets any field of the top level.
    #[must_use]
    pub fn with(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.fields.insert(field.to_owned(), value.into());
        self
    }

    /// One source may send so many heads that nobody knows as no test does.
    #[must_use]
    pub fn any_number_of_unknown(self) -> Self {
        self.with("unknown_requests", any_number())
    }

    /// The document.
    #[must_use]
    pub fn document(&self) -> Value {
        let mut document = json!({
            "version": 1,
            "mode": self.mode,
            "issuers": self.issuers.iter().map(|issuer| &issuer.fields).collect::<Vec<_>>(),
            "servers": self.servers.iter().map(|server| &server.fields).collect::<Vec<_>>(),
        });
        for (field, value) in &self.fields {
            document[field] = value.clone();
        }
        document
    }

    /// Writes `policy.yaml` and the key sets `NAME.jwks` into `directory`.
    ///
    /// # Errors
    /// When a file can't be written.
    pub fn write(&self, directory: &Path) -> Result<()> {
        for issuer in &self.issuers {
            if let Some((name, keys)) = &issuer.key_file {
                keys.write_jwks(&directory.join(format!("{name}.jwks")))?;
            }
        }
        fs::write(directory.join("policy.yaml"), serde_json::to_vec_pretty(&self.document())?)?;
        Ok(())
    }
}

/// One issuer of a policy.
#[derive(Debug, Clone)]
pub struct IssuerSpec {
    fields: Map<String, Value>,
    key_file: Option<(String, Issuer)>,
}

impl IssuerSpec {
    /// An issuer whose keys lie in a file beside the policy.
    #[must_use]
    pub fn from_file(name: &str, issuer: &Issuer) -> Self {
        let keys = json!({ "file": format!("{name}.jwks") });
        Self { fields: fields(name, issuer, keys), key_file: Some((name.to_owned(), issuer.clone())) }
    }

    /// An issuer whose keys come over plain http from a loopback address.
    #[must_use]
    pub fn from_url(name: &str, issuer: &Issuer, url: &str) -> Self {
        let mut fields = fields(name, issuer, json!({ "url": url }));
        fields.insert("allow_http_loopback".to_owned(), json!(true));
        Self { fields, key_file: None }
    }

    /// Sets any field.
    #[must_use]
    pub fn with(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.fields.insert(field.to_owned(), value.into());
        self
    }
}

fn fields(name: &str, issuer: &Issuer, keys: Value) -> Map<String, Value> {
    Map::from_iter([
        ("name".to_owned(), json!(name)),
        ("issuer".to_owned(), json!(issuer.uri())),
        ("keys".to_owned(), keys),
        ("algorithms".to_owned(), json!([issuer.alg().name()])),
    ])
}

/// One server of a policy.
#[derive(Debug, Clone)]
pub struct ServerSpec {
    fields: Map<String, Value>,
}

impl ServerSpec {
    /// A server that takes tokens of the issuer called `corp`; its path is that of `resource`.
    #[must_use]
    pub fn new(name: &str, listen: &[SocketAddr], resource: &str) -> Self {
        let listen: Vec<String> = listen.iter().map(ToString::to_string).collect();
        let fields = Map::from_iter([
            ("name".to_owned(), json!(name)),
            ("listen".to_owned(), json!(listen)),
            ("resource".to_owned(), json!(resource)),
            ("issuers".to_owned(), json!(["corp"])),
        ]);
        Self { fields }
    }

    /// Sets any field.
    #[must_use]
    pub fn with(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.fields.insert(field.to_owned(), value.into());
        self
    }
}

/// A limit that no test reaches.
#[must_use]
pub fn any_number() -> Value {
    json!({"rate": "1000000/s", "burst": 1_000_000})
}
