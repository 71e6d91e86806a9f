//! The HTTP client for key sets and metadata.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use url::{Host, Url};

use super::fetch::{FetchError, MAX_DOCUMENT_BYTES, Remote};

/// Bound for connecting, and for a whole request with its body.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// A client for one fetch: https by `ring` with the issuer's certificate authorities, HTTP/1.1, no redirects, no proxy
/// (a proxy from the environment would see, and could answer, what decides about all access), no cookies.
///
/// Made anew for each fetch. Fetches are minutes apart, and so changed certificate authorities need no restart.
pub(super) struct Transport {
    client: reqwest::Client,
    allow_http_loopback: bool,
}

impl Transport {
    pub(super) async fn new(remote: &Remote) -> Result<Self, FetchError> {
        let ca = remote.ca.clone();
        let tls = tokio::task::spawn_blocking(move || tls_config(ca.as_ref()))
            .await
            .map_err(|error| FetchError::Task { defect: error.to_string() })??;
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .connect_timeout(REQUEST_TIMEOUT)
            .timeout(REQUEST_TIMEOUT)
            .pool_max_idle_per_host(0)
            .user_agent(concat!("enforcer/", env!("CARGO_PKG_VERSION")))
            // The loopback exception goes by this name, so the name must mean loopback. The port is the URL's.
            .resolve_to_addrs(
                "localhost",
                &[SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), SocketAddr::from((Ipv6Addr::LOCALHOST, 0))],
            )
            .build()
            .map_err(|error| FetchError::Client { defect: chain(&error) })?;
        Ok(Self { client, allow_http_loopback: remote.allow_http_loopback })
    }

    /// The body of a 200 answer, of bounded size.
    pub(super) async fn get(&self, url: &Url) -> Result<Vec<u8>, FetchError> {
        check_url(url, self.allow_http_loopback)?;
        let shown = display_url(url);
        let failed = |error: reqwest::Error| FetchError::Request {
            url: shown.clone(),
            defect: chain(&error.without_url()),
        };
        let request =
            self.client.get(url.clone()).header("accept", "application/json, application/jwk-set+json");
        let mut response = request.send().await.map_err(failed)?;
        if response.status() != 200 {
            return Err(FetchError::Status { url: shown, status: response.status().as_u16() });
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if (body.len() + chunk.len()) as u64 > MAX_DOCUMENT_BYTES {
                return Err(FetchError::TooLarge { origin: shown });
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

/// https, or http to a host that is loopback by its spelling, where policy allows that.
pub(super) fn check_url(url: &Url, allow_http_loopback: bool) -> Result<(), FetchError> {
    let loopback = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => IpAddr::V4(address).is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::V6(address).is_loopback(),
        None => false,
    };
    match url.scheme() {
        "https" if url.host().is_some() => Ok(()),
        "http" if allow_http_loopback && loopback => Ok(()),
        _ => Err(FetchError::NotHttps { url: display_url(url) }),
    }
}

/// A URL for messages: without user, password, query and fragment.
pub(super) fn display_url(url: &Url) -> String {
    let mut shown = url.clone();
    shown.set_query(None);
    shown.set_fragment(None);
    // Fails only for URLs that can't have them.
    let _ = shown.set_username("");
    let _ = shown.set_password(None);
    shown.into()
}

fn tls_config(ca: Option<&(String, String)>) -> Result<ClientConfig, FetchError> {
    let roots = match ca {
        Some((path, text)) => roots_of_file(path, text)?,
        None => system_roots()?,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| FetchError::Client { defect: error.to_string() })?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

fn roots_of_file(path: &str, text: &str) -> Result<RootCertStore, FetchError> {
    let failed = |defect: String| FetchError::CaFile { path: path.to_owned(), defect };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(text.as_bytes()) {
        let certificate = certificate.map_err(|error| failed(error.to_string()))?;
        roots.add(certificate).map_err(|error| failed(error.to_string()))?;
    }
    if roots.is_empty() { Err(failed("no certificate in it".to_owned())) } else { Ok(roots) }
}

fn system_roots() -> Result<RootCertStore, FetchError> {
    let loaded = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // Some systems ship roots that webpki can't read; the others still count.
    let (_, _) = roots.add_parsable_certificates(loaded.certs);
    if roots.is_empty() {
        let defect = loaded.errors.first().map_or_else(|| "none found".to_owned(), ToString::to_string);
        return Err(FetchError::SystemRoots { defect });
    }
    Ok(roots)
}

/// An error with its causes, which is where HTTP clients say what really happened.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
