// SPDX-License-Identifier: Apache-2.0

//! Settings other than the address, revoked from a guest whose interface is down, just up, or busy with requests.
//! `address.rs` has the address, and `dpdk.rs` another driver.

use std::{thread, time::Duration};

use serde_json::{Value, json};

use super::{
    Relay, Y, agent_with, by_policy, configure, decisions, edit, eventually, ping, port, raw, raw_granted,
    spec_in_group, without_driver,
};
use crate::fixture::{Agent, Guest, host, registers};

/// 01:00:5e:01:01:23 on the adapter: 12 bits of the last two bytes. No function of the host listens to it.
const GROUP: &str = "01:00:5e:01:01:23";
const GROUP_HASH: u16 = 0x230;

/// Stock drivers do not reset twice within 10 s.
const REVOKED: Duration = Duration::from_secs(40);

/// A setting, and the use that a guest makes of it.
struct Case {
    setting: &'static str,
    granted: Value,
    revoked: Value,
    on: String,
    off: &'static str,
    /// Commands that keep the mailbox busy with requests of the same kind.
    busy: &'static str,
    /// Whether the adapter has what the guest requested.
    has: fn() -> bool,
}

fn cases() -> Vec<Case> {
    vec![
        Case {
            setting: "vlan",
            granted: json!({ "vlan": { "trunk": ["100-110"] } }),
            revoked: json!({ "vlan": { "trunk": ["200"] } }),
            on: "ip link add link eth0 name v105 type vlan id 105; ip link set v105 up".into(),
            off: "ip link del v105",
            busy: "ip link add link eth0 name v106 type vlan id 106; ip link del v106",
            has: || registers::vlans_of(0).contains(&105),
        },
        Case {
            setting: "multicast_limit",
            granted: json!({ "multicast_limit": 30 }),
            revoked: json!({ "multicast_limit": 0 }),
            on: format!("ip maddr add {GROUP} dev eth0"),
            off: "ip maddr del 01:00:5e:01:01:23 dev eth0",
            busy: "ip maddr add 01:00:5e:01:01:24 dev eth0; ip maddr del 01:00:5e:01:01:24 dev eth0",
            has: || registers::multicast_hash(GROUP_HASH),
        },
        Case {
            setting: "unicast_limit",
            granted: json!({ "mac_changes": { "list": [Y] }, "unicast_limit": 2 }),
            revoked: json!({ "unicast_limit": 0 }),
            on: format!("ip link add mv0 link eth0 address {Y} type macvlan mode bridge; ip link set mv0 up"),
            off: "ip link del mv0",
            // igbvf rewrites its whole list.
            busy: "ip link set eth0 promisc on; ip link set eth0 promisc off",
            has: || registers::addresses_of(0).contains(Y),
        },
        Case {
            setting: "mtu",
            granted: json!({ "mtu": 9000 }),
            revoked: json!({ "mtu": 1500 }),
            on: "ip link set eth0 mtu 9000".into(),
            off: "ip link set eth0 mtu 1500",
            busy: "ip link set eth0 mtu 8000; ip link set eth0 mtu 9000",
            // 1526 and a tag.
            has: || registers::max_frame_of(0) > 1530,
        },
    ]
}

fn is_revoked(agent: &Agent, setting: &str) -> bool {
    decisions(agent, "taken_back").iter().any(|decision| {
        serde_json::to_value(decision.decided_by).is_ok_and(|by| by["setting"] == json!(setting))
    })
}

/// What a guest was granted, in words, and whether the adapter has it.
type Granted = (String, fn() -> bool);

/// Each of these is revoked, none comes back, and nothing waits.
fn stay_revoked(agent: &Agent, held: &[Granted]) {
    for (what, has) in held {
        eventually(agent, REVOKED, &format!("{what} is revoked"), || !has());
    }
    eventually(agent, REVOKED, "nothing is pending", || port(agent).status.pending.is_none());
    thread::sleep(Duration::from_secs(3));
    for (what, has) in held {
        by_policy(!has(), &format!("{what} does not come back"));
    }
}

/// The settings of all cases as one change of the group.
fn all(cases: &[Case], setting: impl Fn(&Case) -> &Value) -> Value {
    cases
        .iter()
        .flat_map(|case| setting(case).as_object().unwrap().clone())
        .collect::<serde_json::Map<_, _>>()
        .into()
}

/// One edit revokes the settings of all cases: a stock driver resets every 10 s at most, whatever was revoked.
fn revoke(agent: &Agent, guest: &mut Guest<'_>, cases: &[Case], state: &str) {
    edit(agent, &all(cases, |case| &case.granted));
    for case in cases {
        guest.must(&case.on);
        eventually(
            agent,
            REVOKED,
            &format!("{} of a guest that is {state} is granted", case.setting),
            case.has,
        );
    }
    let (before, after) = match state {
        "down" => ("ip link set eth0 down".to_owned(), "sleep 1; ip link set eth0 up"),
        "just up" => ("ip link set eth0 down; ip link set eth0 up; sleep 1".to_owned(), "true"),
        _ => {
            let busy = cases.iter().map(|case| case.busy).collect::<Vec<_>>().join("; ");
            (format!("(for i in $(seq 25); do {busy}; done) >/dev/null 2>&1 & sleep 1"), "wait")
        }
    };
    guest.must(&before);
    edit(agent, &all(cases, |case| &case.revoked));
    guest.must(after);
    let held = cases.iter().map(|case| (format!("{} of a guest that is {state}", case.setting), case.has));
    stay_revoked(agent, &held.collect::<Vec<_>>());
    guest.must(super::WAIT_FOR_LINK);
    for case in cases.iter().rev() {
        guest.must(case.off);
    }
    ping(guest, host::GATEWAY, 3);
}

/// All multicast frames: Linux's driver has no such request, so the guest sends it by itself.
fn revoke_all_multicast(agent: &Agent, guest: &mut Guest<'_>) {
    let has: fn() -> bool = || registers::all_multicast(0);
    without_driver(guest);
    for state in ["down", "just up", "busy"] {
        let what = format!("all multicast of a guest that is {state}");
        edit(agent, &json!({ "promiscuous": "multicast" }));
        raw(guest, "reset");
        assert!(raw_granted(guest, "00020006"), "{what}");
        eventually(agent, REVOKED, &format!("{what} is granted"), has);
        match state {
            // A device reset, after which the PF takes no message but RESET.
            "down" => drop(raw(guest, "abort 1")),
            "just up" => {}
            _ => drop(guest.must("(vf-mailbox $(cat /run/vf) flood 4 >/dev/null 2>&1 &); sleep 1")),
        }
        edit(agent, &json!({ "promiscuous": "reject" }));
        if state == "busy" {
            guest.must("sleep 5");
        }
        raw(guest, "reset");
        stay_revoked(agent, &[(what.clone(), has)]);
        by_policy(!raw_granted(guest, "00020006"), &format!("{what} is denied"));
    }
}

#[test]
fn every_setting_is_revoked_from_a_guest_that_is_down_or_just_up_or_busy() {
    let agent = agent_with(Relay::Policed, &json!({}));
    let mut spec = spec_in_group(&agent, "web1");
    let initramfs = host::initramfs_of_programs("revoked", &["macvlan"], &["ip"], &[]);
    spec["boot"]["initramfs"] = json!(agent.link_image("revoked", &initramfs));
    let mut guest = agent.boot(&spec);
    guest.wait_for_shell();
    // The guest's shell prefers its own applet.
    guest.must("ip() { /bin/ip \"$@\"; }");
    configure(&mut guest, "10.0.2.21");
    let cases = cases();
    for state in ["down", "just up", "busy"] {
        revoke(&agent, &mut guest, &cases, state);
    }
    for case in &cases {
        assert!(is_revoked(&agent, case.setting), "{} has a record", case.setting);
    }
    revoke_all_multicast(&agent, &mut guest);
    assert!(is_revoked(&agent, "promiscuous"));
    assert!(agent.vm("web1").status.pid.is_some(), "its process has confirmed all revocations");
}
