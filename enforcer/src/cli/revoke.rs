//! `enforcer revoke` and `enforcer unrevoke`.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use clap::{ArgGroup, Args};
use enforcer_common::abi::{
    Ends, MAX_REVOCATIONS, MODE_OBSERVE, NameHash, REVOCATION_NEXT_ID, REVOCATION_TOKEN_LIFE_SECS,
    REVOKE_CLIENT, REVOKE_ISSUER, REVOKE_SERVER, REVOKE_SUBJECT, REVOKE_TOKEN, REVOKE_WORKLOAD,
    REVOKED_BY_OPERATOR, Revocation, Text, grant_slot, text, text_str,
};
use serde::Serialize;

use super::exit::{FAILURE, NOT_LOADED, OK, failed};
use super::format::{duration, unix_secs};
use super::output::{Render, print};
use super::view::revocations::selection;
use super::{Global, live};
use crate::core::{Stream, must_end};
use crate::datapath::{Live, LiveError, SocketDestroyer};
use crate::policy::{MAX_LEEWAY_SECS, Mode};
use crate::revocation::store::{Recorded, StateDir, StateLock, parse_hex};
use crate::revocation::{Revocations, is_over, name_hash, selects};

/// Requests that passed at the very moment of the revocation are noted in their flows this much later at most.
const SECOND_LOOK: Duration = Duration::from_millis(20);

/// Refuse tokens that issuer and policy would accept, and end what they opened
///
/// Takes effect at once, also while no daemon runs: grants that match are revoked in the kernel, connections that carry answers
/// to their requests are reset, and the daemon gives no new grant. A token must match everything that is named. Except with
/// --token-fingerprint, only tokens that were issued up to now are meant: later ones are good. It ends by itself when the
/// last token that it can mean has ended. See docs/revocation.md.
#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("which").required(true).multiple(true)
        .args(["token_fingerprint", "issuer", "subject", "client", "server", "workload", "all"]),
    after_long_help = "\
Examples:
  enforcer revoke --token-fingerprint 5bdcc146bf60754e6a042426089575c7   as `enforcer grants` shows it
  enforcer revoke --issuer corp --subject alice
  enforcer revoke --client editor --server files
  enforcer revoke --workload agent.service                               as `enforcer workloads` shows it
  enforcer revoke --all                                                  every token issued up to now
  enforcer unrevoke 3                                                    takes number 3 back"
)]
pub(super) struct Command {
    /// One token, by its fingerprint: 32 hexadecimal digits
    #[arg(long, value_name = "FP", value_parser = fingerprint)]
    token_fingerprint: Option<[u8; 16]>,
    /// Tokens of this issuer: its name in the policy, or its identifier (`iss`)
    #[arg(long, value_name = "ISSUER")]
    issuer: Option<String>,
    /// Tokens of this subject (`sub`), of whatever issuer unless one is named
    #[arg(long, value_name = "SUBJECT")]
    subject: Option<String>,
    /// Tokens of this client (`client_id` or `azp`)
    #[arg(long, value_name = "CLIENT")]
    client: Option<String>,
    /// At this server only: tokens that are good elsewhere stay so
    #[arg(long, value_name = "NAME")]
    server: Option<String>,
    /// When this workload presents them: unit, container, pod, cgroup path, or the address of a caller elsewhere, as `enforcer workloads` and the
    /// log show it
    #[arg(long, value_name = "NAME")]
    workload: Option<String>,
    /// Every token
    #[arg(long, conflicts_with_all = ["token_fingerprint", "issuer", "subject", "client", "server", "workload"])]
    all: bool,
}

/// Take a revocation back: its tokens are good again
///
/// Tokens get new grants from the daemon; while none runs they stay refused. Connections that were ended stay ended.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  enforcer revocations      which there are
  enforcer unrevoke 3")]
pub(super) struct UndoCommand {
    /// Number of the revocation
    #[arg(value_name = "ID")]
    id: u64,
}

fn fingerprint(shown: &str) -> Result<[u8; 16], String> {
    parse_hex(shown)
        .ok_or_else(|| "a fingerprint is 32 hexadecimal digits, as `enforcer grants` shows it".to_owned())
}

#[derive(Debug, Serialize)]
struct Done {
    id: u64,
    selects: String,
    /// The enforcement is loaded; otherwise it is recorded for the next start.
    in_force: bool,
    grants_revoked: usize,
    connections_closed: usize,
    /// Until when it stands, if it is not taken back.
    ends_at_unix_s: u64,
    ends_in_s: u64,
}

impl Render for Done {
    fn text(&self) -> String {
        let Self { id, selects, grants_revoked, connections_closed, .. } = self;
        let ends = duration(self.ends_in_s.saturating_mul(1000));
        let mut text = format!("revocation {id}: {selects}, for {ends}\n");
        text.push_str(&if self.in_force {
            format!("{grants_revoked} grants revoked, {connections_closed} connections closed\n")
        } else {
            "no enforcement is loaded; it is in force from the next start on\n".to_owned()
        });
        text
    }
}

#[derive(Debug, Serialize)]
struct Undone {
    id: u64,
    selects: String,
}

impl Render for Undone {
    fn text(&self) -> String {
        format!("revocation {} is taken back: {}\n", self.id, self.selects)
    }
}

/// The revocations where they are: in the maps if an enforcement is loaded, and in the file.
struct Book {
    live: Option<Live>,
    state: StateDir,
    lock: StateLock,
    recorded: Recorded,
    /// The file does not say what `recorded` does.
    unrecorded: bool,
}

impl Book {
    fn open(global: &Global) -> anyhow::Result<Self> {
        let state = global.state();
        if !state.path().exists() {
            // There never was an enforcement of this name, unless there is one.
            live::open(global)?;
        }
        // Before the look at the maps: a daemon that is starting holds it until they are in their place.
        let lock = state.lock()?;
        let live = match live::open(global) {
            Ok(live) => Some(live),
            Err(error) if matches!(error.downcast_ref(), Some(LiveError::NotLoaded(_))) => None,
            Err(error) => return Err(error),
        };
        let recorded = match &live {
            // The maps are right; a file that is damaged is written anew.
            Some(live) => Recorded {
                next_id: live.revocation_word(REVOCATION_NEXT_ID)?.max(1),
                token_life_secs: live.revocation_word(REVOCATION_TOKEN_LIFE_SECS)?,
                revocations: live.revocations()?,
            },
            None => state.read()?.ok_or_else(|| {
                failed(
                    NOT_LOADED,
                    format!(
                        "no enforcement is loaded, and none was before: {} has no revocations",
                        state.path().display()
                    ),
                )
            })?,
        };
        Ok(Self { live, state, lock, recorded, unrecorded: false })
    }

    /// The file first: whatever ends this command, what is in force is also there after the enforcement is loaded anew. A file that
    /// can't be written keeps nothing from being in force; [`Self::record`] tries again, and tells.
    fn set(&mut self, id: u64, revocation: Revocation) -> Result<(), LiveError> {
        self.recorded.revocations.insert(id, revocation);
        self.unrecorded = self.state.write(&self.lock, &self.recorded).is_err();
        if let Some(live) = &mut self.live {
            live.set_revocation(id, &revocation)?;
            live.move_revocation_epoch()?;
        }
        Ok(())
    }

    /// The file comes last, by [`Self::record`]: a command that is killed in between takes nothing back for good.
    fn remove(&mut self, id: u64) -> Result<Option<Revocation>, LiveError> {
        self.unrecorded = true;
        let removed = self.recorded.revocations.remove(&id);
        if let Some(live) = &mut self.live {
            live.remove_revocation(id)?;
            live.move_revocation_epoch()?;
        }
        Ok(removed)
    }

    /// Removes what is over, and gives the next number.
    fn make_room(&mut self, now_unix_secs: u64) -> anyhow::Result<u64> {
        let over: Vec<u64> = over(&self.recorded.revocations, now_unix_secs);
        for id in over {
            self.remove(id)?;
        }
        let used = self.recorded.revocations.len();
        if used >= MAX_REVOCATIONS as usize {
            let next = self.recorded.revocations.values().map(|entry| entry.expires_at_unix_secs).min();
            let wait = duration(next.unwrap_or(now_unix_secs).saturating_sub(now_unix_secs) * 1000);
            let message = format!(
                "nothing is revoked: the list is full ({used} of {MAX_REVOCATIONS}). The next one ends in {wait}. Take back \
                 what is not needed (`enforcer revocations`, `enforcer unrevoke ID`), or revoke by subject, client or issuer \
                 instead of token by token"
            );
            return Err(failed(FAILURE, message));
        }
        let id = self.recorded.next_id;
        self.recorded.next_id += 1;
        if let Some(live) = &mut self.live {
            live.set_revocation_word(REVOCATION_NEXT_ID, self.recorded.next_id)?;
        }
        Ok(id)
    }

    fn record(&self, what: &str) -> anyhow::Result<()> {
        if !self.unrecorded {
            return Ok(());
        }
        self.state.write(&self.lock, &self.recorded).with_context(|| {
            format!("{what} in the kernel, but this is not recorded: it is lost when the enforcement is loaded anew")
        })
    }
}

fn over(revocations: &Revocations, now_unix_secs: u64) -> Vec<u64> {
    revocations.iter().filter(|(_, entry)| is_over(entry, now_unix_secs)).map(|(id, _)| *id).collect()
}

pub(super) fn run(command: &Command, global: &Global) -> anyhow::Result<u8> {
    let mut book = Book::open(global)?;
    if let (Some(live), Some(name)) = (&book.live, &command.server) {
        known_server(live, name)?;
    }
    let now = unix_secs();
    let id = book.make_room(now)?;
    let mut entry = command.entry(now);
    // What is there was issued before now, whatever the issuer's clock says.
    let mut found = Found::look(&book, &entry)?;
    found.bound(&mut entry, book.recorded.token_life_secs);
    book.set(id, entry)?;
    let mut revoked = BTreeSet::new();
    loop {
        found = Found::look(&book, &entry)?;
        let later = found.issued_until.is_some_and(|at| at > entry.issued_until_unix_secs);
        if later {
            found.bound(&mut entry, book.recorded.token_life_secs);
            book.set(id, entry)?;
        }
        if let Some(live) = &mut book.live {
            for (slot, grant) in &found.grants {
                if grant.revoked == 0 {
                    live.revoke_grant(*slot, grant, REVOKED_BY_OPERATOR)?;
                    revoked.insert(grant.serial);
                }
            }
        }
        if !later {
            break;
        }
    }
    let closed = match &book.live {
        Some(live) => close(live, &revoked, now),
        None => Ok(0),
    };
    book.record("the tokens are revoked")?;
    let done = Done {
        id,
        selects: selection(&entry),
        in_force: book.live.is_some(),
        grants_revoked: revoked.len(),
        connections_closed: closed?,
        ends_at_unix_s: entry.expires_at_unix_secs,
        ends_in_s: entry.expires_at_unix_secs.saturating_sub(now),
    };
    print(global.output, &done)?;
    Ok(OK)
}

pub(super) fn undo(command: &UndoCommand, global: &Global) -> anyhow::Result<u8> {
    let mut book = Book::open(global)?;
    let Some(entry) = book.remove(command.id)? else {
        let message = format!("there is no revocation {}; see `enforcer revocations`", command.id);
        return Err(failed(FAILURE, message));
    };
    book.record("the revocation is taken back")?;
    print(global.output, &Undone { id: command.id, selects: selection(&entry) })?;
    Ok(OK)
}

/// A name that no server has would revoke nothing, and nobody would notice.
fn known_server(live: &Live, name: &str) -> anyhow::Result<()> {
    let servers = live::servers(live)?;
    let names: Vec<_> = servers.values().map(|label| text_str(&label.name)).collect();
    // A label holds the beginning of a long name.
    if names.contains(&text_str(&text::<64>(name))) {
        return Ok(());
    }
    Err(failed(FAILURE, format!("no server is called `{name}`; there are: {}", names.join(", "))))
}

impl Command {
    fn entry(&self, now: u64) -> Revocation {
        let mut selectors = 0;
        let mut asked = |selector, name: &Option<String>| match name {
            Some(name) => {
                selectors |= selector;
                name_hash(name)
            }
            None => NameHash::default(),
        };
        let issuer_hash = asked(REVOKE_ISSUER, &self.issuer);
        let subject_hash = asked(REVOKE_SUBJECT, &self.subject);
        let client_hash = asked(REVOKE_CLIENT, &self.client);
        let server_hash = asked(REVOKE_SERVER, &self.server);
        let workload_hash = asked(REVOKE_WORKLOAD, &self.workload);
        if self.token_fingerprint.is_some() {
            selectors |= REVOKE_TOKEN;
        }
        Revocation {
            revoked_at_unix_secs: now,
            issued_until_unix_secs: now,
            expires_at_unix_secs: now,
            fingerprint: self.token_fingerprint.unwrap_or_default(),
            issuer_hash,
            subject_hash,
            client_hash,
            server_hash,
            workload_hash,
            selectors,
            exact_end: 0,
            issuer: begins(&self.issuer),
            subject: begins(&self.subject),
            client_id: begins(&self.client),
            server: begins(&self.server),
            workload: begins(&self.workload),
        }
    }
}

fn begins<const N: usize>(name: &Option<String>) -> Text<N> {
    text(name.as_deref().unwrap_or_default())
}

/// The grants that a revocation selects.
struct Found {
    grants: Vec<(u32, enforcer_common::abi::Grant)>,
    /// The latest `iat` among them.
    issued_until: Option<u64>,
}

impl Found {
    fn look(book: &Book, entry: &Revocation) -> Result<Self, LiveError> {
        let all = book.live.as_ref().map_or_else(|| Ok(Vec::new()), Live::revocable_grants)?;
        let selected: Vec<_> = all.into_iter().filter(|(_, _, subject)| selects(entry, subject)).collect();
        let issued_until = selected.iter().filter_map(|(_, _, subject)| subject.issued_at_unix_secs).max();
        Ok(Self {
            grants: selected.into_iter().map(|(slot, grant, _)| (slot, grant)).collect(),
            issued_until,
        })
    }

    /// Until when the tokens were issued that are meant, and when the last of them ends: for a token that is there its own `exp` and
    /// the leeway that a later policy may have, else by the longest life that policy allows.
    fn bound(&self, entry: &mut Revocation, life_secs: u64) {
        entry.issued_until_unix_secs =
            entry.issued_until_unix_secs.max(self.issued_until.unwrap_or_default());
        let token_expires_at = self.grants.iter().map(|(_, grant)| grant.expires_at_unix_secs).max();
        match token_expires_at {
            Some(expires_at) if entry.selectors & REVOKE_TOKEN != 0 => {
                entry.exact_end = 1;
                entry.expires_at_unix_secs = expires_at.saturating_add(MAX_LEEWAY_SECS);
            }
            _ => entry.expires_at_unix_secs = entry.issued_until_unix_secs.saturating_add(life_secs),
        }
    }
}

/// Ends the connections of revoked tokens; how many. A daemon does the same within its tick, but there may be none.
fn close(live: &Live, revoked: &BTreeSet<u64>, now_unix_secs: u64) -> anyhow::Result<usize> {
    if revoked.is_empty() {
        return Ok(0);
    }
    let revoked: Vec<u64> = revoked.iter().copied().collect();
    let mode = if live.configuration()?.mode == MODE_OBSERVE { Mode::Observe } else { Mode::Enforce };
    let mut destroyer = SocketDestroyer::default();
    let mut closed = BTreeSet::new();
    let mut error = None;
    for look in 0..2 {
        if look > 0 {
            std::thread::sleep(SECOND_LOOK);
        }
        let mut ends = Vec::new();
        live.each_flow(&mut |cookie, flow| {
            let must = Stream::of(cookie, flow, mode).and_then(|stream| {
                let grant = |serial| live.grants.get(&grant_slot(serial), 0).ok();
                must_end(&stream, now_unix_secs, &revoked, grant)
            });
            if must.is_some() {
                ends.push((cookie, *flow));
            }
        })?;
        for (cookie, flow) in ends {
            let pair = Ends { local: flow.local, peer: flow.peer };
            match destroyer.destroy(flow.netns_cookie, cookie, flow.interface, pair) {
                Ok(()) => _ = closed.insert(cookie),
                Err(failure) => error = Some((cookie, failure)),
            }
        }
    }
    match error {
        Some((cookie, failure)) => Err(failure).with_context(|| {
            format!(
                "the tokens are revoked, but connection {cookie} could not be closed ({} were)",
                closed.len()
            )
        }),
        None => Ok(closed.len()),
    }
}
