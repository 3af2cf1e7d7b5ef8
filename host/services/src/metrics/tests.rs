// SPDX-License-Identifier: Apache-2.0

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use api::types::{VmDeviceStats, VmState, VmStats};
use netpolicy::{MacAddress, Name, Port, PortGroupId, PortId, VmId, VmRef};
use uuid::Uuid;

use super::*;

fn vm(name: &str, state: VmState) -> Vm {
    let mailbox = BTreeMap::from([("set_mac:refused".to_owned(), 2), ("reset:granted".to_owned(), 1)]);
    let device = VmDeviceStats { mailbox, passed_reads: 3, passed_writes: 40, ..VmDeviceStats::default() };
    let stats = VmStats {
        exits: BTreeMap::from([("io_out".to_owned(), 7)]),
        devices: [("0000:01:10.0".to_owned(), device.clone()), ("0000:01:10.2".to_owned(), device)].into(),
        memory: 512 << 20,
        boots: 3,
        ..VmStats::default()
    };
    Vm { name: name.into(), state, resident: Some(4096), stats: Some(stats) }
}

/// Metrics in which each counter was used once.
fn used() -> Metrics {
    let metrics = Metrics::default();
    let of = VmRef { id: VmId(Uuid::nil()), name: Name::new("web1").unwrap() };
    let mac = MacAddress::new([2, 0, 0, 0, 0, 1]);
    let port = Port::new(PortId(Uuid::nil()), of, "eth0", PortGroupId(Uuid::nil()), mac);
    metrics.decision(&Decision::new(Uuid::nil(), &port, "set_mac", Outcome::Denied, 1));
    metrics.decided(Outcome::Denied, Duration::from_micros(300));
    metrics.committed(true, Duration::from_millis(2));
    metrics.repaired("set_trust", true);
    let request =
        Answered { route: "/v1/vms", method: "GET", status: 200, elapsed: Duration::from_millis(3) };
    metrics.answered(&request);
    let source = api::Source::User(None);
    metrics.turned_away(&TurnedAway { source, code: ProblemCode::Unauthorized });
    metrics
}

#[test]
fn what_is_counted_is_shown_under_names_with_units() {
    let text = used().text(&[vm("web1", VmState::Running), vm("web2", VmState::Stopped)]).unwrap();
    for line in [
        concat!("portcullis_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        "portcullis_vms{state=\"running\"} 1",
        "portcullis_vms{state=\"failed\"} 0",
        "portcullis_vm_exits_total{vm=\"web1\",reason=\"io_out\"} 7",
        "portcullis_vm_mailbox_messages_total{vm=\"web1\",opcode=\"set_mac\",verdict=\"refused\"} 4",
        "portcullis_vm_passed_accesses_total{vm=\"web1\",access=\"read\"} 6",
        "portcullis_vm_passed_accesses_total{vm=\"web1\",access=\"write\"} 80",
        "portcullis_vm_memory_bytes{vm=\"web1\"} 536870912",
        "portcullis_vm_process_resident_memory_bytes{vm=\"web1\"} 4096",
        "portcullis_vm_boots_total{vm=\"web2\"} 3",
        "portcullis_decisions_total{request=\"set_mac\",verdict=\"denied\"} 1",
        "portcullis_decision_duration_seconds_count{verdict=\"denied\"} 1",
        "portcullis_decision_duration_seconds_bucket{le=\"0.0005\",verdict=\"denied\"} 1",
        "portcullis_commit_duration_seconds_count{result=\"made\"} 1",
        "portcullis_drift_repairs_total{setting=\"set_trust\",result=\"repaired\"} 1",
        "portcullis_api_requests_total{route=\"/v1/vms\",method=\"GET\",status=\"200\"} 1",
        "portcullis_api_request_duration_seconds_count{route=\"/v1/vms\",method=\"GET\"} 1",
        "portcullis_api_turned_away_total{reason=\"token\"} 1",
        "# UNIT portcullis_decision_duration_seconds seconds",
        "# EOF",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    let agent = text.lines().find_map(|line| line.strip_prefix("process_resident_memory_bytes ")).unwrap();
    assert!(agent.parse::<u64>().unwrap() > 1 << 20, "{agent}");
}

#[test]
fn a_vm_that_is_gone_has_no_series() {
    let metrics = Metrics::default();
    assert!(metrics.text(&[vm("web1", VmState::Running)]).unwrap().contains("web1"));
    assert!(!metrics.text(&[]).unwrap().contains("web1"));
}

#[test]
fn a_vmm_cannot_make_series_without_end() {
    let mut wild = vm("web1", VmState::Running);
    let stats = wild.stats.as_mut().unwrap();
    stats.exits = (0..10_000).map(|n| (format!("reason_{n}"), 1)).collect();
    stats.exits.insert("x\"} 1\nforged 1".into(), 5);
    let mailbox = &mut stats.devices.get_mut("0000:01:10.0").unwrap().mailbox;
    *mailbox = (0..10_000).map(|n| (format!("a{n}:b{n}"), u64::MAX)).collect();
    let text = Metrics::default().text(&[wild]).unwrap();
    assert!(text.lines().filter(|line| line.starts_with("portcullis_vm_")).count() < 200, "{text}");
    assert!(!text.contains("forged"));
    assert!(text.contains("portcullis_vm_exits_total{vm=\"web1\",reason=\"other\"}"), "{text}");
}

/// The dashboard shows no metric that does not exist.
#[test]
fn every_metric_of_the_dashboard_is_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../resources/grafana/portcullis.json");
    let dashboard: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let mut queries = Vec::new();
    expressions(&dashboard, &mut queries);
    let text = used().text(&[vm("web1", VmState::Running)]).unwrap();
    let known: BTreeSet<&str> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next())
        .collect();
    let mut asked = BTreeSet::new();
    for query in &queries {
        let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
        asked.extend(words.filter(|word| word.starts_with("portcullis_") || word.starts_with("process_")));
    }
    let wrong: Vec<_> = asked.difference(&known).collect();
    assert!(wrong.is_empty(), "{wrong:?} are not in\n{text}");
    assert!(queries.len() >= 10 && asked.len() >= 10, "{queries:?}");
    // Conversely, the dashboard shows every metric, except sums and counts of histograms.
    let suffixes = ["_sum", "_count"];
    let shown = |name: &&&str| !suffixes.iter().any(|suffix| name.ends_with(suffix));
    let unseen: Vec<_> = known.difference(&asked).filter(shown).collect();
    assert!(unseen.is_empty(), "{unseen:?} are not on the dashboard");
}

/// Every `expr`, and every query of a variable.
fn expressions(value: &serde_json::Value, found: &mut Vec<String>) {
    match value {
        serde_json::Value::Array(values) => values.iter().for_each(|value| expressions(value, found)),
        serde_json::Value::Object(members) => {
            for (name, value) in members {
                match value.as_str() {
                    Some(text) if name == "expr" || name == "query" => found.push(text.to_owned()),
                    _ => expressions(value, found),
                }
            }
        }
        _ => {}
    }
}
