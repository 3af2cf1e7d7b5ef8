// SPDX-License-Identifier: Apache-2.0

//! NICs under port groups: the control queue of a virtio driver is a channel of the relay.

use api::types::{DecisionFilter, VmAction, VmState};
use serde_json::{Value, json};

use super::adapter::{port_group, start};
use crate::fixture::{Agent, Guest, SmallGuest};

const ALICE: &str = "02:00:00:00:0a:01";
const BOB: &str = "02:00:00:00:0b:01";
const OTHER: &str = "02:00:00:00:0c:01";
const GROUP: &str = "01:00:5e:00:37:07";

fn boot<'a>(agent: &'a Agent, name: &str, mac: &str) -> SmallGuest<'a> {
    let mut spec = SmallGuest::spec(agent, name, json!([]), "");
    spec["nics"] = json!([{ "id": "net0", "port_group": "tests", "mac": mac }]);
    let mut guest = SmallGuest { guest: agent.boot(&spec) };
    guest.wait_for_ready();
    probe(&mut guest, mac);
    guest
}

/// Starts the driver, and waits until the port has its link.
fn probe(guest: &mut SmallGuest<'_>, mac: &str) {
    assert_eq!(guest.ask("nic-probe"), format!("slot=1 mac={mac} mtu=1500"));
    assert_link(guest, &format!("up mac={mac}"));
}

fn assert_link(guest: &mut SmallGuest<'_>, wanted: &str) {
    let mut link = String::new();
    for _ in 0..100 {
        link = guest.ask("nic-link");
        if link == wanted {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("the link is {link}, not {wanted}");
}

fn pair(agent: &Agent) -> [SmallGuest<'_>; 2] {
    [boot(agent, "alice", ALICE), boot(agent, "bob", BOB)]
}

/// Bob's view of a frame of alice.
fn seen(alice: &mut SmallGuest<'_>, bob: &mut SmallGuest<'_>, send: &str) -> String {
    assert_eq!(alice.ask(&format!("nic-send {send}")), "ok");
    bob.ask("nic-receive ms=300")
}

/// The requests of bob's that were denied.
fn denied(agent: &Agent) -> Vec<String> {
    let verdict = serde_json::from_value(json!("denied")).unwrap();
    let filter = DecisionFilter { verdict: Some(verdict), limit: 100, ..DecisionFilter::default() };
    let decisions = agent.ask(agent.client.decisions(&filter)).unwrap();
    let of_bob = decisions.into_iter().filter(|decision| decision.owner.name == "bob");
    let mut requests: Vec<String> = of_bob.map(|decision| decision.request).collect();
    requests.sort();
    requests
}

#[test]
fn guests_exchange_frames_and_the_policy_decides_about_their_requests() {
    let agent = start();
    port_group(
        &agent,
        json!({"vlan": {"trunk": ["100-200"]}, "unicast_limit": 1, "mac_changes": {"list": [OTHER]}}),
    );
    let [mut alice, mut bob] = pair(&agent);
    let frame = |text: &str| format!("{ALICE} {text}");
    assert_eq!(seen(&mut alice, &mut bob, &format!("{BOB} hello")), frame("hello"));
    assert_eq!(seen(&mut alice, &mut bob, "ff:ff:ff:ff:ff:ff all"), frame("all"));
    // The PF drops forged frames, outside of the vmm.
    assert_eq!(seen(&mut alice, &mut bob, &format!("{BOB} forged source={OTHER}")), "nothing");
    let cases = [
        (format!("{OTHER} filter"), "filter"),
        (format!("{GROUP} group"), "group"),
        (format!("{BOB} tagged vlan=100"), "tagged vlan=100"),
    ];
    for (send, _) in &cases {
        assert_eq!(seen(&mut alice, &mut bob, send), "nothing", "{send}");
    }
    for (command, result) in [
        ("nic-mac 02:00:00:00:0c:77", "refused"),
        ("nic-vlan add 100", "ok"),
        ("nic-vlan add 300", "refused"),
        ("nic-vlan add 5000", "refused"),
        ("nic-promiscuous on", "refused"),
        ("nic-promiscuous off", "ok"),
    ] {
        assert_eq!(bob.ask(command), result, "{command}");
    }
    assert_eq!(bob.ask(&format!("nic-lists {OTHER} {GROUP}")), "ok");
    assert_eq!(alice.ask("nic-vlan add 100"), "ok");
    for (send, text) in &cases {
        assert_eq!(seen(&mut alice, &mut bob, send), frame(text), "{send}");
    }
    assert_eq!(bob.ask("nic-lists - -"), "ok");
    assert_eq!(bob.ask("nic-vlan remove 100"), "ok");
    for (send, _) in &cases {
        assert_eq!(seen(&mut alice, &mut bob, send), "nothing", "{send}");
    }
    let vm = agent.vm("bob");
    let port = vm.status.nics[0].port.as_ref().unwrap();
    assert!(
        port.vf.is_some() && port.pf.as_deref() == Some("sim0") && port.mac.to_string() == BOB,
        "{port:?}"
    );
    assert_eq!(denied(&agent), ["set_mac", "set_promiscuous", "set_vlan"]);
}

#[test]
fn a_granted_address_lasts_until_the_boot_ends_and_a_revoked_one_is_gone_at_once() {
    let agent = start();
    port_group(&agent, json!({"mac_changes": "accept"}));
    let [mut alice, mut bob] = pair(&agent);
    assert_eq!(bob.ask(&format!("nic-mac {OTHER}")), "ok");
    assert_eq!(bob.ask("nic-link"), format!("up mac={OTHER}"));
    assert_eq!(seen(&mut alice, &mut bob, &format!("{OTHER} new")), format!("{ALICE} new"));
    assert_eq!(seen(&mut alice, &mut bob, &format!("{BOB} old")), "nothing");
    assert_eq!(seen(&mut bob, &mut alice, &format!("{ALICE} mine source={OTHER}")), format!("{OTHER} mine"));
    // The driver has it again after a reset of the device, until the machine is reset.
    assert_eq!(bob.ask("nic-probe"), format!("slot=1 mac={OTHER} mtu=1500"));
    assert_eq!(bob.ask("reboot"), "ok");
    bob.wait_for_ready();
    probe(&mut bob, BOB);
    assert_eq!(seen(&mut alice, &mut bob, &format!("{BOB} back")), format!("{ALICE} back"));
    // A revoked address: the device shows the one that it has now.
    assert_eq!(bob.ask(&format!("nic-mac {OTHER}")), "ok");
    port_group(&agent, json!({"mac_changes": "reject"}));
    assert_link(&mut bob, &format!("up mac={BOB}"));
    assert_eq!(seen(&mut alice, &mut bob, &format!("{OTHER} revoked")), "nothing");
    assert_eq!(seen(&mut alice, &mut bob, &format!("{BOB} restored")), format!("{ALICE} restored"));
    assert_eq!(bob.ask(&format!("nic-mac {OTHER}")), "refused");
}

#[test]
fn a_silent_denial_looks_like_success_and_changes_nothing() {
    let agent = start();
    port_group(&agent, json!({"on_denied": "silent"}));
    let [mut alice, mut bob] = pair(&agent);
    assert_eq!(bob.ask(&format!("nic-mac {OTHER}")), "ok");
    assert_eq!(seen(&mut alice, &mut bob, &format!("{OTHER} new")), "nothing");
    assert_eq!(seen(&mut alice, &mut bob, &format!("{BOB} old")), format!("{ALICE} old"));
    assert_eq!(seen(&mut bob, &mut alice, &format!("{ALICE} forged source={OTHER}")), "nothing");
}

#[test]
fn a_port_outlives_its_agent_and_ends_with_its_vm() {
    let mut agent = start();
    port_group(&agent, json!({}));
    {
        let [mut alice, mut bob] = pair(&agent);
        assert_eq!(seen(&mut alice, &mut bob, &format!("{BOB} before")), format!("{ALICE} before"));
    }
    agent.kill_and_restart();
    {
        let mut guests: Vec<SmallGuest<'_>> =
            ["alice", "bob"].map(|name| SmallGuest { guest: Guest::new(&agent, name.into()) }).into();
        let [alice, bob] = guests.as_mut_slice() else { unreachable!() };
        assert_eq!(bob.ask("nic-promiscuous off"), "ok", "behind the text of its former commands");
        assert_eq!(seen(alice, bob, &format!("{BOB} after")), format!("{ALICE} after"));
        assert_eq!(bob.ask(&format!("nic-mac {OTHER}")), "refused");
        assert_eq!(bob.ask("nic-hostile"), "ok faults=36");
        probe(bob, BOB);
        assert_eq!(seen(alice, bob, &format!("{BOB} alive")), format!("{ALICE} alive"));
    }
    agent.act("bob", VmAction::Stop).unwrap();
    agent.wait_for_state("bob", VmState::Stopped);
    let used: Vec<Value> = agent.vfs().iter().map(|vf| serde_json::to_value(vf).unwrap()).collect();
    let owners: Vec<&Value> = used.iter().map(|vf| &vf["owner"]).filter(|owner| !owner.is_null()).collect();
    assert_eq!(owners.len(), 1, "{owners:?}");
}
