//! Who may call, and who may present a token.

use std::sync::Arc;

use super::*;
use crate::policy::WorkloadRule;
use crate::workload::Workload;

fn workload(path: Option<&str>) -> Workload {
    Workload::of(7, path.map(str::to_owned))
}

fn guarded() -> Server {
    let agent = WorkloadRule { units: vec!["agent.service".to_owned()], ..WorkloadRule::default() };
    Server { callers: Some(vec![Arc::new(agent)]), ..server("/mcp") }
}

fn request(line: &str, lines: &str) -> String {
    format!("{line} HTTP/1.1\r\nHost: mcp.example.com\r\n{lines}\r\n")
}

#[test]
fn who_is_no_caller_of_the_server_gets_403_whatever_it_asks_for() {
    let (agent, other, gone) =
        (workload(Some("/agent.service")), workload(Some("/other.service")), workload(None));
    let server = guarded();
    let ours =
        Server { metadata: crate::policy::Metadata { serve: false, ..guarded().metadata }, ..guarded() };
    let good = "Authorization: Bearer good\r\n";
    for (line, lines, allowed) in [
        ("POST /mcp", good, "allow 0"),
        ("POST /mcp", "", "401 no-credentials UntilPolicyChange"),
        ("GET /healthz", "", "public 0"),
        ("GET /.well-known/oauth-protected-resource/mcp", "", "200 metadata Never"),
        ("PUT /mcp", good, "405 method-not-allowed UntilPolicyChange"),
    ] {
        let text = request(line, lines);
        let outcome = |workload| outcome_for(&text, &[&server], &CallerView { workload, ..REMOTE });
        assert_eq!(outcome(Some(&agent)), allowed, "{line}");
        assert_eq!(outcome(Some(&other)), "403 caller-not-allowed UntilPolicyChange", "{line}");
        assert_eq!(outcome(Some(&gone)), "403 caller-not-allowed Short", "{line}");
        assert_eq!(outcome(None), "403 caller-not-allowed Short", "{line}");
    }
    let text = request("GET /.well-known/oauth-protected-resource/mcp", "");
    assert_eq!(outcome(&text, &[&ours]), "403 caller-not-allowed Short", "metadata of the server's own");
    assert_eq!(outcome(&request("GET /nothing", ""), &[&server]), "404 path-unknown UntilPolicyChange");
    assert_eq!(outcome(&request("GET /healthz?x", ""), &[&server]), "403 caller-not-allowed Short");
}

#[test]
fn a_good_token_of_another_workload_gets_401_and_is_named() {
    let server = server("/mcp");
    let head =
        |scopes: &str| request("POST /mcp", &format!("Authorization: Bearer scopes.mcp~tools{scopes}\r\n"));
    assert_eq!(outcome(&head(""), &[&server]), "allow 0");
    assert_eq!(outcome(&head(".first"), &[&server]), "allow 0 first use");
    assert_eq!(outcome(&head(".anothers"), &[&server]), "401 token-of-another-workload Short");
    assert_eq!(outcome(&head(".local"), &[&server]), "401 caller-unknown Short");
    let agent = workload(Some("/agent.service"));
    let known = CallerView { workload: Some(&agent), ..REMOTE };
    assert_eq!(outcome_for(&head(".local"), &[&server], &known), "allow 0");
    let text = head(".anothers");
    match decide(text.as_bytes(), &[&server], &Fake, &REMOTE, &Options::default()) {
        Decision::Answer { answer, misplaced: Some(misplaced), .. } => {
            let answer = String::from_utf8_lossy(&answer.bytes).into_owned();
            assert!(answer.contains("error=\"invalid_token\""), "{answer}");
            assert_eq!(
                (misplaced.token, misplaced.fault),
                ("scopes.mcp~tools.anothers", BindFault::OtherWorkload)
            );
        }
        other => panic!("{other:?}"),
    }
    // Who may not present a token does not learn what it lacks.
    let text = request("POST /mcp", "Authorization: Bearer scopes.anothers\r\n");
    assert_eq!(outcome(&text, &[&server]), "401 token-of-another-workload Short");
}
