// SPDX-License-Identifier: Apache-2.0

//! Addresses: denied, denied silently, accepted, listed, revoked.
//!
//! Each scenario is a function of the relay. `control` runs it again with a relay that grants everything.

use api::types::{EventKind, VmAction};
use serde_json::json;

use super::{
    INITIAL, Relay, X, Y, Z, agent_with, by_policy, decisions, down_up, edit, eventually, guest_in_group,
    guest_mac, ping, port, reason, spec, wait_for_decision,
};
use crate::fixture::{Guest, agent::PATIENCE, host};

pub(super) fn refused(relay: Relay) {
    let agent = agent_with(relay, &json!({}));
    let mut guest = guest_in_group(&agent, "web1");
    let mut events = agent.wait_on(agent.client.events(None)).unwrap();
    let output = guest.run(&format!("ip link set dev eth0 address {X}"));
    by_policy(output.status != 0, "the guest's command fails");
    // EADDRNOTAVAIL
    assert!(
        output.text.contains("Cannot assign requested address") || output.text.contains("not available"),
        "{}",
        output.text
    );
    by_policy(host::vf_mac(0) == INITIAL, "the device keeps its address");
    assert_eq!(guest_mac(&mut guest), INITIAL);
    ping(&mut guest, host::GATEWAY, 5);

    let decision = wait_for_decision(&agent, "denied", X);
    let vm = agent.vm("web1");
    assert_eq!(reason(&decision), "mac_changes_rejected");
    assert_eq!(decision.old.as_deref(), Some(INITIAL));
    assert_eq!(decision.requested.as_deref(), Some(X));
    assert_eq!((decision.owner.vm, decision.owner.name.as_str()), (vm.id, "web1"));
    assert_eq!(decision.owner.adapter.as_deref(), Some("eth0"));
    assert_eq!(decision.port, port(&agent).id);
    assert_eq!((decision.pf.as_deref(), decision.vf_index), (Some(host::PF), Some(0)));

    // The subscriber gets the same decision.
    let told = loop {
        let event = agent.wait_on(events.next()).unwrap().expect("events go on");
        if let EventKind::Decision { decision } = event.what
            && decision.requested.as_deref() == Some(X)
        {
            break *decision;
        }
    };
    assert_eq!(told, decision);

    let log = agent.log();
    let line = log.lines().find(|line| line.contains(X)).unwrap_or_else(|| panic!("{log}"));
    let port = decision.port.to_string();
    for word in ["web1", "eth0 vf 0", &port, INITIAL, "mac_changes_rejected"] {
        assert!(line.contains(word), "{word}: {line}");
    }
}

#[test]
fn a_refused_address_is_an_error_in_the_guest_and_changes_nothing() {
    refused(Relay::Policed);
}

/// "The guest may show success, but a log message says that it failed; guest and virtual device then hold different
/// addresses, until the interface is reset in the guest and picks up the device's address."
pub(super) fn refused_silently(relay: Relay) {
    let agent = agent_with(relay, &json!({ "on_denied": "silent" }));
    let mut guest = guest_in_group(&agent, "web1");

    guest.must(&format!("ip link set dev eth0 address {X}"));
    assert_eq!(guest_mac(&mut guest), X, "the guest shows success");
    by_policy(host::vf_mac(0) == INITIAL, "the device keeps its address");
    let decision = wait_for_decision(&agent, "denied", X);
    assert_eq!(reason(&decision), "mac_changes_rejected");
    assert!(agent.log().lines().any(|line| line.contains(X)), "{}", agent.log());
    let status = port(&agent).status;
    assert_eq!((status.effective_mac.to_string(), status.guest_mac.to_string()), (INITIAL.into(), X.into()));

    // The PF's side sends frames for X, and they do not arrive at the VF.
    host::run("ip", &["addr", "replace", "10.0.2.9/24", "dev", host::PF]);
    host::run("ip", &["neigh", "replace", "10.0.2.21", "lladdr", X, "dev", host::PF, "nud", "permanent"]);
    let received = |guest: &mut Guest<'_>| -> u64 {
        guest.must("cat /sys/class/net/eth0/statistics/rx_packets").parse().unwrap()
    };
    let sent = || host::counter("tx_packets");
    let (before_sent, before) = (sent(), received(&mut guest));
    host::try_ping("10.0.2.21", 20);
    assert!(sent() >= before_sent + 20, "the sender sends");
    assert!(received(&mut guest) < before + 10, "they do not arrive");

    down_up(&mut guest);
    assert_eq!(guest_mac(&mut guest), INITIAL, "the guest has picked up the device's address");
    host::run(
        "ip",
        &["neigh", "replace", "10.0.2.21", "lladdr", INITIAL, "dev", host::PF, "nud", "permanent"],
    );
    ping(&mut guest, host::GATEWAY, 5);
    let status = port(&agent).status;
    assert_eq!(status.guest_mac, status.effective_mac);
    host::run("ip", &["neigh", "del", "10.0.2.21", "dev", host::PF]);
    host::run("ip", &["addr", "del", "10.0.2.9/24", "dev", host::PF]);
}

#[test]
fn a_silent_refusal_keeps_the_devices_address_until_the_guest_resets_its_interface() {
    refused_silently(Relay::Policed);
}

#[test]
fn an_accepted_address_is_committed_and_lasts_until_the_next_boot() {
    let agent = agent_with(Relay::Policed, &json!({ "mac_changes": "accept" }));
    let mut guest = guest_in_group(&agent, "web1");
    guest.must(&format!("ip link set dev eth0 address {X}"));
    assert_eq!(host::vf_mac(0), X);
    ping(&mut guest, host::GATEWAY, 5);
    down_up(&mut guest);
    assert_eq!(guest_mac(&mut guest), X);
    ping(&mut guest, host::GATEWAY, 3);

    // Accept Y, then deny Z, then down and up: the guest has Y.
    guest.must(&format!("ip link set dev eth0 address {Y}"));
    edit(&agent, &json!({ "mac_changes": { "list": [Y] } }));
    assert_ne!(guest.run(&format!("ip link set dev eth0 address {Z}")).status, 0);
    down_up(&mut guest);
    assert_eq!(guest_mac(&mut guest), Y);
    assert_eq!(host::vf_mac(0), Y);
    ping(&mut guest, host::GATEWAY, 3);

    agent.act("web1", VmAction::Reboot).unwrap();
    guest.wait_for_shell();
    assert_eq!(guest_mac(&mut guest), INITIAL);
    assert_eq!(host::vf_mac(0), INITIAL);
    super::configure(&mut guest, "10.0.2.21");
    ping(&mut guest, host::GATEWAY, 3);
}

pub(super) fn listed(relay: Relay) {
    let agent =
        agent_with(relay, &json!({ "mac_changes": { "list": ["00:00:5e:00:01:00/ff:ff:ff:ff:ff:00"] } }));
    let mut spec2 = spec(&agent, "web2", host::VF1);
    spec2["adapters"] =
        json!([{ "id": "eth0", "port_group": "web", "mac": "00:00:5e:00:01:08", "vf": host::VF1 }]);
    let _neighbour = agent.boot(&spec2);
    let mut guest = guest_in_group(&agent, "web1");
    guest.must("ip link set dev eth0 address 00:00:5e:00:01:07");
    assert_eq!(host::vf_mac(0), "00:00:5e:00:01:07");
    by_policy(
        guest.run(&format!("ip link set dev eth0 address {X}")).status != 0,
        "an address that is not listed is refused",
    );
    assert_eq!(reason(&wait_for_decision(&agent, "denied", X)), "mac_not_allowed");
    by_policy(
        guest.run("ip link set dev eth0 address 00:00:5e:00:01:08").status != 0,
        "an address in use is refused",
    );
    assert_eq!(reason(&wait_for_decision(&agent, "denied", "00:00:5e:00:01:08")), "mac_in_use");
    assert_eq!(host::vf_mac(0), "00:00:5e:00:01:07");
}

#[test]
fn a_list_with_masks_accepts_a_vrrp_address_and_refuses_others() {
    listed(Relay::Policed);
}

pub(super) fn tightened(relay: Relay) {
    let agent = agent_with(relay, &json!({ "mac_changes": "accept" }));
    let mut guest = guest_in_group(&agent, "web1");
    guest.must(&format!("ip link set dev eth0 address {X}"));
    assert_eq!(host::vf_mac(0), X);
    edit(&agent, &json!({ "mac_changes": "reject" }));
    // A revocation takes a moment. Without a policy a short wait is enough to see that there is none.
    let patience = if relay == Relay::Policed { PATIENCE } else { std::time::Duration::from_secs(5) };
    eventually(&agent, patience, "BY POLICY: the address is revoked", || host::vf_mac(0) == INITIAL);
    assert!(!decisions(&agent, "taken_back").is_empty());
    down_up(&mut guest);
    assert_eq!(guest_mac(&mut guest), INITIAL);
    ping(&mut guest, host::GATEWAY, 3);
}

#[test]
fn a_tightened_group_takes_the_address_back_from_a_running_guest() {
    tightened(Relay::Policed);
}

/// The signal that makes a guest reset its VF is kept until the reset: the guest's interface may be down when the
/// address is revoked, or its driver may send another request right then. Stock drivers do not reset twice within 10
/// s.
#[test]
fn a_guest_learns_that_its_address_was_revoked_while_it_was_down_or_busy() {
    const LEARNT: std::time::Duration = std::time::Duration::from_secs(40);
    let agent = agent_with(Relay::Policed, &json!({ "mac_changes": "accept" }));
    let mut guest = guest_in_group(&agent, "web1");
    let mut revoked = |what: &str, before: &[&str], after: &[&str]| {
        edit(&agent, &json!({ "mac_changes": "accept" }));
        guest.must(&format!("ip link set dev eth0 address {X}"));
        for command in before {
            guest.must(command);
        }
        edit(&agent, &json!({ "mac_changes": "reject" }));
        for command in after {
            guest.must(command);
        }
        eventually(&agent, LEARNT, &format!("{what}: the guest has the device's address"), || {
            host::vf_mac(0) == INITIAL && guest_mac(&mut guest) == INITIAL
        });
        guest.must(super::WAIT_FOR_LINK);
        ping(&mut guest, host::GATEWAY, 3);
        assert_eq!(port(&agent).status.guest_mac.to_string(), INITIAL, "{what}");
    };
    revoked("down", &["ip link set eth0 down"], &["sleep 1", "ip link set eth0 up"]);
    let reset = ["ip link set eth0 down", "ip link set eth0 up", "sleep 1"];
    revoked("just up", &reset, &["ifconfig eth0 allmulti"]);
    let other = "for i in $(seq 200); do ip link set dev eth0 address 02:00:00:0b:fe:$(printf %02x $i); done";
    revoked("busy", &[&format!("({other}) 2>/dev/null & sleep 1")], &["wait"]);
}
