// SPDX-License-Identifier: Apache-2.0

//! The API over a real Unix socket, with a backend in memory.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a fixture that fails is a failed test"
)]

mod client;
mod document;
mod fake;
mod fake_policy;
mod forms;
mod network;
mod policy;
mod routes;

use std::sync::Arc;

use api::{Client, Limits};
use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Method, Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{UnixListener, UnixStream};

use fake::Fake;
use fake_policy::FakePolicy;

/// A served API; it ends with the test's runtime.
struct Server {
    directory: tempfile::TempDir,
    fake: Fake,
    policy: FakePolicy,
}

/// An answer, read to its end.
struct Answer {
    status: u16,
    headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&self.body)))
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// Checks that this is a whole problem of this status and code; returns it.
    fn problem(&self, status: u16, code: &str) -> Value {
        let problem = self.json();
        assert_eq!((self.status, &problem["code"]), (status, &Value::from(code)), "{problem}");
        assert_eq!(self.header("content-type"), Some("application/problem+json"));
        assert_eq!(problem["status"], status);
        assert_eq!(problem["type"], format!("urn:portcullis:problem:{code}"));
        let id = self.header("x-request-id").unwrap();
        assert_eq!(problem["request_id"], id);
        assert!(problem["title"].as_str().is_some_and(|title| !title.is_empty()));
        assert!(problem["detail"].as_str().is_some_and(|detail| !detail.is_empty()));
        problem
    }
}

impl Server {
    fn start() -> Self {
        Server::start_with(Limits::default())
    }

    fn start_with(limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (fake, policy) = (Fake::default(), FakePolicy::default());
        let listener = UnixListener::bind(directory.path().join("api.sock")).unwrap();
        let router = api::router_with_policy(Arc::new(fake.clone()), Arc::new(policy.clone()));
        tokio::spawn(api::serve(vec![listener.into()], router, limits, std::future::pending()));
        Server { directory, fake, policy }
    }

    fn client(&self) -> Client {
        Client::new(self.directory.path().join("api.sock"))
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, &[], "").await
    }

    async fn post(&self, path: &str, body: impl Into<String>) -> Answer {
        self.send(Method::POST, path, &[("content-type", "application/json")], body).await
    }

    /// Sends a request. If the response is a problem, the document must list it for the request.
    async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<String>,
    ) -> Answer {
        let answer = self.exchange(method.clone(), path, headers, body).await;
        document::knows(&method, path, &answer);
        answer
    }

    /// Sends a request.
    async fn exchange(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<String>,
    ) -> Answer {
        let stream = UnixStream::connect(self.directory.path().join("api.sock")).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header("host", "localhost");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body.into()))).unwrap();
        let (head, body) = sender.send_request(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        assert!(head.headers.contains_key("x-request-id"), "each answer has an id");
        Answer { status: head.status.as_u16(), headers: head.headers, body }
    }

    /// Makes a VM of this name.
    async fn vm(&self, name: &str) -> Value {
        let answer = self.post("/v1/vms", spec(name).to_string()).await;
        assert_eq!(answer.status, 201, "{:?}", answer.body);
        answer.json()
    }
}

/// A specification that uses every field.
fn spec(name: &str) -> Value {
    serde_json::json!({
        "name": name, "cpus": 2, "memory": "512MiB", "hugepages": true,
        "boot": { "kernel": "vmlinuz", "initramfs": "initrd.img", "cmdline": "console=ttyS0" },
        "adapters": [
            { "id": "eth0", "port_group": "web", "mac": "02:00:00:00:00:11", "vf": "0000:01:10.0" },
            { "id": "eth1" },
        ],
        "devices": ["0000:02:00.0"],
    })
}
