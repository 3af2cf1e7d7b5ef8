// SPDX-License-Identifier: Apache-2.0

//! A typed client of the API over the agent's Unix socket, or TCP.
//!
//! One connection for each request: a local connect costs microseconds, and there is no pool to go stale. It is built
//! on hyper, which the server needs anyway; common HTTP clients cannot speak over Unix sockets.

mod forward;
mod lease;
mod policy;
mod remote;

use std::{fmt::Write as _, io, path::PathBuf, sync::Arc, time::Duration};

use axum::body::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    client::conn::http1,
    header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, IF_MATCH},
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
    time::timeout,
};

pub use lease::Lease;
pub use policy::Events;
pub use remote::{Remote, RemoteError};

use crate::{Problem, Progress, types::*};

/// The agent's socket by default.
pub const DEFAULT_SOCKET: &str = "/run/portcullis/api.sock";

/// The most bytes of a response that are read.
const MAX_ANSWER: usize = 64 << 20;

/// The longest time for the agent's response, beside the time that a request asks the agent to wait.
const PATIENCE: Duration = Duration::from_secs(60);

/// The reason that a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No agent listens.
    #[error(
        "No agent listens on {}: start one with `portcullis serve`, or name its socket with --socket",
        .socket.display()
    )]
    NoAgent {
        /// The socket.
        socket: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The user may not connect.
    #[error(
        "This user may not use the agent's socket {}: run the command as its owner (root, as a rule)",
        .socket.display()
    )]
    NotAllowed {
        /// The socket.
        socket: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// No agent responds over TCP, or its certificate cannot be trusted.
    #[error(
        "The agent at {url} cannot be reached: check the address, and the certificates of --ca-file for https"
    )]
    Unreachable {
        /// As the user named it.
        url: String,
        /// The cause, from connecting or TLS.
        source: io::Error,
    },
    /// The connection broke.
    #[error("The connection to the agent on {agent} broke: see the agent's log")]
    Broken {
        /// Its socket or address.
        agent: String,
        /// The cause, from HTTP.
        source: hyper::Error,
    },
    /// The agent did not respond in time.
    #[error("The agent on {agent} did not respond within {} s: see the agent's log", .waited.as_secs())]
    TimedOut {
        /// Its socket or address.
        agent: String,
        /// How long the client waited.
        waited: Duration,
    },
    /// The request was refused or failed.
    #[error(transparent)]
    Problem(#[from] Box<Problem>),
    /// The response is not one of this API.
    #[error(
        "The response to {request} is not one of Portcullis ({what}): check that an agent of this version \
         serves there"
    )]
    Strange {
        /// Method and path.
        request: String,
        /// The fault.
        what: String,
    },
}

impl ClientError {
    /// The problem, if the agent responded with one.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            ClientError::Problem(problem) => Some(problem),
            _ => None,
        }
    }
}

/// The client.
#[derive(Clone, Debug)]
pub struct Client {
    agent: Agent,
}

/// The agent's address.
#[derive(Clone, Debug)]
enum Agent {
    Socket(PathBuf),
    Remote(Arc<Remote>),
}

impl std::fmt::Display for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Agent::Socket(socket) => socket.display().fmt(f),
            Agent::Remote(remote) => f.write_str(remote.url()),
        }
    }
}

/// A connection's byte stream.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A request before it is sent.
struct Call {
    method: Method,
    path: String,
    kind: Option<&'static str>,
    body: Bytes,
    if_match: Option<u64>,
    last_event: Option<u64>,
    patience: Duration,
}

impl Call {
    fn new(method: Method, path: String) -> Self {
        Call {
            method,
            path,
            kind: None,
            body: Bytes::new(),
            if_match: None,
            last_event: None,
            patience: PATIENCE,
        }
    }

    fn get(path: String) -> Self {
        Call::new(Method::GET, path)
    }

    fn json(mut self, body: &impl Serialize) -> Result<Self, ClientError> {
        let written = serde_json::to_vec(body).map_err(|error| self.strange(error.to_string()))?;
        self.kind = Some("application/json");
        self.body = written.into();
        Ok(self)
    }

    fn strange(&self, what: impl Into<String>) -> ClientError {
        ClientError::Strange { request: format!("{} {}", self.method, self.path), what: what.into() }
    }
}

impl Client {
    /// A client of the agent that listens on this socket. Nothing is connected before the first request.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Client { agent: Agent::Socket(socket.into()) }
    }

    /// A client of an agent that listens on TCP. Nothing is connected before the first request.
    pub fn remote(remote: Remote) -> Self {
        Client { agent: Agent::Remote(Arc::new(remote)) }
    }

    /// `POST /v1/vms`.
    pub async fn create_vm(&self, spec: &VmSpec) -> Result<Vm, ClientError> {
        self.read(Call::new(Method::POST, "/v1/vms".to_owned()).json(spec)?).await
    }

    /// `GET /v1/vms`.
    pub async fn list_vms(&self) -> Result<Vec<Vm>, ClientError> {
        self.list("/v1/vms").await
    }

    /// `GET /v1/vms/{name}`.
    pub async fn get_vm(&self, vm: &str) -> Result<Vm, ClientError> {
        self.read(Call::get(format!("/v1/vms/{}", segment(vm)))).await
    }

    /// `PUT /v1/vms/{name}`, only at this revision if there is one.
    pub async fn put_vm(&self, vm: &str, spec: &VmSpec, if_match: Option<u64>) -> Result<Vm, ClientError> {
        let call = Call::new(Method::PUT, format!("/v1/vms/{}", segment(vm))).json(spec)?;
        self.read(Call { if_match, ..call }).await
    }

    /// `PATCH /v1/vms/{name}` with a JSON merge patch, only at this revision if there is one.
    pub async fn patch_vm(
        &self,
        vm: &str,
        patch: &serde_json::Value,
        if_match: Option<u64>,
    ) -> Result<Vm, ClientError> {
        let call = Call::new(Method::PATCH, format!("/v1/vms/{}", segment(vm))).json(patch)?;
        self.read(Call { if_match, ..call }).await
    }

    /// `POST /v1/vms/{name}/clone`.
    pub async fn clone_vm(&self, vm: &str, copy: &CloneSpec) -> Result<Vm, ClientError> {
        self.read(Call::new(Method::POST, format!("/v1/vms/{}/clone", segment(vm))).json(copy)?).await
    }

    /// `POST /v1/vms/{name}/resize-disk`. The agent waits for at most 300 seconds.
    pub async fn resize_disk(&self, vm: &str, wanted: &DiskSize) -> Result<DiskSize, ClientError> {
        let call = Call::new(Method::POST, format!("/v1/vms/{}/resize-disk", segment(vm))).json(wanted)?;
        let patience = PATIENCE.saturating_add(Duration::from_secs(300));
        self.read(Call { patience, ..call }).await
    }

    /// `DELETE /v1/vms/{name}`, only at this revision if there is one.
    pub async fn delete_vm(&self, vm: &str, if_match: Option<u64>) -> Result<(), ClientError> {
        self.delete_vm_within(vm, if_match, Duration::ZERO).await
    }

    /// The same, with this much more time for the response.
    pub async fn delete_vm_within(
        &self,
        vm: &str,
        if_match: Option<u64>,
        wait: Duration,
    ) -> Result<(), ClientError> {
        let call = Call::new(Method::DELETE, format!("/v1/vms/{}", segment(vm)));
        let patience = PATIENCE.saturating_add(wait);
        self.send(&Call { if_match, patience, ..call }).await.map(drop)
    }

    /// `POST /v1/vms/{name}/boot` and so on. The agent takes a wait of at most 600 seconds.
    pub async fn act(&self, vm: &str, action: VmAction, wait: Duration) -> Result<Progress, ClientError> {
        let path = format!("/v1/vms/{}/{}?wait={}", segment(vm), action.as_str(), wait.as_secs());
        let call = Call { patience: PATIENCE.saturating_add(wait), ..Call::new(Method::POST, path) };
        let response = self.send(&call).await?;
        let complete = response.status() != StatusCode::ACCEPTED;
        Ok(Progress { vm: self.parse(&call, response).await?, complete })
    }

    /// `GET /v1/vms/{name}/stats`.
    pub async fn stats(&self, vm: &str) -> Result<VmStats, ClientError> {
        self.read(Call::get(format!("/v1/vms/{}/stats", segment(vm)))).await
    }

    /// `GET /v1/vms/{name}/console`.
    pub async fn read_console(
        &self,
        vm: &str,
        offset: Option<u64>,
        follow: bool,
    ) -> Result<Console, ClientError> {
        let mut path = format!("/v1/vms/{}/console?follow={follow}", segment(vm));
        if let Some(offset) = offset {
            // Writing to a String does not fail.
            let _ = write!(path, "&offset={offset}");
        }
        let call = Call::get(path);
        let response = self.send(&call).await?;
        let start =
            response.headers().get("console-offset").and_then(|value| value.to_str().ok()?.parse().ok());
        let start = start.ok_or_else(|| call.strange("no console-offset"))?;
        Ok(Console { start, body: response.into_body(), client: self.clone() })
    }

    /// `POST /v1/vms/{name}/console`: returns how many of the bytes (at most 4096) were taken.
    pub async fn write_console(&self, vm: &str, bytes: impl Into<Bytes>) -> Result<usize, ClientError> {
        let call = Call::new(Method::POST, format!("/v1/vms/{}/console", segment(vm)));
        let call = Call { kind: Some("application/octet-stream"), body: bytes.into(), ..call };
        self.read::<ConsoleTaken>(call).await.map(|answer| answer.taken)
    }

    /// `GET /v1/pfs`.
    pub async fn list_pfs(&self) -> Result<Vec<Pf>, ClientError> {
        self.list("/v1/pfs").await
    }

    /// `GET /v1/pfs/{name}`.
    pub async fn get_pf(&self, pf: &str) -> Result<Pf, ClientError> {
        self.read(Call::get(format!("/v1/pfs/{}", segment(pf)))).await
    }

    /// `PUT /v1/pfs/{name}/vfs`, only at this revision if there is one.
    pub async fn set_vfs(&self, pf: &str, count: u32, if_match: Option<u64>) -> Result<Pf, ClientError> {
        let call = Call::new(Method::PUT, format!("/v1/pfs/{}/vfs", segment(pf))).json(&VfCount { count })?;
        self.read(Call { if_match, ..call }).await
    }

    /// `GET /v1/vfs`.
    pub async fn list_vfs(&self) -> Result<Vec<Vf>, ClientError> {
        self.list("/v1/vfs").await
    }

    /// `GET /healthz`: the complaints, none if all is well.
    pub async fn health(&self) -> Result<Vec<String>, ClientError> {
        let call = Call::get("/healthz".to_owned());
        let response = self.exchange(&call).await?;
        let well = response.status().is_success();
        let text = String::from_utf8_lossy(&self.collect(&call, response).await?).into_owned();
        Ok(if well { Vec::new() } else { text.lines().map(str::to_owned).collect() })
    }

    /// `GET /metrics`, as OpenMetrics text.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let call = Call::get("/metrics".to_owned());
        let response = self.send(&call).await?;
        Ok(String::from_utf8_lossy(&self.collect(&call, response).await?).into_owned())
    }

    async fn list<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>, ClientError> {
        let mut page = self.page(path).await?;
        let mut items = std::mem::take(&mut page.items);
        while let Some(cursor) = page.next.take() {
            page = self.page(&format!("{path}?cursor={cursor}")).await?;
            // An agent that always names a next page must not keep this loop alive with empty ones.
            if page.items.is_empty() {
                break;
            }
            items.append(&mut page.items);
        }
        Ok(items)
    }

    async fn page<T: DeserializeOwned>(&self, path: &str) -> Result<List<T>, ClientError> {
        self.read(Call::get(path.to_owned())).await
    }

    async fn read<T: DeserializeOwned>(&self, call: Call) -> Result<T, ClientError> {
        let response = self.send(&call).await?;
        self.parse(&call, response).await
    }

    /// Sends the request; a response without success becomes an error.
    async fn send(&self, call: &Call) -> Result<Response<Incoming>, ClientError> {
        let response = self.exchange(call).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let bytes = self.collect(call, response).await?;
        match serde_json::from_slice::<Problem>(&bytes) {
            Ok(problem) => Err(Box::new(problem).into()),
            Err(_) => Err(call.strange(format!("status {status} without a problem"))),
        }
    }

    async fn exchange(&self, call: &Call) -> Result<Response<Incoming>, ClientError> {
        let timed_out = || ClientError::TimedOut { agent: self.agent.to_string(), waited: call.patience };
        timeout(call.patience, self.exchange_unhurried(call)).await.map_err(|_| timed_out())?
    }

    async fn exchange_unhurried(&self, call: &Call) -> Result<Response<Incoming>, ClientError> {
        let mut request = Request::builder().method(&call.method).uri(&call.path);
        if let Some(kind) = call.kind {
            request = request.header(CONTENT_TYPE, kind);
        }
        if let Some(revision) = call.if_match {
            request = request.header(IF_MATCH, format!("\"{revision}\""));
        }
        if let Some(id) = call.last_event {
            request = request.header("last-event-id", id);
        }
        let request =
            request.body(Full::new(call.body.clone())).map_err(|error| call.strange(error.to_string()))?;
        self.transmit(request).await
    }

    /// Sends a request on a connection of its own, with the data that identifies its author to the agent.
    async fn transmit(&self, mut request: Request<Full<Bytes>>) -> Result<Response<Incoming>, ClientError> {
        let stream = self.connect().await?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|source| self.broken(source))?;
        // Ends when the response has been read or dropped; its errors are also those of the response.
        tokio::spawn(connection);
        match &self.agent {
            Agent::Socket(_) => {
                drop(request.headers_mut().insert(HOST, HeaderValue::from_static("localhost")))
            }
            Agent::Remote(remote) => {
                request.headers_mut().insert(HOST, remote.host_header());
                request.headers_mut().insert(AUTHORIZATION, remote.credentials());
            }
        }
        sender.send_request(request).await.map_err(|source| self.broken(source))
    }

    async fn connect(&self) -> Result<Box<dyn Stream>, ClientError> {
        let socket = match &self.agent {
            Agent::Remote(remote) => return remote.connect().await,
            Agent::Socket(socket) => socket,
        };
        match UnixStream::connect(socket).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(source) => {
                let socket = socket.clone();
                Err(match source.kind() {
                    io::ErrorKind::PermissionDenied => ClientError::NotAllowed { socket, source },
                    _ => ClientError::NoAgent { socket, source },
                })
            }
        }
    }

    async fn parse<T: DeserializeOwned>(
        &self,
        call: &Call,
        response: Response<Incoming>,
    ) -> Result<T, ClientError> {
        let bytes = self.collect(call, response).await?;
        serde_json::from_slice(&bytes).map_err(|error| call.strange(error.to_string()))
    }

    async fn collect(&self, call: &Call, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        Ok(body.map_err(|error| call.strange(error.to_string()))?.to_bytes())
    }

    fn broken(&self, source: hyper::Error) -> ClientError {
        ClientError::Broken { agent: self.agent.to_string(), source }
    }
}

/// A console's log as it arrives.
#[derive(Debug)]
pub struct Console {
    /// Offset of the first byte.
    pub start: u64,
    body: Incoming,
    client: Client,
}

impl Console {
    /// The next bytes; None at the end.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|source| self.client.broken(source))?;
            if let Ok(bytes) = frame.into_data() {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }
}

/// A text as one segment of a path (RFC 3986: all but unreserved characters are escaped).
fn segment(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut path, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                path.push(char::from(byte))
            }
            // Writing to a String does not fail.
            _ => drop(write!(path, "%{byte:02X}")),
        }
        path
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_cannot_leave_their_segment() {
        for (text, expect) in [("web1", "web1"), ("a/../b?c", "a%2F..%2Fb%3Fc"), ("ä %", "%C3%A4%20%25")] {
            assert_eq!(super::segment(text), expect);
        }
    }
}
