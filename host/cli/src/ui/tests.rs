// SPDX-License-Identifier: Apache-2.0

//! Access through the command's proxy. The agent is a Unix socket that answers anything.

use std::net::SocketAddr;

use api::{Client, Limits, Listener};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixListener},
};

use super::proxy::Proxy;

/// A command's proxy before an agent that echoes its requests.
struct Page {
    address: SocketAddr,
    link: String,
    _directory: tempfile::TempDir,
}

impl Page {
    async fn open() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("api.sock");
        let agent = UnixListener::bind(&socket).unwrap();
        let echo = axum::Router::new().fallback(async |request: axum::extract::Request| {
            let mut text = format!("agent: {} {}", request.method(), request.uri());
            for (name, value) in request.headers() {
                text.push_str(&format!("; {name}={}", value.to_str().unwrap()));
            }
            text
        });
        tokio::spawn(api::serve(vec![agent.into()], echo, Limits::default(), std::future::pending()));
        let proxy = Proxy::new(Client::new(socket)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, link) = (listener.local_addr().unwrap(), proxy.link().to_owned());
        let listeners = vec![Listener::tcp(listener, proxy.gate(), None)];
        tokio::spawn(api::serve(listeners, proxy.router(None), Limits::default(), std::future::pending()));
        Page { address, link, _directory: directory }
    }

    /// The status and the body of a request with these headers; `HOST` stands for the right one.
    async fn ask(&self, line: &str, headers: &str) -> (u16, String) {
        let headers = headers.replace("HOST", &self.address.to_string());
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let text = format!("{line} HTTP/1.1\r\nconnection: close\r\n{headers}\r\n");
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(
            !answer.to_lowercase().contains("access-control")
                && !answer.to_lowercase().contains("set-cookie"),
            "{answer}"
        );
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    async fn session(&self) -> String {
        let headers = format!("host: HOST\r\norigin: http://HOST\r\nauthorization: Bearer {}\r\n", self.link);
        let (status, body) = self.ask("POST /session", &headers).await;
        assert_eq!(status, 200, "{body}");
        serde_json::from_str::<serde_json::Value>(&body).unwrap()["session"].as_str().unwrap().to_owned()
    }
}

#[tokio::test]
async fn a_link_is_good_for_one_session() {
    let page = Page::open().await;
    let session = page.session().await;
    let headers = format!("host: HOST\r\nauthorization: Bearer {}\r\n", page.link);
    let (status, body) = page.ask("POST /session", &headers).await;
    assert!(status == 401 && body.contains("works once"), "{status} {body}");
    // Neither token works in place of the other.
    assert_eq!(page.ask("GET /v1/vms", &headers).await.0, 401);
    let headers = format!("host: HOST\r\nauthorization: Bearer {session}\r\n");
    assert_eq!(page.ask("POST /session", &headers).await.0, 401);
    let (status, body) = page.ask("GET /v1/vms?limit=3", &headers).await;
    assert!(status == 200 && body.contains("agent: GET /v1/vms?limit=3;"), "{status} {body}");
}

#[tokio::test]
async fn only_what_the_api_reads_is_handed_on() {
    let page = Page::open().await;
    let headers = format!(
        "host: HOST\r\nauthorization: Bearer {}\r\norigin: http://HOST\r\nsec-fetch-site: same-origin\r\ncookie: a=b\r\nif-match: \
         \"3\"\r\nlast-event-id: 7\r\ncontent-type: application/json\r\nx-forwarded-for: me\r\ncontent-length: 2\r\n\r\n{{}}",
        page.session().await
    );
    let (status, body) = page.ask("PATCH /v1/port-groups/web", headers.trim_end_matches("\r\n")).await;
    assert_eq!(status, 200, "{body}");
    for part in ["if-match=\"3\"", "last-event-id=7", "content-type=application/json", "host=localhost"] {
        assert!(body.contains(part), "{part}: {body}");
    }
    for part in ["origin", "sec-fetch", "cookie", "authorization", "forwarded"] {
        assert!(!body.contains(part), "{part}: {body}");
    }
}

#[tokio::test]
async fn pages_and_names_of_others_do_not_get_in() {
    let page = Page::open().await;
    let session = format!("authorization: Bearer {}\r\n", page.session().await);
    for (line, headers, expect) in [
        ("GET /v1/vms", "host: HOST\r\n", 200),
        ("GET /v1/vms", "host: HOST\r\nsec-fetch-site: same-origin\r\n", 200),
        ("GET /v1/vms", "host: localhost\r\norigin: http://localhost\r\n", 200),
        ("GET /v1/vms", "host: evil.example\r\n", 403),
        ("GET /", "host: evil.example\r\n", 403),
        ("GET /v1/vms", "", 403),
        ("GET /v1/vms", "host: HOST\r\norigin: http://evil.example\r\n", 403),
        ("GET /v1/vms", "host: HOST\r\norigin: null\r\n", 403),
        ("GET /v1/vms", "host: HOST\r\norigin: http://127.0.0.1:1\r\n", 403),
        ("GET /v1/vms", "host: HOST\r\nsec-fetch-site: same-site\r\n", 403),
        ("GET /v1/vms", "host: HOST\r\nsec-fetch-site: cross-site\r\n", 403),
        ("POST /session", "host: HOST\r\nsec-fetch-site: cross-site\r\n", 403),
        // The page itself is no secret.
        ("GET /", "host: HOST\r\nsec-fetch-site: cross-site\r\n", 200),
        ("GET /healthz", "host: HOST\r\n", 404),
        ("GET /ui", "host: HOST\r\n", 404),
    ] {
        let (status, body) = page.ask(line, &format!("{headers}{session}")).await;
        assert_eq!(status, expect, "{line} {headers}: {body}");
    }
    // Without the session, or with a wrong one, there is no response of the agent.
    for headers in ["", "authorization: Bearer 0123456789abcdef0123456789abcdef\r\n", "cookie: session=x\r\n"]
    {
        let (status, body) = page.ask("GET /v1/vms", &format!("host: HOST\r\n{headers}")).await;
        assert!(status == 401 && !body.contains("agent:"), "{headers}: {status} {body}");
    }
}
