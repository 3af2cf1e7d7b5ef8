// SPDX-License-Identifier: Apache-2.0

//! Access over TCP, and bounds on the resources that one client can take from the others.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use api::{Caller, Client, ClientError, Gate, Limits, ProblemCode, Remote, RemoteError, tls, token::Tokens};
use axum::body::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream, UnixStream},
    time::{sleep, timeout},
};

use crate::{Server, fake::Fake, fake_policy::FakePolicy, spec};

const CI: &str = "0123456789abcdef0123456789abcdef";
const OPS: &str = "fedcba9876543210fedcba9876543210";

/// No step of a test takes longer.
const PATIENCE: Duration = Duration::from_secs(10);

fn tokens() -> Tokens {
    Tokens::parse(&format!("ci:{CI}\nops:{OPS}\n")).unwrap()
}

/// A self-signed certificate for 127.0.0.1 and agent.lab, and its key.
fn certificate() -> (String, String) {
    let names = ["127.0.0.1".to_owned(), "agent.lab".to_owned()];
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

/// Serves on TCP; the server ends with the test's runtime.
async fn serve(tls: Option<(&str, &str)>) -> (SocketAddr, Fake) {
    serve_with(tls, Limits::default()).await
}

async fn serve_with(tls: Option<(&str, &str)>, limits: Limits) -> (SocketAddr, Fake) {
    let fake = Fake::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let gate = Arc::new(Gate::new(tokens(), ["agent.lab".to_owned()]));
    let tls = tls.map(|(certificate, key)| tls::acceptor(certificate.as_bytes(), key.as_bytes()).unwrap());
    let router = api::router_with_policy(Arc::new(fake.clone()), Arc::new(FakePolicy::default()));
    let listeners = vec![api::Listener::tcp(listener, gate, tls)];
    tokio::spawn(api::serve(listeners, router, limits, std::future::pending()));
    (address, fake)
}

/// Sends text and returns all bytes that come until the connection ends; a head without `connection: close` does not
/// end it.
async fn raw(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin), text: &str) -> String {
    // The server may close the connection before it has read all.
    let _ = stream.write_all(text.as_bytes()).await;
    rest(stream).await
}

async fn rest(stream: &mut (impl AsyncReadExt + Unpin)) -> String {
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    while let Ok(1..) = timeout(PATIENCE, stream.read(&mut piece)).await.expect("it ends").inspect(|len| {
        answer.extend_from_slice(&piece[..*len]);
    }) {}
    String::from_utf8_lossy(&answer).into_owned()
}

/// The status, and the problem's code if there is one, of a request with these headers.
async fn ask(address: SocketAddr, target: &str, headers: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let answer =
        raw(&mut stream, &format!("GET {target} HTTP/1.1\r\nconnection: close\r\n{headers}\r\n")).await;
    assert!(!answer.to_lowercase().contains("access-control"), "no page may read it: {answer}");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
    let status = head.split(' ').nth(1).unwrap();
    assert_eq!(status == "401", head.contains("www-authenticate: Bearer"), "{head}");
    let problem: Option<api::Problem> = serde_json::from_str(body).ok();
    problem.map_or_else(|| status.to_owned(), |problem| format!("{status} {}", problem.code))
}

#[tokio::test]
async fn each_request_over_tcp_needs_a_token() {
    let (address, fake) = serve(None).await;
    let host = format!("host: {address}\r\n");
    for (target, authorization, expect) in [
        ("/v1/vms", format!("authorization: Bearer {CI}\r\n"), "200"),
        ("/v1/vms", format!("authorization: bearer   {OPS}\r\n"), "200"),
        ("/v1/vms", String::new(), "401 unauthorized"),
        ("/healthz", String::new(), "401 unauthorized"),
        ("/v1/openapi.json", String::new(), "401 unauthorized"),
        ("/nothing", String::new(), "401 unauthorized"),
        ("/v1/vms", format!("authorization: Bearer {}\r\n", &CI[1..]), "401 unauthorized"),
        ("/v1/vms", format!("authorization: Basic {CI}\r\n"), "401 unauthorized"),
        ("/v1/vms", format!("authorization: {CI}\r\n"), "401 unauthorized"),
        ("/v1/vms", format!("authorization: Bearer x\r\nauthorization: Bearer {CI}\r\n"), "401 unauthorized"),
    ] {
        assert_eq!(ask(address, target, &(host.clone() + &authorization)).await, expect, "{authorization}");
    }
    let remote = Remote::new(&format!("http://{address}"), &tokens(), None).unwrap();
    let client = Client::remote(remote);
    client.create_vm(&serde_json::from_value(spec("web1")).unwrap()).await.unwrap();
    assert_eq!(fake.state().callers, [Caller::Token("ci".into())], "the token's name is who did it");
}

/// Connects from another address of the loopback network.
async fn connect_from(source: [u8; 4], address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((source, 0).into()).unwrap();
    socket.connect(address).await.unwrap()
}

#[tokio::test]
async fn clients_without_a_token_keep_none_with_one_out() {
    // No client of the test reaches a time limit.
    let long = PATIENCE * 100;
    let limits = Limits { head: long, stranger: long, ..Limits::default() };
    let (certificate_pem, key) = certificate();
    for tls in [None, Some((certificate_pem.as_str(), key.as_str()))] {
        let (address, _) = serve_with(tls, limits).await;
        let mut silent = Vec::new();
        for n in (0..40).cycle().take(300) {
            silent.push(connect_from([127, 0, 0, 1 + n], address).await);
        }
        let url = format!("{}://{address}", if tls.is_some() { "https" } else { "http" });
        let authority = tls.map(|_| certificate_pem.as_bytes());
        let client = Client::remote(Remote::new(&url, &tokens(), authority).unwrap());
        for _ in 0..50 {
            timeout(PATIENCE, client.list_vms()).await.expect("an answer").unwrap();
        }
    }
    // The same with clients of one address, even if it is that of the client with a token.
    let (address, _) = serve_with(None, limits).await;
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let headers = format!("host: {address}\r\nauthorization: Bearer {CI}\r\n");
    assert_eq!(ask(address, "/v1/vms", &headers).await, "200");
    let last = silent.pop().unwrap();
    let held = timeout(Duration::from_millis(100), rest(&mut { last })).await;
    assert!(held.is_err(), "the latest strangers keep their places");
}

#[tokio::test]
async fn a_connection_without_a_token_ends_soon() {
    let stranger = Duration::from_millis(500);
    let (address, _) = serve_with(None, Limits { stranger, ..Limits::default() }).await;
    let get = |headers: &str| format!("GET /v1/vms HTTP/1.1\r\nhost: {address}\r\n{headers}\r\n");
    let token = format!("authorization: Bearer {CI}\r\n");
    let mut piece = [0; 4096];
    let mut known = TcpStream::connect(address).await.unwrap();
    known.write_all(get(&token).as_bytes()).await.unwrap();
    assert!(known.read(&mut piece).await.unwrap() > 0);
    let begun = Instant::now();
    let mut silent = TcpStream::connect(address).await.unwrap();
    let mut wrong = TcpStream::connect(address).await.unwrap();
    // The client goes on, and each of its requests is refused.
    let repeat = async {
        while wrong.write_all(get("").as_bytes()).await.is_ok() {
            let Ok(1..) = wrong.read(&mut piece).await else { break };
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, repeat).await.expect("the connection ends");
    rest(&mut silent).await;
    assert!(begun.elapsed() < Limits::default().head / 2, "{:?}", begun.elapsed());
    known.write_all(get(&token).as_bytes()).await.unwrap();
    assert!(known.read(&mut piece).await.unwrap() > 0, "a client with a token has time");
}

#[tokio::test]
async fn a_request_that_is_turned_away_is_told_with_its_source() {
    let (address, fake) = serve(None).await;
    let token = format!("authorization: Bearer {CI}\r\n");
    ask(address, "/v1/vms", &format!("host: {address}\r\n")).await;
    ask(address, "/v1/vms", &format!("host: elsewhere.example\r\n{token}")).await;
    ask(address, "/v1/vms", &format!("host: {address}\r\n{token}")).await;
    assert_eq!(fake.state().turned_away, ["127.0.0.1 unauthorized", "127.0.0.1 forbidden"]);
    let server = Server::start();
    server.get("/v1/vms").await;
    let origin = [("origin", "http://evil.example")];
    server.send(hyper::Method::GET, "/v1/vms", &origin, "").await;
    let uid = rustix::process::geteuid().as_raw();
    assert_eq!(server.fake.state().turned_away, [format!("uid {uid} forbidden")]);
}

/// Connections to a socket by another user of the host; only root can make them.
fn connections_of(uid: u32, socket: std::path::PathBuf, count: usize) -> Vec<std::os::unix::net::UnixStream> {
    let connect = move || {
        // The kernel keeps user ids by thread.
        rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(uid)).unwrap();
        (0..count).map(|_| std::os::unix::net::UnixStream::connect(&socket).unwrap()).collect()
    };
    std::thread::spawn(connect).join().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_of_the_socket_keeps_no_other_out() {
    use std::os::unix::fs::PermissionsExt;
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let server = Server::start_with(Limits { connections: 32, head: PATIENCE * 100, ..Limits::default() });
    let socket = server.directory.path().join("api.sock");
    for (path, mode) in [(server.directory.path(), 0o755), (&socket, 0o666)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let mut held = connections_of(65534, socket.clone(), 12);
    let answer = held.pop().unwrap();
    answer.set_nonblocking(true).unwrap();
    let answer = rest(&mut UnixStream::from_std(answer).unwrap()).await;
    assert!(answer.contains("too_many_clients") && answer.contains("Your user"), "{answer}");
    let mut other = connections_of(65533, socket.clone(), 1).pop().unwrap();
    std::io::Write::write_all(&mut other, b"GET /v1/vms HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .unwrap();
    other.set_nonblocking(true).unwrap();
    let answer = rest(&mut UnixStream::from_std(other).unwrap()).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "another user: {answer}");
    // Many users together have less than all connections.
    for uid in 65000..65010 {
        held.extend(connections_of(uid, socket.clone(), 12));
    }
    server.client().list_vms().await.unwrap();
}

#[tokio::test]
async fn no_page_and_no_foreign_name_reaches_the_agent() {
    let (address, _) = serve(None).await;
    let port = address.port();
    let token = format!("authorization: Bearer {CI}\r\n");
    for (host, expect) in [
        ("127.0.0.1", "200"),
        ("localhost", "200"),
        ("LocalHost:1", "200"),
        ("agent.lab", "200"),
        ("AGENT.LAB:8443", "200"),
        ("[::ffff:127.0.0.1]", "200"),
        ("evil.example", "403 forbidden"),
        ("127.0.0.2", "403 forbidden"),
        ("127.0.0.1.evil.example", "403 forbidden"),
        ("agent.lab.evil.example", "403 forbidden"),
        ("localhost@evil.example", "403 forbidden"),
        ("evil.example@localhost", "403 forbidden"),
        ("", "403 forbidden"),
    ] {
        assert_eq!(ask(address, "/v1/vms", &format!("host: {host}\r\n{token}")).await, expect, "{host}");
    }
    let here = format!("host: 127.0.0.1:{port}\r\n");
    for (target, headers, expect) in [
        ("/v1/vms", String::new(), "403 forbidden"),
        ("/v1/vms", format!("{here}{here}"), "403 forbidden"),
        ("http://evil.example/v1/vms", here.clone(), "403 forbidden"),
        ("http://localhost/v1/vms", here.clone(), "200"),
        ("/v1/vms", format!("{here}origin: http://evil.example\r\n"), "403 forbidden"),
        ("/v1/vms", format!("{here}origin: null\r\n"), "403 forbidden"),
        ("/v1/vms", format!("{here}origin: http://127.0.0.1:{port}\r\n"), "403 forbidden"),
        ("/v1/vms", format!("{here}sec-fetch-site: cross-site\r\n"), "403 forbidden"),
        ("/v1/vms", format!("{here}sec-fetch-site: none\r\n"), "200"),
    ] {
        assert_eq!(ask(address, target, &format!("{headers}{token}")).await, expect, "{target} {headers}");
    }
    // Likewise on the socket, which a proxy may serve to browsers.
    let server = Server::start();
    let origin = [("origin", "http://evil.example")];
    server.send(hyper::Method::GET, "/v1/vms", &origin, "").await.problem(403, "forbidden");
}

#[tokio::test]
async fn tls_is_trusted_for_the_right_certificate_only() {
    let (certificate_pem, key) = certificate();
    let (address, fake) = serve(Some((&certificate_pem, &key))).await;
    let url = format!("https://{address}");
    let client =
        |authority: &str| Client::remote(Remote::new(&url, &tokens(), Some(authority.as_bytes())).unwrap());
    let known = client(&certificate_pem);
    known.create_vm(&serde_json::from_value(spec("web1")).unwrap()).await.unwrap();
    assert_eq!(fake.state().callers, [Caller::Token("ci".into())]);
    let error = client(&certificate().0).list_vms().await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("--ca-file"), "{error}");
    // Without TLS there is no response.
    let mut stream = TcpStream::connect(address).await.unwrap();
    let answer = raw(&mut stream, &format!("GET /healthz HTTP/1.1\r\nhost: {address}\r\n\r\n")).await;
    assert!(!answer.contains("HTTP"), "{answer:?}");

    let (_, other_key) = certificate();
    assert!(tls::acceptor(certificate_pem.as_bytes(), other_key.as_bytes()).is_err());
    assert!(tls::acceptor(b"", key.as_bytes()).is_err());
}

#[test]
fn a_token_goes_nowhere_in_clear() {
    let remote = |url: &str| Remote::new(url, &tokens(), None).map(drop);
    for url in ["http://127.0.0.1:80", "http://localhost", "http://[::1]:1/"] {
        remote(url).unwrap_or_else(|error| panic!("{url}: {error}"));
    }
    assert!(matches!(remote("http://192.0.2.1:80"), Err(RemoteError::Clear(_))));
    assert!(matches!(remote("http://localhost.evil.example"), Err(RemoteError::Clear(_))));
    assert!(matches!(remote("https://192.0.2.1"), Err(RemoteError::NoAuthority(_))));
    for url in ["", "agent", "ftp://agent", "http://localhost/v1", "http://a@localhost", "http://localhost?x"]
    {
        assert!(matches!(remote(url), Err(RemoteError::NotAUrl(_))), "{url}");
    }
}

#[tokio::test]
async fn idle_connections_take_nothing_from_others_and_are_closed() {
    let server =
        Server::start_with(Limits { connections: 120, head: Duration::from_secs(1), ..Limits::default() });
    let socket = server.directory.path().join("api.sock");
    let begun = Instant::now();
    let mut idle = Vec::new();
    for n in 0..100 {
        let mut stream = UnixStream::connect(&socket).await.unwrap();
        // Some clients have begun a request.
        if n % 2 == 0 {
            stream.write_all(b"GET /v1/vms HTTP/1.1\r\nhost:").await.unwrap();
        }
        idle.push(stream);
    }
    let client = server.client();
    for _ in 0..50 {
        client.list_vms().await.unwrap();
    }
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    for mut stream in idle {
        rest(&mut stream).await;
    }
}

#[tokio::test]
async fn one_connection_too_many_is_told_so() {
    let server = Server::start_with(Limits { connections: 3, ..Limits::default() });
    let socket = server.directory.path().join("api.sock");
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(UnixStream::connect(&socket).await.unwrap());
    }
    let mut stream = UnixStream::connect(&socket).await.unwrap();
    let answer = rest(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains("application/problem+json") && answer.contains("too_many_clients"), "{answer}");
    held.clear();
    let client = server.client();
    timeout(PATIENCE, async {
        while client.list_vms().await.is_err() {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("there is room again");
}

#[tokio::test]
async fn heads_have_a_bound() {
    let server = Server::start();
    let socket = server.directory.path().join("api.sock");
    let long = format!("x: {}\r\n", "y".repeat(20 << 10));
    let many: String = (0..100).map(|n| format!("x{n}: y\r\n")).collect();
    for headers in [long, many] {
        let mut stream = UnixStream::connect(&socket).await.unwrap();
        let answer = raw(&mut stream, &format!("GET /v1/vms HTTP/1.1\r\nhost: x\r\n{headers}\r\n")).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
    let mut stream = UnixStream::connect(&socket).await.unwrap();
    let target = "/".repeat(40 << 10);
    let answer = raw(&mut stream, &format!("GET {target} HTTP/1.1\r\nhost: x\r\n\r\n")).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
}

/// Tokio's paused clock advances when no task can run.
#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_come_is_not_waited_for() {
    let server = Server::start();
    let mut stream = UnixStream::connect(server.directory.path().join("api.sock")).await.unwrap();
    let head = "POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{";
    let begun = tokio::time::Instant::now();
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = vec![0; 4096];
    let len = stream.read(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer[..len]);
    assert!(
        answer.starts_with("HTTP/1.1 408 ") && answer.contains(ProblemCode::RequestTimeout.as_str()),
        "{answer}"
    );
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn who_takes_nothing_is_cut_off() {
    let stall = Duration::from_millis(300);
    let server = Server::start_with(Limits { stall, ..Limits::default() });
    server.vm("web1").await;
    let client = server.client();
    let _console = client.read_console("web1", None, true).await.unwrap();
    let sender = server.fake.state().consoles.pop().unwrap();
    let flood = async { while sender.send(Bytes::from(vec![0; 64 << 10])).await.is_ok() {} };
    timeout(PATIENCE, flood).await.expect("the connection is given up");
    // A stream without data is not a stalled one.
    let mut quiet = client.read_console("web1", None, true).await.unwrap();
    assert!(quiet.chunk().await.unwrap().is_some(), "what the console has had");
    let sender = server.fake.state().consoles.pop().unwrap();
    sleep(stall * 3).await;
    sender.send(Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(timeout(PATIENCE, quiet.chunk()).await.unwrap().unwrap().unwrap(), "x");
}

#[tokio::test]
async fn streams_leave_room_for_requests() {
    let server = Server::start();
    server.vm("web1").await;
    let client = server.client();
    let code = |error: ClientError| error.problem().unwrap().code;
    let mut consoles = Vec::new();
    while consoles.len() < 200 {
        match client.read_console("web1", None, true).await {
            Ok(console) => consoles.push(console),
            Err(error) => {
                assert_eq!(code(error), ProblemCode::TooManyClients);
                break;
            }
        }
    }
    assert_eq!(consoles.len(), 64);
    let mut leases = Vec::new();
    while leases.len() < 200 {
        match client.lease_vm("web1", None).await {
            Ok(lease) => leases.push(lease),
            Err(error) => {
                assert_eq!(code(error), ProblemCode::TooManyClients);
                break;
            }
        }
    }
    assert_eq!(leases.len(), 48, "of one user");
    client.list_vms().await.unwrap();
    consoles.pop();
    timeout(PATIENCE, async {
        while client.read_console("web1", None, true).await.is_err() {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("there is room again");
}
