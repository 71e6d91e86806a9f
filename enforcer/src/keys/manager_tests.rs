//! Fetching from real files and real loopback servers.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use url::Url;

use super::fetch::{fetch, metadata_urls};
use super::transport::check_url;
use super::{FetchError, Fetched, Freshness, KeyManager, KeyManagerHandle};
use crate::policy::{Algorithm, DEFAULT_DAEMON_TIMEOUT, DEFAULT_UNKNOWN, Issuer, KeySource, Mode, Policy};
use crate::token::testing::{TestKey, issuer};

fn jwks(kids: &[&str]) -> String {
    let keys: Vec<Value> = kids.iter().map(|kid| TestKey::for_algorithm(Algorithm::ES256).jwk(kid)).collect();
    json!({ "keys": keys }).to_string()
}

/// A server of fixed answers (path to status line and body) on 127.0.0.1; it ends with its runtime.
struct Site {
    origin: String,
    answers: Arc<Mutex<HashMap<String, String>>>,
    requests: Arc<AtomicUsize>,
}

impl Site {
    async fn start(tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let answers = Arc::new(Mutex::new(HashMap::new()));
        let requests = Arc::new(AtomicUsize::new(0));
        let site = Self {
            origin: format!("{scheme}://localhost:{port}"),
            answers: Arc::clone(&answers),
            requests: Arc::clone(&requests),
        };
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (tls, answers, requests) = (tls.clone(), Arc::clone(&answers), Arc::clone(&requests));
                tokio::spawn(async move {
                    match tls {
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                answer(stream, &answers, &requests).await;
                            }
                        }
                        None => answer(stream, &answers, &requests).await,
                    }
                });
            }
        });
        site
    }

    fn set(&self, path: &str, body: &str) {
        self.set_raw(path, &format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
    }

    fn set_raw(&self, path: &str, response: &str) {
        self.answers.lock().unwrap().insert(path.to_owned(), response.to_owned());
    }

    fn url(&self, path: &str) -> Url {
        Url::parse(&format!("{}{path}", self.origin)).unwrap()
    }

    fn issuer(&self, keys: KeySource) -> Issuer {
        Issuer { keys, allow_http_loopback: true, ..issuer("main", &self.origin) }
    }
}

async fn answer(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    answers: &Mutex<HashMap<String, String>>,
    requests: &AtomicUsize,
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read_exact(&mut byte).await.is_err() {
            return;
        }
        head.push(byte[0]);
    }
    requests.fetch_add(1, Ordering::SeqCst);
    let head = String::from_utf8(head).unwrap();
    let path = head.split(' ').nth(1).unwrap().to_owned();
    let response = answers.lock().unwrap().get(&path).cloned();
    match response.as_deref() {
        Some("hang") => tokio::time::sleep(Duration::from_secs(60)).await,
        Some(response) => {
            let _ = stream.write_all(response.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
        None => {
            let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await;
            let _ = stream.shutdown().await;
        }
    }
}

/// A CA, and a server certificate of it for `name`.
fn authority(name: &str) -> (String, TlsAcceptor) {
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let ca = parameters.self_signed(&ca_key).unwrap();
    let ca_pem = ca.pem();
    let authority = rcgen::Issuer::new(parameters, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf =
        rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![leaf.der().clone()],
            rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        )
        .unwrap();
    (ca_pem, TlsAcceptor::from(Arc::new(config)))
}

fn start(issuer: Issuer) -> KeyManagerHandle {
    KeyManager::start(Arc::new(Policy {
        daemon_timeout: DEFAULT_DAEMON_TIMEOUT,
        mode: Mode::Enforce,
        issuers: vec![Arc::new(issuer)],
        servers: Vec::new(),
        workloads: Vec::new(),
        limits: Vec::new(),
        unknown: DEFAULT_UNKNOWN,
        refused: None,
        shield: None,
    }))
}

async fn keys_of(issuer: &Issuer) -> Result<Vec<String>, FetchError> {
    match fetch(issuer, None).await?.0 {
        Fetched::Keys(set) => Ok(set.keys().iter().filter_map(|key| key.id().map(str::to_owned)).collect()),
        Fetched::Unchanged => panic!("nothing was known before"),
    }
}

#[tokio::test]
async fn url_is_fetched_and_a_rotated_key_is_found_by_its_kid() {
    let site = Site::start(None).await;
    site.set("/jwks", &jwks(&["k1"]));
    let issuer = site.issuer(KeySource::Url(site.url("/jwks")));
    let handle = start(issuer.clone());
    assert!(handle.wait_initial(Duration::from_secs(5)).await);
    assert!(handle.snapshot().of_issuer(&issuer).unwrap().contains("k1"));
    assert_eq!(site.requests.load(Ordering::SeqCst), 1);

    // The first fetch was a moment ago: a flood of unknown kids gets answers at once and makes no request.
    site.set("/jwks", &jwks(&["k2"]));
    let begin = Instant::now();
    for n in 0..100 {
        let snapshot = handle.refresh_for_unknown_kid("main", &format!("bad-{n}")).await;
        assert!(snapshot.of_issuer(&issuer).unwrap().contains("k1"));
    }
    assert!(begin.elapsed() < Duration::from_secs(1));
    assert_eq!(site.requests.load(Ordering::SeqCst), 1);
    let status = &handle.status()[0];
    assert_eq!((status.name.as_str(), status.key_count, status.freshness), ("main", 1, Freshness::Fresh));
    assert_eq!(status.last_error, None);
}

#[tokio::test]
async fn a_request_waits_for_the_refresh_that_its_kid_asked_for() {
    // A file may be read again after 1 s.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys.json");
    std::fs::write(&path, jwks(&["k1"])).unwrap();
    let issuer =
        Issuer { keys: KeySource::File(path.clone()), ..issuer("main", "https://issuer.example.com") };
    let handle = start(issuer.clone());
    assert!(handle.wait_initial(Duration::from_secs(5)).await);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    std::fs::write(&path, jwks(&["k2"])).unwrap();
    let snapshot = handle.refresh_for_unknown_kid("main", "k2").await;
    assert!(snapshot.of_issuer(&issuer).unwrap().contains("k2"));
}

#[tokio::test]
async fn a_changed_file_is_read_again_and_a_broken_one_keeps_the_keys() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys.json");
    std::fs::write(&path, jwks(&["k1"])).unwrap();
    let issuer =
        Issuer { keys: KeySource::File(path.clone()), ..issuer("main", "https://issuer.example.com") };
    let handle = start(issuer.clone());
    assert!(handle.wait_initial(Duration::from_secs(5)).await);

    let until = async |what: &str, met: &dyn Fn() -> bool| {
        let begin = Instant::now();
        while !met() {
            assert!(begin.elapsed() < Duration::from_secs(10), "{what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let holds = |kid: &str| handle.snapshot().of_issuer(&issuer).unwrap().contains(kid);
    // Replaced by rename, same size: the way orchestrators do it.
    let next = directory.path().join("next");
    std::fs::write(&next, jwks(&["k2"])).unwrap();
    std::fs::rename(&next, &path).unwrap();
    until("the new file is read", &|| holds("k2")).await;
    std::fs::write(&path, "{").unwrap();
    until("the defect is reported", &|| handle.status()[0].last_error.is_some()).await;
    assert!(holds("k2"));
    std::fs::write(&path, jwks(&["k3"])).unwrap();
    until("a repaired file is read", &|| holds("k3")).await;
    assert_eq!(handle.status()[0].last_error, None);
}

/// Same inode, size and mtime: what a copy that keeps times leaves behind.
#[tokio::test]
async fn a_file_changed_under_a_restored_mtime_is_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys.json");
    std::fs::write(&path, jwks(&["k1"])).unwrap();
    let issuer =
        Issuer { keys: KeySource::File(path.clone()), ..issuer("main", "https://issuer.example.com") };
    let (_, stamp) = fetch(&issuer, None).await.unwrap();
    assert!(matches!(fetch(&issuer, stamp).await.unwrap().0, Fetched::Unchanged));
    let mtime = std::fs::metadata(&path).unwrap().modified().unwrap();
    // Longer than the kernel's time granularity (one tick).
    tokio::time::sleep(Duration::from_millis(30)).await;
    std::fs::write(&path, jwks(&["k2"])).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(mtime).unwrap();
    assert!(matches!(fetch(&issuer, stamp).await.unwrap().0, Fetched::Keys(set) if set.contains("k2")));
}

#[tokio::test]
async fn files_are_regular_and_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| Issuer {
        keys: KeySource::File(directory.path().join(name)),
        ..issuer("main", "https://i")
    };
    assert!(matches!(keys_of(&file("absent")).await, Err(FetchError::File { .. })));
    assert!(matches!(keys_of(&file(".")).await, Err(FetchError::NotRegularFile { .. })));
    nix::unistd::mkfifo(&directory.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(keys_of(&file("pipe")).await, Err(FetchError::NotRegularFile { .. })));
    std::fs::write(directory.path().join("large"), " ".repeat(1024 * 1024 + 1)).unwrap();
    assert!(matches!(keys_of(&file("large")).await, Err(FetchError::TooLarge { .. })));
}

#[tokio::test]
async fn discovery_reads_rfc_8414_and_then_openid() {
    let site = Site::start(None).await;
    site.set("/jwks", &jwks(&["k1"]));
    let metadata = json!({"issuer": site.origin, "jwks_uri": site.url("/jwks").as_str()}).to_string();
    let issuer = site.issuer(KeySource::Discovery);
    assert!(matches!(keys_of(&issuer).await, Err(FetchError::Discovery { .. })));
    site.set("/.well-known/openid-configuration", &metadata);
    assert_eq!(keys_of(&issuer).await.unwrap(), ["k1"]);
    site.set("/.well-known/oauth-authorization-server", "<html>every path answers here</html>");
    assert_eq!(keys_of(&issuer).await.unwrap(), ["k1"]);
    site.set("/other", &jwks(&["k2"]));
    let metadata = json!({"issuer": site.origin, "jwks_uri": site.url("/other").as_str()}).to_string();
    site.set("/.well-known/oauth-authorization-server", &metadata);
    assert_eq!(keys_of(&issuer).await.unwrap(), ["k2"]);
}

#[tokio::test]
async fn metadata_of_another_issuer_is_refused() {
    let site = Site::start(None).await;
    site.set("/jwks", &jwks(&["k1"]));
    let metadata =
        |issuer: &str| json!({"issuer": issuer, "jwks_uri": site.url("/jwks").as_str()}).to_string();
    site.set("/.well-known/openid-configuration", &metadata(&site.origin));
    for other in [format!("{}/", site.origin), site.origin.to_uppercase(), "https://evil.example".to_owned()]
    {
        site.set("/.well-known/oauth-authorization-server", &metadata(&other));
        let error = keys_of(&site.issuer(KeySource::Discovery)).await.unwrap_err();
        assert!(matches!(error, FetchError::IssuerMismatch { .. }), "{error}");
    }
    for bad in [json!({"issuer": site.origin}), json!({"issuer": site.origin, "jwks_uri": "/jwks"})] {
        site.set("/.well-known/oauth-authorization-server", &bad.to_string());
        let error = keys_of(&site.issuer(KeySource::Discovery)).await.unwrap_err();
        assert!(matches!(error, FetchError::NoKeySetUrl { .. }), "{error}");
    }
    // The key set's URL is held to the same rule as the issuer's.
    let plain = json!({"issuer": site.origin, "jwks_uri": "http://192.0.2.1/jwks"}).to_string();
    site.set("/.well-known/oauth-authorization-server", &plain);
    let error = keys_of(&site.issuer(KeySource::Discovery)).await.unwrap_err();
    assert!(matches!(error, FetchError::NotHttps { .. }), "{error}");
}

#[test]
fn metadata_urls_follow_the_rfcs() {
    let urls = |issuer| metadata_urls(issuer).unwrap().iter().map(Url::to_string).collect::<Vec<_>>();
    assert_eq!(
        urls("https://h.example"),
        [
            "https://h.example/.well-known/oauth-authorization-server",
            "https://h.example/.well-known/openid-configuration",
        ]
    );
    assert_eq!(
        urls("https://h.example:8443/a/b/"),
        [
            "https://h.example:8443/.well-known/oauth-authorization-server/a/b",
            "https://h.example:8443/.well-known/openid-configuration/a/b",
            "https://h.example:8443/a/b/.well-known/openid-configuration",
        ]
    );
    for bad in ["h.example", "https://h.example/?x", "https://h.example/#x"] {
        assert!(matches!(metadata_urls(bad), Err(FetchError::Url { .. })), "{bad}");
    }
}

#[tokio::test]
async fn redirects_errors_and_endless_answers_are_refused() {
    let site = Site::start(None).await;
    site.set("/jwks", &jwks(&["k1"]));
    let from = |path: &str| site.issuer(KeySource::Url(site.url(path)));
    site.set_raw("/moved", "HTTP/1.1 302 Found\r\nlocation: /jwks\r\ncontent-length: 0\r\n\r\n");
    assert!(matches!(keys_of(&from("/moved")).await, Err(FetchError::Status { status: 302, .. })));
    assert!(matches!(keys_of(&from("/absent")).await, Err(FetchError::Status { status: 404, .. })));
    site.set("/large", &" ".repeat(1024 * 1024 + 1));
    assert!(matches!(keys_of(&from("/large")).await, Err(FetchError::TooLarge { .. })));
    site.set("/html", "<html>");
    assert!(matches!(keys_of(&from("/html")).await, Err(FetchError::KeySet { .. })));
    site.set_raw("/cut", "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"keys\":[]}");
    assert!(matches!(keys_of(&from("/cut")).await, Err(FetchError::Request { .. })));
}

#[tokio::test]
async fn a_server_that_never_answers_costs_five_seconds() {
    let site = Site::start(None).await;
    site.set_raw("/hang", "hang");
    let begin = Instant::now();
    let error = keys_of(&site.issuer(KeySource::Url(site.url("/hang")))).await.unwrap_err();
    assert!(matches!(error, FetchError::Request { .. }), "{error}");
    assert!((4..11).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn https_needs_a_certificate_of_the_given_authority() {
    let directory = tempfile::tempdir().unwrap();
    let (ca_pem, acceptor) = authority("localhost");
    let (other_pem, _) = authority("localhost");
    let write = |name: &str, text: &str| -> PathBuf {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let site = Site::start(Some(acceptor)).await;
    site.set("/jwks", &jwks(&["k1"]));
    let with_ca = |ca_file| Issuer {
        ca_file,
        allow_http_loopback: false,
        ..site.issuer(KeySource::Url(site.url("/jwks")))
    };
    assert_eq!(keys_of(&with_ca(Some(write("ca", &ca_pem)))).await.unwrap(), ["k1"]);
    let error = keys_of(&with_ca(Some(write("other", &other_pem)))).await.unwrap_err();
    assert!(
        matches!(&error, FetchError::Request { defect, .. } if defect.contains("certificate")),
        "{error}"
    );
    for (name, text) in
        [("empty", ""), ("junk", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")]
    {
        let error = keys_of(&with_ca(Some(write(name, text)))).await.unwrap_err();
        assert!(matches!(error, FetchError::CaFile { .. }), "{error}");
    }
    // The system's authorities don't know ours; a system without any is an error of its own.
    let error = keys_of(&with_ca(None)).await.unwrap_err();
    assert!(matches!(error, FetchError::Request { .. } | FetchError::SystemRoots { .. }), "{error}");
}

#[tokio::test]
async fn https_needs_the_right_name() {
    let directory = tempfile::tempdir().unwrap();
    let (ca_pem, acceptor) = authority("issuer.example.com");
    let ca_file = directory.path().join("ca");
    std::fs::write(&ca_file, ca_pem).unwrap();
    let site = Site::start(Some(acceptor)).await;
    site.set("/jwks", &jwks(&["k1"]));
    let issuer = Issuer { ca_file: Some(ca_file), ..site.issuer(KeySource::Url(site.url("/jwks"))) };
    assert!(matches!(keys_of(&issuer).await, Err(FetchError::Request { .. })));
}

#[test]
fn plain_http_is_for_literal_loopback_with_the_switch_only() {
    for (url, with_switch) in [
        ("http://localhost:8080/jwks", true),
        ("http://127.0.0.1/jwks", true),
        ("http://127.9.9.9/jwks", true),
        ("http://[::1]:1/jwks", true),
        ("http://localhost.evil.example/jwks", false),
        ("http://127.0.0.1.evil.example/jwks", false),
        ("http://localhost@evil.example/jwks", false),
        ("http://0.0.0.0/jwks", false),
        ("http://[::]/jwks", false),
        ("http://[::ffff:127.0.0.1]/jwks", false),
        ("http://10.0.0.1/jwks", false),
        ("file:///etc/passwd", false),
        ("ftp://localhost/jwks", false),
    ] {
        let url = Url::parse(url).unwrap();
        assert_eq!(check_url(&url, true).is_ok(), with_switch, "{url}");
        assert!(check_url(&url, false).is_err(), "{url}");
    }
    assert!(check_url(&Url::parse("https://issuer.example.com/jwks").unwrap(), false).is_ok());
    let secret = Url::parse("http://user:pass@h.example/jwks?key=secret#x").unwrap();
    let shown = check_url(&secret, true).unwrap_err().to_string();
    assert!(shown.starts_with("http://h.example/jwks is not https"), "{shown}");
}

#[tokio::test]
async fn wait_initial_reports_what_is_missing() {
    let site = Site::start(None).await;
    let handle = start(site.issuer(KeySource::Url(site.url("/jwks"))));
    assert!(!handle.wait_initial(Duration::from_millis(300)).await);
    let status = &handle.status()[0];
    assert_eq!((status.freshness, status.key_count), (Freshness::Missing, 0));
    assert!(status.last_error.as_ref().is_some_and(|(text, _)| text.contains("404")), "{status:?}");
    // The retry after about a second finds the keys.
    site.set("/jwks", &jwks(&["k1"]));
    assert!(handle.wait_initial(Duration::from_secs(5)).await);
}
