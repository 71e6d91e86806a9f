//! From a request head to what happens to the request.

use super::{CacheFor, Decision, KeyLookup, Misplaced, Options, TokenFault, TokenVerifier};
use crate::http::answer::{self, Draft};
use crate::http::head::{self, Connection, Credentials, Framing, Head, Origin};
use crate::http::metadata;
use crate::policy::Server;
use crate::workload::{CallerView, callers_allow};

/// Seconds after which a client may try again when keys are unavailable.
const KEYS_RETRY_AFTER_SECONDS: u32 = 5;

/// What a path stands for.
enum Route<'a> {
    Mcp(usize, &'a Server),
    Public(usize, &'a Server),
    Metadata(usize, &'a Server),
    Nothing,
}

impl<'a> Route<'a> {
    fn server(&self) -> Option<(usize, &'a Server)> {
        match *self {
            Self::Mcp(index, server) | Self::Public(index, server) | Self::Metadata(index, server) => {
                Some((index, server))
            }
            Self::Nothing => None,
        }
    }
}

/// Decides about one request. `endpoint_servers` are the servers that share the endpoint it arrived at.
///
/// The checks, in order; the first that fails makes the answer, and nothing but passing all of them is an allow:
///
/// 1. the head has exactly one reading ([`head::parse_head`]): else 400, 413, 417, 431, 501 or 505, and close;
/// 2. the path is a server's, by the longest match, or public, or a metadata URL: else 404. Metadata is answered
///    after the next two, before Host and Origin: it is for everyone, and does not depend on them;
/// 3. the caller is one of the server's, also for public paths and metadata: else 403;
/// 4. a query stands only behind an MCP path: else 404;
/// 5. Host is on the server's list: else 403;
/// 6. Origin is absent or on the list, once: else 403. An answer to a listed origin is readable by its page;
/// 7. the method is POST, GET or DELETE (GET and HEAD for a public path): else 405. A CORS preflight (OPTIONS, a
///    listed Origin, Access-Control-Request-Method) is answered here and never reaches the server;
/// 8. only POST has a body: else 400, and close. A server that does not expect a body there would read it as the
///    next request, which nobody judged. Public paths end here;
/// 9. there is exactly one well-formed bearer: else 401 without an error, or 400;
/// 10. the token is good for this server: else 401; a key that is not at hand first leads to
///     [`Decision::NeedKey`]; an issuer without usable keys to 503, since 401 would make the client drop a token
///     that may be good;
/// 11. the caller may present it, by every rule that binds it: else 401, as for a token that is bound to another's certificate (RFC 8705,
///     section 3);
/// 12. the token grants every scope that the server needs: else 403.
pub fn decide<'h, T: TokenVerifier>(
    head_bytes: &'h [u8],
    endpoint_servers: &[&Server],
    verifier: &T,
    caller: &CallerView<'_>,
    options: &Options,
) -> Decision<'h, T::Verified> {
    let head = match head::parse_head(head_bytes, options.max_head_bytes) {
        Ok(head) => head,
        Err(error) => return broken(&error),
    };
    let request = Request { head: &head };
    let route = route(head.path(), endpoint_servers);
    if let Some((index, server)) = route.server()
        && !callers_allow(server, caller)
    {
        // Who is not resolved yet may be so a second later.
        let resolved = caller.workload.is_some_and(|workload| workload.cgroup_path.is_some());
        let cache = if resolved { CacheFor::UntilPolicyChange } else { CacheFor::Short };
        return request.refuse(Some(index), answer::forbidden("caller-not-allowed"), cache);
    }
    let (index, server, public) = match route {
        Route::Mcp(index, server) => (index, server, false),
        _ if head.query().is_some() => {
            return request.refuse(None, answer::not_found(), CacheFor::UntilPolicyChange);
        }
        Route::Public(index, server) => (index, server, true),
        Route::Metadata(index, server) if server.metadata.serve => return request.metadata(index, server),
        Route::Metadata(index, server) => return request.server_metadata(index, server),
        Route::Nothing => return request.refuse(None, answer::not_found(), CacheFor::UntilPolicyChange),
    };
    let origin = match request.sender(server) {
        Ok(origin) => origin,
        Err(reason) => {
            return request.refuse(Some(index), answer::forbidden(reason), CacheFor::UntilPolicyChange);
        }
    };
    let refuse = |draft: Draft, cache| {
        let draft = match origin {
            Some(origin) => draft.readable_by(origin),
            None => draft,
        };
        request.refuse(Some(index), draft, cache)
    };
    if let (false, "OPTIONS", Some(origin)) = (public, head.method(), origin)
        && head.header("access-control-request-method").is_some()
    {
        return request.refuse(Some(index), answer::preflight(origin), CacheFor::Never);
    }
    let (methods, allow): (&[&str], _) = if public {
        (&["GET", "HEAD"], answer::PUBLIC_METHODS)
    } else {
        (&["POST", "GET", "DELETE"], answer::MCP_METHODS)
    };
    if !methods.contains(&head.method()) {
        return refuse(answer::method_not_allowed(allow), CacheFor::UntilPolicyChange);
    }
    if head.method() != "POST" && !head.framing().is_empty() {
        return refuse(answer::unexpected_body(), CacheFor::Never);
    }
    if public {
        return request.public(index);
    }
    let token = match head.credentials() {
        Credentials::Bearer(token) => token,
        Credentials::None => {
            return refuse(answer::no_credentials(server, "no-credentials"), CacheFor::UntilPolicyChange);
        }
        Credentials::OtherScheme => {
            return refuse(answer::no_credentials(server, "other-scheme"), CacheFor::UntilPolicyChange);
        }
        Credentials::Malformed(fault) => {
            return refuse(answer::invalid_request(server, fault), CacheFor::UntilPolicyChange);
        }
    };
    let verified = match (verifier.verify(token, server), options.key_lookup) {
        (Ok(verified), _) => verified,
        (Err(TokenFault::Invalid { reason }), _) => {
            return refuse(answer::invalid_token(server, reason), CacheFor::Short);
        }
        (Err(TokenFault::UnknownKey { issuer, kid }), KeyLookup::MayRefresh) => {
            return Decision::NeedKey { server_index: index, issuer, kid };
        }
        (Err(TokenFault::UnknownKey { .. }), KeyLookup::Final) => {
            return refuse(answer::invalid_token(server, "unknown-key"), CacheFor::Short);
        }
        (Err(TokenFault::RevocationsUnavailable), _) => {
            return refuse(
                answer::unavailable("revocations-unavailable", KEYS_RETRY_AFTER_SECONDS),
                CacheFor::Never,
            );
        }
        (Err(TokenFault::KeysUnavailable { .. }), _) => {
            return refuse(
                answer::unavailable("keys-unavailable", KEYS_RETRY_AFTER_SECONDS),
                CacheFor::Never,
            );
        }
    };
    let bound = match verifier.bind(&verified, server, caller) {
        Ok(bound) => bound,
        Err(fault) => {
            let mut refusal = refuse(answer::invalid_token(server, fault.name()), CacheFor::Short);
            if let Decision::Answer { misplaced, .. } = &mut refusal {
                *misplaced = Some(Misplaced { verified, token, fault });
            }
            return refusal;
        }
    };
    if !verifier.missing_scopes(&verified, &server.scopes).is_empty() {
        return refuse(answer::insufficient_scope(server, &server.scopes), CacheFor::Short);
    }
    Decision::Allow {
        server_index: index,
        verified,
        token,
        framing: head.framing(),
        cacheable: request.is_recognisable(),
        keep_alive: request.keeps_alive(),
        first_use: bound.first_use,
    }
}

/// The answer to a request that is over a limit, whatever it asks for; the connection lives on where the request's end is known.
pub fn over_limit<'h, V>(head_bytes: &'h [u8], retry_after_secs: u32, options: &Options) -> Decision<'h, V> {
    match head::parse_head(head_bytes, options.max_head_bytes) {
        Ok(head) => {
            let draft = answer::over_limit("over-limit", retry_after_secs);
            Request { head: &head }.refuse(None, draft, CacheFor::Never)
        }
        Err(error) => broken(&error),
    }
}

fn broken<'h, V>(error: &head::HeadError) -> Decision<'h, V> {
    Decision::Answer {
        server_index: None,
        answer: answer::broken_head(error).finish(""),
        framing: None,
        cache: CacheFor::Never,
        misplaced: None,
    }
}

/// What the path stands for. A public path wins over an MCP path that merely covers it, if both are the same
/// server's; a path that *is* an MCP path is never public.
fn route<'a>(path: &str, servers: &[&'a Server]) -> Route<'a> {
    if let Some(index) = metadata::find(path, servers)
        && let Some(server) = servers.get(index)
    {
        return Route::Metadata(index, server);
    }
    let covering = servers
        .iter()
        .enumerate()
        .filter(|(_, server)| covers(&server.path, path))
        .max_by_key(|(_, server)| server.path.len());
    let is_public = |server: &Server| server.public_paths.iter().any(|public| public == path);
    match covering {
        Some((index, server)) if server.path != path && is_public(server) => Route::Public(index, server),
        Some((index, server)) => Route::Mcp(index, server),
        None => servers
            .iter()
            .enumerate()
            .find(|(_, server)| is_public(server))
            .map_or(Route::Nothing, |(index, server)| Route::Public(index, server)),
    }
}

/// Is `path` the endpoint's path, or below it? Everything is below `/`.
fn covers(endpoint: &str, path: &str) -> bool {
    let prefix = endpoint.strip_suffix('/').unwrap_or(endpoint);
    path == endpoint || path.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'))
}

struct Request<'r, 'h> {
    head: &'r Head<'h>,
}

impl Request<'_, '_> {
    /// Host and Origin (MCP transports: servers MUST validate Origin against DNS rebinding). Both, because a
    /// rebound page's Origin equals its Host. Gives the listed origin, if there is one.
    fn sender<'s>(&self, server: &'s Server) -> Result<Option<&'s str>, &'static str> {
        if !server.hosts.iter().any(|host| host.eq_ignore_ascii_case(self.head.host())) {
            return Err("host-not-allowed");
        }
        match self.head.origin() {
            Origin::None => Ok(None),
            Origin::Several => Err("origin-repeated"),
            Origin::One("null") => Err("origin-null"),
            Origin::One(origin) => {
                let listed = server.origins.iter().find(|listed| *listed == origin);
                listed.map(|listed| Some(listed.as_str())).ok_or("origin-not-allowed")
            }
        }
    }

    fn keeps_alive(&self) -> bool {
        self.head.connection() != Connection::Close
    }

    /// Will the kernel read the same head alike when it comes again, and return to the head state after it?
    ///
    /// The kernel takes heads for the same that differ in the digits of Content-Length, so the answer must hold
    /// for every length: a GET with `Content-Length: 0` is fine once, a GET with a body never is.
    fn is_recognisable(&self) -> bool {
        let any_length = match self.head.framing() {
            Framing::None => true,
            Framing::ContentLength(_) => self.head.method() == "POST",
            Framing::Chunked => false,
        };
        any_length && self.keeps_alive() && !self.head.expects_continue()
    }

    fn refuse<'h, V>(&self, server_index: Option<usize>, draft: Draft, cache: CacheFor) -> Decision<'h, V> {
        // A client that waits for 100 Continue may or may not send its body after a refusal (RFC 9110, section
        // 10.1.1): what comes next could be a body or a head.
        let ambiguous = self.head.expects_continue() && !self.head.framing().is_empty();
        // The kernel skips a refused body by its length. One without would have to be read to its end by the daemon, for as long
        // as a client cares to send.
        let endless = self.head.framing() == Framing::Chunked;
        let closes = ambiguous || endless || !self.keeps_alive();
        let draft = if closes { draft.closing() } else { draft };
        let answer = draft.finish(self.head.method());
        // The kernel's replies keep the connection open, and have a body.
        let repeatable = self.is_recognisable() && !answer.close && self.head.method() != "HEAD";
        let cache = if repeatable { cache } else { CacheFor::Never };
        let framing = Some(self.head.framing());
        Decision::Answer { server_index, answer, framing, cache, misplaced: None }
    }

    fn public<'h, V>(&self, server_index: usize) -> Decision<'h, V> {
        Decision::Public {
            server_index,
            framing: self.head.framing(),
            cacheable: self.is_recognisable(),
            keep_alive: self.keeps_alive(),
        }
    }

    fn metadata<'h, V>(&self, index: usize, server: &Server) -> Decision<'h, V> {
        self.refuse(Some(index), metadata::draft(server, self.head.method()), CacheFor::Never)
    }

    /// Metadata that the server answers itself: reading is all that passes without a token.
    fn server_metadata<'h, V>(&self, index: usize, server: &Server) -> Decision<'h, V> {
        match self.sender_of_metadata(server) {
            Err(draft) => self.refuse(Some(index), draft, CacheFor::UntilPolicyChange),
            Ok(()) => self.public(index),
        }
    }

    fn sender_of_metadata(&self, server: &Server) -> Result<(), Draft> {
        if !server.hosts.iter().any(|host| host.eq_ignore_ascii_case(self.head.host())) {
            return Err(answer::forbidden("host-not-allowed"));
        }
        if !matches!(self.head.method(), "GET" | "HEAD" | "OPTIONS") {
            return Err(answer::method_not_allowed("GET, HEAD, OPTIONS"));
        }
        if !self.head.framing().is_empty() {
            return Err(answer::unexpected_body());
        }
        Ok(())
    }
}
