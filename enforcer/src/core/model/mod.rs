//! The protocol between kernel and daemon, in every order that its steps can have: a search over all states of one connection, with
//! the real [`Engine`](super::Engine), and the judge's and the inject program's own functions.
//!
//! What is checked, for each script of requests and each way to cut it into packets:
//!
//! - The server gets the bytes of allowed requests, in order, once, and nothing else.
//! - The client gets one answer to each request, in order: the server's for what was allowed, a refusal for what was refused.
//! - In the end every request has its answer, or the connection is gone; no flow is left in hands of nobody.
//!
//! The daemon may be killed before any of its steps and between any two of its calls into the kernel, and a new one takes over.
//! Not in it: observe mode, more than one connection, packets of more than one record, and what overlaps within one step
//! (`enforcer_common::flow::races`). The server answers a request in one piece.
//!
//! Each rule of the protocol is also left out, one at a time, which has to be found.

mod edge;
mod judge;
mod kernel;
mod script;
mod search;
mod world;

use std::rc::Rc;

use kernel::Fault;
use script::{Cut, Kind, Script};
use search::{Seen, explore};
use world::{Options, Setting, World};

/// Explores all scripts.
fn explore_all(scripts: &[Vec<(Kind, Cut)>], options: Options) -> Result<Seen, String> {
    let setting = Rc::new(Setting::new());
    let begun = std::time::Instant::now();
    let mut total = Seen::default();
    for requests in scripts {
        let script = Rc::new(Script::new(requests, &setting.tokens));
        let seen = explore(World::new(&setting, &script, options))?;
        assert!(seen.ends > 0, "{} never ends", script.name);
        total.states += seen.states;
        total.ends += seen.ends;
    }
    eprintln!(
        "{} scripts, {} states, {} ends, {:?}",
        scripts.len(),
        total.states,
        total.ends,
        begun.elapsed()
    );
    Ok(total)
}

/// Every way to cut each kind.
fn every_request() -> Vec<(Kind, Cut)> {
    script::WHOLE.iter().flat_map(|kind| Script::cuts(*kind).iter().map(|cut| (*kind, *cut))).collect()
}

/// Pairs whose first is one of `first`.
fn pairs(first: &[(Kind, Cut)]) -> Vec<Vec<(Kind, Cut)>> {
    let second = [
        (Kind::Get, Cut::Whole),
        (Kind::Post, Cut::Body),
        (Kind::Chunked, Cut::Head),
        (Kind::Bad, Cut::Whole),
        (Kind::BadPost, Cut::Body),
    ];
    first.iter().flat_map(|one| second.map(|two| vec![*one, two])).collect()
}

fn found(scripts: &[Vec<(Kind, Cut)>], options: Options) -> bool {
    match explore_all(scripts, options) {
        Ok(_) => false,
        Err(what) => {
            eprintln!("{:?}: {what}", options.fault);
            true
        }
    }
}

#[test]
fn single_requests_in_every_order() {
    let mut scripts: Vec<_> = every_request().into_iter().map(|request| vec![request]).collect();
    scripts.push(vec![(Kind::Half, Cut::Whole)]);
    for (close, server_blocks) in [(false, false), (true, false), (false, true)] {
        explore_all(&scripts, Options { close, server_blocks, ..Options::default() }).unwrap();
    }
}

#[test]
fn two_requests_in_every_order() {
    explore_all(&pairs(&every_request()), Options::default()).unwrap();
}

#[test]
fn three_requests_in_every_order() {
    let kinds = [Kind::Get, Kind::Bad];
    let mut scripts = vec![
        vec![(Kind::Post, Cut::Whole), (Kind::Get, Cut::Whole), (Kind::Bad, Cut::Whole)],
        vec![(Kind::Get, Cut::Whole), (Kind::BadPost, Cut::Whole), (Kind::Get, Cut::Whole)],
    ];
    for one in kinds {
        for two in kinds {
            for three in kinds {
                scripts.push(vec![(one, Cut::Whole), (two, Cut::Whole), (three, Cut::Whole)]);
            }
        }
    }
    explore_all(&scripts, Options::default()).unwrap();
}

#[test]
fn a_daemon_killed_at_any_instant_leaves_no_flow_behind_and_repeats_no_byte() {
    let options = Options { deaths: true, ..Options::default() };
    let mut scripts: Vec<_> = every_request().into_iter().map(|request| vec![request]).collect();
    scripts.push(vec![(Kind::Half, Cut::Whole)]);
    scripts.extend(every_request().into_iter().map(|request| vec![request, (Kind::Get, Cut::Whole)]));
    explore_all(&scripts, options).unwrap();
}

#[test]
fn a_full_ring_buffer_ends_the_connection() {
    let options = Options { ring_records: 1, ..Options::default() };
    explore_all(&pairs(&[(Kind::Post, Cut::Bodies), (Kind::Bad, Cut::Head)]), options).unwrap();
}

#[test]
fn each_rule_of_the_protocol_is_needed() {
    let bodies = vec![vec![(Kind::Post, Cut::Bodies)], vec![(Kind::BadPost, Cut::Body)]];
    let pairs = pairs(&[(Kind::Get, Cut::Whole), (Kind::Post, Cut::Joined)]);
    for (fault, scripts) in [
        (Fault::BytesNotCompared, &bodies),
        (Fault::BackFirst, &bodies),
        (Fault::PassOvertakes, &bodies),
        (Fault::DiscardPasses, &bodies),
        (Fault::AnswersNotAwaited, &pairs),
    ] {
        assert!(found(scripts, Options { fault, ..Options::default() }), "{fault:?} is not found");
    }
    let known = vec![
        vec![(Kind::Get, Cut::Whole); 2],
        vec![(Kind::Get, Cut::Whole), (Kind::Get, Cut::Whole), (Kind::Bad, Cut::Whole)],
    ];
    let joined = vec![vec![(Kind::Get, Cut::Whole), (Kind::Get, Cut::Joined), (Kind::Bad, Cut::Whole)]];
    let fault = Fault::PipeliningPasses;
    assert!(found(&joined, Options { fault, ..Options::default() }), "{fault:?} is not found");
    let fault = Fault::PipeliningForgotten;
    assert!(found(&known, Options { fault, ..Options::default() }), "{fault:?} is not found");
    for fault in [Fault::ReadTwice, Fault::OrphansForgotten] {
        assert!(
            found(&bodies, Options { fault, deaths: true, ..Options::default() }),
            "{fault:?} is not found"
        );
    }
}
