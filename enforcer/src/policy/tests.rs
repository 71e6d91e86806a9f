//! The fixtures under `testdata/policy`: each bad file lists in comments, `#! LINE:COLUMN FIELD | TEXT`, exactly what
//! is wrong with it, each good file its warnings in the same way.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;

const EXAMPLE: &str = include_str!("../../../docs/policy.example.yaml");

fn fixtures(kind: &str) -> Vec<(PathBuf, String)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/policy").join(kind);
    let mut files: Vec<_> = fs::read_dir(directory)
        .expect("the fixture directory")
        .map(|entry| entry.expect("an entry").path())
        .map(|path| (path.clone(), fs::read_to_string(path).expect("a text file")))
        .collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

/// `(line, column, field, text)` of each `#!` comment.
fn expectations(text: &str) -> Vec<(u64, u64, &str, &str)> {
    text.lines()
        .filter_map(|line| line.strip_prefix("#! "))
        .map(|line| {
            let (place, text) = line.split_once('|').expect("a bar");
            let (position, field) = place.trim().split_once(' ').unwrap_or((place.trim(), ""));
            let (line, column) = position.split_once(':').expect("line:column");
            (line.parse().expect("a line"), column.parse().expect("a column"), field, text.trim())
        })
        .collect()
}

type Found = (u64, u64, String, String);

/// What was expected and not found, and what was found and not expected; a line each.
fn differences(file: &Path, text: &str, found: &[Found]) -> String {
    let wanted = expectations(text);
    let met = |w: &(u64, u64, &str, &str), f: &Found| {
        (w.0, w.1, w.2) == (f.0, f.1, f.2.as_str()) && f.3.contains(w.3)
    };
    let name = file.file_name().unwrap_or_default().display();
    let missing = wanted.iter().filter(|w| !found.iter().any(|f| met(w, f)));
    let missing =
        missing.map(|(line, column, field, text)| format!("{name}: - {line}:{column} {field} | {text}\n"));
    let extra = found.iter().filter(|f| !wanted.iter().any(|w| met(w, f)));
    let extra =
        extra.map(|(line, column, field, text)| format!("{name}: + {line}:{column} {field} | {text}\n"));
    missing.chain(extra).collect()
}

#[test]
fn bad_fixtures_are_refused_for_exactly_their_reasons() {
    let mut all = String::new();
    for (file, text) in fixtures("bad") {
        let errors = parse("policy.yaml", &text).expect_err(&file.display().to_string());
        let found: Vec<_> =
            errors.errors.iter().map(|e| (e.line, e.column, e.field.clone(), e.to_string())).collect();
        all += &differences(&file, &text, &found);
        let places: Vec<_> = errors.errors.iter().map(|e| (e.line, e.column)).collect();
        assert!(places.is_sorted(), "{}: not in file order", file.display());
    }
    assert!(all.is_empty(), "\n{all}");
}

#[test]
fn good_fixtures_have_exactly_their_warnings() {
    let mut all = String::new();
    for (file, text) in fixtures("good") {
        let (_, warnings) =
            parse("policy.yaml", &text).unwrap_or_else(|e| panic!("{}:\n{e}", file.display()));
        let found: Vec<_> =
            warnings.iter().map(|w| (w.line, w.column, w.field.clone(), w.to_string())).collect();
        all += &differences(&file, &text, &found);
    }
    assert!(all.is_empty(), "\n{all}");
}

/// A new defect without a fixture that shows it fails here.
#[test]
fn every_defect_has_a_fixture() {
    let source = include_str!("error.rs");
    let body =
        source.split("pub enum Defect {").nth(1).and_then(|s| s.split("\n}\n").next()).expect("the enum");
    let is_variant = |l: &&str| l.starts_with("    ") && l[4..].starts_with(|c: char| c.is_ascii_uppercase());
    let name = |l: &str| l.trim().chars().take_while(char::is_ascii_alphanumeric).collect::<String>();
    let all: BTreeSet<String> = body.lines().filter(is_variant).map(name).collect();
    let mut seen: BTreeSet<String> = BTreeSet::new();
    for (_, text) in fixtures("bad") {
        let errors = parse("policy.yaml", &text).expect_err("a bad fixture");
        seen.extend(errors.errors.iter().map(|e| name(&format!("{:?}", e.defect))));
    }
    // These have tests of their own below.
    let elsewhere = ["Unreadable", "NotRegularFile", "FileTooLarge", "NotUtf8", "TooManyEntries"];
    seen.extend(elsewhere.map(str::to_owned));
    let missing: Vec<_> = all.difference(&seen).collect();
    assert!(all.len() > 40 && missing.is_empty(), "no fixture for {missing:?}");
}

#[test]
fn messages_carry_file_line_column_field_and_hint() {
    let errors = parse("etc/policy.yaml", "version: 1\nissuers: []\nservers: []\n").expect_err("empty lists");
    assert_eq!(
        errors.to_string(),
        "etc/policy.yaml:2:10: issuers: the list is empty, at least one entry is needed\n\
         etc/policy.yaml:3:10: servers: no server is listed: the policy protects nothing\n    \
         hint: list at least one server"
    );
}

fn load_bytes(bytes: &[u8]) -> Result<(Policy, Vec<Warning>), PolicyErrors> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("policy.yaml");
    fs::write(&path, bytes).expect("written");
    load(&path)
}

fn only_defect(errors: &PolicyErrors) -> &PolicyError {
    assert_eq!(errors.errors.len(), 1, "{errors}");
    &errors.errors[0]
}

#[test]
fn files_that_are_no_policy_are_refused() {
    let missing = load(Path::new("/nonexistent/policy.yaml")).expect_err("no file");
    assert!(matches!(only_defect(&missing).defect, Defect::Unreadable { .. }));
    let device = load(Path::new("/dev/zero")).expect_err("a device");
    assert_eq!(only_defect(&device).defect, Defect::NotRegularFile);
    let large = load_bytes(&vec![b'#'; MAX_FILE_BYTES + 1]).expect_err("too large");
    assert_eq!(only_defect(&large).defect, Defect::FileTooLarge { limit: MAX_FILE_BYTES });
    let large = parse("p", &"#".repeat(MAX_FILE_BYTES + 1)).expect_err("too large");
    assert_eq!(only_defect(&large).defect, Defect::FileTooLarge { limit: MAX_FILE_BYTES });
    let latin1 = load_bytes(b"version: 1\n# f\xfcr\n").expect_err("not UTF-8");
    let error = only_defect(&latin1);
    assert_eq!((&error.defect, error.line, error.column), (&Defect::NotUtf8, 2, 4));
}

#[test]
fn lists_and_errors_are_bounded() {
    let many = format!("version: 1\nissuers: []\nservers: [{}]\n", "x, ".repeat(MAX_SERVERS + 1));
    let errors = parse("p", &many).expect_err("too many servers");
    let limit = Defect::TooManyEntries { found: MAX_SERVERS + 1, limit: MAX_SERVERS };
    assert!(errors.errors.iter().any(|e| e.defect == limit), "{errors}");
    let many = format!("version: 1\nissuers: []\nservers: [{}]\n", "x, ".repeat(MAX_SERVERS));
    let errors = parse("p", &many).expect_err("bad servers");
    assert_eq!(
        (errors.errors.len(), errors.suppressed),
        (MAX_REPORTED_ERRORS, MAX_SERVERS + 1 - MAX_REPORTED_ERRORS)
    );
    assert!(errors.to_string().ends_with(&format!("... and {} more", errors.suppressed)));
}

#[test]
fn the_largest_policies_compile_in_bounded_time() {
    let server = |i: usize| {
        format!(
            "  - {{name: s{i}, listen: [\"0.0.0.0:80\", \"[::1]:80\"], resource: \"https://h/p{i}\", issuers: [a], public_paths: [/h{i}]}}\n"
        )
    };
    let text = format!(
        "version: 1\nissuers: [{{name: a, issuer: \"https://a\", keys: {{discovery: true}}, algorithms: [ES256]}}]\nservers:\n{}",
        (0..MAX_SERVERS).map(server).collect::<String>()
    );
    let (policy, _) = parse("p", &text).expect("good");
    assert_eq!(policy.servers.len(), MAX_SERVERS);
    assert_eq!(policy.sharing(&policy.servers[0]).len(), MAX_SERVERS - 1);
}

#[test]
fn defaults_are_as_documented() {
    let (policy, _) =
        parse("dir/policy.yaml", include_str!("../../testdata/policy/good/minimal.yaml")).expect("good");
    assert_eq!(policy.mode, Mode::Enforce);
    let issuer = &policy.issuers[0];
    assert_eq!(issuer.leeway.as_secs(), 30);
    assert_eq!(issuer.max_token_lifetime.as_secs(), 86_400);
    assert_eq!(issuer.token_types, ["at+jwt"]);
    assert_eq!(issuer.refresh_interval.as_secs(), 300);
    assert_eq!(issuer.max_staleness.as_secs(), 3600);
    assert_eq!((&issuer.keys, &issuer.ca_file), (&KeySource::Discovery, &None));
    let server = &policy.servers[0];
    assert_eq!(server.path, "/mcp");
    assert!(server.scopes.is_empty() && server.origins.is_empty() && server.public_paths.is_empty());
    assert_eq!(server.metadata, Metadata { serve: true, resource_name: None, scopes_supported: Vec::new() });
    assert_eq!(server.hosts, ["localhost:8080", "127.0.0.1:8080", "[::1]:8080"]);
    assert!(Arc::ptr_eq(&server.issuers[0], issuer));
}

#[test]
fn values_are_normalised() {
    let (policy, _) =
        parse("dir/policy.yaml", include_str!("../../testdata/policy/good/warnings.yaml")).expect("good");
    assert_eq!(policy.mode, Mode::Observe);
    assert_eq!(policy.issuers[0].token_types, ["jwt"]);
    assert_eq!(policy.issuers[0].keys, KeySource::File(PathBuf::from("dir/keys.json")));
    assert_eq!(policy.servers[1].resource, "https://mcp.example");
    assert_eq!(policy.servers[1].path, "/");
    let (policy, _) =
        parse("policy.yaml", include_str!("../../testdata/policy/good/shared.yaml")).expect("good");
    assert_eq!(policy.servers[0].path, "/one");
    assert_eq!(policy.servers[0].resource, "https://h.example/one/");
    assert_eq!(policy.servers[1].listen[0].to_string(), "127.0.0.1:80");
    let sharing =
        |i: usize| policy.sharing(&policy.servers[i]).iter().map(|s| s.name.clone()).collect::<Vec<_>>();
    assert_eq!(sharing(0), ["two"]);
    assert_eq!(sharing(1), ["one"]);
    assert!(sharing(2).is_empty() && sharing(3).is_empty());
    assert_eq!(policy.servers[0].metadata_path(), "/.well-known/oauth-protected-resource/one/");
    assert_eq!(policy.servers[2].metadata_path(), METADATA_PREFIX);
}

#[test]
fn a_missing_key_file_is_a_warning_of_load() {
    let text = "version: 1\nissuers: [{name: a, issuer: \"https://a\", keys: {file: k}, algorithms: [ES256]}]\n\
                servers: [{name: s, listen: [127.0.0.1:1], resource: \"https://h\", issuers: [a]}]\n";
    let (_, warnings) = load_bytes(text.as_bytes()).expect("good");
    assert!(
        matches!(&warnings[..], [Warning { line: 2, caution: Caution::FileMissing { .. }, .. }]),
        "{warnings:?}"
    );
}

#[test]
fn the_example_compiles_and_its_effective_policy_says_all() {
    let (policy, warnings) = parse("policy.example.yaml", EXAMPLE).unwrap_or_else(|e| panic!("{e}"));
    assert!(
        warnings.iter().all(|w| matches!(w.caution, Caution::WildcardListen { .. } | Caution::PlainJwtType))
    );
    let text = effective(&policy);
    for needle in [
        "policy version 1: 3 servers, 2 issuers",
        "mode enforce",
        "server 0 \"files\"",
        "127.0.0.1:8080 (IPv4 loopback)",
        "[::1]:8080 (IPv6 loopback)",
        "[::]:9000 (every IPv6 and every IPv4 address of this host)",
        "shared with     server \"deploy\" (path /deploy)",
        "/files and everything under /files/",
        "/healthz (exactly",
        "  https://mcp.example.com/files\n",
        "  https://files.example.com/mcp\n",
        "`iss` is exactly https://login.example.com/realms/tools",
        "signature: ES256, RS256; no other algorithm",
        "signature: EdDSA; no other algorithm",
        "`typ`: at+jwt, jwt; no other type",
        "30s of tolerance; `iat` needed, `exp` at most 1h after it",
        "10s of tolerance; `iat` needed, `exp` at most 1d after it",
        "the file /etc/enforcer/build.jwks",
        "refreshed after 5m; not refreshed for 1h",
        "all of: files.read; one missing: 403",
        "none needed",
        "absent, or one of: https://console.example.com",
        "none accepted: a request with an Origin header: 403",
        "one of: mcp.example.com, mcp.example.com:443, files.example.com, files.example.com:443, 127.0.0.1:8080",
        "/.well-known/oauth-protected-resource/files and /.well-known/oauth-protected-resource: answered",
        "/.well-known/oauth-protected-resource/deploy: passes to the server",
        "scopes_supported: files.read files.write",
        "resource_name: File tools",
    ] {
        assert!(text.contains(needle), "{needle:?} is not in:\n{text}");
    }
    let json = effective_json(&policy);
    assert_eq!(json["mode"], "enforce");
    assert_eq!(json["daemon_timeout_seconds"], 5);
    assert_eq!(json["issuers"][1]["leeway_seconds"], 10);
    assert_eq!(json["servers"][1]["shares_endpoint_with"][0], "deploy");
    assert_eq!(json["servers"][2]["metadata"]["serve"], false);
    assert_eq!(json["servers"][2]["hosts"][0], "tools.example.com");
    assert_eq!(
        effective(&policy),
        effective(&parse("policy.example.yaml", EXAMPLE).expect("good").0),
        "stable"
    );
}

#[test]
fn observe_mode_can_not_be_overlooked() {
    let (policy, _) =
        parse("policy.yaml", include_str!("../../testdata/policy/good/warnings.yaml")).expect("good");
    assert!(effective(&policy).contains("mode OBSERVE: NOTHING IS REFUSED"));
    assert_eq!(effective_json(&policy)["mode"], "observe");
}

/// One change to a text: where (as a fraction), what to remove, what to put in.
fn edit() -> impl Strategy<Value = (usize, usize, String)> {
    let token = prop_oneof![
        Just(": ".to_owned()),
        Just("- ".to_owned()),
        Just("[".to_owned()),
        Just("}".to_owned()),
        Just("\n  ".to_owned()),
        Just("~".to_owned()),
        Just("&a ".to_owned()),
        Just("*a".to_owned()),
        Just("? ".to_owned()),
        Just("1e999".to_owned()),
        Just("!!binary ".to_owned()),
        Just("https://[::]:0/%".to_owned()),
        "\\PC{0,4}",
        Just(String::new()),
    ];
    (any::<usize>(), 0..20_usize, token)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_policy_text_panics(which in 0..64_usize, edits in prop::collection::vec(edit(), 1..6)) {
        let mut files = vec![EXAMPLE.to_owned()];
        files.extend(fixtures("good").into_iter().chain(fixtures("bad")).map(|(_, text)| text));
        let mut chars: Vec<char> = files[which % files.len()].chars().collect();
        for (at, remove, insert) in edits {
            let at = at % (chars.len() + 1);
            let end = (at + remove).min(chars.len());
            chars.splice(at..end, insert.chars());
        }
        let text: String = chars.into_iter().collect();
        match parse("policy.yaml", &text) {
            Ok((policy, _)) => {
                prop_assert!(!policy.servers.is_empty());
                prop_assert!(policy.servers.iter().all(|s| !s.issuers.is_empty() && !s.hosts.is_empty()));
                let _ = (effective(&policy), effective_json(&policy));
            }
            Err(errors) => {
                prop_assert!(!errors.errors.is_empty());
                let lines = text.lines().count() as u64 + 1;
                prop_assert!(errors.errors.iter().all(|e| (1..=lines).contains(&e.line) && e.column >= 1));
            }
        }
    }

    #[test]
    fn no_text_at_all_panics(text in "\\PC{0,60}") {
        prop_assert!(parse("policy.yaml", &text).is_err());
    }
}

#[test]
fn the_daemon_timeout_is_bounded_and_part_of_the_hash() {
    let with = |line: &str| {
        parse("p.yaml", &EXAMPLE.replace("mode: enforce\n", &format!("mode: enforce\n{line}\n")))
    };
    let default = with("").unwrap().0;
    assert_eq!(default.daemon_timeout, DEFAULT_DAEMON_TIMEOUT);
    let longer = with("daemon_timeout: 30s").unwrap().0;
    assert_eq!(longer.daemon_timeout, Duration::from_secs(30));
    assert_eq!(hash(&default), hash(&with("daemon_timeout: 5s").unwrap().0));
    assert_ne!(hash(&default), hash(&longer));
    assert!(effective(&longer).contains("30s without a sign of life"));
    for bad in ["1s", "301s", "6", "0s"] {
        let error = with(&format!("daemon_timeout: {bad}")).unwrap_err();
        assert!(error.to_string().contains("daemon_timeout"), "{error}");
    }
}

const WORKLOADS: &str = include_str!("../../testdata/policy/good/workloads.yaml");

#[test]
fn workloads_bindings_and_limits_reach_the_servers_that_they_are_for() {
    let (policy, _) = parse("policy.yaml", WORKLOADS).unwrap_or_else(|e| panic!("{e}"));
    let [files, mail] = &policy.servers[..] else { panic!("two servers") };
    let names = |rules: &[Arc<WorkloadRule>]| rules.iter().map(|r| r.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(files.callers.as_ref().unwrap()), ["agents", "office"]);
    assert_eq!(names(mail.callers.as_ref().unwrap()), ["builder"]);
    assert_eq!((files.bind.len(), mail.bind.len()), (3, 3));
    assert!(matches!(&files.bind[1].to, BindTo::SpiffeId(rules) if names(rules) == ["builder"]));
    assert_eq!((&files.bind[2].to, &mail.bind[2].to), (&BindTo::KubernetesPod, &BindTo::FirstUse));
    let limits = |server: &Server| server.limits.iter().map(|l| l.name.clone()).collect::<Vec<_>>();
    assert_eq!(
        (limits(files), limits(mail)),
        (vec!["each".into(), "prefix".into()], vec!["each".into(), "slow".into()])
    );
    let [each, prefix, slow] = &policy.limits[..] else { panic!("three limits") };
    assert_eq!(each.rate, Some(Rate { interval_ns: 50_000_000, burst: 40 }));
    assert_eq!(
        (each.per, each.ipv4_prefix, each.ipv6_prefix, each.streams),
        (Dimension::Workload, 32, 64, None)
    );
    assert_eq!(prefix.rate, Some(Rate { interval_ns: 200_000_000, burst: 5 }), "a second's worth");
    assert_eq!((prefix.ipv4_prefix, prefix.ipv6_prefix, prefix.streams), (24, 56, Some(10)));
    assert_eq!(slow.rate.unwrap().burst, 1, "at least one");
    assert_eq!(policy.unknown, Rate { interval_ns: 2_000_000, burst: 500 });
    assert_eq!(policy.refused, Some(Rate { interval_ns: 6_000_000_000, burst: 5 }));
    let text = effective(&policy);
    for needle in [
        "one of: agents, office; any other: 403",
        "  subject \"agent\": only from agents\n",
        "  issuer \"corp\", client \"builder\": only from the workload with its `sub` as SPIFFE id, of builder\n",
        "only from the pod that the token names",
        "prefix, per source (IPv4 /24, IPv6 /56): 5/s, 5 at once, 10 open streams; beyond: 429",
        "workload \"agents\": all of\n  unit            agent.service or agent@1.service\n  uid             998 or 999\n",
        "app=builder and com.example.tier=ci",
        "per source: 500/s, 500 at once",
        "per source: 10/m, 5 at once",
    ] {
        assert!(text.contains(needle), "{needle:?} is not in:\n{text}");
    }
    let (plain, _) = parse("policy.yaml", EXAMPLE).unwrap();
    assert_eq!((plain.unknown, plain.refused, &plain.limits[..]), (DEFAULT_UNKNOWN, None, &[][..]));
    assert!(plain.servers[0].callers.is_none() && plain.servers[0].bind.is_empty());
}
