// SPDX-License-Identifier: Apache-2.0

//! The agent's own binary over TCP, and demanding clients.

use std::{
    fs,
    io::Write,
    net::{TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::PathBuf,
    process::{Command, Output},
    time::{Duration, Instant},
};

use api::{
    problem::ProblemCode,
    types::{EventKind, VmAction, VmState},
};
use serde_json::json;

use crate::fixture::{Agent, Options, SmallGuest, agent::binary, wire};

const TOKENS: &str = "# of this test\nops:0123456789abcdef0123456789abcdef\n";

fn token_file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokens");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    (directory, path)
}

fn portcullis(arguments: &[&str]) -> Output {
    Command::new(binary()).args(arguments).output().unwrap()
}

#[test]
fn the_command_line_uses_an_agent_over_tcp_by_its_token() {
    let (_directory, tokens) = token_file(TOKENS);
    let tokens = tokens.to_str().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let arguments = ["--sim-pf", "sim0=1", "--listen", &address, "--token-file", tokens];
    let mut agent = Agent::start_with(Options {
        arguments: arguments.map(ToString::to_string).into(),
        ..Options::default()
    });
    let url = format!("http://{address}");
    let done = portcullis(&[
        "--url",
        &url,
        "--token-file",
        tokens,
        "port-group",
        "set",
        "web",
        "--switch",
        "default",
        "--mtu",
        "9000",
    ]);
    assert!(done.status.success(), "{done:?}");
    assert!(agent.log().contains("policy made by token ops"), "{}", agent.log());
    let event = agent.wait_on(async { agent.client.events(Some(0)).await?.next().await }).unwrap();
    // The first event is the gap before this start of the agent.
    assert!(event.is_some_and(|event| event.what == EventKind::Gap));

    let (_other_directory, other) = token_file(&TOKENS.replace("0123", "3210"));
    let refused = portcullis(&["--url", &url, "--token-file", other.to_str().unwrap(), "vm", "list"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("unauthorized"), "{refused:?}");
    let ask = |headers: &str| {
        let stream = TcpStream::connect(&address).unwrap();
        wire::exchange(stream, &format!("GET /v1/vms HTTP/1.1\r\nconnection: close\r\n{headers}\r\n")).code()
    };
    assert_eq!(ask("host: localhost\r\n"), ProblemCode::Unauthorized);
    let token = "authorization: Bearer 0123456789abcdef0123456789abcdef\r\n";
    assert_eq!(ask(&format!("host: elsewhere.example\r\n{token}")), ProblemCode::Forbidden);
    let usage = portcullis(&["--url", &url, "vm", "list"]);
    assert_eq!(usage.status.code(), Some(2), "{usage:?}");
    let turned_away = |code: &str| {
        agent.log().lines().any(|found| {
            found.contains("refused a request of the API")
                && found.contains("source=127.0.0.1")
                && found.contains(&format!("code={code}"))
        })
    };
    assert!(turned_away("unauthorized") && turned_away("forbidden"), "{}", agent.log());
    assert!(!agent.log().contains("3210456789"), "no token is in the log");
    // A token's name is no user of the host: only images may be booted.
    let kernel = agent.directory().join("kernel");
    fs::write(&kernel, "x").unwrap();
    let vm = agent.directory().join("vm.json");
    let spec = json!({"name": "web1", "memory": "2MiB", "boot": {"kernel": kernel}});
    fs::write(&vm, spec.to_string()).unwrap();
    let created = portcullis(&["--url", &url, "--token-file", tokens, "vm", "create", vm.to_str().unwrap()]);
    assert!(created.status.success(), "{created:?}");
    let booted = portcullis(&["--url", &url, "--token-file", tokens, "vm", "boot", "web1"]);
    let said = String::from_utf8_lossy(&booted.stderr).into_owned();
    assert!(said.contains("kernel_unreadable") && said.contains("token ops"), "{said}");

    // An agent that would send tokens in clear over the network does not start.
    agent.kill();
    let directory = agent.directory().to_owned();
    let refused = Command::new(binary())
        .arg("--socket")
        .arg(directory.join("other.sock"))
        .args(["serve", "--listen", "0.0.0.0:0", "--token-file", tokens])
        .arg("--state-dir")
        .arg(directory.join("other-state"))
        .arg("--run-dir")
        .arg(directory.join("other-run"))
        .output()
        .unwrap();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--tls-cert"), "{refused:?}");
    agent.restart();
}

#[test]
fn idle_clients_and_one_that_does_not_read_harm_nobody() {
    let arguments = ["--sim-pf", "sim0=1"].map(ToString::to_string).into();
    let agent = Agent::start_with(Options { arguments, ..Options::default() });
    let socket = agent.directory().join("api.sock");
    let mut burden: Vec<UnixStream> = (0..100).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let mut deaf = UnixStream::connect(&socket).unwrap();
    deaf.write_all(b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    burden.push(deaf);
    let mut events = agent.wait_on(agent.client.events(None)).unwrap();
    let begun = Instant::now();
    let mut guest = SmallGuest::boot(&agent, "busy", json!([{"id": "eth0"}]));
    assert!(guest.ask("up").starts_with("ok "));
    // Twice the number of events that a subscriber may leave unread.
    for _ in 0..300 {
        for (action, then) in [(VmAction::Pause, VmState::Paused), (VmAction::Resume, VmState::Running)] {
            agent.act("busy", action).unwrap();
            let told = |event: api::types::Event| {
                assert!(event.what != EventKind::Gap);
                matches!(event.what, EventKind::VmState { state, .. } if state == then)
            };
            while !told(agent.wait_on(events.next()).unwrap().expect("who reads is not left behind")) {}
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    assert!(guest.ask("link").contains("up"), "the guest is as before");
    agent.delete("busy").unwrap();
}
