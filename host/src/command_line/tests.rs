// SPDX-License-Identifier: Apache-2.0

mod addresses;
mod life;
mod names;

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use api::{
    Backend, Client, Problem, ProblemCode,
    types::{EventKind, ObjectKind, Subject, VmAction},
};
use axum::{extract::Request as HttpRequest, middleware::Next, response::IntoResponse as _};
use clap::error::ErrorKind;
use cli::{CliError, EventStream, Format, Output, request};
use netpolicy::VmId;
use passthrough::relay::RelayEvent;
use tokio::net::UnixListener;

use super::*;
use crate::{
    agent::Agent,
    vm::tests::fixture::{Host, PATIENCE, spec},
};

/// The error's kind, or None if the command line is right.
fn check(line: &str, expect: Option<ErrorKind>) {
    let parsed = Cli::try_parse_from(["portcullis"].into_iter().chain(line.split_whitespace()));
    assert_eq!(parsed.err().map(|error| error.kind()), expect, "{line}");
}

#[test]
fn the_definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn command_lines() {
    for line in [
        "serve",
        "--socket /tmp/s serve --state-dir /tmp/state",
        "run web1.toml",
        "run --rm -",
        "run web1.toml --timeout 600",
        "vm create web1.yaml",
        "vm create -",
        "vm list --output json",
        "--socket /tmp/s vm show web1",
        "vm boot web1 --wait 0",
        "vm pause web1",
        "vm resume web1",
        "vm reboot web1",
        "vm shutdown web1 --wait 600",
        "vm stop web1",
        "vm delete web1",
        "vm delete web1 --timeout 600",
        "vm set web1 -f web1.toml --if-match 3",
        "vm patch web1 --memory 1GiB --restart always",
        "vm patch web1 --autostart false",
        "vm disk-limits web1 root --bytes-per-second 200MiB --operations-per-second 5000 --burst-bytes 1GiB",
        "vm disk-limits web1 root",
        "vm rename web1 web2",
        "vm clone web1 web2",
        "vm wait web1 --for rest --timeout 5",
        "vm boot web1 --timeout 5",
        "vm list --output yaml",
        "apply -f dir -f file.toml --dry-run",
        "check --root /tmp/host",
        "completions bash",
        "completion zsh",
        "man /tmp/man",
        "health",
        "console web1 --attach",
        "vm stats web1",
        "guest-image",
        "demo --json",
        "pf list",
        "pf show eth0",
        "pf set-vfs eth0 8",
        "vf list",
        "console web1 --follow",
        "console web1 --offset 100",
    ] {
        check(line, None);
    }
    check("", Some(ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand));
    check("vm boot", Some(ErrorKind::MissingRequiredArgument));
    check("vm boot web1 --wait 601", Some(ErrorKind::ValueValidation));
    check("vm delete web1 --wait 601", Some(ErrorKind::ValueValidation));
    check("vm boot web1 --wait -1", Some(ErrorKind::UnknownArgument));
    check("vm patch web1 --restart sometimes", Some(ErrorKind::ValueValidation));
    check("vm rename web1 Web", Some(ErrorKind::ValueValidation));
    check("vm wait web1 --for asleep", Some(ErrorKind::ValueValidation));
    check("vm wait web1", Some(ErrorKind::MissingRequiredArgument));
    check("apply", Some(ErrorKind::MissingRequiredArgument));
    check("completions tcsh", Some(ErrorKind::InvalidValue));
    check("console web1 --attach --follow", Some(ErrorKind::ArgumentConflict));
    check("vm list --output xml", Some(ErrorKind::InvalidValue));
    check("pf set-vfs eth0 many", Some(ErrorKind::ValueValidation));
    check("port-group set web --mtu 9000", Some(ErrorKind::MissingRequiredArgument));
    check("port-group set web --switch a --mtu 67", Some(ErrorKind::ValueValidation));
    check("port-group patch web --unset colour", Some(ErrorKind::ValueValidation));
    // No editor is opened.
    check("vm edit web1", Some(ErrorKind::InvalidSubcommand));
    check("port-group edit web", Some(ErrorKind::InvalidSubcommand));
    check("decisions --verdict maybe", Some(ErrorKind::ValueValidation));
    check("decisions --limit 1001", Some(ErrorKind::ValueValidation));
    check("decisions --since yesterday", Some(ErrorKind::ValueValidation));
    check("frobnicate", Some(ErrorKind::InvalidSubcommand));
}

/// An agent with a switch on a made-up host, and its command line.
struct Desk {
    host: Host,
    client: Client,
    agent: Arc<Agent>,
    /// Whether every deletion is refused.
    deletes_nothing: Arc<AtomicBool>,
}

impl Desk {
    async fn new() -> Self {
        let host = Host::new().await;
        let agent = Arc::new(Agent::start(Arc::clone(&host.env)).await.unwrap());
        let socket = host.env.run_dir.join("api.sock");
        std::fs::create_dir_all(&host.env.run_dir).unwrap();
        let policy = Arc::new(host.env.policy.clone());
        let deletes_nothing = Arc::new(AtomicBool::new(false));
        let refuse = Arc::clone(&deletes_nothing);
        let router = api::router_with_policy(Arc::clone(&agent) as Arc<dyn Backend>, policy).layer(
            axum::middleware::from_fn(move |request: HttpRequest, next: Next| {
                let refused = refuse.load(Ordering::SeqCst) && request.method() == "DELETE";
                async move {
                    if !refused {
                        return next.run(request).await;
                    }
                    let problem = Problem::new(ProblemCode::DeviceFailed, "The function does not come back.");
                    let kind = [("content-type", "application/problem+json")];
                    let text = serde_json::to_string(&problem).unwrap();
                    (axum::http::StatusCode::CONFLICT, kind, text).into_response()
                }
            }),
        );
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(api::serve(
            vec![listener.into()],
            router,
            api::Limits::default(),
            std::future::pending(),
        ));
        Desk { host, client: Client::new(socket), agent, deletes_nothing }
    }

    /// The output of a command, or its exit code and error.
    async fn run(&self, line: &str) -> Result<String, (u8, String)> {
        let mut bytes = Vec::new();
        let result = self.run_into(line, &mut bytes).await;
        let text = String::from_utf8(bytes).unwrap();
        result.map(|()| text).map_err(|error| (error.code(), error.to_string()))
    }

    async fn run_into(&self, line: &str, to: &mut dyn io::Write) -> Result<(), CliError> {
        let cli = Cli::try_parse_from(["portcullis"].into_iter().chain(line.split_whitespace())).unwrap();
        let Command::Other(cli::Command::Client(command)) = cli.command else { panic!("{line}") };
        let socket = cli.common.socket().to_owned();
        let client = if line.contains("--socket") { Client::new(socket) } else { self.client.clone() };
        let mut output = Output::new(cli.common.format(), to);
        tokio::time::timeout(PATIENCE, request(&client, &mut output, command)).await.expect("an end")
    }

    async fn json(&self, line: &str) -> serde_json::Value {
        serde_json::from_str(&self.run(&format!("{line} --output json")).await.unwrap()).unwrap()
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.host.env.run_dir.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    async fn boot(&self, name: &str, group: &str) {
        let mut spec = spec(name);
        spec.adapters[0].port_group = Some(group.parse().unwrap());
        spec.adapters[0].mac = Some("02:00:00:00:00:11".parse().unwrap());
        self.client.create_vm(&spec).await.unwrap();
        self.client.act(name, VmAction::Boot, PATIENCE).await.unwrap();
    }

    /// Sends a request of the guest; returns when the port has counted the response.
    async fn asks(&self, vm: &str, request: &str, answers: u64) {
        self.client.write_console(vm, format!("ask {request}")).await.unwrap();
        let answered = async {
            loop {
                let counters = self.client.get_port(&format!("{vm}/eth0")).await.unwrap().status.counters;
                if counters.allowed + counters.denied >= answers {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, answered).await.expect("an answer");
    }
}

/// The cells of a row, of any width.
fn words(line: &str) -> Vec<&str> {
    line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect()
}

#[tokio::test]
async fn switches_and_port_groups_from_options_and_files() {
    let desk = Desk::new().await;
    let shown = desk.run("switch set uplink --uplink eth0 --forged-transmits accept").await.unwrap();
    assert!(shown.contains("uplinks:      eth0\n") && shown.contains("forged_transmits=accept"), "{shown}");
    let group = "--switch uplink --mac-changes reject --vlan 100 --on-denied nack --port-override mtu";
    let shown = desk.run(&format!("port-group set web {group}")).await.unwrap();
    for line in [
        "switch:            uplink",
        "port overrides:    mtu",
        "mac_changes:       reject (by the port group)",
        "forged_transmits:  accept (by the switch)",
        "vlan:              100 (by the port group)",
        "mtu:               1500 (by default)",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    assert_eq!(desk.run("port-group show web").await.unwrap(), shown);

    let revision = &desk.json("port-group show web").await["revision"];
    // A part, with one setting unset; then the whole, from a file in each format and an option on top.
    let shown = desk
        .run(&format!("port-group patch web --mtu 9000 --unset vlan --if-match {revision}"))
        .await
        .unwrap();
    assert!(shown.contains("mtu:               9000 (by the port group)"), "{shown}");
    assert!(shown.contains("vlan:              none (by default)"), "{shown}");
    let patch = desk.file("patch.yaml", "settings: {mac_changes: null, rate: {max_tx_mbit: 10}}");
    desk.run(&format!("port-group patch web -f {patch} --promiscuous multicast")).await.unwrap();
    let spec = &desk.json("port-group show web").await["spec"];
    assert_eq!(
        spec["settings"],
        serde_json::json!({
            "mtu": 9000, "on_denied": "nack", "promiscuous": "multicast", "rate": { "max_tx_mbit": 10 }
        })
    );
    let file =
        desk.file("web.toml", "switch = \"uplink\"\nport_overrides = [\"vlan\"]\n[settings]\nmtu = 1400");
    desk.run(&format!("port-group set web --file {file} --vlan trunk:7")).await.unwrap();
    let listed = desk.run("port-group list").await.unwrap();
    let rows: Vec<_> = listed.lines().map(words).collect();
    assert_eq!(rows[0], ["NAME", "SWITCH", "PORTS", "SETTINGS"]);
    assert!(rows.contains(&vec!["web", "uplink", "0", "vlan=trunk:7 mtu=1400"]), "{listed}");
    let file = desk.file("uplink.json", r#"{"uplinks": ["eth0"]}"#);
    assert_eq!(
        desk.run(&format!("switch set uplink -f {file} --mtu 2000")).await.unwrap(),
        desk.run("switch show uplink").await.unwrap()
    );
    assert_eq!(
        desk.json("switch show uplink").await["spec"],
        serde_json::json!({ "kind": "standard", "uplinks": ["eth0"], "settings": { "mtu": 2000 } })
    );
    // A part without an option stays, and so do concurrent changes of other callers.
    let spec = async || desk.json("switch show uplink").await["spec"].take();
    desk.run("switch set uplink --on-denied silent").await.unwrap();
    desk.run("switch set uplink --uplink eth0").await.unwrap();
    let both = serde_json::json!({ "mtu": 2000, "on_denied": "silent" });
    assert_eq!(
        spec().await,
        serde_json::json!({ "kind": "standard", "uplinks": ["eth0"], "settings": both })
    );
    let revision = desk.json("switch show uplink").await["revision"].take();
    desk.run(&format!("switch set uplink --unset on-denied --if-match {revision}")).await.unwrap();
    assert_eq!(
        desk.run(&format!("switch set uplink --mtu 68 --if-match {revision}")).await.unwrap_err().0,
        5
    );
    assert_eq!(spec().await["settings"], serde_json::json!({ "mtu": 2000 }));
    assert_eq!(spec().await["uplinks"], serde_json::json!(["eth0"]));
    let listed = desk.run("switch list").await.unwrap();
    let rows: Vec<_> = listed.lines().map(words).collect();
    assert!(rows.contains(&vec!["uplink", "eth0", "1", "0", "mtu=2000"]), "{listed}");

    desk.run("port-group delete web").await.unwrap();
    desk.run("switch delete uplink").await.unwrap();
    assert_eq!(desk.run("switch show uplink").await.unwrap_err().0, 4);
}

#[tokio::test]
async fn ports_show_a_guest_that_believes_otherwise_and_can_be_blocked() {
    let desk = Desk::new().await;
    desk.run("port-group set web --switch default --on-denied silent --port-override mtu").await.unwrap();
    desk.boot("web1", "web").await;
    desk.asks("web1", r#"{"set_mac": "02:00:00:00:00:09"}"#, 1).await;
    // A fake vmm has no relay: report in its place the address that the guest was made to believe.
    let vm = desk.client.get_vm("web1").await.unwrap().id;
    let event = RelayEvent::GuestMac { mac: "02:00:00:00:00:09".parse().unwrap() };
    let switch = &desk.host.env.policy.switch;
    switch.newest_intake(VmId(vm)).event("eth0".to_owned(), event).await;
    let listed = desk.run("port list").await.unwrap();
    let rows: Vec<_> = listed.lines().map(words).collect();
    let (initial, guest) = ("02:00:00:00:00:11", "02:00:00:00:00:09");
    assert_eq!(
        rows[1],
        ["web1/eth0", "web", "eth0", "0", "0000:01:10.0", initial, initial, guest, "GUEST DIFFERS"]
    );
    let shown = desk.run("port show web1/eth0").await.unwrap();
    assert!(shown.contains(&format!("guest mac:         {guest} (differs")), "{shown}");
    assert!(shown.contains("0 allowed, 1 denied") && shown.contains("(VF 0 of eth0)"), "{shown}");

    let revision = &desk.json("port show web1/eth0").await["revision"];
    let shown = desk.run(&format!("port set web1/eth0 --mtu 9000 --if-match {revision}")).await.unwrap();
    assert!(shown.contains("mtu:               9000 (by the port)"), "{shown}");
    let file = desk.file("port.json", r#"{"settings": {"mtu": 2000}}"#);
    desk.run(&format!("port set web1/eth0 -f {file}")).await.unwrap();
    let (code, error) = desk.run("port block web1/eth0").await.unwrap_err();
    assert!(code == 5 && error.contains("stop the VM"), "{error}");
    desk.agent.stop_all(PATIENCE).await;
    desk.run("port block web1/eth0").await.unwrap();
    let port = desk.json("port show web1/eth0").await;
    assert_eq!(port["spec"]["settings"], serde_json::json!({ "mtu": 2000, "blocked": true }));
    assert!(desk.run("port list").await.unwrap().contains("BLOCKED"));
    desk.run("port unblock web1/eth0").await.unwrap();
    desk.run("port set web1/eth0 --unset mtu").await.unwrap();
    assert_eq!(desk.json("port show web1/eth0").await["spec"]["settings"], serde_json::json!({}));

    let (code, _) = desk.run("port-group delete web").await.unwrap_err();
    assert_eq!(code, 5, "in use");
}

/// The output so far of a command without end.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Written {
    fn lines(&self) -> Vec<String> {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
    }

    async fn has(&self, count: usize) -> Vec<String> {
        let there = async {
            while self.lines().len() < count {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, there).await.unwrap_or_else(|_| panic!("{:?}", self.lines()));
        self.lines()
    }
}

const DENIED: [&str; 8] = [
    "web1/eth0",
    "eth0/0",
    "set_mac",
    "02:00:00:00:00:11",
    "02:00:00:00:00:09",
    "denied",
    "mac_changes_rejected",
    "1",
];

#[tokio::test]
async fn decisions_are_listed_by_filters() {
    let desk = Desk::new().await;
    desk.boot("web1", "default").await;
    desk.asks("web1", r#"{"set_mac": "02:00:00:00:00:09"}"#, 1).await;
    let listed = desk.run("decisions --verdict denied").await.unwrap();
    let rows: Vec<_> = listed.lines().map(words).collect();
    assert_eq!(rows[0][..4], ["TIME", "PORT", "VF", "REQUEST"]);
    assert_eq!((rows.len(), &rows[1][1..]), (2, DENIED.as_slice()));
    for (filter, count) in [
        ("--port web1/eth0 --vm web1 --since 1h --limit 1", 1),
        ("--vm web2", 0),
        ("--since 2100-01-01T00:00:00Z", 0),
        ("--port 00000000-0000-0000-0000-000000000001", 0),
    ] {
        let found = desk.json(&format!("decisions --verdict denied {filter}")).await;
        assert_eq!(found.as_array().unwrap().len(), count, "{filter}");
    }
    assert_eq!(desk.json("decisions --verdict repaired").await, serde_json::json!([]));
    desk.agent.stop_all(PATIENCE).await;
}

#[tokio::test]
async fn decisions_are_followed_each_once() {
    let desk = Desk::new().await;
    desk.boot("web1", "default").await;
    desk.asks("web1", r#"{"set_mac": "02:00:00:00:00:09"}"#, 1).await;
    let (table, json) = (Written::default(), Written::default());
    let (mut to_table, mut to_json) = (table.clone(), json.clone());
    let scene = async {
        // The header and the stored decisions; then new ones, except those that the filter drops.
        assert_eq!(words(&table.has(2).await[1])[1..], DENIED);
        json.has(1).await;
        desk.asks("web1", r#"{"set_mac": "02:00:00:00:00:11"}"#, 2).await;
        desk.asks("web1", r#"{"set_mac": "02:00:00:00:00:0a"}"#, 3).await;
        (table.has(3).await, json.has(2).await)
    };
    let (rows, lines) = tokio::select! {
        done = desk.run_into("decisions --follow --verdict denied --vm WEB1", &mut to_table) => panic!("{done:?}"),
        done = desk.run_into("decisions --follow --verdict denied --output json", &mut to_json) => panic!("{done:?}"),
        seen = scene => seen,
    };
    assert_eq!((rows.len(), words(&rows[2])[5]), (3, "02:00:00:00:00:0a"));
    let last: serde_json::Value = serde_json::from_str(&lines[1]).unwrap();
    assert_eq!((lines.len(), &last["requested"]), (2, &"02:00:00:00:00:0a".into()));
    desk.agent.stop_all(PATIENCE).await;
}

#[tokio::test]
async fn events_since_one_and_from_now_on() {
    let desk = Desk::new().await;
    desk.run("port-group set web --switch default").await.unwrap();
    desk.run("port-group set web --switch default --mtu 9000").await.unwrap();
    desk.run("port-group delete web").await.unwrap();
    let mut events = Vec::new();
    desk.run_into("events --since 0 --limit 4 --output json", &mut events).await.unwrap();
    let events: Vec<serde_json::Value> =
        events.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    let kinds: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["gap", "created", "changed", "deleted"]);
    let shown = desk.run(&format!("events --since {} --limit 2", events[1]["id"])).await.unwrap();
    let rows: Vec<_> = shown.lines().map(words).collect();
    let by = format!("uid {}", rustix::process::geteuid().as_raw());
    assert_eq!(
        rows[1][2..],
        ["changed", "port group web", &format!("at revision {} by {by}", events[2]["revision"])]
    );
    assert_eq!(rows[2][2..], ["deleted", "port group web", &format!("by {by}")]);
}

#[tokio::test]
async fn a_stream_that_the_agent_ends_goes_on_after_its_last_event() {
    let desk = Desk::new().await;
    let hub = &desk.host.env.policy.events;
    let mut stream = EventStream::open(&desk.client, None).await.unwrap();
    // More at once than a subscriber's queue holds: it is left behind.
    for n in 0..600 {
        let (kind, id) = (ObjectKind::Vm, uuid::Uuid::from_u128(n));
        hub.publish(EventKind::Deleted { object: Subject { kind, id, name: n.to_string() }, by: None });
    }
    for n in 0..600 {
        let event = tokio::time::timeout(PATIENCE, stream.next()).await.unwrap().unwrap();
        assert!(
            matches!(&event.what, EventKind::Deleted { object, .. } if object.name == n.to_string()),
            "{event:?}"
        );
    }
}

#[tokio::test]
async fn each_failure_has_its_exit_code() {
    let desk = Desk::new().await;
    desk.run("port-group set web --switch default").await.unwrap();
    let odd = desk.file("odd.json", r#"{"switch": "default", "colour": "red"}"#);
    let null = desk.file("null.yaml", "settings: null");
    for (line, code, text) in [
        ("port-group show no", 4, "no port group no"),
        ("switch show no", 4, "no switch no"),
        ("port show web1/eth0", 4, "no port web1/eth0"),
        ("port block web1/eth0", 4, "no port"),
        ("decisions --port web1/eth0", 4, "no port"),
        ("port-group delete no", 4, "no port group no"),
        ("port-group set web --switch default --if-match 9", 5, "not 9"),
        ("port-group patch web --mtu 9000 --if-match 9", 5, "not 9"),
        ("switch delete default", 5, "cannot be deleted"),
        ("port-group set lan --switch no", 1, "no switch"),
        ("port-group set lan -f /nonexistent/lan.json", 2, "/nonexistent/lan.json"),
        (&format!("port-group set lan -f {odd}"), 2, "is not a port group's specification: colour"),
        (&format!("switch set lan -f {odd}"), 2, "is not a switch's specification"),
        (&format!("port-group patch web -f {null} --mtu 9000"), 2, "`settings`"),
        ("port-group patch web", 2, "No change is given"),
        ("port set web1/eth0", 2, "No change is given"),
        ("switch list --socket /nonexistent/api.sock", 3, "No agent listens"),
        ("events --socket /nonexistent/api.sock", 3, "No agent listens"),
    ] {
        let (found, error) = desk.run(line).await.unwrap_err();
        assert!(found == code && error.contains(text), "{line}: {found} {error}");
    }
}
