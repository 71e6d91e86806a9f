//! From one policy to the next: who keeps their access. Pure: what is asked is given.

use std::collections::BTreeMap;
use std::sync::Arc;

use enforcer_common::abi::{FLOW_OBSERVE, Flow, NameHash};

use super::Endpoints;
use crate::keys::KeySnapshot;
use crate::policy::{BindRule, Issuer, Mode, Server};
use crate::revocation::name_hash;
use crate::token::{Evidence, TokenReason, missing_scopes, verify_again};

/// Why the new policy does not allow what the old one did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The policy has no server of this name any more.
    ServerRemoved,
    /// The server's path is another one. Which path the requests had is not kept, so none of them counts as allowed.
    PathChanged,
    /// The server accepts fewer hosts; which one the requests had is not kept.
    HostRemoved,
    /// The server accepts fewer origins, likewise.
    OriginRemoved,
    /// Other callers may call the server, or another rule says who may present the token. Who did is not kept.
    BindingChanged,
    /// The token would be refused.
    Token(TokenReason),
    /// The token lacks a scope.
    InsufficientScope,
    /// What the token says is not known any more (it was too large, or an earlier daemon gave the grant), and the policy asks for
    /// something that the old one did not.
    NotRemembered,
    /// The policy does not name the connection's endpoint any more.
    EndpointRemoved,
    /// The token's server does not listen on the connection's endpoint any more.
    ListenerRemoved,
    /// A path without token, which the connection may be using, needs one now.
    PublicPathRemoved,
    /// The connection was accepted in observe mode, and nothing on it was refused.
    Observed,
}

impl Loss {
    /// Stable kebab-case name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ServerRemoved => "server-removed",
            Self::PathChanged => "path-changed",
            Self::HostRemoved => "host-removed",
            Self::OriginRemoved => "origin-removed",
            Self::BindingChanged => "binding-changed",
            Self::Token(reason) => reason.name(),
            Self::InsufficientScope => "insufficient-scope",
            Self::NotRemembered => "not-remembered",
            Self::EndpointRemoved => "endpoint-removed",
            Self::ListenerRemoved => "listener-removed",
            Self::PublicPathRemoved => "public-path-removed",
            Self::Observed => "observed",
        }
    }
}

/// Two policies, under numbers of which each means the same in both.
#[derive(Debug)]
pub struct Transition {
    old: Endpoints,
    new: Endpoints,
    /// The old policy's servers, and what became of them.
    servers: BTreeMap<u32, Fate>,
    new_mode: Mode,
}

#[derive(Debug)]
struct Fate {
    old: Arc<Server>,
    new: Result<Arc<Server>, Loss>,
}

impl Transition {
    /// From the old endpoints to the new ones, and the new mode.
    #[must_use]
    pub fn new(old: Endpoints, (new, new_mode): (Endpoints, Mode)) -> Self {
        let new_servers = new.servers();
        let fate = |(id, old): (u32, Arc<Server>)| {
            let new = match new_servers.get(&id) {
                Some(new) => heads_hold(&old, new).map(|()| Arc::clone(new)),
                None => Err(Loss::ServerRemoved),
            };
            (id, Fate { old, new })
        };
        let servers = old.servers().into_iter().map(fate).collect();
        Self { old, new, servers, new_mode }
    }

    /// The new policy's mode.
    #[must_use]
    pub const fn mode(&self) -> Mode {
        self.new_mode
    }

    /// The new policy's endpoints.
    #[must_use]
    pub fn endpoints(&self) -> &Endpoints {
        &self.new
    }

    /// Name of a server of the old policy.
    #[must_use]
    pub fn server_name(&self, server_id: u32) -> Option<&str> {
        self.servers.get(&server_id).map(|fate| fate.old.name.as_str())
    }

    /// Names of the old policy's servers on an endpoint.
    #[must_use]
    pub fn endpoint_names(&self, endpoint_id: u32) -> String {
        self.old.names(endpoint_id)
    }

    /// Does a grant for a server hold under the new policy, with its keys, at this time?
    ///
    /// # Errors
    /// Why it does not.
    pub fn grant(
        &self,
        server_id: u32,
        evidence: &Evidence,
        keys: &KeySnapshot,
        now_unix_secs: u64,
    ) -> Result<(), Loss> {
        let fate = self.servers.get(&server_id).ok_or(Loss::ServerRemoved)?;
        let server = fate.new.as_ref().map_err(|loss| *loss)?;
        bindings_hold(&fate.old, server)?;
        let token = verify_again(evidence, server, keys, now_unix_secs)
            .map_err(|error| Loss::Token(error.reason()))?;
        if missing_scopes(&token, &server.scopes).is_empty() { Ok(()) } else { Err(Loss::InsufficientScope) }
    }

    /// As [`Transition::grant`], for a token of which only the issuer is known, by the hash of its identifier. It passed every check of
    /// the old policy, so it passes those of a new one that accepts all that the old one did.
    ///
    /// # Errors
    /// Why it does not, or may not.
    pub fn grant_unseen(&self, server_id: u32, issuer_hash: &NameHash) -> Result<(), Loss> {
        let fate = self.servers.get(&server_id).ok_or(Loss::ServerRemoved)?;
        let (old, new) = (&fate.old, fate.new.as_ref().map_err(|loss| *loss)?);
        bindings_hold(old, new)?;
        let old_issuer = old.issuers.iter().find(|issuer| name_hash(&issuer.issuer) == *issuer_hash);
        let old_issuer = old_issuer.ok_or(Loss::NotRemembered)?;
        let new_issuer = new.issuers.iter().find(|issuer| issuer.issuer == old_issuer.issuer);
        let new_issuer = new_issuer.ok_or(Loss::Token(TokenReason::IssuerUnknown))?;
        let holds = accepts_all_for(old, new) && accepts_all_of(old_issuer, new_issuer);
        if holds { Ok(()) } else { Err(Loss::NotRemembered) }
    }

    /// May a connection go on? `grants` are the servers of the grants that it used, and whether those hold.
    ///
    /// # Errors
    /// Why it must end.
    pub fn flow(
        &self,
        flow: &Flow,
        grants: impl IntoIterator<Item = (u32, Result<(), Loss>)>,
    ) -> Result<(), Loss> {
        let endpoint = self.new.0.get(&flow.endpoint_id).ok_or(Loss::EndpointRemoved)?;
        if self.new_mode == Mode::Enforce && flow.flags & FLOW_OBSERVE != 0 {
            return Err(Loss::Observed);
        }
        for (server_id, holds) in grants {
            holds?;
            if !endpoint.servers.iter().any(|(id, _)| *id == server_id) {
                return Err(Loss::ListenerRemoved);
            }
        }
        // A connection that uses tokens may have an answer from a public path as well.
        if flow.requests == 0 { Ok(()) } else { self.public_paths_hold(flow.endpoint_id) }
    }

    /// Everything that was open without a token on an endpoint still is.
    fn public_paths_hold(&self, endpoint_id: u32) -> Result<(), Loss> {
        let servers =
            self.old.0.get(&endpoint_id).map(|endpoint| endpoint.servers.as_slice()).unwrap_or_default();
        for (id, old) in servers.iter().filter(|(_, old)| !old.public_paths.is_empty()) {
            let Some(Ok(new)) = self.servers.get(id).map(|fate| &fate.new) else {
                return Err(Loss::PublicPathRemoved);
            };
            if !all_in(&old.public_paths, &new.public_paths) {
                return Err(Loss::PublicPathRemoved);
            }
        }
        Ok(())
    }
}

/// Whether every head that `old` let through, by what it says besides its token, `new` lets through as well.
fn heads_hold(old: &Server, new: &Server) -> Result<(), Loss> {
    if old.path != new.path {
        return Err(Loss::PathChanged);
    }
    if !all_in(&old.hosts, &new.hosts) {
        return Err(Loss::HostRemoved);
    }
    if !all_in(&old.origins, &new.origins) {
        return Err(Loss::OriginRemoved);
    }
    if new.callers.is_none() || new.callers == old.callers { Ok(()) } else { Err(Loss::BindingChanged) }
}

/// Whether every token that was presented to `old` may be presented to `new` by the same caller: no rule is new.
fn bindings_hold(old: &Server, new: &Server) -> Result<(), Loss> {
    // A rule names its issuer as the policy does, and the name may have gone to another one.
    let issuer = |server: &Server, rule: &BindRule| {
        let issuer = server.issuers.iter().find(|issuer| Some(&issuer.name) == rule.issuer.as_ref());
        issuer.map(|issuer| issuer.issuer.clone())
    };
    let stood = |rule: &BindRule| old.bind.contains(rule) && issuer(old, rule) == issuer(new, rule);
    if new.bind.iter().all(stood) { Ok(()) } else { Err(Loss::BindingChanged) }
}

/// Whether every token that is good for `old`, by what it says to the server, is good for `new`.
fn accepts_all_for(old: &Server, new: &Server) -> bool {
    // Named one by one: who adds a field has to say what it means for tokens.
    let Server { resource, aliases, scopes, .. } = new;
    let Server {
        name: _,
        listen: _,
        resource: old_resource,
        aliases: old_aliases,
        // Those of the head: `heads_hold`.
        path: _,
        hosts: _,
        origins: _,
        public_paths: _,
        // One by one: `accepts_all_of`.
        issuers: _,
        scopes: old_scopes,
        metadata: _,
        // `heads_hold` and `bindings_hold`.
        callers: _,
        bind: _,
        // They count requests, also those of grants from before.
        limits: _,
    } = old;
    let accepted = |audience: &String| audience == resource || aliases.contains(audience);
    accepted(old_resource) && old_aliases.iter().all(accepted) && all_in(scopes, old_scopes)
}

/// Whether every token of `old` that is good is good as one of `new`, which has the same identifier.
fn accepts_all_of(old: &Issuer, new: &Issuer) -> bool {
    let Issuer {
        name: _,
        issuer: _,
        keys,
        ca_file,
        allow_http_loopback,
        algorithms,
        leeway,
        max_token_lifetime,
        token_types,
        // When the keys are fetched, not which.
        refresh_interval: _,
        max_staleness: _,
    } = old;
    *keys == new.keys
        && *ca_file == new.ca_file
        && *allow_http_loopback == new.allow_http_loopback
        && all_in(algorithms, &new.algorithms)
        && all_in(token_types, &new.token_types)
        && *leeway <= new.leeway
        && *max_token_lifetime <= new.max_token_lifetime
}

fn all_in<T: PartialEq>(some: &[T], all: &[T]) -> bool {
    some.iter().all(|one| all.contains(one))
}

#[cfg(test)]
#[path = "transition_tests.rs"]
mod tests;
