// SPDX-License-Identifier: Apache-2.0

//! No state outlives a tenant: the filters that a guest had set on its VF are gone when the next one gets the VF.

use api::types::VmState;
use serde_json::json;

use super::{
    INITIAL, Relay, Y, agent_with, configure, guest_in_group, ping, raw, raw_granted, spec_in_group,
    without_driver,
};
use crate::fixture::{Agent, Guest, host, registers};

/// 239.1.1.35 is 01:00:5e:01:01:23: the adapter takes 12 bits of the last two bytes.
const GROUP: &str = "239.1.1.35";
const GROUP_HASH: u16 = 0x230;
const TAGGED: &str = "eth0.105";

fn received(guest: &mut Guest<'_>) -> u64 {
    guest.must("cat /sys/class/net/eth0/statistics/rx_packets").parse().unwrap()
}

/// Sends frames to the guest's own address from the PF's side, in VLAN 105.
fn tagged_frames(to: &str) {
    host::run("ip", &["neigh", "replace", "10.105.0.21", "lladdr", to, "dev", TAGGED, "nud", "permanent"]);
    host::try_ping("10.105.0.21", 20);
}

fn outlives_nothing(end: impl FnOnce(&Agent)) {
    let settings =
        json!({ "vlan": { "trunk": ["100-110"] }, "mac_changes": "accept", "unicast_limit": 2, "mtu": 9000 });
    let agent = agent_with(Relay::Policed, &settings);
    let mut tenant = guest_in_group(&agent, "web1");
    host::run("ip", &["addr", "replace", "10.0.2.9/24", "dev", host::PF]);
    let _ = std::process::Command::new("ip").args(["link", "del", TAGGED]).output();
    host::run("ip", &["link", "add", "link", host::PF, "name", TAGGED, "type", "vlan", "id", "105"]);
    host::run("ip", &["addr", "add", "10.105.0.9/24", "dev", TAGGED]);
    host::run("ip", &["link", "set", TAGGED, "up"]);

    tenant.must("ip link add link eth0 name v105 type vlan id 105; ip link set v105 up");
    let before = received(&mut tenant);
    tagged_frames(INITIAL);
    assert!(received(&mut tenant) >= before + 20, "frames in its VLAN reach the tenant");

    // All that a VF can request, by raw messages: the driver requests less.
    without_driver(&mut tenant);
    assert!(raw(&mut tenant, "reset").contains(INITIAL));
    assert!(raw_granted(&mut tenant, "00010004 69"), "VLAN 105");
    assert!(raw_granted(&mut tenant, &format!("00010003 {GROUP_HASH:08x}")), "a multicast address");
    assert!(raw_granted(&mut tenant, "00020002 00000002 0000020a"), "another address, {Y}");
    assert!(raw_granted(&mut tenant, "00000005 0000233e"), "frames of 9022 bytes");
    assert_eq!(registers::vlans_of(0), [105]);
    assert!(registers::max_frame_of(0) >= 9022);
    assert!(registers::multicast_hash(GROUP_HASH));
    let addresses = registers::addresses_of(0);
    assert!(addresses.contains(INITIAL) && addresses.contains(Y), "{addresses:?}");

    end(&agent);
    assert_eq!(registers::vlans_of(0), [] as [u32; 0]);
    assert!(!registers::multicast_hash(GROUP_HASH));
    assert!(!registers::all_multicast(0));
    let longest = registers::max_frame_of(0);
    assert!(longest <= 1530, "{longest} bytes: 1526 and a tag");
    let addresses = registers::addresses_of(0);
    assert!(!addresses.contains(Y) && !addresses.contains(INITIAL), "{addresses:?}");

    // The next tenant gets none of it. It has the same address, so the former specification must go.
    let _ = agent.delete("web1");
    let mut spec = spec_in_group(&agent, "web2");
    agent
        .ask(agent.client.put_port_group(
            "plain",
            &serde_json::from_value(json!({ "switch": "uplink" })).unwrap(),
            None,
        ))
        .unwrap_or_else(|problem| panic!("{problem:?}"));
    spec["adapters"][0]["port_group"] = json!("plain");
    let mut next = agent.boot(&spec);
    next.wait_for_shell();
    configure(&mut next, "10.0.2.22");
    ping(&mut next, host::GATEWAY, 3);
    let mut arrived = |what: &str, send: &dyn Fn(), expected: bool| {
        let before = received(&mut next);
        send();
        let frames = received(&mut next) - before;
        assert_eq!(frames >= 20, expected, "{frames} frames arrive of 20 {what}");
    };
    let to = |mac: &str| {
        host::run(
            "ip",
            &["neigh", "replace", "10.0.2.77", "lladdr", mac, "dev", host::PF, "nud", "permanent"],
        );
        host::try_ping("10.0.2.77", 20);
    };
    arrived("to its address", &|| to(INITIAL), true);
    arrived("in the former tenant's VLAN", &|| tagged_frames(INITIAL), false);
    arrived("to the former tenant's other address", &|| to(Y), false);
    host::run("ip", &["route", "replace", "239.0.0.0/8", "dev", host::PF]);
    arrived("to the former tenant's multicast group", &|| host::try_ping(GROUP, 20), false);

    host::run("ip", &["route", "del", "239.0.0.0/8", "dev", host::PF]);
    host::run("ip", &["neigh", "del", "10.0.2.77", "dev", host::PF]);
    host::run("ip", &["link", "del", TAGGED]);
    host::run("ip", &["addr", "del", "10.0.2.9/24", "dev", host::PF]);
}

#[test]
fn of_a_deleted_vm() {
    outlives_nothing(|agent| agent.delete("web1").unwrap());
}

#[test]
fn of_a_killed_vmm() {
    outlives_nothing(|agent| {
        let vm = agent.vm("web1");
        let pids = host::processes(&["vmm", &vm.id.to_string()]);
        assert_eq!(pids.len(), 1, "{pids:?}");
        host::run("kill", &["-9", &pids[0].to_string()]);
        agent.wait_for_state("web1", VmState::Failed);
        // The VF is already released: the checks below see the state that the end of the process has left.
        let owner = agent.vfs().into_iter().find(|vf| vf.bdf.to_string() == host::VF0).unwrap().owner;
        assert!(owner.is_none(), "{owner:?}");
    });
}
