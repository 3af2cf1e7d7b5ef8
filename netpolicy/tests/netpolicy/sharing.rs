// SPDX-License-Identifier: Apache-2.0

//! Addresses that ports of one VM share.

use netpolicy::{Change, Port, PortGroup, Request, Setting, Switch, SwitchState, VfRef};

use crate::fixture::{GROUP, SWITCH, ask, evaluate, group, own, port, port_id, settings, switch};

/// Ports 1 to 3 of one VM, the first two on different PFs and the third on the PF of the first, and port 4 of another VM.
fn bonded(group_settings: &str) -> SwitchState {
    let mut state = SwitchState::new();
    let two = Switch { uplinks: ["pf0".into(), "pf1".into()].into(), ..switch(SWITCH, "switch", "pf0") };
    state.add_switch(two).unwrap();
    state.add_port_group(group(GROUP, "web", SWITCH, settings(group_settings))).unwrap();
    for (n, vm, pf) in [(1, 1, "pf0"), (2, 1, "pf1"), (3, 1, "pf0"), (4, 4, "pf1")] {
        let initial = own(u8::try_from(n).unwrap());
        let vm = port(vm, GROUP, initial).vm;
        state.attach(Port { vm, adapter: format!("eth{n}"), ..port(n, GROUP, initial) }).unwrap();
        state.bind(port_id(n), VfRef { pf: pf.into(), index: n }).unwrap();
    }
    state
}

fn set_group(state: &mut SwitchState, group_settings: &str) -> Vec<(u32, Vec<Change>)> {
    let group = PortGroup { settings: settings(group_settings), ..state.port_group(GROUP).unwrap().clone() };
    let due = state.update_port_group(group).unwrap().into_iter();
    due.map(|due| ((1..5).find(|n| port_id(*n) == due.port).unwrap(), due.changes())).collect()
}

const SHARING: &str = r#"{"mac_sharing": "same_vm", "unicast_limit": 1}"#;

#[test]
fn ports_of_one_vm_on_different_pfs_share_an_address_if_their_policy_says_so() {
    for policy in [r#"{"mac_changes": "accept"}"#, "{}"] {
        let denial = evaluate(&bonded(policy), 2, &Request::SetMac(own(1))).unwrap_err();
        let by = denial.decided_by.map(|by| by.setting);
        let expect = if policy == "{}" { Setting::MacChanges } else { Setting::MacSharing };
        assert_eq!(by, Some(expect), "{policy}");
    }
    // The bond's two ports have the address of the first one: nothing else is allowed, and no other guest has it.
    let mut state = bonded(SHARING);
    assert_eq!(ask(&mut state, 2, &Request::SetMac(own(1))), Ok(vec![Change::SetMac(own(1))]));
    assert_eq!(ask(&mut state, 2, &Request::SetMac(own(1))), Ok(vec![]));
    assert_eq!(state.ports_of_mac(SWITCH, own(1)).count(), 2);
    let refused = |state: &SwitchState, n, address| {
        let denial = evaluate(state, n, &Request::SetMac(own(address))).unwrap_err();
        (denial.reason.name(), denial.detail.unwrap_or_default())
    };
    assert_eq!(refused(&state, 2, 9).0, "mac_changes_rejected");
    assert_eq!(refused(&state, 2, 4).0, "mac_changes_rejected");
    let (reason, detail) = refused(&state, 3, 1);
    assert_eq!(reason, "mac_in_use");
    assert!(detail.contains("vm1/eth1 of the same VM has it, on the same PF"), "{detail}");
    assert!(set_group(&mut state, r#"{"mac_sharing": "same_vm", "mac_changes": "accept"}"#).is_empty());
    assert_eq!(refused(&state, 4, 1), ("mac_in_use", "The port vm1/eth1 has it".into()));
    // An address of neither may be shared too.
    for n in [1, 2] {
        ask(&mut state, n, &Request::SetMac(own(9))).unwrap();
    }
    assert_eq!(refused(&state, 3, 9).0, "mac_in_use");
}

#[test]
fn an_address_moves_between_the_ports_of_a_vm() {
    let mut state = bonded(SHARING);
    // As bonding's fail_over_mac=follow does: the new active port takes the address, then the old one takes the other's.
    ask(&mut state, 2, &Request::SetMac(own(1))).unwrap();
    ask(&mut state, 1, &Request::SetMac(own(2))).unwrap();
    ask(&mut state, 1, &Request::Reset).unwrap();
    let has = |state: &SwitchState, n| state.port(port_id(n)).unwrap().effective_mac();
    assert_eq!((has(&state, 1), has(&state, 2)), (own(2), own(1)));
    // Each may go back, in any order, and what one gives up stays the other's.
    ask(&mut state, 1, &Request::SetMac(own(1))).unwrap();
    assert_eq!(state.ports_of_mac(SWITCH, own(1)).count(), 2);
    state.unbind(port_id(1)).unwrap();
    let lost = state.detach(port_id(1)).unwrap();
    assert_eq!(state.ports_of_mac(SWITCH, own(1)).map(|port| port.id).collect::<Vec<_>>(), [port_id(2)]);
    // Its initial address is for its own VM only, as long as that has it.
    assert!(state.clone().attach(port(9, GROUP, own(1))).is_err());
    state.attach(lost).unwrap();
    ask(&mut state, 2, &Request::SetMac(own(2))).unwrap();
    assert_eq!(state.ports_of_mac(SWITCH, own(1)).count(), 1);
}

#[test]
fn ports_that_may_not_share_any_more_go_back() {
    let mut state = bonded(SHARING);
    ask(&mut state, 2, &Request::SetMac(own(1))).unwrap();
    let back = (2, vec![Change::SetMac(own(2))]);
    assert_eq!(set_group(&mut state.clone(), "{}"), std::slice::from_ref(&back));
    // Also where any free address is allowed.
    assert_eq!(set_group(&mut state, r#"{"mac_changes": "accept"}"#), [back]);
    assert_eq!(
        state.corrections(port_id(2)).unwrap().list[0].decided_by.unwrap().setting,
        Setting::MacSharing
    );

    let mut state = bonded(r#"{"mac_sharing": "same_vm", "mac_changes": "accept", "unicast_limit": 1}"#);
    for n in [1, 2] {
        ask(&mut state, n, &Request::AddUnicastFilter(own(9))).unwrap();
    }
    let cleared = |n| (n, vec![Change::ClearUnicast]);
    let due = set_group(&mut state, r#"{"mac_changes": "accept", "unicast_limit": 1}"#);
    assert_eq!(due, [cleared(1), cleared(2)]);
    // The first one to give it up leaves it to the other.
    assert_eq!(state.commit(port_id(1), &due[0].1).unwrap().list, []);
    assert_eq!(state.corrections(port_id(2)).unwrap().list, []);
}

#[test]
fn a_port_that_shares_nothing_keeps_its_own_to_itself() {
    let mut state = bonded(r#"{"mac_sharing": "same_vm", "mac_changes": "accept"}"#);
    let due = state.update_port(port_id(1), settings(r#"{"mac_sharing": "reject"}"#)).unwrap();
    assert_eq!(due.list, []);
    ask(&mut state, 1, &Request::SetMac(own(9))).unwrap();
    let denial = evaluate(&state, 2, &Request::SetMac(own(9))).unwrap_err();
    assert!(denial.decided_by.is_none() && denial.detail.unwrap().contains("rejects another holder"));
    // Its initial address may be taken: it can take that back any time.
    ask(&mut state, 2, &Request::SetMac(own(1))).unwrap();
    assert_eq!(ask(&mut state, 1, &Request::SetMac(own(1))), Ok(vec![Change::SetMac(own(1))]));
    // The relay asks about the addresses that only another port's being there allows.
    let strict = r#"{"mac_sharing": "same_vm"}"#;
    let standing = bonded(strict).standing_refusal(port_id(2)).unwrap().unwrap();
    assert_eq!([1, 2, 3, 4, 9].map(|n| standing.covers(own(n))), [false, false, false, true, true]);
}

#[test]
fn shared_addresses_come_back_from_the_store_in_any_order() {
    let mut state = bonded(SHARING);
    ask(&mut state, 2, &Request::SetMac(own(1))).unwrap();
    ask(&mut state, 1, &Request::SetMac(own(2))).unwrap();
    // With the second policy an edit was stored, and its corrections were not made.
    for (policy, due) in [(SHARING, 0), ("{}", 2)] {
        assert_eq!(set_group(&mut state, policy).len(), due);
        for order in [[1, 2, 3, 4], [4, 3, 2, 1]] {
            let mut restarted = SwitchState::new();
            restarted.add_switch(state.switch(SWITCH).unwrap().clone()).unwrap();
            restarted.add_port_group(state.port_group(GROUP).unwrap().clone()).unwrap();
            for n in order {
                restarted.attach(state.port(port_id(n)).unwrap().clone()).unwrap();
            }
            assert_eq!(restarted, state);
        }
    }
}
