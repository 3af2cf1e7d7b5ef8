// SPDX-License-Identifier: Apache-2.0

//! VLANs, frame sizes, multicast.

use serde_json::json;

use super::{
    Relay, agent_with, by_policy, configure, guest_in_group, raw, raw_granted, reason, spec_in_group,
    wait_for_decision, without_driver,
};
use crate::fixture::{host, registers};

pub(super) fn access_vlan(relay: Relay) {
    let agent = agent_with(relay, &json!({ "vlan": { "access": { "id": 100 } } }));
    let mut guest = agent.boot(&spec_in_group(&agent, "web1"));
    guest.wait_for_shell();
    assert_eq!(host::vf(0)["vlan_list"][0]["vlan"], json!(100), "{}", host::vf(0));
    configure(&mut guest, "10.0.2.21");
    // igb itself refuses filters to a VF with a tag: the reason shows that the policy denied it. busybox's ip does
    // not report the kernel's refusal: check that the interface does not exist.
    guest.run("ip link add link eth0 name v200 type vlan id 200");
    by_policy(guest.run("[ -e /sys/class/net/v200 ]").status != 0, "the guest's filter is refused");
    let decision = wait_for_decision(&agent, "denied", "200");
    by_policy(reason(&decision) == "vlan_not_allowed", "the refusal is the policy's");
}

#[test]
fn access_vlans_are_tagged_by_the_adapter_and_guest_filters_refused() {
    access_vlan(Relay::Policed);
}

pub(super) fn trunk(relay: Relay) {
    let agent = agent_with(relay, &json!({ "vlan": { "trunk": ["100-110"] } }));
    let mut guest = guest_in_group(&agent, "web1");
    guest.must("ip link add link eth0 name v105 type vlan id 105");
    guest.must("[ -e /sys/class/net/v105 ]");
    assert_eq!(registers::vlans_of(0), [105]);
    guest.run("ip link add link eth0 name v200 type vlan id 200");
    by_policy(guest.run("[ -e /sys/class/net/v200 ]").status != 0, "a VLAN out of range is refused");
    assert_eq!(reason(&wait_for_decision(&agent, "denied", "200")), "vlan_not_allowed");
    assert_eq!(registers::vlans_of(0), [105]);
}

#[test]
fn trunks_accept_vlans_in_range_and_refuse_others() {
    trunk(Relay::Policed);
}

pub(super) fn frames_and_multicast(relay: Relay) {
    let agent = agent_with(relay, &json!({ "mtu": 2000, "multicast_limit": 2 }));
    let mut guest = guest_in_group(&agent, "web1");
    // igbvf ignores the denial: the adapter's limit decides. 4 bytes of checksum, 4 of a tag.
    guest.must("ip link set eth0 mtu 1900");
    guest.must(super::WAIT_FOR_LINK);
    let allowed = registers::max_frame_of(0);
    assert!((1918..=1926).contains(&allowed), "{allowed}");
    guest.run("ip link set eth0 mtu 9000");
    by_policy(registers::max_frame_of(0) == allowed, "longer frames do not reach the guest");
    assert_eq!(reason(&wait_for_decision(&agent, "denied", "90")), "mtu_exceeded");

    without_driver(&mut guest);
    raw(&mut guest, "reset");
    assert!(raw_granted(&mut guest, "00020003 00020001"), "two hashes are allowed");
    by_policy(!raw_granted(&mut guest, "00030003 00020001 3"), "three are not");
    assert_eq!(reason(&wait_for_decision(&agent, "denied", "3 hashes")), "limit_exceeded");
}

#[test]
fn frame_sizes_and_multicast_are_limited() {
    frames_and_multicast(Relay::Policed);
}
