// SPDX-License-Identifier: Apache-2.0

//! Requests that the agent answers late or not at all.

use std::{thread, time::Duration};

use serde_json::json;

use super::{
    INITIAL, Relay, X, agent_with, decisions, eventually, guest_in_group, guest_mac, in_group, ping, reason,
};
use crate::fixture::{Agent, Guest, Options, agent::PATIENCE, host};

#[test]
fn without_an_agent_requests_are_refused_and_the_guest_goes_on() {
    let mut agent = agent_with(Relay::Policed, &json!({ "mac_changes": "accept" }));
    {
        let guest = guest_in_group(&agent, "web1");
        guest.type_line(&format!("sleep 3; ip link set dev eth0 address {X}; echo ended $?"));
    }
    agent.kill();
    thread::sleep(Duration::from_secs(6));
    agent.restart();
    let mut guest = Guest::new(&agent, "web1".into());
    let text = guest.wait_for("ended ");
    assert!(text.contains(X) || text.contains("address"), "{text}");
    assert!(!guest.unread().starts_with('0'), "the guest was refused");
    assert_eq!(host::vf_mac(0), INITIAL);
    eventually(&agent, PATIENCE, "the refusal is recorded", || {
        decisions(&agent, "denied").iter().any(|decision| reason(decision) == "authority_unreachable")
    });
    ping(&mut guest, host::GATEWAY, 3);
    // With the agent back the same request is allowed.
    guest.must(&format!("ip link set dev eth0 address {X}"));
    assert_eq!(host::vf_mac(0), X);
}

/// The relay denies by itself the requests that the policy denies in any case. The agent learns it later.
#[test]
fn an_agent_that_hangs_delays_no_refusal_that_needs_no_question() {
    let agent = agent_with(Relay::Policed, &json!({ "mac_changes": "reject" }));
    let guest = guest_in_group(&agent, "web1");
    guest.type_line(&format!("sleep 3; ip link set dev eth0 address {X}; echo ended $?"));
    agent.signal("STOP");
    thread::sleep(Duration::from_secs(6));
    agent.signal("CONT");
    let mut guest = Guest::new(&agent, "web1".into());
    guest.wait_for("ended ");
    let said = guest.unread();
    assert!(!said.starts_with('0'), "the guest was refused");
    let mut reasons = Vec::new();
    eventually(&agent, PATIENCE, "the refusal is recorded", || {
        reasons = decisions(&agent, "denied").iter().map(reason).collect();
        !reasons.is_empty()
    });
    assert_eq!(reasons, ["mac_changes_rejected"], "not authority_unreachable");
    ping(&mut guest, host::GATEWAY, 3);
}

/// The relay waits 400 ms for the agent, which makes the change on the PF after 700 ms.
#[test]
fn a_change_that_lands_after_the_refusal_is_reverted() {
    let agent = Agent::start_with(Options::for_tests(&["--late-address-for-tests", "700"]));
    let agent = in_group(agent, &json!({ "mac_changes": "accept" }));
    let mut guest = guest_in_group(&agent, "web1");
    let output = guest.run(&format!("ip link set dev eth0 address {X}"));
    assert_ne!(output.status, 0, "{}", output.text);
    let mut reverted = None;
    eventually(&agent, PATIENCE, "the late change is reverted and recorded", || {
        reverted = decisions(&agent, "reverted").pop();
        reverted.is_some()
    });
    let reverted = reverted.unwrap();
    assert_eq!(reverted.old.as_deref(), Some(X), "the change had landed: {reverted:?}");
    assert_eq!(reason(&reverted), "authority_unreachable");
    assert_eq!(host::vf_mac(0), INITIAL);
    assert_eq!(guest_mac(&mut guest), INITIAL);
    eventually(&agent, PATIENCE, "the refusal is recorded", || {
        decisions(&agent, "denied").iter().any(|decision| reason(decision) == "authority_unreachable")
    });
    ping(&mut guest, host::GATEWAY, 5);
}
