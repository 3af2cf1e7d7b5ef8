// SPDX-License-Identifier: Apache-2.0

//! Serving: Unix sockets and TCP, with a bound on all that a client can hold.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use hyper::{Request, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    auth::{Gate, Peer},
    places::{Bounds, Newcomer, Place, Places, Source},
    respond::RequestId,
    write_timeout::Patient,
};
use crate::{Caller, Problem, ProblemCode, User};

/// The longest time for open requests after the signal to end (console streams would go on for ever).
const GRACE: Duration = Duration::from_secs(2);

/// The pause after an error of `accept` (no more descriptors, as a rule).
const PAUSE: Duration = Duration::from_millis(200);

/// The longest time to send a client the refusal that there is no room, and the most refusals at once.
const REFUSAL: Duration = Duration::from_secs(1);
const REFUSALS: usize = 16;

/// The most bytes of a request's head, and the most headers. Beyond it the response is 431 without a body.
const MAX_HEAD: usize = 16 << 10;
const MAX_HEADERS: usize = 64;

/// Bounds on the resources of clients, by listener, and on the time that clients may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections. One more is refused in words (TLS: without) and closed.
    pub connections: usize,
    /// How long a client may take to send a request's head; an idle connection is closed after it, too.
    pub head: Duration,
    /// The longest time in which a client may take nothing of the data sent to it.
    pub stall: Duration,
    /// The longest time for a client over TCP until a request with a token has come, TLS included.
    pub stranger: Duration,
}

impl Limits {
    /// Connections of other users than the agent's own, which can always come in. One user has a quarter of all.
    pub(super) fn users(&self) -> Bounds {
        let part = |divisor: usize| (self.connections / divisor).max(1);
        Bounds { all: self.connections.saturating_sub(part(8)).max(1), each: part(4), displace: false }
    }

    /// Connections over TCP without a token so far. The other half is for clients with one.
    fn strangers(&self) -> Bounds {
        let part = |divisor: usize| (self.connections / divisor).max(1);
        Bounds { all: part(2), each: part(16), displace: true }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 256,
            head: Duration::from_secs(15),
            stall: Duration::from_secs(30),
            stranger: Duration::from_secs(5),
        }
    }
}

/// Where clients come in.
#[derive(Debug)]
pub struct Listener(Kind);

enum Kind {
    Unix(UnixListener),
    Tcp { listener: TcpListener, gate: Arc<Gate>, tls: Option<TlsAcceptor> },
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Kind::Unix(listener) => listener.fmt(f),
            Kind::Tcp { listener, .. } => listener.fmt(f),
        }
    }
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Listener(Kind::Unix(listener))
    }
}

impl Listener {
    /// A TCP listener: the gate checks requests. Pass `tls` unless only this host can connect.
    pub fn tcp(listener: TcpListener, gate: Arc<Gate>, tls: Option<TlsAcceptor>) -> Self {
        Listener(Kind::Tcp { listener, gate, tls })
    }
}

/// Serves until `end` completes, then lets requests finish for two seconds.
pub async fn serve(
    listeners: Vec<Listener>,
    router: Router,
    limits: Limits,
    end: impl Future<Output = ()> + Send + 'static,
) {
    let (told, ending) = watch::channel(false);
    let mut tasks = JoinSet::new();
    for Listener(kind) in listeners {
        let bounds = if matches!(kind, Kind::Unix(_)) { limits.users() } else { limits.strangers() };
        let door = Door {
            room: Arc::new(Semaphore::new(limits.connections)),
            places: Places::new(bounds),
            refusals: Arc::new(Semaphore::new(REFUSALS)),
            router: router.clone(),
            limits,
            ending: ending.clone(),
        };
        tasks.spawn(door.serve(kind));
    }
    drop(ending);
    end.await;
    let _ = told.send(true);
    // A connection that does not end by then ends with its task.
    drop(timeout(GRACE, async { while tasks.join_next().await.is_some() {} }).await);
}

/// A listener's side of its connections.
struct Door {
    room: Arc<Semaphore>,
    /// The shares of users, or of strangers.
    places: Places,
    /// Room for clients that are refused for lack of room.
    refusals: Arc<Semaphore>,
    router: Router,
    limits: Limits,
    ending: watch::Receiver<bool>,
}

/// A client that has connected.
enum Client {
    Unix(UnixStream, Peer),
    Tcp(TcpStream, Peer, Option<TlsAcceptor>),
}

impl Client {
    /// The owner of the share that the connection counts in; None for the agent's own user and root.
    fn source(&self) -> Option<Source> {
        match self {
            Client::Unix(_, Peer::Local(Some(Caller::User(user)))) => {
                let own = user.uid == 0 || user.uid == rustix::process::geteuid().as_raw();
                (!own).then_some(Source::User(Some(user.uid)))
            }
            Client::Unix(..) => Some(Source::User(None)),
            Client::Tcp(_, peer, _) => peer.source(),
        }
    }
}

impl Door {
    /// Accepts until the end is signalled; returns when all connections have ended.
    async fn serve(mut self, kind: Kind) {
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = told(&mut self.ending) => break,
                // Forget ended connections.
                Some(_) = connections.join_next() => continue,
                accepted = accept(&kind, self.limits.stall) => accepted,
            };
            let client = match accepted {
                Ok(client) => client,
                Err(error) => {
                    tracing::warn!("Cannot accept a client of the API: {error}");
                    sleep(PAUSE).await;
                    continue;
                }
            };
            match self.enter(&client) {
                Ok((room, place)) => drop(connections.spawn(self.connection(client, room, place))),
                // Without room for a refusal, close the connection without a word.
                Err(detail) => match Arc::clone(&self.refusals).try_acquire_owned() {
                    Ok(room) => drop(connections.spawn(refuse(client, detail, room))),
                    Err(_) => drop(client),
                },
            }
        }
        while connections.join_next().await.is_some() {}
    }

    /// The room for a client and its place among those of its source, or the reason that it has none.
    fn enter(&self, client: &Client) -> Result<(OwnedSemaphorePermit, Option<Place>), &'static str> {
        let full = "The agent has its maximum number of connections: end some, or try again.";
        let shared = "Your user, or all users other than the agent's own, have their maximum number of \
                      connections: end some, or try again.";
        let room = Arc::clone(&self.room).try_acquire_owned().map_err(|_| full)?;
        let place = client.source().map(|source| self.places.take(source).ok_or(shared)).transpose()?;
        Ok((room, place))
    }

    fn connection(
        &self,
        client: Client,
        room: OwnedSemaphorePermit,
        place: Option<Place>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let (router, limits, ending) = (self.router.clone(), self.limits, self.ending.clone());
        async move {
            let _room = room;
            let (stream, peer, tls) = match client {
                Client::Unix(stream, peer) => {
                    let _place = place;
                    return exchange(stream, peer, None, router, limits, ending).await;
                }
                Client::Tcp(stream, peer, tls) => (stream, peer, tls),
            };
            let newcomer = place.map(Newcomer::new);
            let stranger = newcomer.clone();
            let overstays = async {
                match stranger {
                    Some(newcomer) => newcomer.overstays(limits.stranger).await,
                    None => std::future::pending().await,
                }
            };
            let serve = async {
                let Some(tls) = tls else {
                    return exchange(stream, peer, newcomer, router, limits, ending).await;
                };
                match tls.accept(Patient::new(stream, limits.stall)).await {
                    Ok(stream) => exchange(stream, peer, newcomer, router, limits, ending).await,
                    Err(error) => tracing::debug!("TLS with a client of the API failed: {error}"),
                }
            };
            tokio::select! {
                () = serve => {}
                () = overstays => {
                    tracing::debug!("A client sent no token in time, or lost its place to another client");
                }
            }
        }
    }
}

/// Waits until the end is signalled.
async fn told(ending: &mut watch::Receiver<bool>) {
    drop(ending.wait_for(|ending| *ending).await);
}

/// Accepts a client. One over TCP that acknowledges nothing for `stall` is cut off: without that, a stream to a host that is gone
/// ends after a quarter of an hour.
async fn accept(kind: &Kind, stall: Duration) -> std::io::Result<Client> {
    match kind {
        Kind::Unix(listener) => {
            let (stream, _) = listener.accept().await?;
            let user = stream
                .peer_cred()
                .map(|cred| Caller::User(User { uid: cred.uid(), gid: cred.gid(), pid: cred.pid() }));
            let user = user.inspect_err(|error| tracing::warn!(%error, "no credentials of an API client"));
            Ok(Client::Unix(stream, Peer::Local(user.ok())))
        }
        Kind::Tcp { listener, gate, tls } => {
            let (stream, remote) = listener.accept().await?;
            let local: SocketAddr = stream.local_addr()?;
            // Responses are small and written at once.
            stream.set_nodelay(true)?;
            let milliseconds = u32::try_from(stall.as_millis()).unwrap_or(u32::MAX);
            rustix::net::sockopt::set_tcp_user_timeout(&stream, milliseconds)?;
            Ok(Client::Tcp(
                stream,
                Peer::Network { gate: Arc::clone(gate), local, remote: remote.ip() },
                tls.clone(),
            ))
        }
    }
}

/// Carries requests and responses until either side ends the connection.
async fn exchange<I: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    stream: I,
    peer: Peer,
    newcomer: Option<Newcomer>,
    router: Router,
    limits: Limits,
    mut ending: watch::Receiver<bool>,
) {
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        if let Some(newcomer) = &newcomer {
            request.extensions_mut().insert(newcomer.clone());
        }
        hyper::service::Service::call(&router, request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS)
        .serve_connection(TokioIo::new(Patient::new(stream, limits.stall)), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = told(&mut ending) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("A connection to the API ended: {error}");
    }
}

/// Refuses a client for lack of room, if it takes the refusal soon.
async fn refuse(client: Client, detail: &'static str, _room: OwnedSemaphorePermit) {
    let id = RequestId::new();
    let request_id = Some(id.as_str().into());
    let problem = Problem { request_id, ..Problem::new(ProblemCode::TooManyClients, detail) };
    let body = serde_json::to_string(&problem).unwrap_or_default();
    let answer = format!(
        "HTTP/1.1 {} Service Unavailable\r\ncontent-type: application/problem+json\r\ncontent-length: {}\r\nretry-after: \
         1\r\nx-request-id: {}\r\nconnection: close\r\n\r\n{body}",
        problem.status,
        body.len(),
        id.as_str(),
    );
    let written = match client {
        Client::Unix(mut stream, _) => timeout(REFUSAL, stream.write_all(answer.as_bytes())).await,
        Client::Tcp(mut stream, _, None) => timeout(REFUSAL, stream.write_all(answer.as_bytes())).await,
        // The refusal would have to be encrypted.
        Client::Tcp(_, _, Some(_)) => return,
    };
    if let Ok(Err(error)) = written {
        tracing::debug!("Cannot send a client the refusal for too many clients: {error}");
    }
}
