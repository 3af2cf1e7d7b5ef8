// SPDX-License-Identifier: Apache-2.0

//! The agent's metrics, and the request ids in its log.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    thread,
    time::{Duration, Instant},
};

use api::types::DecisionFilter;
use serde_json::{Value, json};

use crate::fixture::{Agent, Options, SmallGuest};

fn start(arguments: &[&str]) -> Agent {
    let arguments = [&["--sim-pf", "sim0=2"], arguments].concat().iter().map(ToString::to_string).collect();
    Agent::start_with(Options { arguments, ..Options::default() })
}

/// Sends a request with an id of its caller's; returns the response.
fn call(agent: &Agent, id: &str, method: &str, path: &str, body: &Value) -> String {
    let mut socket = UnixStream::connect(agent.directory().join("api.sock")).unwrap();
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-request-id: {id}\r\n");
    let rest = format!("content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    socket.write_all((head + &rest).as_bytes()).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(&format!("x-request-id: {id}\r\n")), "{answer}");
    answer
}

#[test]
fn a_request_s_id_is_in_each_line_that_it_causes() {
    let agent = start(&["--log-format", "json"]);
    let spec = SmallGuest::spec(&agent, "web1", json!([{"id": "eth0"}]), "");
    call(&agent, "made-1", "POST", "/v1/vms", &spec);
    let boot = call(&agent, "booted-1", "POST", "/v1/vms/web1/boot?wait=60", &Value::Null);
    assert!(boot.starts_with("HTTP/1.1 200 "), "{boot}");
    call(&agent, "group-1", "PUT", "/v1/port-groups/web", &json!({"switch": "default"}));
    call(&agent, "deleted-1", "DELETE", "/v1/vms/web1", &Value::Null);
    let refused = call(&agent, "refused-1", "DELETE", "/v1/vms/web1", &Value::Null);
    assert!(refused.contains(r#""request_id":"refused-1""#), "{refused}");

    let log = agent.log();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |id: &str| -> Vec<&str> {
        let its = |line: &&Value| line["span"]["id"] == id;
        lines.iter().filter(its).map(|line| line["fields"]["message"].as_str().unwrap()).collect()
    };
    // From the route, from the switch's task, from the VM's task.
    assert_eq!(of("made-1"), ["created"], "{log}");
    assert!(of("group-1")[0].starts_with("policy made by uid "), "{log}");
    let booted = of("booted-1");
    assert!(booted.contains(&"asked") && booted.contains(&"booted"), "{booted:?}\n{log}");
    assert!(of("deleted-1").contains(&"deleted"), "{log}");
    let without: Vec<_> = lines.iter().filter(|line| line["fields"]["by"].is_string()).collect();
    assert!(without.iter().all(|line| line["span"]["id"].is_string()), "{without:?}");
}

/// The value of a series.
fn value(metrics: &str, series: &str) -> f64 {
    let found = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    found.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{series} is not in\n{metrics}"))
}

#[test]
fn metrics_show_what_guests_and_clients_do() {
    let agent = start(&[]);
    let metrics = || agent.ask(agent.client.metrics()).unwrap();
    assert!(value(&metrics(), "portcullis_vms{state=\"running\"}") == 0.0);
    let group = json!({"mac_changes": {"list": ["02:00:00:00:00:00/ff:ff:ff:ff:ff:00"]}});
    agent.ask(agent.client.patch_port_group("default", &json!({"settings": group}), None)).unwrap();
    let adapters = json!([{"id": "eth0", "mac": "02:00:00:00:00:11"}]);
    let mut guest = SmallGuest::boot(&agent, "web1", adapters);
    guest.ask("up");
    let granted = guest.ask("set-mac 02:00:00:00:00:12");
    let refused = guest.ask("set-mac 02:00:00:00:99:99");
    assert_ne!(granted, refused);

    // The relay reports its own denials at its next report.
    let denied = "portcullis_decisions_total{request=\"set_mac\",verdict=\"denied\"} 1";
    let mut text = metrics();
    for _ in 0..200 {
        if text.contains(denied) {
            break;
        }
        thread::sleep(Duration::from_millis(25));
        text = metrics();
    }
    assert_eq!(value(&text, "portcullis_vms{state=\"running\"}"), 1.0);
    assert!(value(&text, "portcullis_vm_exits_total{vm=\"web1\",reason=\"mmio_write\"}") > 0.0);
    assert!(value(&text, "portcullis_vm_memory_bytes{vm=\"web1\"}") >= f64::from(2 << 20));
    assert!(value(&text, "portcullis_vm_process_resident_memory_bytes{vm=\"web1\"}") > 0.0);
    assert!(value(&text, "process_resident_memory_bytes") > 0.0);
    for verdict in ["granted", "refused"] {
        let opcode = "vm=\"web1\",opcode=\"set_mac\"";
        let series = format!("portcullis_vm_mailbox_messages_total{{{opcode},verdict=\"{verdict}\"}}");
        assert_eq!(value(&text, &series), 1.0);
    }
    for verdict in ["allowed", "denied"] {
        let series = format!("portcullis_decisions_total{{request=\"set_mac\",verdict=\"{verdict}\"}}");
        assert_eq!(value(&text, &series), 1.0);
    }
    // A standing refusal needs no request to the agent.
    assert!(value(&text, "portcullis_decision_duration_seconds_count{verdict=\"allowed\"}") >= 1.0);
    let sum = value(&text, "portcullis_commit_duration_seconds_sum{result=\"made\"}");
    assert!(sum > 0.0 && sum < 10.0, "{sum}");
    let made = "portcullis_api_requests_total{route=\"/v1/vms\",method=\"POST\",status=\"201\"}";
    assert_eq!(value(&text, made), 1.0);
    let made = "portcullis_api_request_duration_seconds_count{route=\"/v1/vms\",method=\"POST\"}";
    assert_eq!(value(&text, made), 1.0);

    agent.delete("web1").unwrap();
    let text = metrics();
    assert!(!text.contains("web1"), "no series of a VM that is gone:\n{text}");
    assert!(text.ends_with("# EOF\n"));
}

/// The bytes that the agent's process has written to files.
fn written(agent: &Agent) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/io", agent.pid())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap();
    line.parse().unwrap()
}

/// A guest repeats denied messages as fast as its relay lets it. A write for each would rewrite the pages of the
/// table and of its indexes, 28 KiB and more.
#[test]
fn a_refused_message_costs_the_disk_little() {
    const REFUSALS: u64 = 300;
    let agent = start(&[]);
    let mut guest = SmallGuest::boot(&agent, "web1", json!([{"id": "eth0"}]));
    guest.ask("up");
    let denied = || agent.ask(agent.client.list_ports()).unwrap()[0].status.counters.denied;
    let (before, began) = (written(&agent), Instant::now());
    // Each with another address, so that each is another record.
    for n in 0..REFUSALS {
        assert_eq!(guest.ask(&format!("set-mac 02:00:00:00:{:02x}:{:02x}", 0x90 + n / 256, n % 256)), "nack");
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while denied() < REFUSALS && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    let took = began.elapsed();
    let each = (written(&agent) - before) / REFUSALS;
    println!("{each} bytes for each of {REFUSALS} refusals in {took:?}");
    assert_eq!(denied(), REFUSALS);
    let seconds = took.as_secs() + 1;
    assert!(each < 8192 || each * REFUSALS / seconds < 320 << 10, "{each} bytes for each, in {took:?}");
    // In the end all of them are recorded.
    let filter = DecisionFilter { vm: Some("web1".to_owned()), ..DecisionFilter::default() };
    let recorded =
        || agent.ask(agent.client.decisions(&filter)).unwrap().iter().map(|one| one.count).sum::<u64>();
    while recorded() < 100 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    assert!(recorded() >= 100, "{}", recorded());
}

/// Counts of denials survive the agent, and do not pass to another VM of the same name.
#[test]
fn refusals_outlast_the_agent_and_are_not_a_successor_s() {
    let mut agent = start(&[]);
    {
        let mut guest = SmallGuest::boot(&agent, "web1", json!([{"id": "eth0"}]));
        guest.ask("up");
        for n in 1..=3 {
            assert_eq!(guest.ask(&format!("set-mac 02:00:00:00:99:0{n}")), "nack");
        }
    }
    let refused = |agent: &Agent, vm: &str| {
        let filter = DecisionFilter {
            vm: Some(vm.to_owned()),
            verdict: Some(serde_json::from_value(json!("denied")).unwrap()),
            ..DecisionFilter::default()
        };
        agent.ask(agent.client.decisions(&filter)).unwrap().iter().map(|decision| decision.count).sum::<u64>()
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while refused(&agent, "web1") < 3 {
        assert!(Instant::now() < deadline, "three refusals are recorded\n{}", agent.log());
        thread::sleep(Duration::from_millis(20));
    }
    agent.create(&SmallGuest::spec(&agent, "defined", json!([]), "")).unwrap();
    let moments = |agent: &Agent| {
        let switches = agent.ask(agent.client.list_switches()).unwrap();
        let groups = agent.ask(agent.client.list_port_groups()).unwrap();
        (switches[0].created, groups[0].created, agent.vm("defined").status.since)
    };
    let before = moments(&agent);
    agent.restart();
    assert_eq!(moments(&agent), before);
    let ports = agent.ask(agent.client.list_ports()).unwrap();
    assert_eq!(ports[0].status.counters.denied, 3);
    let old = agent.vm("web1").id.to_string();
    agent.delete("web1").unwrap();
    assert_eq!(refused(&agent, "web1"), 3, "nobody else has the name");
    agent.create(&SmallGuest::spec(&agent, "web1", json!([{"id": "eth0"}]), "")).unwrap();
    assert_eq!([refused(&agent, "web1"), refused(&agent, &old)], [0, 3]);
}
