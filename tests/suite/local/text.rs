// SPDX-License-Identifier: Apache-2.0

//! Text from outside reaches terminals and the log without control characters.
//!
//! The table: each kind of text (a specification, a request, a file, the name of an interface, a vmm's words and log, the database)
//! against each path on which text is printed (tables, JSON, YAML, errors, metrics, the log of the agent).

use std::{
    fs,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use api::types::{VmAction, VmState};
use serde_json::json;
use tempfile::TempDir;

use crate::fixture::{Agent, Options, SmallGuest, agent::binary, host, played::Played, wire};

/// Clears a screen, forges a line of the log, rings, and reorders the text after it; U+009B is ESC [ in one character.
const HOSTILE: &str = "x\u{1b}[2J\r\n2000-01-01T00:00:00.000000Z  INFO forged\u{7}\u{9b}2J\u{202e}y\u{2028}z";

/// The characters of it that nothing may print.
const ACTIVE: [char; 6] = ['\u{1b}', '\r', '\u{7}', '\u{9b}', '\u{202e}', '\u{2028}'];

/// A word of `HOSTILE` that remains wherever the text has been printed.
const TRACE: &str = "forged";

#[track_caller]
fn assert_harmless(what: &str, text: &str) {
    assert!(!text.contains(ACTIVE), "{what}: {text:?}");
    // The agent's own lines have present times, not ones of the year 2000.
    assert!(!text.lines().any(|line| line.starts_with("2000-01-01T")), "{what}: {text:?}");
}

/// The output of a command, on both streams.
fn printed(agent: &Agent, words: &[&str]) -> String {
    // Events have no end.
    let mut command = Command::new(if words[0] == "events" { "timeout".into() } else { binary() });
    if words[0] == "events" {
        command.arg("2").arg(binary());
    }
    command.arg("--socket").arg(agent.directory().join("api.sock")).args(words).stdin(Stdio::null());
    let Output { stdout, stderr, .. } = command.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert_harmless(&format!("{words:?}"), &text);
    assert_harmless(&format!("the log after {words:?}"), &agent.log());
    text
}

/// Prints every list and object in each format. Each format must show the trace: a table without it would prove nothing.
#[track_caller]
fn print_all(agent: &Agent, what: &str) {
    for format in ["table", "json", "yaml"] {
        let mut all = String::new();
        let reads = ["vm list", "port list", "decisions", "events --since 0", "health", "pf list", "vf list"];
        for read in reads {
            let words: Vec<&str> = read.split(' ').chain(["--output", format]).collect();
            all.push_str(&printed(agent, &words));
        }
        for vm in agent.ask(agent.client.list_vms()).unwrap() {
            all.push_str(&printed(agent, &["vm", "show", vm.name.as_str(), "--output", format]));
        }
        assert!(all.contains(TRACE), "{what} is in no answer: {all}");
    }
    let metrics = "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let metrics = wire::exchange(wire::connect(&agent.directory().join("api.sock")), metrics);
    assert_eq!(metrics.status, 200);
    assert_harmless("metrics", &metrics.body);
}

fn wait_for_cause(agent: &Agent, vm: &str) {
    let cause = agent.wait_for_state(vm, VmState::Failed).status.cause.unwrap();
    assert!(cause.detail.contains(TRACE), "{cause:?}");
}

fn start() -> Agent {
    let arguments = ["--sim-pf", "sim0=4"].map(Into::into).into();
    Agent::start_with(Options { arguments, ..Options::default() })
}

/// A hostile specification, requests, and files of `apply`.
#[test]
fn texts_of_clients_control_no_terminal_and_forge_no_line() {
    let agent = start();
    let adapters = json!([]);
    let mut spec = SmallGuest::spec(&agent, "paths", adapters, "");
    spec["boot"]["kernel"] = format!("/{HOSTILE}").into();
    spec["boot"]["initramfs"] = HOSTILE.into();
    agent.create(&spec).unwrap();
    print_all(&agent, "a path");
    // The paths of disks, in their specification and in the error of a boot.
    let mut spec = SmallGuest::spec(&agent, "disks", json!([]), "");
    let backing = json!([{ "path": format!("/{HOSTILE}"), "format": "raw" }]);
    spec["disks"] = json!([{ "id": "a", "path": HOSTILE, "format": "qcow2", "backing": backing }]);
    agent.create(&spec).unwrap();
    for format in ["table", "json", "yaml"] {
        for words in [["vm", "show", "disks"], ["vm", "boot", "disks"], ["vm", "stats", "disks"]] {
            let text = printed(&agent, &[&words[..], &["--output", format]].concat());
            assert!(words[1] == "stats" || text.contains(TRACE), "{words:?}: {text}");
        }
    }
    print_all(&agent, "the cause of a boot without its disk");
    for format in ["table", "json", "yaml"] {
        let text = printed(&agent, &["vm", "boot", "paths", "--output", format]);
        assert!(text.contains(TRACE), "{text}");
        for words in [["vm", "show", HOSTILE], ["vm", "delete", HOSTILE], ["port", "show", HOSTILE]] {
            printed(&agent, &[&words[..], &["--output", format]].concat());
        }
        printed(&agent, &["vm", "patch", "paths", "--cmdline", HOSTILE, "--output", format]);
        printed(&agent, &["port-group", "set", HOSTILE, "--mtu", HOSTILE, "--output", format]);
    }
    print_all(&agent, "the cause of a boot that failed");

    // A file's name, its keys and its values, in each file format.
    let site = TempDir::with_prefix("site").unwrap();
    let quoted = serde_json::to_string(HOSTILE).unwrap();
    let files = [
        ("a.json", format!("{{\"object\": \"vm\", {quoted}: 1}}")),
        ("b.yaml", format!("object: vm\nname: {quoted}\n")),
        ("c.toml", format!("object = {quoted}\n")),
    ];
    for (name, content) in files {
        let name = format!("{}{name}", HOSTILE.replace('/', ""));
        let path = site.path().join(&name);
        fs::write(&path, content).unwrap();
        for format in ["table", "json", "yaml"] {
            let text = printed(&agent, &["apply", "-f", path.to_str().unwrap(), "--output", format]);
            assert!(text.contains(TRACE), "{name:?}: {text}");
        }
    }
    // The directory of them all, whose errors and differences name each file.
    for format in ["table", "json", "yaml"] {
        for words in [&["apply", "-f"][..], &["apply", "--dry-run", "-f"]] {
            let text =
                printed(&agent, &[words, &[site.path().to_str().unwrap(), "--output", format]].concat());
            assert!(text.contains(TRACE), "{text}");
        }
    }

    // Requests that no honest client sends.
    let encoded: String = HOSTILE.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let header: String = HOSTILE.chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
    for request in [
        format!("GET /v1/vms/{encoded} HTTP/1.1\r\nhost: x\r\n"),
        format!("GET /{encoded}?{encoded} HTTP/1.1\r\nhost: x\r\n"),
        format!("GET /v1/vms HTTP/1.1\r\nhost: x\r\nuser-agent: {header}\r\nx-request-id: {header}\r\n"),
        format!("GET /v1/vms HTTP/1.1\r\nhost: {header}\r\norigin: {header}\r\n"),
        format!("{encoded} /v1/vms HTTP/1.1\r\nhost: x\r\n"),
    ] {
        let stream = wire::connect(&agent.directory().join("api.sock"));
        let answer = wire::exchange(stream, &format!("{request}connection: close\r\n\r\n"));
        // JSON is for programs. Programs may show the head of a response as it is.
        assert_harmless(&request, &answer.head.replace('\r', ""));
    }
    assert_harmless("the log", &agent.log());
}

/// Linux forbids only blanks, `/` and `:` in the name of an interface, of 15 bytes. `check` reads names from sysfs; a switch has those
/// that its author wrote.
#[test]
fn names_of_interfaces_control_no_terminal_and_forge_no_line() {
    const NAME: &str = "\u{1b}[2J\u{7}\u{9b}forged";
    assert!(NAME.len() <= 15);
    let root = TempDir::with_prefix("root").unwrap();
    let device = root.path().join("sys/bus/pci/devices/0000:01:00.0");
    fs::create_dir_all(device.join(format!("net/{NAME}"))).unwrap();
    for (file, content) in [
        ("vendor", "0x8086"),
        ("device", "0x10c9"),
        ("class", "0x020000"),
        ("sriov_totalvfs", "7"),
        ("sriov_numvfs", "0"),
        ("sriov_drivers_autoprobe", "1"),
        (&format!("net/{NAME}/flags"), "0x1002"),
        (&format!("net/{NAME}/ifindex"), "7"),
        (&format!("net/{NAME}/address"), "02:00:00:00:00:01"),
    ] {
        fs::write(device.join(file), content).unwrap();
    }
    let agent = start();
    let switch = serde_json::from_value(json!({ "uplinks": [NAME] })).unwrap();
    agent.ask(agent.client.put_switch("foreign", &switch, None)).unwrap();
    let group = serde_json::from_value(json!({ "switch": "foreign" })).unwrap();
    agent.ask(agent.client.put_port_group("foreign", &group, None)).unwrap();
    let adapters = json!([{ "id": "eth0", "port_group": "foreign" }]);
    agent.create(&SmallGuest::spec(&agent, "foreign", adapters, "")).unwrap();
    let root = root.path().to_str().unwrap();
    for format in ["table", "json", "yaml"] {
        for (words, shows) in [
            (&["check", "--root", root][..], true),
            (&["switch", "list"], true),
            (&["switch", "show", "foreign"], true),
            (&["port-group", "show", "foreign"], false),
            (&["pf", "show", NAME], true),
            (&["pf", "set-vfs", NAME, "1"], true),
            (&["switch", "set", "another", "--uplink", NAME], true),
            (&["vm", "boot", "foreign"], false),
            (&["events", "--since", "0"], false),
        ] {
            let text = printed(&agent, &[words, &["--output", format]].concat());
            assert!(!shows || text.contains(TRACE), "{words:?}: {text}");
        }
    }
}

/// A taken-over vmm's reasons and failures, and the last lines of its log.
#[test]
fn texts_of_a_vmm_control_no_terminal_and_forge_no_line() {
    let mut agent = start();
    for name in ["failing", "refusing", "crashing"] {
        drop(agent.boot(&SmallGuest::spec(&agent, name, json!([{ "id": "eth0" }]), "")));
    }
    let names = ["failing", "refusing"].map(ToOwned::to_owned);
    let played = Played::take_over(&mut agent, &names);
    names.iter().for_each(|name| drop(agent.wait_for_state(name, VmState::Running)));

    played[1].refuse(HOSTILE);
    let deadline = Instant::now() + Duration::from_secs(30);
    while !agent.log().contains(TRACE) {
        assert!(Instant::now() < deadline, "{}", agent.log());
        thread::sleep(Duration::from_millis(20));
    }
    let refused = printed(&agent, &["vm", "pause", "refusing"]);
    assert!(refused.contains(TRACE), "{refused}");

    played[0].emit(&json!({ "report": "ended", "end": { "end": "failed", "detail": HOSTILE } }));
    let pid = agent.vm("failing").status.pid;
    if let Some(pid) = pid {
        host::run("kill", &["-KILL", &pid.to_string()]);
    }
    wait_for_cause(&agent, "failing");
    print_all(&agent, "a failure");

    let vm = agent.vm("crashing");
    let log = agent.directory().join("run/vms").join(vm.id.to_string()).join("vmm.log");
    fs::write(log, HOSTILE).unwrap();
    host::run("kill", &["-KILL", &vm.status.pid.unwrap().to_string()]);
    wait_for_cause(&agent, "crashing");
    print_all(&agent, "the last words of a process");
    assert_harmless("the log", &agent.log());
}

/// The database was edited by hand.
#[test]
fn texts_of_the_store_control_no_terminal_and_forge_no_line() {
    let mut agent = start();
    let spec = SmallGuest::spec(&agent, "edited", json!([{ "id": "eth0" }]), "");
    drop(agent.boot(&spec));
    agent.act("edited", VmAction::Stop).unwrap();
    let edit = |agent: &Agent, statement: &str| {
        let store = rusqlite::Connection::open(agent.directory().join("state/portcullis.db")).unwrap();
        assert!(store.execute(statement, [HOSTILE]).unwrap() > 0, "{statement}");
    };
    agent.kill();
    edit(&agent, "UPDATE objects SET value = json_set(value, '$.cause.detail', ?1) WHERE kind = 'run'");
    agent.restart();
    print_all(&agent, "a stored cause");
    // An invalid name is either not shown at all, or the agent does not start; both ways the log reports it in one line.
    agent.kill();
    edit(
        &agent,
        "UPDATE objects SET name = ?1, value = json_set(value, '$.spec.name', ?1) WHERE kind = 'vm'",
    );
    agent.restart_with(&[("PORTCULLIS_LOG", "debug")]);
    if !agent.has_ended() {
        for format in ["table", "json", "yaml"] {
            printed(&agent, &["vm", "list", "--output", format]);
            printed(&agent, &["health", "--output", format]);
            printed(&agent, &["events", "--since", "0", "--output", format]);
        }
    }
    assert!(agent.log().contains(TRACE), "{}", agent.log());
    assert_harmless("the log", &agent.log());
}
