// SPDX-License-Identifier: Apache-2.0

//! Adding, changing and removing switches, groups and ports.

use netpolicy::{Change, MacAddress, PortGroupId, Route, StateError, SwitchId, SwitchState, VfRef};
use uuid::Uuid;

use crate::fixture::{GROUP, SWITCH, ask, group, host, own, port, port_id, settings, switch, vf, vlan};

const OTHER_SWITCH: SwitchId = SwitchId(Uuid::from_u128(0x55));
const OTHER_GROUP: PortGroupId = PortGroupId(Uuid::from_u128(0x66));

/// A refused change leaves the tables unchanged.
fn refused<T: std::fmt::Debug>(change: impl FnOnce(&mut SwitchState) -> Result<T, StateError>) -> String {
    let mut state = host("{}");
    state.add_switch(switch(OTHER_SWITCH, "other", "pf1")).unwrap();
    let before = state.clone();
    let error = change(&mut state).unwrap_err();
    assert_eq!(state, before, "{error}");
    error.to_string()
}

#[test]
fn what_is_used_or_taken_stays() {
    let named = |id, name: &str, pf: &str| switch(SwitchId(Uuid::from_u128(id)), name, pf);
    for (error, expect) in [
        (refused(|s| s.remove_port_group(GROUP)), "Port group web is used by port"),
        (refused(|s| s.remove_switch(SWITCH)), "Switch switch is used by port group web"),
        (refused(|s| s.detach(port_id(1))), "has a VF"),
        (refused(|s| s.detach(port_id(9))), "does not exist"),
        (refused(|s| s.add_switch(named(9, "switch", "pf9"))), "exists already"),
        (refused(|s| s.add_switch(named(9, "nine", "pf0"))), "Uplink pf0 is used by switch switch"),
        (refused(|s| s.add_switch(named(5, "nine", "pf9"))), "exists already"),
        (refused(|s| s.update_switch(named(9, "nine", "pf9"))), "does not exist"),
        (refused(|s| s.update_switch(named(5, "other", "pf0"))), "exists already"),
        (refused(|s| s.update_switch(named(5, "switch", "pf9"))), "Uplink pf0 is used by port"),
        (refused(|s| s.update_switch(named(5, "switch", "pf1"))), "Uplink pf1 is used by switch other"),
        (
            refused(|s| s.add_port_group(group(OTHER_GROUP, "web", OTHER_SWITCH, settings("{}")))),
            "exists already",
        ),
        (refused(|s| s.add_port_group(group(GROUP, "new", SWITCH, settings("{}")))), "exists already"),
        (
            refused(|s| s.add_port_group(group(OTHER_GROUP, "db", SwitchId(Uuid::nil()), settings("{}")))),
            "does not exist",
        ),
        (
            refused(|s| s.update_port_group(group(GROUP, "web", OTHER_SWITCH, settings("{}")))),
            "is used by port",
        ),
        (
            refused(|s| s.update_port_group(group(OTHER_GROUP, "db", SWITCH, settings("{}")))),
            "does not exist",
        ),
        (refused(|s| s.attach(port(1, GROUP, own(9)))), "exists already"),
        (refused(|s| s.attach(port(9, OTHER_GROUP, own(9)))), "does not exist"),
        (refused(|s| s.attach(port(9, GROUP, own(2)))), "in use by port"),
        (refused(|s| s.attach(port(9, GROUP, MacAddress::ZERO))), "unicast and not zero"),
        (refused(|s| s.attach(port(9, GROUP, MacAddress::new([1, 0, 0, 0, 0, 1])))), "unicast and not zero"),
        (refused(|s| s.bind(port_id(1), vf(7))), "has a VF"),
        (refused(|s| s.begin(port_id(1), &[Change::SetMac(own(2))])), "in use by port"),
        (refused(|s| s.commit(port_id(1), &[Change::SetMac(own(2))])), "in use by port"),
    ] {
        assert!(error.contains(expect), "{error:?} does not say {expect:?}");
    }
}

#[test]
fn a_vf_belongs_to_one_port_and_its_pf_to_the_switch() {
    let mut state = host("{}");
    state.attach(port(3, GROUP, own(3))).unwrap();
    assert!(matches!(state.bind(port_id(3), vf(1)), Err(StateError::InUse { .. })));
    let foreign = VfRef { pf: "pf9".into(), index: 0 };
    assert!(matches!(state.bind(port_id(3), foreign), Err(StateError::NotAnUplink { .. })));
    assert_eq!(state.unbind(port_id(1)).unwrap(), vf(1));
    assert_eq!(state.port_of_vf(&vf(1)), None);
    assert_eq!(state.bind(port_id(3), vf(1)).unwrap().mac, own(3));
    assert_eq!(state.port_of_vf(&vf(1)).map(|p| p.id), Some(port_id(3)));
    assert_eq!(state.detach(port_id(1)).unwrap().id, port_id(1));
    assert_eq!(state.ports_of_mac(SWITCH, own(1)).count(), 0);
    assert!(matches!(state.unbind(port_id(1)), Err(StateError::NoPort(_))));
}

#[test]
fn switches_do_not_share_addresses() {
    let mut state = host("{}");
    state.add_switch(switch(OTHER_SWITCH, "other", "pf1")).unwrap();
    state.add_port_group(group(OTHER_GROUP, "db", OTHER_SWITCH, settings("{}"))).unwrap();
    state.attach(port(9, OTHER_GROUP, own(1))).unwrap();
    let holders = |switch| state.ports_of_mac(switch, own(1)).map(|port| port.id).collect::<Vec<_>>();
    assert_eq!((holders(OTHER_SWITCH), holders(SWITCH)), (vec![port_id(9)], vec![port_id(1)]));
}

#[test]
fn a_stored_port_comes_back_with_all_that_its_vf_has() {
    let mut state = host(r#"{"mac_changes": "accept", "unicast_limit": 3, "vlan": {"trunk": ["1-9"]}}"#);
    ask(&mut state, 1, &netpolicy::Request::SetMac(own(0x11))).unwrap();
    ask(&mut state, 1, &netpolicy::Request::SetVlan { vid: 5, add: true }).unwrap();
    let stored = serde_json::to_string(state.port(port_id(1)).unwrap()).unwrap();

    let mut restarted = SwitchState::new();
    restarted.set_reset_clears("pf0", netpolicy::PfCapabilities::igb_82576().reset_clears);
    restarted.add_switch(state.switch(SWITCH).unwrap().clone()).unwrap();
    restarted.add_port_group(state.port_group(GROUP).unwrap().clone()).unwrap();
    restarted.attach(state.port(port_id(2)).unwrap().clone()).unwrap();
    restarted.attach(serde_json::from_str(&stored).unwrap()).unwrap();
    assert_eq!(restarted, state);
    assert_eq!(restarted.corrections(port_id(1)).unwrap().list, []);
}

#[test]
fn the_baseline_is_the_policy_with_the_initial_address() {
    let mut state = host(
        r#"{"mac_changes": "accept", "forged_transmits": "accept", "vlan": {"access": {"id": 10, "qos": 3}},
            "rate": {"max_tx_mbit": 100}, "blocked": false}"#,
    );
    ask(&mut state, 1, &netpolicy::Request::SetMac(own(0x11))).unwrap();
    let text = serde_json::to_value(state.baseline(port_id(1)).unwrap()).unwrap();
    let expect = serde_json::json!({"mac": "02:00:00:00:00:01", "port_vlan": {"id": 10, "qos": 3}, "spoof_check": false,
        "trust": false, "max_tx_rate": 100, "link": "auto"});
    assert_eq!(text, expect);
    let expected = state.expected(port_id(1)).unwrap();
    assert_eq!(expected, state.port(port_id(1)).unwrap().device.pf);
    assert!(expected.changes().iter().all(|change| change.route() == Route::Pf));
    assert!(expected.changes().contains(&Change::SetMac(own(0x11))));
}

#[test]
fn a_tightened_group_takes_back_in_order() {
    let mut state = host(
        r#"{"mac_changes": "accept", "unicast_limit": 3, "vlan": {"trunk": ["1-9"]}, "forged_transmits": "accept",
            "promiscuous": "accept", "mtu": 9000}"#,
    );
    let promiscuous = netpolicy::PromiscuousMode { multicast: true, unicast: true };
    for request in [
        netpolicy::Request::SetMac(own(0x11)),
        netpolicy::Request::AddUnicastFilter(own(0x12)),
        netpolicy::Request::SetVlan { vid: 5, add: true },
        netpolicy::Request::SetMulticast { count: 3, hashes: vec![1, 2, 3] },
        netpolicy::Request::SetMaxFrame(9022),
        netpolicy::Request::SetPromiscuous(promiscuous),
    ] {
        ask(&mut state, 1, &request).unwrap();
    }
    let strict =
        settings(r#"{"vlan": {"access": {"id": 10}}, "multicast_limit": 2, "promiscuous": "multicast"}"#);
    let corrections = state.update_port_group(group(GROUP, "web", SWITCH, strict)).unwrap();
    let [first, second] = corrections.as_slice() else { panic!("{corrections:?}") };
    let access = Change::SetPortVlan(Some(netpolicy::AccessVlan { id: vlan(10), qos: Default::default() }));
    let expect = [
        Change::SetMac(own(1)),
        Change::SetSpoofCheck(true),
        Change::LeaveVlan(vlan(5)),
        Change::ClearUnicast,
        Change::SetMulticast(vec![1, 2]),
        Change::SetPromiscuous(netpolicy::PromiscuousMode { multicast: true, unicast: false }),
        Change::SetMaxFrame(1526),
        access.clone(),
    ];
    assert_eq!((first.port, first.changes()), (port_id(1), expect.to_vec()));
    assert_eq!((second.port, second.changes()), (port_id(2), vec![Change::SetSpoofCheck(true), access]));
    assert_eq!(first.list[0].old, "02:00:00:00:00:11");
    assert_eq!(state.commit(port_id(1), &first.changes()).unwrap().list, []);
    assert_eq!(state.port(port_id(1)).unwrap().guest_mac, own(0x11), "the guest has not been told");
}

/// No reset shortens the longest frame that a VF receives: the next tenant's policy may allow less.
#[test]
fn the_longest_frame_of_a_tenant_goes_with_it() {
    let long = netpolicy::Request::SetMaxFrame(9022);
    let mut state = host(r#"{"mtu": 9000, "vlan": {"trunk": ["1-9"]}}"#);
    let left = |state: &SwitchState| state.revocations_for_release(port_id(1)).unwrap();
    let short = Change::SetMaxFrame(1526);
    assert_eq!(left(&state), [Change::Reset]);
    ask(&mut state, 1, &netpolicy::Request::SetMaxFrame(1518)).unwrap();
    assert_eq!(left(&state), [Change::Reset], "nothing is left of that");
    state.begin(port_id(1), &[Change::SetMaxFrame(9022)]).unwrap();
    assert_eq!(left(&state), [Change::Reset, short.clone()], "it may have been made");
    state.abort(port_id(1)).unwrap();
    ask(&mut state, 1, &long).unwrap();
    assert_eq!(left(&state), [Change::Reset, short.clone()]);
    assert_eq!(
        state.revocations_for_reboot(port_id(1)).unwrap(),
        [Change::Reset],
        "a reboot is the same tenant's"
    );
    state.unbind(port_id(1)).unwrap();
    state.bind(port_id(1), vf(1)).unwrap();
    ask(&mut state, 1, &netpolicy::Request::SetVlan { vid: 5, add: true }).unwrap();
    assert_eq!(left(&state), [Change::Reset, Change::LeaveVlan(vlan(5)), short]);
}

#[test]
fn a_loosened_group_gives() {
    let mut state = host("{}");
    let loose = settings(r#"{"forged_transmits": "accept", "rate": {"max_tx_mbit": 10}}"#);
    let corrections = state.update_port_group(group(GROUP, "web", SWITCH, loose)).unwrap();
    let rate = Change::SetMaxTxRate(std::num::NonZeroU32::new(10));
    assert_eq!(corrections[0].changes(), [Change::SetSpoofCheck(false), rate]);
    assert!(corrections.iter().flat_map(|c| &c.list).all(|step| !step.revokes));
}
