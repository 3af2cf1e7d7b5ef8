// SPDX-License-Identifier: Apache-2.0

//! Guests' uses of their VFs: bonds, macvlan and bridges, as in `docs/guest-networking.md`. VRRP is in
//! `policy/shared.rs`, DPDK in `policy/dpdk.rs`.

use std::time::Duration;

use serde_json::json;

use super::{bare_spec, page, ping, policy::eventually};
use crate::fixture::{Agent, Guest, Options, agent::PATIENCE, host, registers};

const TAP: &str = "simtap0";
/// The host's addresses behind the simulated PF and on the PF.
const BEHIND_SIMULATED: &str = "10.9.0.1";
const BEHIND_PF: &str = "10.0.2.9";
const FIRST: &str = "02:00:00:00:00:11";
const SECOND: &str = "02:00:00:00:00:12";

/// An agent with a switch that has a real and a simulated PF.
fn agent() -> Agent {
    let arguments = ["--sim-pf".to_owned(), format!("sim0=1,tap={TAP}")].into();
    let agent = Agent::start_with(Options { arguments, ..Options::default() });
    host::run("ip", &["addr", "add", &format!("{BEHIND_SIMULATED}/24"), "dev", TAP]);
    host::run("ip", &["link", "set", TAP, "up"]);
    host::run("ip", &["addr", "replace", &format!("{BEHIND_PF}/24"), "dev", host::PF]);
    let switch = serde_json::from_value(json!({ "uplinks": [host::PF, "sim0"] })).unwrap();
    agent.ask(agent.client.put_switch("uplink", &switch, None)).unwrap();
    let group = serde_json::from_value(json!({ "switch": "uplink" })).unwrap();
    agent.ask(agent.client.put_port_group("web", &group, None)).unwrap();
    agent
}

fn guest(agent: &Agent) -> Guest<'_> {
    let simulated = agent.vfs().into_iter().find(|vf| vf.simulated).unwrap().bdf.to_string();
    let mut spec = bare_spec(agent, "web1");
    let modules = ["bonding", "macvlan", "bridge", "veth"];
    let initramfs = host::initramfs_of_programs("networking", &modules, &["ip", "bridge"], &[]);
    spec["boot"]["initramfs"] = json!(agent.link_image("networking", &initramfs));
    spec["adapters"] = json!([
        { "id": "eth0", "port_group": "web", "mac": FIRST, "vf": host::VF0 },
        { "id": "eth1", "port_group": "web", "mac": SECOND, "vf": simulated },
    ]);
    let mut guest = agent.boot(&spec);
    guest.wait_for_shell();
    // The guest's shell prefers its own applet.
    guest.must("ip() { /bin/ip \"$@\"; }");
    guest
}

/// The addresses that the PFs have for the two VFs.
fn addresses(agent: &Agent) -> [String; 2] {
    let ports = agent.ask(agent.client.list_ports()).unwrap();
    let second = ports.into_iter().find(|port| port.name == "web1/eth1").unwrap();
    [host::vf_mac(0), second.status.effective_mac.to_string()]
}

/// Makes a VF the active one, and asserts that frames to the bond's address pass by it.
fn talks_by(guest: &mut Guest<'_>, active: &str, target: &str) {
    guest.must(&format!("ip link set bond0 type bond active_slave {active}"));
    let answered = format!("for i in $(seq 100); do ping -q -c 1 -W 1 {target} && break; done >/dev/null");
    guest.must(&answered);
    ping(guest, target, 5);
}

fn bond(agent: &Agent, guest: &mut Guest<'_>) {
    // The module makes a bond when it is loaded, unless its options forbid that, as systemd's do.
    guest.must("ip link del bond0");
    // Without the setting the second VF cannot join.
    guest.must("ip link add bond0 type bond mode active-backup fail_over_mac none miimon 100");
    guest.must("ip link set eth0 down; ip link set eth1 down; ip link set eth0 master bond0");
    assert_ne!(guest.run("ip link set eth1 master bond0").status, 0, "an address has one holder by default");
    guest.must("ip link del bond0");

    page::follow_on_host(agent, "Bonds");
    page::follow_in_guest(guest, "Bonds", &[]);
    assert_eq!(addresses(agent), [FIRST, FIRST], "both have the bond's address");
    guest.must("ip addr add 10.0.2.21/24 dev bond0; ip addr add 10.9.0.21/24 dev bond0");
    talks_by(guest, "eth0", host::GATEWAY);
    talks_by(guest, "eth1", BEHIND_SIMULATED);
    guest.must("ip link del bond0");
    assert_eq!(addresses(agent), [FIRST, SECOND], "each has its own again");

    page::follow_in_guest(guest, "Bonds", &[("fail_over_mac none", "fail_over_mac follow")]);
    guest.must("ip addr add 10.0.2.21/24 dev bond0; ip addr add 10.9.0.21/24 dev bond0");
    talks_by(guest, "eth0", host::GATEWAY);
    assert_eq!(addresses(agent), [FIRST, SECOND]);
    talks_by(guest, "eth1", BEHIND_SIMULATED);
    assert_eq!(addresses(agent), [SECOND, FIRST], "the address has moved");
    guest.must("ip link del bond0");
}

fn has(mac: &str) -> bool {
    registers::addresses_of(0).contains(mac)
}

fn macvlan(agent: &Agent, guest: &mut Guest<'_>) {
    page::follow_on_host(agent, "macvlan");
    page::follow_in_guest(guest, "macvlan", &[]);
    guest.must("ip addr add 10.0.2.31/24 dev mv0");
    eventually(agent, PATIENCE, "the macvlan's filter", || has("02:00:5e:10:00:01"));
    eventually(agent, Duration::from_secs(20), "the macvlan answers", || host::answers("10.0.2.31"));
    guest.must("ip link del mv0");
}

fn bridge(agent: &Agent, guest: &mut Guest<'_>) {
    page::follow_on_host(agent, "Bridges");
    guest.must("ip link add br1 type bridge");
    assert_ne!(guest.run("ip link set eth0 master br1").status, 0, "the bridge joins VLAN 1 by default");
    guest.must("ip link del br1");

    page::follow_in_guest(guest, "Bridges", &[]);
    // Only the interface with an IP address answers for it.
    guest.must("echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore");
    guest.must("ip addr add 10.0.2.41/24 dev inside");
    eventually(agent, PATIENCE, "the filter of the address behind the bridge", || has("02:00:5e:10:00:02"));
    eventually(agent, Duration::from_secs(20), "it answers", || host::answers("10.0.2.41"));

    // An address that the bridge has only learned. ARP requests arrive, and the host has the address from the reply.
    guest.must("ip link del veth0");
    guest.must("ip link add veth1 type veth peer name inside address 02:00:5e:10:00:03");
    guest.must("ip link set veth1 master br0 up; ip link set inside up; ip addr add 10.0.2.42/24 dev inside");
    let learned = || host::run("ip", &["neigh", "show", "10.0.2.42"]).contains("02:00:5e:10:00:03");
    eventually(agent, PATIENCE, "the host has the address", || host::answers("10.0.2.42") || learned());
    assert!(!(0..3).any(|_| host::answers("10.0.2.42")), "frames to a learned address do not arrive");
    guest.must("bridge fdb add 02:00:5e:10:00:03 dev eth0 self permanent");
    eventually(agent, Duration::from_secs(20), "it answers with an entry", || host::answers("10.0.2.42"));
}

#[test]
fn bonds_macvlans_and_bridges_work_as_the_page_says() {
    let agent = agent();
    let mut guest = guest(&agent);
    bond(&agent, &mut guest);

    guest.must("ip link set eth0 up");
    macvlan(&agent, &mut guest);
    bridge(&agent, &mut guest);
}
