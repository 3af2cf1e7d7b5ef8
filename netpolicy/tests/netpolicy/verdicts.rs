// SPDX-License-Identifier: Apache-2.0

//! The verdict of each policy on each message.

use netpolicy::{Change, PfCapabilities, PromiscuousMode, Request, SwitchState};

use crate::fixture::{ask, evaluate, host, mac, own, port_id, settings, vf, vlan};

/// Parses a request like `mac 02:00:00:00:00:09` or `vlan+ 100`.
fn request(wish: &str) -> Request {
    let (kind, value) = wish.split_once(' ').unwrap_or((wish, ""));
    let number = || value.parse::<u16>().unwrap();
    match kind {
        "reset" => Request::Reset,
        "mac" => Request::SetMac(mac(value)),
        "unicast" => Request::AddUnicastFilter(mac(value)),
        "clear" => Request::ClearUnicastFilters,
        "multicast" => Request::SetMulticast { count: number(), hashes: (0..number()).collect() },
        "vlan+" => Request::SetVlan { vid: number(), add: true },
        "vlan-" => Request::SetVlan { vid: number(), add: false },
        "frame" => Request::SetMaxFrame(value.parse().unwrap()),
        "promiscuous" => Request::SetPromiscuous(PromiscuousMode {
            multicast: value.contains('m'),
            unicast: value.contains('u'),
        }),
        "unknown" => Request::Unknown { opcode: number() },
        _ => panic!("{wish}"),
    }
}

/// The verdict of port 1 on a request: `ok` and the changes, or reason and setting.
fn verdict(state: &netpolicy::SwitchState, wish: &str) -> String {
    match evaluate(state, 1, &request(wish)) {
        Ok(changes) if changes.is_empty() => "ok".into(),
        Ok(changes) => format!("ok {}", serde_json::to_string(&changes).unwrap().replace('"', "")),
        Err(denial) => match denial.decided_by {
            Some(by) => format!("{} {}", denial.reason, by.setting),
            None => denial.reason.to_string(),
        },
    }
}

fn check(policy: &str, earlier: &[&str], wish: &str, expect: &str) {
    let mut state = host(policy);
    for wish in earlier {
        ask(&mut state, 1, &request(wish))
            .unwrap_or_else(|denial| panic!("{wish} under {policy}: {denial:?}"));
    }
    assert_eq!(verdict(&state, wish), expect, "{wish} after {earlier:?} under {policy}");
}

const DEFAULT: &str = "{}";
const BLOCKED: &str =
    r#"{"blocked": true, "mac_changes": "accept", "promiscuous": "accept", "vlan": {"trunk": ["1-4094"]}}"#;
const ACCEPT: &str = r#"{"mac_changes": "accept", "unicast_limit": 2}"#;
const LIST: &str =
    r#"{"mac_changes": {"list": ["00:00:5e:00:01:00/ff:ff:ff:ff:ff:00"]}, "unicast_limit": 1}"#;

#[test]
fn addresses() {
    let x = "mac 02:00:00:00:00:09";
    check(DEFAULT, &[], x, "mac_changes_rejected mac_changes");
    check(DEFAULT, &[], "mac 02:00:00:00:00:01", "ok");
    check(DEFAULT, &[], "mac 02:00:00:00:00:02", "mac_changes_rejected mac_changes");
    check(ACCEPT, &[], x, "ok [{set_mac:02:00:00:00:00:09}]");
    check(ACCEPT, &[x], x, "ok");
    check(ACCEPT, &[x], "mac 02:00:00:00:00:01", "ok [{set_mac:02:00:00:00:00:01}]");
    check(ACCEPT, &[], "mac 02:00:00:00:00:02", "mac_in_use");
    check(ACCEPT, &[], "mac 00:00:00:00:00:00", "mac_invalid");
    check(ACCEPT, &[], "mac 01:00:5e:00:00:01", "mac_invalid");
    check(ACCEPT, &[], "mac ff:ff:ff:ff:ff:ff", "mac_invalid");
    check(LIST, &[], "mac 00:00:5e:00:01:07", "ok [{set_mac:00:00:5e:00:01:07}]");
    check(LIST, &["mac 00:00:5e:00:01:07"], "mac 02:00:00:00:00:01", "ok [{set_mac:02:00:00:00:00:01}]");
    check(LIST, &[], "mac 00:00:5e:00:02:07", "mac_not_allowed mac_changes");
    check(LIST, &[], "mac 00:00:00:00:00:00", "mac_invalid");
    check(BLOCKED, &[], x, "port_blocked blocked");
    check(BLOCKED, &[], "mac 02:00:00:00:00:01", "ok");
}

#[test]
fn further_addresses() {
    let (a, b) = ("unicast 02:00:00:00:00:0a", "unicast 02:00:00:00:00:0b");
    check(DEFAULT, &[], a, "mac_changes_rejected mac_changes");
    check(DEFAULT, &[], "clear", "ok");
    check(r#"{"mac_changes": "accept"}"#, &[], a, "limit_exceeded unicast_limit");
    check(ACCEPT, &[], a, "ok [{add_unicast:02:00:00:00:00:0a}]");
    check(ACCEPT, &[a], a, "ok");
    check(ACCEPT, &[a, "reset"], a, "ok");
    check(ACCEPT, &[a, b], "unicast 02:00:00:00:00:0c", "limit_exceeded unicast_limit");
    check(ACCEPT, &[a, b, "clear"], "unicast 02:00:00:00:00:0c", "ok [{add_unicast:02:00:00:00:00:0c}]");
    check(ACCEPT, &[a], "clear", "ok [clear_unicast]");
    check(ACCEPT, &[a, "reset"], "clear", "ok [clear_unicast]");
    check(ACCEPT, &[], "unicast 02:00:00:00:00:01", "ok");
    check(ACCEPT, &[], "unicast 02:00:00:00:00:02", "mac_in_use");
    check(ACCEPT, &[], "unicast 01:00:5e:00:00:01", "mac_invalid");
    check(LIST, &[], a, "mac_not_allowed mac_changes");
    check(LIST, &[], "unicast 00:00:5e:00:01:01", "ok [{add_unicast:00:00:5e:00:01:01}]");
    check(BLOCKED, &[], a, "port_blocked blocked");
    check(BLOCKED, &[], "clear", "ok");
}

#[test]
fn multicast() {
    check(DEFAULT, &[], "multicast 2", "ok [{set_multicast:[0,1]}]");
    // An empty list is a change only after another one.
    check(DEFAULT, &[], "multicast 0", "ok");
    check(DEFAULT, &["multicast 1"], "multicast 0", "ok [{set_multicast:[]}]");
    check(DEFAULT, &["multicast 1", "multicast 0"], "multicast 0", "ok");
    check(DEFAULT, &[], "multicast 31", "limit_exceeded multicast_limit");
    check(r#"{"multicast_limit": 1}"#, &[], "multicast 2", "limit_exceeded multicast_limit");
    check(r#"{"multicast_limit": 0}"#, &[], "multicast 0", "ok");
    // Promiscuous mode has its own message, even where the policy accepts it.
    check(r#"{"promiscuous": "accept"}"#, &[], "multicast 31", "limit_exceeded multicast_limit");
    check(BLOCKED, &[], "multicast 1", "port_blocked blocked");
    check(BLOCKED, &[], "multicast 0", "ok");

    let state = host(DEFAULT);
    let claims = |count, carried| {
        evaluate(&state, 1, &Request::SetMulticast { count, hashes: vec![7; carried] })
            .map_err(|d| d.reason.name())
    };
    assert_eq!(claims(2, 1), Err("malformed_message"));
    assert_eq!(claims(1, 2), Err("malformed_message"));
    assert_eq!(claims(0, 1), Err("malformed_message"));
    assert_eq!(claims(1, 31), Err("limit_exceeded"));
    assert_eq!(claims(255, 30), Err("limit_exceeded"));
}

#[test]
fn vlans() {
    let trunk = r#"{"vlan": {"trunk": ["100-200", 7]}, "vlan_limit": 2}"#;
    check(DEFAULT, &[], "vlan+ 100", "vlan_not_allowed vlan");
    check(r#"{"vlan": {"access": {"id": 100}}}"#, &[], "vlan+ 100", "vlan_not_allowed vlan");
    for policy in [DEFAULT, trunk, BLOCKED] {
        check(policy, &[], "vlan+ 0", "ok");
        check(policy, &[], "vlan- 0", "ok");
        check(policy, &[], "vlan- 100", "ok");
    }
    check(trunk, &[], "vlan+ 100", "ok [{join_vlan:100}]");
    check(trunk, &[], "vlan+ 200", "ok [{join_vlan:200}]");
    check(trunk, &[], "vlan+ 7", "ok [{join_vlan:7}]");
    for outside in ["vlan+ 6", "vlan+ 8", "vlan+ 99", "vlan+ 201", "vlan+ 4095", "vlan+ 65535", "vlan- 4095"]
    {
        check(trunk, &[], outside, "vlan_not_allowed vlan");
    }
    // A repeated join is forwarded again: the PF may have forgotten it.
    check(trunk, &["vlan+ 100"], "vlan+ 100", "ok [{join_vlan:100}]");
    check(trunk, &["vlan+ 100"], "vlan- 100", "ok [{leave_vlan:100}]");
    check(trunk, &["vlan+ 100", "vlan+ 101"], "vlan+ 102", "limit_exceeded vlan_limit");
    check(trunk, &["vlan+ 100", "vlan+ 101"], "vlan+ 101", "ok [{join_vlan:101}]");
    check(trunk, &["vlan+ 100", "vlan+ 101", "vlan- 100"], "vlan+ 102", "ok [{join_vlan:102}]");
    check(BLOCKED, &[], "vlan+ 100", "port_blocked blocked");
}

#[test]
fn vlans_of_before_a_reset_make_room() {
    let trunk = r#"{"vlan": {"trunk": ["100-200"]}, "vlan_limit": 2}"#;
    let before = ["vlan+ 100", "vlan+ 101", "reset"];
    check(trunk, &before, "vlan+ 100", "ok [{join_vlan:100}]");
    check(trunk, &before, "vlan- 101", "ok [{leave_vlan:101}]");
    check(trunk, &before, "vlan+ 102", "ok [{leave_vlan:100},{join_vlan:102}]");
    let before = ["vlan+ 100", "vlan+ 101", "reset", "vlan+ 102"];
    check(trunk, &before, "vlan+ 103", "ok [{leave_vlan:101},{join_vlan:103}]");
    let before = ["vlan+ 100", "vlan+ 101", "reset", "vlan+ 102", "vlan+ 103"];
    check(trunk, &before, "vlan+ 104", "limit_exceeded vlan_limit");
}

#[test]
fn frames() {
    check(DEFAULT, &[], "frame 1522", "ok [{set_max_frame:1522}]");
    // DPDK's driver counts two tags.
    check(DEFAULT, &[], "frame 1526", "ok [{set_max_frame:1526}]");
    check(DEFAULT, &[], "frame 1527", "mtu_exceeded mtu");
    check(DEFAULT, &[], "frame 4294967295", "mtu_exceeded mtu");
    check(DEFAULT, &[], "frame 64", "ok [{set_max_frame:64}]");
    check(DEFAULT, &[], "frame 63", "malformed_message");
    check(r#"{"mtu": 9000}"#, &[], "frame 9026", "ok [{set_max_frame:9026}]");
    check(r#"{"mtu": 9000}"#, &[], "frame 9027", "mtu_exceeded mtu");
    check(BLOCKED, &[], "frame 1522", "port_blocked blocked");
}

#[test]
fn promiscuous() {
    let (multicast, all) = (r#"{"promiscuous": "multicast"}"#, r#"{"promiscuous": "accept"}"#);
    for (policy, m, u, mu) in
        [(DEFAULT, false, false, false), (multicast, true, false, false), (all, true, true, true)]
    {
        for (wish, allowed) in [("promiscuous m", m), ("promiscuous u", u), ("promiscuous mu", mu)] {
            let verdict = verdict(&host(policy), wish);
            if allowed {
                assert!(verdict.starts_with("ok [{set_promiscuous"), "{wish} under {policy}: {verdict}");
            } else {
                assert_eq!(verdict, "promiscuous_rejected promiscuous", "{wish} under {policy}");
            }
        }
        check(policy, &[], "promiscuous", "ok");
    }
    check(all, &["promiscuous mu"], "promiscuous", "ok [{set_promiscuous:{multicast:false,unicast:false}}]");
    check(BLOCKED, &[], "promiscuous m", "port_blocked blocked");
}

#[test]
fn others() {
    for policy in [DEFAULT, BLOCKED, ACCEPT] {
        check(policy, &[], "reset", "ok [reset]");
        check(policy, &[], "unknown 4711", "unknown_message");
    }
}

#[test]
fn a_refusal_says_what_was_there_and_what_was_asked_for() {
    let mut state = host(ACCEPT);
    ask(&mut state, 1, &request("mac 02:00:00:00:00:09")).unwrap();
    let denial = evaluate(&state, 1, &request("mac 02:00:00:00:00:02")).unwrap_err();
    assert_eq!(denial.old.as_deref(), Some("02:00:00:00:00:09"));
    assert_eq!(denial.requested, "02:00:00:00:00:02");
    let answer = state.evaluate(port_id(1), &request("reset")).unwrap();
    assert_eq!(answer.effective_mac, mac("02:00:00:00:00:09"));
}

#[test]
fn guest_and_device_differ_after_a_silent_refusal_until_the_reset() {
    let mut state = host(r#"{"on_denied": "silent"}"#);
    let x = request("mac 02:00:00:00:00:09");
    let answer = state.evaluate(port_id(1), &x).unwrap();
    assert!(matches!(answer.verdict, netpolicy::Verdict::Deny(_)));
    assert_eq!(answer.on_denied, netpolicy::OnDenied::Silent);
    state.note_answer(port_id(1), &x, true).unwrap();
    let guest_and_device = |state: &netpolicy::SwitchState| {
        let port = state.port(port_id(1)).unwrap();
        (port.guest_mac, port.effective_mac())
    };
    assert_eq!(guest_and_device(&state), (mac("02:00:00:00:00:09"), own(1)));
    ask(&mut state, 1, &Request::Reset).unwrap();
    assert_eq!(guest_and_device(&state), (own(1), own(1)));
}

#[test]
fn two_ports_are_not_granted_the_same_address_while_the_adapter_is_slow() {
    let mut state = host(ACCEPT);
    let x = request("mac 02:00:00:00:00:09");
    let changes = evaluate(&state, 1, &x).unwrap();
    state.begin(port_id(1), &changes).unwrap();
    assert_eq!(evaluate(&state, 2, &x).unwrap_err().reason, netpolicy::Reason::MacInUse);
    assert!(state.begin(port_id(2), &changes).is_err());
    assert_eq!(
        state.commit(port_id(2), &changes).map_err(|e| matches!(e, netpolicy::StateError::MacInUse { .. })),
        Err(true)
    );
    state.abort(port_id(1)).unwrap();
    assert_eq!(evaluate(&state, 2, &x).unwrap(), changes);
}

#[test]
fn a_policy_that_changes_while_the_adapter_is_slow_is_put_right_by_the_commit() {
    let mut state = host(ACCEPT);
    let changes = evaluate(&state, 1, &request("mac 02:00:00:00:00:09")).unwrap();
    state.begin(port_id(1), &changes).unwrap();
    let mut strict = state.port_group(crate::fixture::GROUP).unwrap().clone();
    strict.settings = settings("{}");
    assert_eq!(state.update_port_group(strict).unwrap(), []);
    let corrections = state.commit(port_id(1), &changes).unwrap();
    assert_eq!(corrections.changes(), [Change::SetMac(own(1))]);
    assert!(corrections.list.iter().all(|step| step.revokes));
}

#[test]
fn all_is_revoked_even_what_is_on_its_way() {
    let mut state = host(
        r#"{"mac_changes": "accept", "unicast_limit": 3, "vlan": {"trunk": ["1-4094"]}, "promiscuous": "accept"}"#,
    );
    for wish in ["vlan+ 5", "reset", "vlan+ 6", "unicast 02:00:00:00:00:0a", "mac 02:00:00:00:00:09"] {
        ask(&mut state, 1, &request(wish)).unwrap();
    }
    state.begin(port_id(1), &[Change::JoinVlan(vlan(7)), Change::SetMulticast(vec![1])]).unwrap();
    let all = state.revocations_for_reboot(port_id(1)).unwrap();
    let leave = |id| Change::LeaveVlan(vlan(id));
    let rest = [Change::ClearUnicast, Change::SetMulticast(vec![]), Change::SetMac(own(1))];
    assert_eq!(all, [vec![Change::Reset, leave(5), leave(6), leave(7)], rest.to_vec()].concat());
    assert_eq!(state.restart(port_id(1)).unwrap().mac, own(1));
    assert_eq!(state.revocations_for_reboot(port_id(1)).unwrap(), [Change::Reset]);
}

/// The VF may have addresses that its vmm concealed.
#[test]
fn a_vf_that_was_trusted_is_cleared_for_the_next_tenant_whatever_its_vmm_said() {
    const UNICAST: &str = r#"{"mac_changes": "accept", "unicast_limit": 1}"#;
    const CLEARED: [Change; 3] = [Change::Reset, Change::ClearUnicast, Change::SetMaxFrame(1526)];
    let add = [Change::AddUnicast(own(9))];
    let all = |state: &SwitchState| state.revocations_for_release(port_id(1)).unwrap();
    let mut state = host(UNICAST);
    assert_eq!(all(&state), [Change::Reset], "nobody has trusted it");

    // The vmm reports that the PF refused it.
    state.begin(port_id(1), &add).unwrap();
    assert_eq!(state.commit(port_id(1), &[]).unwrap().list, []);
    assert_eq!(all(&state), CLEARED);
    assert_eq!(
        state.revocations_for_reboot(port_id(1)).unwrap(),
        [Change::Reset],
        "of its own it is not trusted again"
    );

    // The vmm reports that the PF has cleared it.
    let mut state = host(UNICAST);
    for changes in [&add[..], &[Change::ClearUnicast]] {
        state.begin(port_id(1), changes).unwrap();
        assert_eq!(state.commit(port_id(1), changes).unwrap().list, []);
    }
    assert!(state.port(port_id(1)).unwrap().device.unicast.is_empty());
    assert_eq!(all(&state), CLEARED);
    state.restart(port_id(1)).unwrap();
    assert_eq!(all(&state), CLEARED, "the vmm stays");
    state.unbind(port_id(1)).unwrap();
    state.bind(port_id(1), vf(1)).unwrap();
    assert_eq!(all(&state), [Change::Reset]);
}

#[test]
fn a_record_that_does_not_say_whether_its_vf_was_trusted_counts_as_the_policy_says() {
    for (group, cleared) in [("{}", false), (r#"{"unicast_limit": 1}"#, true)] {
        let mut state = host(group);
        let stored = serde_json::to_string(state.port(port_id(1)).unwrap()).unwrap();
        let older = stored.replace(r#","was_trusted":false"#, "");
        assert_ne!(stored, older);
        state.unbind(port_id(1)).unwrap();
        state.detach(port_id(1)).unwrap();
        state.attach(serde_json::from_str(&older).unwrap()).unwrap();
        // A later edit makes no difference.
        let mut edited = state.port_group(crate::fixture::GROUP).unwrap().clone();
        edited.settings = settings("{}");
        assert_eq!(state.update_port_group(edited).unwrap(), []);
        let all = state.revocations_for_release(port_id(1)).unwrap();
        assert_eq!(all.contains(&Change::ClearUnicast), cleared, "{group}");
    }
}

/// A driver whose request for a further address is denied does not repeat it: VRRP's backup would never get the
/// address.
#[test]
fn an_address_that_another_port_had_is_added_when_that_port_gives_it_up() {
    const VIRTUAL: &str = "unicast 00:00:5e:00:01:33";
    let policy = r#"{"mac_changes": {"list": ["00:00:5e:00:01:00/ff:ff:ff:ff:ff:00"]}, "unicast_limit": 1}"#;
    let refuse = |state: &mut SwitchState, wish: &str| {
        let reason = ask(state, 2, &request(wish)).unwrap_err().reason;
        state.note_refusal(port_id(2), &request(wish), reason).unwrap();
    };
    let due = |state: &SwitchState| state.corrections(port_id(2)).unwrap().changes();
    let offered = |state: &mut SwitchState| -> Vec<_> {
        let freed = state.take_freed();
        assert_eq!(state.take_freed(), [], "told once");
        freed.into_iter().flat_map(|(switch, mac)| state.offer(switch, mac)).collect()
    };
    let waiting = || {
        let mut state = host(policy);
        ask(&mut state, 1, &request(VIRTUAL)).unwrap();
        refuse(&mut state, VIRTUAL);
        // The limit has room for one address.
        ask(&mut state, 1, &request("mac 00:00:5e:00:01:07")).unwrap();
        refuse(&mut state, "unicast 00:00:5e:00:01:07");
        assert_eq!(state.port(port_id(2)).unwrap().device.wanted_unicast.len(), 1);
        assert_eq!((due(&state), offered(&mut state)), (vec![], vec![]), "it is not free");
        state
    };
    let added = [Change::AddUnicast(mac("00:00:5e:00:01:33"))];

    // The other driver gives it up, its VM ends, or its port goes.
    let mut state = waiting();
    ask(&mut state, 1, &request("clear")).unwrap();
    assert_eq!(due(&state), [], "it is not offered yet");
    assert_eq!((offered(&mut state), due(&state)), (vec![port_id(2)], added.to_vec()));
    state.begin(port_id(2), &added).unwrap();
    assert_eq!(state.commit(port_id(2), &added).unwrap().list, []);
    assert_eq!(state.port(port_id(2)).unwrap().device.wanted_unicast.len(), 0);
    ask(&mut state, 1, &request(VIRTUAL)).unwrap_err();
    let mut state = waiting();
    state.unbind(port_id(1)).unwrap();
    assert_eq!((offered(&mut state), due(&state)), (vec![port_id(2)], added.to_vec()));
    state.detach(port_id(1)).unwrap();
    assert_eq!(due(&state), added);

    // A driver that rewrites its list keeps its addresses.
    let mut state = waiting();
    ask(&mut state, 1, &request("clear")).unwrap();
    ask(&mut state, 1, &request(VIRTUAL)).unwrap();
    assert_eq!((offered(&mut state), due(&state)), (vec![], vec![]));

    // An address is not added if its driver no longer wants it, the policy no longer allows it, or the adapter
    // refused it.
    for wish in ["clear", "reset"] {
        let mut state = waiting();
        ask(&mut state, 2, &request(wish)).unwrap();
        ask(&mut state, 1, &request("clear")).unwrap();
        assert_eq!((offered(&mut state), due(&state)), (vec![], vec![]), "{wish}");
    }
    for tighter in [r#"{"mac_changes": "reject"}"#, r#"{"unicast_limit": 0}"#, r#"{"blocked": true}"#] {
        let mut state = waiting();
        ask(&mut state, 1, &request("clear")).unwrap();
        let _ = state.update_port(port_id(2), settings(tighter)).unwrap();
        assert_eq!(offered(&mut state), [port_id(2)]);
        assert!(!due(&state).contains(&added[0]), "{tighter}");
    }
    let mut state = waiting();
    state.forget_wanted(port_id(2), mac("00:00:5e:00:01:33")).unwrap();
    ask(&mut state, 1, &request("clear")).unwrap();
    assert_eq!((offered(&mut state), due(&state)), (vec![], vec![]));
}

/// The tables keep what the PF's driver may keep: a later edit of the policy must still revoke it.
#[test]
fn a_reset_clears_only_what_the_pf_clears() {
    let hashes = Request::SetMulticast { count: 1, hashes: vec![7] };
    let promiscuous = Request::SetPromiscuous(PromiscuousMode { multicast: true, unicast: false });
    let off = Change::SetPromiscuous(PromiscuousMode::OFF);
    let none = Change::SetMulticast(Vec::new());
    for (pf, kept) in [
        (PfCapabilities::igb_82576(), vec![]),
        (PfCapabilities::simulated(), vec![]),
        (PfCapabilities::ixgbe(), vec![off.clone()]),
        (PfCapabilities::unknown("mystery"), vec![none, off]),
    ] {
        let mut state = host(r#"{"promiscuous": "multicast"}"#);
        state.set_reset_clears("pf0", pf.reset_clears);
        ask(&mut state, 1, &hashes).unwrap();
        ask(&mut state, 1, &promiscuous).unwrap();
        assert_eq!(state.commit(port_id(1), &[Change::Reset]).unwrap().list, []);
        let left = state.revocations_for_reboot(port_id(1)).unwrap();
        assert_eq!(left, [vec![Change::Reset], kept].concat(), "{}", pf.driver);
    }
}

/// A VF that was trusted and promiscuous before this port's time still is.
#[test]
fn a_guest_can_switch_off_a_mode_that_no_reset_clears() {
    let off = Request::SetPromiscuous(PromiscuousMode::OFF);
    let change = vec![Change::SetPromiscuous(PromiscuousMode::OFF)];
    for (pf, changes) in [(PfCapabilities::igb_82576(), vec![]), (PfCapabilities::ixgbe(), change)] {
        let mut state = host("{}");
        state.set_reset_clears("pf0", pf.reset_clears);
        assert_eq!(evaluate(&state, 1, &off), Ok(changes), "{}", pf.driver);
    }
}
