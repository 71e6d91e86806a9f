//! Tests of who may present which token.

use std::net::IpAddr;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::{BindFault, CallerView, Workload, bind, callers_allow};
use crate::policy::{BindRule, BindTo, Policy, WorkloadRule, parse};
use crate::token::VerifiedToken;
use crate::token::testing::World;

const POD: &str = "8c2f6c4e-1f0a-4f5e-9d3b-0a1b2c3d4e5f";
const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

fn policy(workloads: &str, rest: &str) -> Result<Policy, String> {
    let text = format!(
        "version: 1\nissuers: [{{name: main, issuer: 'https://issuer.example.com', keys: {{discovery: true}}, algorithms: [ES256]}}]\n\
         servers: [{{name: files, listen: ['127.0.0.1:8000'], resource: 'https://mcp.example.com/mcp', issuers: [main]}}]\n\
         workloads: [{workloads}]\n{rest}\n"
    );
    parse("policy.yaml", &text).map(|(policy, _)| policy).map_err(|e| e.to_string())
}

fn rule(selectors: &str) -> Arc<WorkloadRule> {
    let policy = policy(&format!("{{name: w, {selectors}}}"), "").unwrap();
    Arc::clone(&policy.workloads[0])
}

fn rules(workloads: &str, bind: &str) -> Vec<BindRule> {
    policy(workloads, &format!("bind: [{bind}]")).unwrap().servers[0].bind.clone()
}

fn workload(path: Option<&str>) -> Workload {
    Workload::of(7, path.map(str::to_owned))
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(workload: Option<&Workload>) -> CallerView<'_> {
    CallerView { workload, uid: 1000, address: address("10.1.2.3"), is_of_this_host: false }
}

fn token(claim: &str, value: &serde_json::Value) -> VerifiedToken {
    World::new().with_claim(claim, value).unwrap()
}

fn alice() -> VerifiedToken {
    World::new().verify().unwrap()
}

#[test]
fn each_selector_fits_what_it_names_and_nothing_else() {
    let pod_path = format!("/kubepods/pod{POD}/{ID}");
    let mut labelled = workload(Some(&format!("/docker/{ID}")));
    labelled.labels.insert("app".to_owned(), "agent".to_owned());
    labelled.labels.insert("tier".to_owned(), "x".to_owned());
    let unit = workload(Some("/system.slice/agent.service"));
    let other = workload(Some("/system.slice/other.service"));
    let pod = workload(Some(&pod_path));
    for (selectors, fits, not) in [
        ("unit: agent.service", &unit, &other),
        ("unit: [x.service, agent.service]", &unit, &other),
        ("cgroup: /system.slice/ag*", &unit, &other),
        ("cgroup: [/x, /**/agent.service]", &unit, &other),
        ("uid: [1, 1000], unit: agent.service", &unit, &other),
        ("network: 10.0.0.0/8, unit: agent.service", &unit, &other),
        (&format!("container: {ID}"), &pod, &unit),
        (&format!("pod: {POD}"), &pod, &unit),
        (&format!("pod: {POD}, container: {ID}"), &pod, &labelled),
        ("label: {app: agent}", &labelled, &pod),
        ("label: {app: agent, tier: x}", &labelled, &pod),
    ] {
        assert!(rule(selectors).matches(&at(Some(fits))), "{selectors}");
        assert!(!rule(selectors).matches(&at(Some(not))), "{selectors}");
        assert!(!rule(selectors).matches(&at(Some(&workload(None)))), "{selectors}: gone");
        assert!(!rule(selectors).matches(&at(None)), "{selectors}: unknown");
    }
    for wrong in ["uid: 1", "uid: 1000, unit: x.service", "unit: agent.service, network: 11.0.0.0/8"] {
        assert!(!rule(wrong).matches(&at(Some(&unit))), "{wrong}");
    }
    assert!(!rule("label: {app: agent, tier: y}").matches(&at(Some(&labelled))));
    assert!(rule("uid: 1000").matches(&at(Some(&workload(None)))) && !rule("uid: 1000").matches(&at(None)));
    assert!(rule("network: 10.1.2.3").matches(&at(None)));
    assert!(!WorkloadRule::default().matches(&at(Some(&unit))), "no selector fits nobody");
}

#[test]
fn a_path_that_is_not_shown_as_it_is_fits_no_pattern() {
    let long = workload(Some(&format!("/jobs/{}", "x".repeat(600))));
    let control = workload(Some("/jobs/a\nb"));
    for odd in [&long, &control] {
        assert!(!rule("cgroup: /jobs/**").matches(&at(Some(odd))));
        assert!(at(Some(odd)).workload_name().ends_with("(cgroup 7)"));
    }
}

#[test]
fn the_name_of_a_workload_is_stable_and_says_nothing_of_the_user() {
    let name = |path: Option<&str>| at(Some(&workload(path))).workload_name();
    assert_eq!(name(Some(&format!("/kubepods/pod{POD}/{ID}"))), format!("pod/{POD}"));
    assert_eq!(name(Some(&format!("/docker/{ID}"))), format!("container/{ID}"));
    assert_eq!(name(Some("/system.slice/agent.service/x")), "agent.service");
    assert_eq!(name(Some("/made/by/hand")), "/made/by/hand");
    assert_eq!(name(None), "10.1.2.3");
    assert_eq!(at(None).workload_name(), "10.1.2.3");
}

#[test]
fn declared_workloads() {
    let (unit, other) = (workload(Some("/system.slice/agent.service")), workload(Some("/x.service")));
    let one = "{name: agent, unit: agent.service}, {name: net, network: 10.0.0.0/8}";
    let bound = rules(one, "{workloads: agent}");
    assert_eq!(bind(&bound, &alice(), &at(Some(&unit))).map(|b| b.first_use), Ok(false));
    assert_eq!(bind(&bound, &alice(), &at(Some(&other))), Err(BindFault::OtherWorkload));
    assert_eq!(bind(&bound, &alice(), &at(None)), Err(BindFault::CallerUnknown));
    assert_eq!(bind(&bound, &alice(), &at(Some(&workload(None)))), Err(BindFault::CallerUnknown));
    let either = rules(one, "{workloads: [agent, net]}");
    assert!(bind(&either, &alice(), &at(None)).is_ok());
    let both = rules(one, "{workloads: agent}, {workloads: net}");
    assert!(bind(&both, &alice(), &at(Some(&unit))).is_ok() && bind(&both, &alice(), &at(None)).is_err());
    let elsewhere = CallerView { address: address("11.0.0.1"), ..at(None) };
    let net = rules(one, "{workloads: net}");
    assert_eq!(bind(&net, &alice(), &elsewhere), Err(BindFault::OtherWorkload));
}

#[test]
fn a_rule_is_only_about_the_tokens_that_it_names() {
    let other = workload(Some("/x.service"));
    let bound = |about: &str| {
        let rules = rules("{name: agent, unit: agent.service}", &format!("{{{about} workloads: agent}}"));
        bind(&rules, &alice(), &at(Some(&other))).is_err()
    };
    for about in
        ["", "issuer: main,", "subject: alice,", "client: agent-1,", "subject: alice, client: agent-1,"]
    {
        assert!(bound(about), "{about}");
    }
    for about in ["subject: bob,", "client: agent-2,", "subject: alice, client: agent-2,"] {
        assert!(!bound(about), "{about}");
    }
    let mut token = alice();
    token.client_id = None;
    let rules = rules("{name: agent, unit: agent.service}", "{client: agent-1, workloads: agent}");
    assert!(bind(&rules, &token, &at(Some(&other))).is_ok());
}

#[test]
fn the_pod_of_a_service_account_token_is_the_caller() {
    let bound = rules("{name: w, uid: 0}", "{claim: kubernetes_pod}");
    let token = token("kubernetes.io", &json!({"namespace": "tools", "pod": {"name": "p", "uid": POD}}));
    let own = workload(Some(&format!("/kubepods/pod{POD}/{ID}")));
    let other = workload(Some(&format!("/kubepods/pod{}/{ID}", POD.replace('8', "9"))));
    assert!(bind(&bound, &token, &at(Some(&own))).is_ok());
    assert_eq!(bind(&bound, &token, &at(Some(&other))), Err(BindFault::OtherWorkload));
    assert_eq!(bind(&bound, &token, &at(Some(&workload(Some("/x.service"))))), Err(BindFault::OtherWorkload));
    assert_eq!(bind(&bound, &token, &at(None)), Err(BindFault::CallerUnknown));
    assert_eq!(bind(&bound, &alice(), &at(Some(&own))), Err(BindFault::ClaimMissing));
    for odd in [json!("x"), json!({"pod": "x"}), json!({"pod": {"uid": 1}}), json!({"pod": {"uid": ""}})] {
        let token = self::token("kubernetes.io", &odd);
        assert_eq!(bind(&bound, &token, &at(Some(&own))), Err(BindFault::ClaimMissing), "{odd}");
    }
}

#[test]
fn a_spiffe_id_is_the_callers() {
    let workloads = "{name: a, unit: a.service, spiffe_id: 'spiffe://e/a'}, {name: b, unit: b.service, spiffe_id: 'spiffe://e/b'}, \
                     {name: c, unit: a.service}";
    let bound = rules(workloads, "{claim: spiffe_id}");
    let token = token("sub", &json!("spiffe://e/a"));
    let [a, b] = ["/a.service", "/b.service"].map(|path| workload(Some(path)));
    assert!(bind(&bound, &token, &at(Some(&a))).is_ok());
    assert_eq!(bind(&bound, &token, &at(Some(&b))), Err(BindFault::OtherWorkload));
    assert_eq!(bind(&bound, &token, &at(None)), Err(BindFault::CallerUnknown));
    assert_eq!(bind(&bound, &alice(), &at(Some(&a))), Err(BindFault::ClaimMissing));
    let nobody = self::token("sub", &json!("spiffe://e/z"));
    assert_eq!(bind(&bound, &nobody, &at(Some(&a))), Err(BindFault::OtherWorkload));
}

#[test]
fn callers_of_a_server() {
    let with = |callers: &str| {
        let mut policy =
            policy("{name: agent, unit: agent.service}, {name: net, network: 10.0.0.0/8}", "").unwrap();
        let server = Arc::get_mut(&mut policy.servers[0]).unwrap();
        let named = |name: &str| policy.workloads.iter().find(|w| w.name == name).cloned().unwrap();
        server.callers = (!callers.is_empty()).then(|| callers.split(' ').map(named).collect());
        Arc::clone(&policy.servers[0])
    };
    let unit = workload(Some("/agent.service"));
    assert!(callers_allow(&with(""), &at(None)));
    assert!(callers_allow(&with("agent"), &at(Some(&unit))) && !callers_allow(&with("agent"), &at(None)));
    assert!(callers_allow(&with("agent net"), &at(None)));
}

fn any_rule() -> impl Strategy<Value = Arc<WorkloadRule>> {
    let selector = prop_oneof![
        Just("unit: a.service"),
        Just("unit: b.service"),
        Just("uid: 0"),
        Just("uid: [0, 1000]"),
        Just("network: 10.0.0.0/8"),
        Just("network: 11.0.0.0/8"),
        Just("cgroup: /**"),
        Just("unit: a.service, network: 10.0.0.0/8"),
        Just("uid: 1000, network: 10.0.0.0/8, spiffe_id: spiffe://e/a"),
    ];
    selector.prop_map(rule)
}

fn any_bind_rule() -> impl Strategy<Value = BindRule> {
    let workloads = || prop::collection::vec(any_rule(), 1..3);
    let to = prop_oneof![
        workloads().prop_map(BindTo::Workloads),
        workloads().prop_map(BindTo::SpiffeId),
        Just(BindTo::KubernetesPod),
        Just(BindTo::FirstUse),
    ];
    let some = |text: &'static str, other: &'static str| {
        prop_oneof![Just(None), Just(Some(text.to_owned())), Just(Some(other.to_owned()))]
    };
    (some("main", "x"), some("alice", "x"), some("agent-1", "x"), to)
        .prop_map(|(issuer, subject, client_id, to)| BindRule { issuer, subject, client_id, to })
}

fn any_path() -> impl Strategy<Value = Option<Option<&'static str>>> {
    prop_oneof![
        Just(None),
        Just(Some(None)),
        Just(Some(Some("/a.service"))),
        Just(Some(Some("/b.service"))),
        Just(Some(Some("/made"))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn one_more_rule_opens_nothing(
        some in prop::collection::vec(any_bind_rule(), 0..4),
        more in any_bind_rule(),
        place in any::<prop::sample::Index>(),
        path in any_path(),
    ) {
        let workload = path.map(workload);
        let caller = at(workload.as_ref());
        let token = alice();
        let before = bind(&some, &token, &caller);
        let mut all = some.clone();
        all.insert(place.index(some.len() + 1), more);
        let after = bind(&all, &token, &caller);
        prop_assert!(after.is_err() || before.is_ok());
        if let (Ok(before), Ok(after)) = (before, after) {
            prop_assert!(after.first_use || !before.first_use);
        }
    }

    #[test]
    fn an_unknown_caller_fits_nothing_but_networks(rule in any_rule(), uid in prop_oneof![Just(0_u32), Just(1000)]) {
        let fits = rule.matches(&CallerView { uid, ..at(None) });
        prop_assert!(!fits || (!rule.needs_known_caller() && !rule.networks.is_empty()));
    }

    #[test]
    fn first_use_alone_refuses_nobody(count in 0..4_usize, path in any_path()) {
        let rule = BindRule { issuer: None, subject: None, client_id: None, to: BindTo::FirstUse };
        let workload = path.map(workload);
        let bound = bind(&vec![rule; count], &alice(), &at(workload.as_ref()));
        prop_assert_eq!(bound.map(|bound| bound.first_use), Ok(count > 0));
    }
}
