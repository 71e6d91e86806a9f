//! Switches to another policy.

use super::*;
use crate::policy::Server;
use crate::token::testing::RESOURCE;

const NEXT: u64 = GENERATION + 1;

fn endpoints(servers: &[(u32, &Server)]) -> Endpoints {
    let key = EndpointKey { addr: [0; 16], port: 1, family: FAMILY_V4, zero: 0 };
    let servers = servers.iter().map(|(id, server)| (*id, Arc::new((*server).clone()))).collect();
    Endpoints(BTreeMap::from([(0, EndpointPolicy { key, servers })]))
}

impl Bench {
    /// The flow's record, as the kernel would have it after this hand-back.
    fn kernel_flow(&mut self, flags: u32) {
        let serial = self.last_back().1.grant_serial;
        let flow = Flow { requests: 1, flags, ..sweep_tests::flow([serial, 0, 0, 0]) };
        self.fake.flows.insert(COOKIE, flow);
    }

    fn next(&self, new: Endpoints, mode: Mode) -> Next {
        let transition = Transition::new(self.engine.endpoints().clone(), (new, mode));
        Next { transition, judged: Judged::new() }
    }

    fn switch(&mut self, new: Endpoints, mode: Mode) -> Consequences {
        let next = self.next(new, mode);
        let foreseen = self.engine.consequences(&next, &self.keys, self.now, &mut self.fake).unwrap();
        let all = self.engine.carry(&next, NEXT, &self.keys, self.now, &mut self.fake).unwrap();
        let came = self.engine.switch(&next, &all, NEXT, self.now, &mut self.fake).unwrap();
        assert_eq!(foreseen, came, "what was foreseen is what came");
        came
    }

    /// A switch between enforced policies that changes the server.
    fn change(&mut self, change: impl FnOnce(&mut Server)) -> Consequences {
        let mut server = (*self.engine.endpoints().servers()[&0]).clone();
        change(&mut server);
        self.switch(endpoints(&[(0, &server)]), Mode::Enforce)
    }
}

fn loss(reason: &str, grants: u64, flows: u64) -> Vec<Losses> {
    vec![Losses { server: "files".into(), reason: reason.into(), grants, flows }]
}

#[test]
fn what_the_new_policy_allows_goes_on_under_its_generation() {
    let mut bench = Bench::new();
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    bench.kernel_flow(0);
    let before = bench.fake.grants[&0];
    let came = bench.change(|server| server.aliases.push("https://alias.example".into()));
    assert_eq!((came.grants, came.flows, came.losses.len()), (1, 1, 0));
    assert_eq!(bench.fake.grants[&0], Grant { generation: NEXT, ..before });
    assert!(bench.fake.destroyed.is_empty());
    // The head was judged by the old policy: it has to be judged again, and its token has its grant still.
    bench.punt(request.as_bytes(), 0, 0);
    assert_eq!(bench.last_back().1.grant_serial, before.serial);
    let (_, digest) = head::analyze_bytes(request.as_bytes(), &bench.key, &Origin::NONE).unwrap();
    assert_eq!(bench.fake.verdicts[&digest].generation, NEXT);
    bench.engine.tick(bench.now, &mut bench.fake);
    assert!(bench.fake.destroyed.is_empty());
}

#[test]
fn what_it_does_not_allow_is_revoked_and_its_stream_ended() {
    type Change = fn(&mut Server);
    let changes: [(&str, Change); 4] = [
        ("insufficient-scope", |server| server.scopes.push("more".into())),
        ("audience-mismatch", |server| server.resource = "https://other.example/mcp".into()),
        ("issuer-unknown", |server| server.issuers = Vec::new()),
        ("host-removed", |server| server.hosts = vec!["other.example".into()]),
    ];
    for (reason, change) in changes {
        let mut bench = Bench::new();
        let request = bench.good("", "");
        bench.punt(request.as_bytes(), 0, 0);
        bench.kernel_flow(0);
        let came = bench.change(change);
        assert_eq!(came.losses, loss(reason, 1, 1));
        assert!(bench.fake.destroyed.contains(&COOKIE), "{reason}");
        assert!(bench.fake.counts.contains(&reason));
        let grant = bench.fake.grants[&0];
        assert_eq!((grant.revoked, grant.generation), (1, GENERATION));
        // A connection whose last request passes at this moment names the grant a little later: the sweep sees it.
        bench.fake.destroyed.clear();
        bench.fake.flows.insert(99, sweep_tests::flow([grant.serial, 0, 0, 0]));
        bench.engine.tick(bench.now, &mut bench.fake);
        assert!(bench.fake.destroyed.contains(&99));
    }
}

#[test]
fn a_request_that_waits_is_decided_under_the_new_policy() {
    let mut bench = Bench::new();
    let request = bench.good("", "");
    let (first, rest) = request.as_bytes().split_at(30);
    bench.punt(first, 0, 0);
    bench.change(|server| server.scopes.push("more".into()));
    bench.punt(rest, 0, 0);
    assert!(bench.fake.server.is_empty() && bench.fake.client.starts_with(b"HTTP/1.1 403 "));
    // The other way round: refused by the old policy, allowed by the new one.
    let mut bench = Bench::new();
    bench.change(|server| server.scopes.push("more".into()));
    bench.punt(first, 0, 0);
    bench.change(|server| server.scopes.clear());
    let rest = &bench.good("", "").into_bytes()[30..];
    bench.punt(rest, 0, 0);
    assert!(bench.fake.client.is_empty() && !bench.fake.server.is_empty());
}

#[test]
fn connections_of_an_endpoint_that_is_gone_end_wherever_they_are() {
    let mut bench = Bench::new();
    bench.punt(b"POST /mcp HT", 0, 0);
    bench.fake.flows.insert(COOKIE, sweep_tests::flow([0; 4]));
    let came = bench.switch(Endpoints::default(), Mode::Enforce);
    assert_eq!(came.losses, loss("endpoint-removed", 0, 1));
    assert!(bench.fake.destroyed.contains(&COOKIE));
    bench.punt(b"TP/1.1\r\n\r\n", 0, 0);
    assert!(bench.fake.server.is_empty() && bench.fake.client.is_empty());
    // One that was accepted just then and not seen.
    let mut bench = Bench::new();
    bench.switch(Endpoints::default(), Mode::Enforce);
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    assert!(bench.fake.server.is_empty() && bench.fake.destroyed.contains(&COOKIE));
    assert!(bench.fake.counts.contains(&"endpoint-removed"));
}

#[test]
fn enforcing_ends_what_was_only_observed() {
    let mut bench = Bench::new();
    bench.punt(&Bench::refused(10, "abc").into_bytes(), PUNT_OBSERVED, 0);
    bench.kernel_flow(enforcer_common::abi::FLOW_OBSERVE);
    let same = bench.engine.endpoints().clone();
    let came = bench.switch(same.clone(), Mode::Observe);
    assert!(came.losses.is_empty());
    bench.engine.tick(bench.now, &mut bench.fake);
    assert!(bench.fake.destroyed.is_empty());
    let came = bench.switch(same, Mode::Enforce);
    assert_eq!(came.losses, loss("observed", 0, 1));
    assert!(bench.fake.destroyed.contains(&COOKIE));
    let backs = bench.fake.backs.len();
    bench.punt(b"defghij", PUNT_OBSERVED, 0);
    // It is never let go.
    assert!(bench.fake.backs[backs..].iter().all(|(_, to)| to.ctl.state() == State::Dead as u64));
    // One that read the mode just before, and was noted just after.
    bench.fake.destroyed.clear();
    let late = Flow { flags: enforcer_common::abi::FLOW_OBSERVE, ..sweep_tests::flow([0; 4]) };
    bench.fake.flows.insert(99, late);
    bench.engine.tick(bench.now, &mut bench.fake);
    assert!(bench.fake.destroyed.contains(&99));
}

#[test]
fn a_revoked_grant_stays_revoked() {
    let mut bench = Bench::new();
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    let revoked = Grant { revoked: 1, ..bench.fake.grants[&0] };
    bench.fake.grants.insert(0, revoked);
    let came = bench.change(|server| server.aliases.push(format!("{RESOURCE}/more")));
    assert_eq!((came.grants, bench.fake.grants[&0]), (0, revoked));
}

#[test]
fn a_token_whose_claims_are_not_known_has_to_show_itself_again_if_more_is_asked_of_it() {
    let mut bench = Bench::new();
    let request = bench.good("", "");
    bench.punt(request.as_bytes(), 0, 0);
    bench.kernel_flow(0);
    let serial = bench.fake.grants[&0].serial;
    bench.engine.grants.remembered.forget(serial);
    let (grant, label) = (bench.fake.grants[&0], bench.fake.labels[&0]);
    // Whatever it says, this policy allows it as well.
    let came = bench.change(|server| server.aliases.push("https://alias.example".into()));
    assert!(came.losses.is_empty());
    assert_eq!(bench.fake.grants[&0], Grant { generation: NEXT, ..grant });
    // A label that is another grant's says nothing.
    bench.fake.labels.insert(0, GrantLabel { serial: serial + 1, ..label });
    let came = bench.change(|server| server.scopes.clear());
    assert_eq!(came.losses, loss("not-remembered", 1, 1));
    bench.fake.labels.insert(0, label);
    bench.fake.grants.insert(0, grant);
    // This one it may not.
    let came = bench.change(|server| server.scopes.push("more".into()));
    assert_eq!(came.losses, loss("not-remembered", 1, 1));
    assert_eq!(bench.fake.grants[&0].revoked, 1);
}
