use std::collections::BTreeMap;
use std::time::Duration;

use enforcer_common::abi::{EndpointKey, FAMILY_V4, FLOW_OBSERVE};

use super::super::EndpointPolicy;
use super::super::sweep::tests::flow;
use super::*;
use crate::policy::{Algorithm, KeySource};
use crate::token::testing::{NOW, World};

const SERVER: u32 = 3;
const ENDPOINT: u32 = 5;

fn endpoints(endpoints: &[(u32, &[(u32, Server)])]) -> Endpoints {
    let endpoint = |(id, servers): &(u32, &[(u32, Server)])| {
        let servers = servers.iter().map(|(id, server)| (*id, Arc::new(server.clone()))).collect();
        let key = EndpointKey { addr: [0; 16], port: *id as u16, family: FAMILY_V4, zero: 0 };
        (*id, EndpointPolicy { key, servers })
    };
    Endpoints(endpoints.iter().map(endpoint).collect::<BTreeMap<_, _>>())
}

fn to(new: &[(u32, &[(u32, Server)])]) -> Transition {
    from(World::new().server(), new)
}

fn from(old: Server, new: &[(u32, &[(u32, Server)])]) -> Transition {
    let old = endpoints(&[(ENDPOINT, &[(SERVER, old)])]);
    Transition::new(old, (endpoints(new), Mode::Enforce))
}

#[test]
fn a_grant_holds_while_everything_about_it_does() {
    let world = World::new();
    let server = || world.server();
    let evidence = world.verify().unwrap().evidence;
    let judged =
        |new: Server| to(&[(ENDPOINT, &[(SERVER, new)])]).grant(SERVER, &evidence, &world.keys(), NOW);
    assert_eq!(judged(server()), Ok(()));
    let other_keys = World::new().keys();
    let same = to(&[(ENDPOINT, &[(SERVER, server())])]);
    assert_eq!(
        same.grant(SERVER, &evidence, &other_keys, NOW),
        Err(Loss::Token(TokenReason::SignatureInvalid))
    );
    let scopes =
        |scopes: &[&str]| Server { scopes: scopes.iter().map(ToString::to_string).collect(), ..server() };
    assert_eq!(judged(scopes(&["mcp:read", "mcp:tools"])), Ok(()));
    assert_eq!(judged(scopes(&["mcp:tools", "more"])), Err(Loss::InsufficientScope));
    let resource = Server { resource: "https://other.example/mcp".into(), ..server() };
    assert_eq!(judged(resource.clone()), Err(Loss::Token(TokenReason::AudienceMismatch)));
    let renamed = Server { aliases: vec![server().resource], ..resource };
    assert_eq!(judged(renamed), Ok(()));
    let issuers = Server { issuers: Vec::new(), ..server() };
    assert_eq!(judged(issuers), Err(Loss::Token(TokenReason::IssuerUnknown)));
    let gone = to(&[(ENDPOINT, &[(SERVER + 1, server())])]);
    assert_eq!(gone.grant(SERVER, &evidence, &world.keys(), NOW), Err(Loss::ServerRemoved));
    assert_eq!(gone.grant(99, &evidence, &world.keys(), NOW), Err(Loss::ServerRemoved));
}

#[test]
fn a_grant_whose_token_is_not_known_holds_under_a_policy_that_asks_for_no_more() {
    type Change<T> = fn(&mut T);
    let old = || {
        let mut server = World::new().server();
        server.aliases = vec!["https://alias.example/".into()];
        server.scopes = vec!["a".into(), "b".into()];
        server
    };
    let issuer = name_hash(&old().issuers[0].issuer);
    let judged = |new: Server| from(old(), &[(ENDPOINT, &[(SERVER, new)])]).grant_unseen(SERVER, &issuer);
    assert_eq!(judged(old()), Ok(()));
    let servers: [(Change<Server>, Result<(), Loss>); 10] = [
        (|new| new.scopes = vec!["b".into()], Ok(())),
        (|new| new.scopes.push("c".into()), Err(Loss::NotRemembered)),
        (|new| new.aliases.push("https://more.example/".into()), Ok(())),
        (|new| new.aliases.clear(), Err(Loss::NotRemembered)),
        (|new| std::mem::swap(&mut new.aliases[0], &mut new.resource), Ok(())),
        (|new| new.resource = "https://other.example/".into(), Err(Loss::NotRemembered)),
        (|new| new.issuers.clear(), Err(Loss::Token(TokenReason::IssuerUnknown))),
        (|new| new.metadata.serve = !new.metadata.serve, Ok(())),
        (|new| new.path = "/other".into(), Err(Loss::PathChanged)),
        (|new| new.hosts = vec!["more".into()], Err(Loss::HostRemoved)),
    ];
    for (number, (change, expected)) in servers.into_iter().enumerate() {
        let mut new = old();
        change(&mut new);
        assert_eq!(judged(new), expected, "change {number} of the server");
    }
    let less = || Err(Loss::NotRemembered);
    let issuers: [(Change<Issuer>, Result<(), Loss>); 12] = [
        (|new| new.name = "renamed".into(), Ok(())),
        (|new| new.issuer.push('/'), Err(Loss::Token(TokenReason::IssuerUnknown))),
        (|new| new.keys = KeySource::File("/other.jwks".into()), less()),
        (|new| new.ca_file = Some("/ca.pem".into()), less()),
        (|new| new.allow_http_loopback = !new.allow_http_loopback, less()),
        (|new| new.algorithms.clear(), less()),
        (|new| new.algorithms.push(Algorithm::EdDSA), Ok(())),
        (|new| new.token_types.clear(), less()),
        (|new| new.leeway += Duration::from_secs(1), Ok(())),
        (|new| new.leeway = Duration::ZERO, less()),
        (|new| new.max_token_lifetime -= Duration::from_secs(1), less()),
        (|new| new.max_staleness *= 2, Ok(())),
    ];
    for (number, (change, expected)) in issuers.into_iter().enumerate() {
        let mut new = old();
        let mut changed = (*new.issuers[0]).clone();
        change(&mut changed);
        new.issuers = vec![Arc::new(changed)];
        assert_eq!(judged(new), expected, "change {number} of the issuer");
    }
    let same = from(old(), &[(ENDPOINT, &[(SERVER, old())])]);
    assert_eq!(same.grant_unseen(SERVER, &name_hash("https://nobody.example")), less());
    assert_eq!(same.grant_unseen(99, &issuer), Err(Loss::ServerRemoved));
    let gone = from(old(), &[(ENDPOINT, &[(SERVER + 1, old())])]);
    assert_eq!(gone.grant_unseen(SERVER, &issuer), Err(Loss::ServerRemoved));
}

#[test]
fn heads_hold_only_if_none_of_them_would_be_refused() {
    let server = || Server { origins: vec!["https://o.example".into()], ..World::new().server() };
    let holds = |new: Server| heads_hold(&server(), &new);
    assert_eq!(holds(server()), Ok(()));
    let more = |some: Vec<String>| [some, vec!["more".to_owned()]].concat();
    assert_eq!(
        holds(Server { hosts: more(server().hosts), origins: more(server().origins), ..server() }),
        Ok(())
    );
    assert_eq!(holds(Server { path: "/other".into(), ..server() }), Err(Loss::PathChanged));
    assert_eq!(holds(Server { hosts: vec!["more".into()], ..server() }), Err(Loss::HostRemoved));
    assert_eq!(holds(Server { origins: Vec::new(), ..server() }), Err(Loss::OriginRemoved));
}

#[test]
fn a_connection_ends_with_its_endpoint_its_listener_and_its_grants() {
    let server = || World::new().server();
    let used = Flow { endpoint_id: ENDPOINT, requests: 1, ..flow([1, 0, 0, 0]) };
    let same = to(&[(ENDPOINT, &[(SERVER, server())])]);
    assert_eq!(same.flow(&used, [(SERVER, Ok(()))]), Ok(()));
    assert_eq!(
        same.flow(&used, [(SERVER, Ok(())), (SERVER, Err(Loss::ServerRemoved))]),
        Err(Loss::ServerRemoved)
    );
    let elsewhere = to(&[(ENDPOINT, &[(SERVER + 1, server())]), (ENDPOINT + 1, &[(SERVER, server())])]);
    assert_eq!(elsewhere.flow(&used, [(SERVER, Ok(()))]), Err(Loss::ListenerRemoved));
    let moved = to(&[(ENDPOINT + 1, &[(SERVER, server())])]);
    for requests in [0, 1] {
        let flow = Flow { requests, ..used };
        assert_eq!(moved.flow(&flow, []), Err(Loss::EndpointRemoved));
    }
}

#[test]
fn what_was_open_must_stay_open() {
    let public = |paths: &[&str]| Server {
        public_paths: paths.iter().map(ToString::to_string).collect(),
        ..World::new().server()
    };
    let flow = |requests| Flow { endpoint_id: ENDPOINT, requests, ..flow([0; 4]) };
    let change = |new: Server, requests| {
        from(public(&["/a", "/b"]), &[(ENDPOINT, &[(SERVER, new)])]).flow(&flow(requests), [])
    };
    assert_eq!(change(public(&["/b", "/a", "/c"]), 1), Ok(()));
    assert_eq!(change(public(&["/a"]), 1), Err(Loss::PublicPathRemoved));
    assert_eq!(change(public(&["/a"]), 0), Ok(()));
    let hosts = Server { hosts: vec!["x".into()], ..public(&["/a", "/b"]) };
    assert_eq!(change(hosts, 1), Err(Loss::PublicPathRemoved));
}

#[test]
fn a_policy_that_enforces_ends_what_was_observed() {
    let server = World::new().server();
    let observed = Flow { endpoint_id: ENDPOINT, flags: FLOW_OBSERVE, ..flow([0; 4]) };
    for (mode, expected) in [(Mode::Enforce, Err(Loss::Observed)), (Mode::Observe, Ok(()))] {
        let endpoints = || endpoints(&[(ENDPOINT, &[(SERVER, server.clone())])]);
        assert_eq!(Transition::new(endpoints(), (endpoints(), mode)).flow(&observed, []), expected);
    }
}

#[test]
fn what_was_decided_about_a_caller_holds_only_if_no_rule_is_new() {
    use crate::policy::{BindRule, BindTo, WorkloadRule};
    let world = World::new();
    let evidence = world.verify().unwrap().evidence;
    let issuer = name_hash(&world.server().issuers[0].issuer);
    let workload = |unit: &str| {
        Arc::new(WorkloadRule { name: "w".into(), units: vec![unit.into()], ..WorkloadRule::default() })
    };
    let rule = |issuer: Option<&str>, unit: &str| BindRule {
        issuer: issuer.map(str::to_owned),
        subject: None,
        client_id: None,
        to: BindTo::Workloads(vec![workload(unit)]),
    };
    let bind = |rules: &[BindRule]| Server { bind: rules.to_vec(), ..world.server() };
    let callers = |callers: Option<&str>| Server {
        callers: callers.map(|unit| vec![workload(unit)]),
        ..world.server()
    };
    let renamed = |rules: &[BindRule], name: &str| {
        let mut server = bind(rules);
        server.issuers = vec![Arc::new(Issuer { name: name.into(), ..(*server.issuers[0]).clone() })];
        server
    };
    let (a, b) = (rule(None, "a.service"), rule(None, "b.service"));
    let main = rule(Some("main"), "a.service");
    let changed = Err(Loss::BindingChanged);
    for (number, (old, new, expected)) in [
        (bind(&[]), bind(&[]), Ok(())),
        (bind(&[]), bind(std::slice::from_ref(&a)), changed),
        (bind(&[a.clone(), b.clone()]), bind(&[b.clone(), a.clone()]), Ok(())),
        (bind(&[a.clone(), b.clone()]), bind(std::slice::from_ref(&b)), Ok(())),
        (bind(std::slice::from_ref(&a)), bind(std::slice::from_ref(&b)), changed),
        // The workload under the name is another one.
        (bind(&[rule(None, "a.service")]), bind(&[rule(None, "c.service")]), changed),
        // The rule's name for an issuer means another one.
        (renamed(std::slice::from_ref(&main), "main"), renamed(std::slice::from_ref(&main), "main"), Ok(())),
        (
            renamed(std::slice::from_ref(&main), "other"),
            renamed(std::slice::from_ref(&main), "main"),
            changed,
        ),
        (callers(None), callers(Some("a.service")), changed),
        (callers(Some("a.service")), callers(Some("a.service")), Ok(())),
        (callers(Some("a.service")), callers(Some("b.service")), changed),
        (callers(Some("a.service")), callers(None), Ok(())),
    ]
    .into_iter()
    .enumerate()
    {
        let transition = from(old, &[(ENDPOINT, &[(SERVER, new)])]);
        assert_eq!(transition.grant(SERVER, &evidence, &world.keys(), NOW), expected, "{number}");
        assert_eq!(transition.grant_unseen(SERVER, &issuer), expected, "{number}, unseen");
    }
}
