// SPDX-License-Identifier: Apache-2.0

//! The port group decides about the requests of the guest's own igbvf driver.

mod address;
mod agent_away;
mod control;
mod dpdk;
mod drift;
mod hostile;
mod limits;
mod revoked;
mod round_trip;
mod shared;
mod tenant;

use std::{
    thread,
    time::{Duration, Instant},
};

use api::types::{Decision, DecisionFilter, Port};
use serde_json::{Value, json};

use super::{WAIT_FOR_LINK, configure, ping, spec};
use crate::fixture::{Agent, Guest, Options, agent::PATIENCE, host};

const X: &str = "02:00:00:00:0a:01";
const Y: &str = "02:00:00:00:0a:02";
const Z: &str = "02:00:00:00:0a:03";
const INITIAL: &str = "02:00:00:00:00:11";

/// The beginning of a failed [`by_policy`]'s message.
const BY_POLICY: &str = "BY POLICY";

/// Checks an effect of the policy: it must be seen, and must not be seen if every request is granted (see `control`).
#[track_caller]
fn by_policy(seen: bool, what: &str) {
    assert!(seen, "{BY_POLICY}: {what}");
}

/// The relay of a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relay {
    Policed,
    /// Every request of every guest is granted.
    GrantingAll,
}

/// An agent with a switch `uplink` over the PF and a port group `web` with these settings.
fn agent_with(relay: Relay, settings: &Value) -> Agent {
    let bypass = match relay {
        Relay::Policed => Options::default(),
        Relay::GrantingAll => Options::for_tests(&["--policy-bypass-for-tests"]),
    };
    in_group(Agent::start_with(bypass), settings)
}

pub(super) fn in_group(agent: Agent, settings: &Value) -> Agent {
    let switch = serde_json::from_value(json!({ "uplinks": [host::PF] })).unwrap();
    agent
        .ask(agent.client.put_switch("uplink", &switch, None))
        .unwrap_or_else(|problem| panic!("{problem:?}"));
    let group = serde_json::from_value(json!({ "switch": "uplink", "settings": settings })).unwrap();
    agent
        .ask(agent.client.put_port_group("web", &group, None))
        .unwrap_or_else(|problem| panic!("{problem:?}"));
    agent
}

fn edit(agent: &Agent, settings: &Value) {
    agent
        .ask(agent.client.patch_port_group("web", &json!({ "settings": settings }), None))
        .unwrap_or_else(|problem| panic!("{problem:?}"));
}

/// The specification of a VM in the group, on VF 0 with the initial address.
fn spec_in_group(agent: &Agent, name: &str) -> Value {
    let mut spec = spec(agent, name, host::VF0);
    spec["adapters"] = json!([{ "id": "eth0", "port_group": "web", "mac": INITIAL, "vf": host::VF0 }]);
    spec
}

/// A guest in the group with the initial address, its interface up and configured.
fn guest_in_group<'a>(agent: &'a Agent, name: &str) -> Guest<'a> {
    let mut guest = agent.boot(&spec_in_group(agent, name));
    guest.wait_for_shell();
    configure(&mut guest, "10.0.2.21");
    ping(&mut guest, host::GATEWAY, 3);
    guest
}

/// Unbinds the guest's driver from the VF, so that [`raw`] can use its registers.
fn without_driver(guest: &mut Guest<'_>) -> String {
    guest.must("basename $(readlink -f /sys/class/net/eth0/device) >/run/vf; ip link set eth0 down");
    guest.must("cat /run/vf > /sys/class/net/eth0/device/driver/unbind");
    guest.must("cat /run/vf")
}

/// Runs the mailbox program in the guest.
fn raw(guest: &mut Guest<'_>, arguments: &str) -> String {
    guest.must(&format!("vf-mailbox $(cat /run/vf) {arguments}"))
}

/// Whether the PF acknowledged a message of these words.
fn raw_granted(guest: &mut Guest<'_>, words: &str) -> bool {
    let text = raw(guest, &format!("send {words}"));
    let reply = text.split("reply: ").nth(1).unwrap_or_else(|| panic!("{text}"));
    let reply = u32::from_str_radix(reply.trim(), 16).unwrap_or_else(|_| panic!("{words}: {text}"));
    reply & 0xc000_0000 == 0x8000_0000
}

fn port(agent: &Agent) -> Port {
    let ports = agent.ask(agent.client.list_ports()).unwrap();
    ports.into_iter().find(|port| port.name == "web1/eth0").expect("the VM's port is listed")
}

fn decisions(agent: &Agent, verdict: &str) -> Vec<Decision> {
    let verdict = serde_json::from_value(json!(verdict)).unwrap();
    let filter = DecisionFilter {
        verdict: Some(verdict),
        vm: Some("web1".into()),
        limit: 1000,
        ..DecisionFilter::default()
    };
    agent.ask(agent.client.decisions(&filter)).unwrap()
}

/// Waits until a condition holds.
pub(super) fn eventually(agent: &Agent, patience: Duration, what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !so() {
        assert!(Instant::now() < deadline, "not within {patience:?}: {what}\n{}", agent.log());
        thread::sleep(Duration::from_millis(100));
    }
}

fn find_decision(agent: &Agent, verdict: &str, requested: &str) -> Option<Decision> {
    let about =
        |decision: &Decision| decision.requested.as_deref().is_some_and(|text| text.contains(requested));
    decisions(agent, verdict).into_iter().find(about)
}

/// Waits for a decision of this verdict about `requested`.
fn wait_for_decision(agent: &Agent, verdict: &str, requested: &str) -> Decision {
    let mut found = None;
    eventually(agent, PATIENCE, &format!("{BY_POLICY}: a {verdict} decision about {requested}"), || {
        found = find_decision(agent, verdict, requested);
        found.is_some()
    });
    found.unwrap()
}

fn reason(decision: &Decision) -> String {
    serde_json::to_value(decision.reason).unwrap().as_str().unwrap_or_default().to_owned()
}

fn guest_mac(guest: &mut Guest<'_>) -> String {
    guest.must("cat /sys/class/net/eth0/address")
}

/// Takes the interface down and up, as a person does when the addresses of guest and device differ.
pub(super) fn down_up(guest: &mut Guest<'_>) {
    guest.must("ip link set eth0 down");
    guest.must("ip link set eth0 up");
    guest.must(WAIT_FOR_LINK);
}
