// SPDX-License-Identifier: Apache-2.0

//! Changes of the PF by other programs.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{INITIAL, Relay, X, Y, agent_with, decisions, eventually, guest_in_group, ping};
use crate::fixture::{Agent, agent::PATIENCE, host};

/// The longest time of a repair.
const REPAIR: Duration = Duration::from_secs(30);

fn is_repaired_and_recorded(agent: &Agent) {
    let begun = Instant::now();
    eventually(agent, REPAIR, "the address is repaired", || host::vf_mac(0) == INITIAL);
    eventually(agent, PATIENCE, "the repair is recorded", || {
        decisions(agent, "repaired").iter().any(|decision| decision.old.as_deref() == Some(X))
    });
    println!("repaired after {:.1} s", begun.elapsed().as_secs_f64());
}

#[test]
fn somebody_elses_change_on_the_pf_is_repaired_and_recorded() {
    let agent = agent_with(Relay::Policed, &json!({}));
    let mut guest = guest_in_group(&agent, "web1");
    host::run("ip", &["link", "set", host::PF, "vf", "0", "mac", X]);
    is_repaired_and_recorded(&agent);
    ping(&mut guest, host::GATEWAY, 3);
}

/// The PCI address identifies a PF: VMs with its VFs do not depend on the name of its interface.
#[test]
fn a_pf_that_is_renamed_is_looked_after_as_before() {
    let mut agent = agent_with(Relay::Policed, &json!({ "mac_changes": "accept" }));
    let mut guest = guest_in_group(&agent, "web1");
    host::run("ip", &["link", "set", host::PF, "name", "pf0"]);
    let has = |mac: &str| host::vf_mac_of("pf0", 0) == mac;
    host::run("ip", &["link", "set", "pf0", "vf", "0", "mac", X]);
    eventually(&agent, REPAIR, "a foreign change is repaired", || has(INITIAL));
    guest.must(&format!("ip link set dev eth0 address {Y}"));
    assert!(has(Y), "what the policy allows is made");
    drop(guest);
    agent.restart();
    host::run("ip", &["link", "set", "pf0", "vf", "0", "mac", X]);
    eventually(&agent, REPAIR, "a foreign change is repaired by the next agent", || has(Y));

    // In another network namespace the PF cannot be read. The port shows that until the PF is back.
    let unchecked = || agent.ask(agent.client.list_ports()).unwrap()[0].status.unchecked.clone();
    assert_eq!(unchecked(), None);
    host::run("ip", &["netns", "add", "elsewhere"]);
    host::run("ip", &["link", "set", "pf0", "netns", "elsewhere"]);
    eventually(&agent, REPAIR, "the port says that it is not compared", || unchecked().is_some());
    let metrics = agent.ask(agent.client.metrics()).unwrap();
    assert!(metrics.contains("portcullis_ports_unchecked 1\n"), "{metrics}");
    assert!(agent.vm("web1").status.adapters[0].unchecked.is_some(), "so does the VM");
    host::run("ip", &["-netns", "elsewhere", "link", "set", "pf0", "netns", "1"]);
    host::run("ip", &["netns", "delete", "elsewhere"]);
    host::run("ip", &["link", "set", "pf0", "up"]);
    host::run("ip", &["link", "set", "pf0", "vf", "0", "mac", X]);
    eventually(&agent, REPAIR, "a foreign change is repaired when it is back", || has(Y));
    eventually(&agent, PATIENCE, "the port is compared again", || unchecked().is_none());
    assert_eq!(agent.vm("web1").status.adapters[0].unchecked, None);

    agent.delete("web1").unwrap();
    let names = agent.ask(agent.client.list_pfs()).unwrap();
    assert!(names.iter().any(|pf| pf.name == "pf0"), "{names:?}");
    // The VF's interface belongs to the host again, and has taken the free name.
    host::run("ip", &["link", "set", host::PF, "name", "of-vf0"]);
    host::run("ip", &["link", "set", "pf0", "name", host::PF]);
    host::wait_for_carrier();
}

#[test]
fn somebody_elses_change_while_the_pf_is_down_is_repaired_and_recorded() {
    let agent = agent_with(Relay::Policed, &json!({}));
    let mut guest = guest_in_group(&agent, "web1");
    host::run("ip", &["link", "set", host::PF, "down"]);
    host::run("ip", &["link", "set", host::PF, "vf", "0", "mac", X]);
    is_repaired_and_recorded(&agent);
    host::run("ip", &["link", "set", host::PF, "up"]);
    host::wait_for_carrier();
    pings_again(&mut guest);
    assert_eq!(host::vf_mac(0), INITIAL);
}

/// Waits for pings, without any action in the guest.
fn pings_again(guest: &mut crate::fixture::Guest<'_>) {
    let begun = Instant::now();
    while guest.run(&format!("ping -q -c 1 -W 1 {}", host::GATEWAY)).status != 0 {
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "the guest does not ping again\n{}",
            guest.agent.log()
        );
    }
    println!("pings again after {:.1} s", begun.elapsed().as_secs_f64());
    ping(guest, host::GATEWAY, 5);
}

#[test]
fn a_guest_pings_again_soon_after_its_pf_was_down() {
    let agent = agent_with(Relay::Policed, &json!({}));
    let mut guest = guest_in_group(&agent, "web1");
    host::run("ip", &["link", "set", host::PF, "down"]);
    std::thread::sleep(Duration::from_secs(3));
    assert_ne!(guest.run(&format!("ping -q -c 1 -W 1 {}", host::GATEWAY)).status, 0, "the wire is cut");
    host::run("ip", &["link", "set", host::PF, "up"]);
    pings_again(&mut guest);
    assert_eq!(host::vf_mac(0), INITIAL);
}
