//! One attempt at an issuer's keys: from a file, a URL, or by discovery.

use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use url::Url;

use super::fetcher;
use super::transport::{Transport, display_url};
use super::{KeySet, KeySetError};
use crate::policy::{Issuer, KeySource};
use crate::token::{Quoted, json};

/// Largest key set or metadata document, in bytes.
pub(super) const MAX_DOCUMENT_BYTES: u64 = 1024 * 1024;
/// Bound for one attempt in all, with every request of a discovery.
pub(super) const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(12);

/// What a successful fetch brought.
#[derive(Debug)]
pub enum Fetched {
    /// A key set that replaces the one before.
    Keys(KeySet),
    /// The source is there and has not changed since the last fetch.
    Unchanged,
}

/// Why a fetch failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum FetchError {
    /// The file can't be read.
    #[error("can't read {path}: {source}")]
    File { path: String, source: io::Error },
    /// A pipe, device or directory.
    #[error("{path} is not a regular file")]
    NotRegularFile { path: String },
    /// The document is larger than any key set.
    #[error("{origin} is larger than {MAX_DOCUMENT_BYTES} bytes")]
    TooLarge { origin: String },
    /// Neither https nor http to loopback where policy allows that.
    #[error("{url} is not https (plain http is for loopback hosts only, with allow_http_loopback)")]
    NotHttps { url: String },
    /// A URL that can't be used.
    #[error("{url} is not usable: {defect}")]
    Url { url: String, defect: &'static str },
    /// The CA file holds no certificate, or can't be read.
    #[error("can't load certificate authorities from {path}: {defect}")]
    CaFile { path: String, defect: String },
    /// The host has no certificate authorities.
    #[error("can't load the system's certificate authorities: {defect}")]
    SystemRoots { defect: String },
    /// TLS or HTTP client set-up.
    #[error("can't set up the https client: {defect}")]
    Client { defect: String },
    /// Name resolution, connection, TLS or HTTP failed, or took too long.
    #[error("can't fetch {url}: {defect}")]
    Request { url: String, defect: String },
    /// Not 200; redirects are not followed.
    #[error("{url} answered {status}, expected 200 (redirects are not followed)")]
    Status { url: String, status: u16 },
    /// The document is not a key set.
    #[error("{origin}: {source}")]
    KeySet { origin: String, source: KeySetError },
    /// No metadata document could be used; says what was tried.
    #[error("no usable issuer metadata: {tried}")]
    Discovery { tried: String },
    /// A metadata document speaks for another issuer (RFC 8414, section 3.3).
    #[error("the metadata at {url} is for issuer {found}, expected {expected}")]
    IssuerMismatch { url: String, found: Quoted, expected: Quoted },
    /// A metadata document without a key set.
    #[error("the metadata at {url} has no usable jwks_uri")]
    NoKeySetUrl { url: String },
    /// "Unchanged", but there is nothing that could stay.
    #[error("the source reports no change of keys that were never loaded")]
    NothingToKeep,
    /// The attempt took too long in all.
    #[error("no key set after {} s", ATTEMPT_TIMEOUT.as_secs())]
    Timeout,
    /// The process that fetches says why it could not.
    #[error("{text}")]
    Remote { text: String },
    /// The fetching task died.
    #[error("the fetch ended early: {defect}")]
    Task { defect: String },
}

/// Identity and age of a file's content, to see a change without reading it. The inode and ctime catch a replacement
/// with the same size and mtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileStamp {
    device: u64,
    inode: u64,
    size_bytes: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

/// Fetches the keys of `issuer`. `known` is the stamp of the file as last read.
pub(super) async fn fetch(
    issuer: &Issuer,
    known: Option<FileStamp>,
) -> Result<(Fetched, Option<FileStamp>), FetchError> {
    let attempt = async {
        match &issuer.keys {
            KeySource::File(path) => {
                let path = path.clone();
                tokio::task::spawn_blocking(move || read_key_file(&path, known))
                    .await
                    .map_err(|error| FetchError::Task { defect: error.to_string() })?
            }
            KeySource::Url(_) | KeySource::Discovery => {
                let remote = Remote::of(issuer)?;
                let (origin, document) = match fetcher::fetch(&remote).await {
                    Some(fetched) => fetched?,
                    None => fetch_document(&remote).await?,
                };
                let keys =
                    KeySet::parse(&document).map_err(|source| FetchError::KeySet { origin, source })?;
                Ok((Fetched::Keys(keys), None))
            }
        }
    };
    tokio::time::timeout(ATTEMPT_TIMEOUT, attempt).await.unwrap_or(Err(FetchError::Timeout))
}

/// What a fetch over the network needs to know. No secret, and nothing that only root can read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Remote {
    /// The issuer's identifier.
    pub(super) issuer: String,
    /// Where its key set is; `None`: ask its metadata.
    pub(super) key_set_url: Option<String>,
    /// Plain http to loopback is fine.
    pub(super) allow_http_loopback: bool,
    /// Name and text of the file with its certificate authorities; `None`: the system's.
    pub(super) ca: Option<(String, String)>,
}

impl Remote {
    fn of(issuer: &Issuer) -> Result<Self, FetchError> {
        let ca = issuer.ca_file.as_ref().map(|path| {
            let shown = path.display().to_string();
            match std::fs::read_to_string(path) {
                Ok(text) => Ok((shown, text)),
                Err(error) => Err(FetchError::CaFile { path: shown, defect: error.to_string() }),
            }
        });
        Ok(Self {
            issuer: issuer.issuer.clone(),
            key_set_url: match &issuer.keys {
                KeySource::Url(url) => Some(url.to_string()),
                KeySource::Discovery | KeySource::File(_) => None,
            },
            allow_http_loopback: issuer.allow_http_loopback,
            ca: ca.transpose()?,
        })
    }
}

/// A key set that is not parsed yet, and where it is from.
pub(super) async fn fetch_document(remote: &Remote) -> Result<(String, Vec<u8>), FetchError> {
    let transport = Transport::new(remote).await?;
    let url = match &remote.key_set_url {
        Some(url) => Url::parse(url).map_err(|_| FetchError::Url {
            url: Quoted::new(url).to_string(),
            defect: "not an absolute URL",
        })?,
        None => discover(&transport, &remote.issuer).await?,
    };
    Ok((display_url(&url), transport.get(&url).await?))
}

/// The issuer's `jwks_uri`: RFC 8414 first, then OpenID Connect Discovery. A document for another issuer ends the search.
async fn discover(transport: &Transport, issuer: &str) -> Result<Url, FetchError> {
    let mut tried = Vec::new();
    for url in metadata_urls(issuer)? {
        let document = match transport.get(&url).await {
            Ok(document) => document,
            Err(error) => {
                tried.push(error.to_string());
                continue;
            }
        };
        let Ok(metadata) = json::parse_object(&document) else {
            tried.push(format!("{} is not a JSON object without duplicate members", display_url(&url)));
            continue;
        };
        match metadata.get("issuer").and_then(Value::as_str) {
            Some(found) if found == issuer => {}
            found => {
                return Err(FetchError::IssuerMismatch {
                    url: display_url(&url),
                    found: Quoted::new(found.unwrap_or("")),
                    expected: Quoted::new(issuer),
                });
            }
        }
        return metadata
            .get("jwks_uri")
            .and_then(Value::as_str)
            .and_then(|jwks_uri| Url::parse(jwks_uri).ok())
            .ok_or_else(|| FetchError::NoKeySetUrl { url: display_url(&url) });
    }
    Err(FetchError::Discovery { tried: tried.join("; ") })
}

/// Where an issuer's metadata may be: RFC 8414, section 3.1 (well-known part between host and path), the same for
/// OpenID Connect (section 5), and OpenID Connect Discovery 1.0, section 4 (appended).
pub(super) fn metadata_urls(issuer: &str) -> Result<Vec<Url>, FetchError> {
    let defect = |defect| FetchError::Url { url: Quoted::new(issuer).to_string(), defect };
    let base = Url::parse(issuer).map_err(|_| defect("not an absolute URL"))?;
    if base.query().is_some() || base.fragment().is_some() {
        return Err(defect("an issuer identifier has neither query nor fragment (RFC 8414, section 2)"));
    }
    let path = base.path().trim_end_matches('/').to_owned();
    let mut paths = vec![
        format!("/.well-known/oauth-authorization-server{path}"),
        format!("/.well-known/openid-configuration{path}"),
    ];
    if !path.is_empty() {
        paths.push(format!("{path}/.well-known/openid-configuration"));
    }
    Ok(paths
        .into_iter()
        .map(|path| {
            let mut url = base.clone();
            url.set_path(&path);
            url
        })
        .collect())
}

fn read_key_file(path: &Path, known: Option<FileStamp>) -> Result<(Fetched, Option<FileStamp>), FetchError> {
    let shown = path.display().to_string();
    let failed = |source| FetchError::File { path: shown.clone(), source };
    // Not to hang on a pipe that nobody writes to.
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(FetchError::NotRegularFile { path: shown });
    }
    // Taken before reading: a change in between is seen next time.
    let stamp = FileStamp {
        device: metadata.dev(),
        inode: metadata.ino(),
        size_bytes: metadata.size(),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        ctime: (metadata.ctime(), metadata.ctime_nsec()),
    };
    if known == Some(stamp) {
        return Ok((Fetched::Unchanged, known));
    }
    let mut document = Vec::new();
    file.take(MAX_DOCUMENT_BYTES + 1).read_to_end(&mut document).map_err(failed)?;
    if document.len() as u64 > MAX_DOCUMENT_BYTES {
        return Err(FetchError::TooLarge { origin: shown });
    }
    let set =
        KeySet::parse(&document).map_err(|source| FetchError::KeySet { origin: shown.clone(), source })?;
    Ok((Fetched::Keys(set), Some(stamp)))
}
