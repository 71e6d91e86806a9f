use std::collections::BTreeMap;

use enforcer_common::abi::{EndpointKey, FAMILY_V4, FLOW_OBSERVE};

use super::super::EndpointPolicy;
use super::super::sweep::tests::flow;
use super::*;
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
    Transition::new((old, Mode::Enforce), (endpoints(new), Mode::Enforce))
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
fn only_a_start_of_enforcing_ends_what_was_observed() {
    let server = World::new().server();
    let observed = Flow { endpoint_id: ENDPOINT, flags: FLOW_OBSERVE, ..flow([0; 4]) };
    let all =
        [(Mode::Observe, Mode::Enforce), (Mode::Enforce, Mode::Enforce), (Mode::Observe, Mode::Observe)];
    for (old, new) in all {
        let endpoints = || endpoints(&[(ENDPOINT, &[(SERVER, server.clone())])]);
        let result = Transition::new((endpoints(), old), (endpoints(), new)).flow(&observed, []);
        let starts = old == Mode::Observe && new == Mode::Enforce;
        assert_eq!(result, if starts { Err(Loss::Observed) } else { Ok(()) });
    }
}
