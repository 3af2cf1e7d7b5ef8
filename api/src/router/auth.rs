// SPDX-License-Identifier: Apache-2.0

//! The admission of requests over TCP.
//!
//! Each request needs a token. The gate also checks headers that a browser sets and a page cannot change. `Host` shows a
//! foreign name that was pointed at this agent (DNS rebinding). `Origin` and `Sec-Fetch-Site` show a request of another site's
//! page. No response has CORS headers, so that no page could read it either.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, header, request::Parts, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::{
    Shared,
    places::{Newcomer, Source},
};
use crate::{Caller, Problem, ProblemCode, TurnedAway, token::Tokens};

/// The admission rules of a TCP listener.
#[derive(Clone, Debug)]
pub struct Gate {
    tokens: Tokens,
    hosts: BTreeSet<String>,
}

impl Gate {
    /// Admits requests that have one of these tokens, and a `Host` that is the agent's address of the connection, `localhost`,
    /// or one of `hosts`.
    pub fn new(tokens: Tokens, hosts: impl IntoIterator<Item = String>) -> Self {
        Gate { tokens, hosts: hosts.into_iter().map(|host| host.to_ascii_lowercase()).collect() }
    }

    /// Admits a request with this head that came to the agent's address `local`, and returns its token's name as the caller.
    ///
    /// # Errors
    /// `forbidden` with a foreign `Host`, `unauthorized` without a known token.
    pub fn admit(&self, head: &Parts, local: SocketAddr) -> Result<Caller, Problem> {
        self.check_host(head, local)?;
        let caller = self.token(&head.headers).map(Caller::Token).ok_or_else(|| {
            let detail = "Each request over TCP needs a token of the agent's token file: send authorization: \
                          Bearer TOKEN (--token-file).";
            Problem::new(ProblemCode::Unauthorized, detail)
        })?;
        if let Some(newcomer) = head.extensions.get::<Newcomer>() {
            newcomer.admitted();
        }
        Ok(caller)
    }

    /// Checks that a request with this head is meant for the agent at `local`.
    ///
    /// # Errors
    /// `forbidden` if not: a foreign name may have been pointed at the agent.
    pub fn check_host(&self, head: &Parts, local: SocketAddr) -> Result<(), Problem> {
        let mut hosts = head.headers.get_all(header::HOST).iter();
        let named = match (hosts.next(), hosts.next()) {
            (Some(host), None) => host.to_str().ok(),
            _ => None,
        };
        // A request may name its target twice, in its URI and in `Host`. Both must be right then.
        let named = named.and_then(|host| host.parse::<Authority>().ok());
        let whole = head.uri.authority().is_none_or(|authority| self.is_here(authority, local));
        if !whole || !named.is_some_and(|host| self.is_here(&host, local)) {
            let detail = "The Host header does not name this agent: use its address or localhost, or start \
                          the agent with --allowed-host for other names.";
            return Err(Problem::new(ProblemCode::Forbidden, detail));
        }
        Ok(())
    }

    fn is_here(&self, authority: &Authority, local: SocketAddr) -> bool {
        let host = authority.host().to_ascii_lowercase();
        // `user@host` is a way to disguise a host.
        if authority.as_str().contains('@') {
            return false;
        }
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(&host);
        host == "localhost"
            || self.hosts.contains(&host)
            || bare.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical() == local.ip().to_canonical())
    }

    fn token(&self, headers: &HeaderMap) -> Option<Arc<str>> {
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        let (Some(value), None) = (values.next(), values.next()) else { return None };
        let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
        let token = scheme.eq_ignore_ascii_case("bearer").then_some(token)?;
        self.tokens.name_of(token.trim().as_bytes())
    }
}

/// The listener that a connection came through, with its peer.
#[derive(Clone, Debug)]
pub enum Peer {
    /// The Unix socket, with the process at the other end; None if the kernel does not name it.
    Local(Option<Caller>),
    /// TCP: the token of each request names its caller.
    Network {
        /// The admission rules for its requests.
        gate: Arc<Gate>,
        /// The agent's own address.
        local: SocketAddr,
        /// The client's address.
        remote: IpAddr,
    },
}

impl Peer {
    /// The origin of the connection; None for a user that the kernel does not name.
    pub(super) fn source(&self) -> Option<Source> {
        match self {
            Peer::Local(Some(Caller::User(user))) => Some(Source::User(Some(user.uid))),
            Peer::Local(_) => None,
            Peer::Network { remote, .. } => Some(Source::Address(*remote)),
        }
    }
}

/// Admits a request and notes its caller, or refuses it.
pub(super) async fn admit(State(backend): State<Shared>, request: Request, next: Next) -> Response {
    let (mut head, body) = request.into_parts();
    let admitted = check_page(&head.headers).and_then(|()| match head.extensions.get::<Peer>() {
        Some(Peer::Network { gate, local, .. }) => gate.admit(&head, *local).map(Some),
        Some(Peer::Local(caller)) => Ok(caller.clone()),
        None => Ok(None),
    });
    match admitted {
        Ok(caller) => {
            head.extensions.remove::<Caller>();
            if let Some(caller) = caller {
                head.extensions.insert(caller);
            }
            next.run(Request::from_parts(head, body)).await
        }
        Err(problem) => {
            if let Some(source) = head.extensions.get::<Peer>().and_then(Peer::source) {
                backend.turned_away(&TurnedAway { source, code: problem.code });
            }
            problem.into_response()
        }
    }
}

/// Refuses requests of web pages. The agent's own page sends its requests through `portcullis ui`, which leaves these headers
/// out, so that any other page is a foreign one.
fn check_page(headers: &HeaderMap) -> Result<(), Problem> {
    let site = headers.get("sec-fetch-site").is_some_and(|site| site != "none");
    if headers.contains_key(header::ORIGIN) || site {
        let detail =
            "The request comes from a web page (Origin, Sec-Fetch-Site), and no page may use this agent.";
        return Err(Problem::new(ProblemCode::Forbidden, detail));
    }
    Ok(())
}
