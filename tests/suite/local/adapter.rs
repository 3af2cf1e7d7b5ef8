// SPDX-License-Identifier: Apache-2.0

//! Guests with simulated VFs: the whole path of frames and of requests.

use std::time::{Duration, Instant};

use api::types::{PortGroupSpec, VmAction, VmState};
use serde_json::{Value, json};

use crate::fixture::{Agent, Guest, Options, SmallGuest};

const ALICE: &str = "02:00:00:00:0a:01";
const BOB: &str = "02:00:00:00:0b:01";

pub(super) fn start() -> Agent {
    Agent::start_with(Options { arguments: vec!["--sim-pf".into(), "sim0=4".into()], ..Options::default() })
}

pub(super) fn port_group(agent: &Agent, settings: Value) {
    let spec = json!({"switch": "default", "settings": settings});
    let spec: PortGroupSpec = serde_json::from_value(spec).unwrap();
    agent.ask(agent.client.put_port_group("tests", &spec, None)).unwrap();
}

/// A guest in the port group `tests`, with its queues up and an address of its own.
fn guest<'a>(agent: &'a Agent, name: &str, mac: &str, ip: &str) -> SmallGuest<'a> {
    let adapters = json!([{"id": "eth0", "port_group": "tests", "mac": mac}]);
    let mut guest = SmallGuest::boot(agent, name, adapters);
    bring_up(&mut guest, mac, ip);
    guest
}

fn bring_up(guest: &mut SmallGuest<'_>, mac: &str, ip: &str) {
    assert_eq!(guest.ask("up"), format!("ok mac={mac} reply={mac}"));
    assert_eq!(guest.ask(&format!("address {ip}")), "ok");
}

fn pair(agent: &Agent) -> [SmallGuest<'_>; 2] {
    [guest(agent, "alice", ALICE, "10.0.0.1"), guest(agent, "bob", BOB, "10.0.0.2")]
}

fn assert_talks(guest: &mut SmallGuest<'_>, ip: &str) {
    let result = guest.ask(&format!("ping {ip} count=5 size=500"));
    assert!(result.starts_with("sent=5 received=5 lost=0 "), "{result}");
}

#[test]
fn two_guests_talk_and_interrupts_wake_them() {
    let agent = start();
    port_group(&agent, json!({}));
    let [mut alice, mut bob] = pair(&agent);
    assert_eq!(alice.ask("link"), "up");
    assert_talks(&mut alice, "10.0.0.2");
    assert_talks(&mut bob, "10.0.0.1");
    // Vectors are routed by igbvf's numbering.
    let interrupts = alice.ask("interrupts");
    for kind in ["transmit", "receive", "mailbox"] {
        assert!(!interrupts.contains(&format!("{kind}=0")), "{interrupts}");
    }
    let frame = |from: &str, to: &str, text: &str| format!("{from}>{to} type=0x88b5 len=60 text={text}");
    alice.ask(&format!("send dst={BOB} text=hello"));
    assert_eq!(bob.ask("expect 2000 text=hello"), frame(ALICE, BOB, "hello"));
    alice.ask("send dst=ff:ff:ff:ff:ff:ff text=all");
    assert_eq!(bob.ask("expect 2000 text=all"), frame(ALICE, "ff:ff:ff:ff:ff:ff", "all"));

    let stats = agent.stats("alice");
    let device = stats.devices.values().next().unwrap();
    assert_eq!(device.mailbox.get("reset:forwarded"), Some(&1), "{:?}", device.mailbox);
}

#[test]
fn frames_reach_those_who_may_have_them() {
    let agent = start();
    port_group(&agent, json!({"vlan": {"trunk": ["100-200"]}}));
    let [mut alice, mut bob] = pair(&agent);
    let cases = [
        // The destination, and the result before and after bob has requested groups and VLANs.
        ("dst=02:00:00:00:0c:01", "none", "none"),
        ("dst=01:00:5e:00:37:07", "none", "len=60"),
        ("dst=01:00:5e:00:57:07", "none", "none"),
        ("dst=02:00:00:00:0b:01 vlan=100", "none", "vlan=100"),
        ("dst=02:00:00:00:0b:01 tag=100", "none", "vlan=100"),
        ("dst=02:00:00:00:0b:01 vlan=150", "none", "none"),
        ("dst=02:00:00:00:0b:01 src=02:00:00:00:0c:01", "none", "none"),
        ("dst=02:00:00:00:0b:01", "len=60", "len=60"),
    ];
    for (send, before, _) in cases {
        assert_eq!(seen(&mut alice, &mut bob, send), before, "{send}");
    }
    for (command, result) in [
        ("multicast 01:00:5e:00:37:07", "ok"),
        ("vlan add 100", "ok"),
        ("vlan add 300", "nack"),
        ("promiscuous multicast", "nack"),
        ("frame-size 9000", "nack"),
        ("mac-filter add 02:00:00:00:0c:01", "nack"),
    ] {
        assert_eq!(bob.ask(command), result, "{command}");
    }
    assert_eq!(alice.ask("vlan add 100"), "ok");
    for (send, _, after) in cases {
        assert_eq!(seen(&mut alice, &mut bob, send), after, "{send}");
    }
}

/// Bob's view of a frame that alice sends: its tag, else its length.
fn seen(alice: &mut SmallGuest<'_>, bob: &mut SmallGuest<'_>, send: &str) -> String {
    bob.ask("forget");
    assert_eq!(alice.ask(&format!("send {send} text=x")), "ok sent=1");
    let frame = bob.ask("expect 300 text=x");
    let what = frame.split_whitespace().find(|word| word.starts_with("vlan=") || word.starts_with("len="));
    what.unwrap_or("none").to_owned()
}

#[test]
fn an_adapter_works_again_after_every_kind_of_reset() {
    let agent = start();
    port_group(&agent, json!({"mac_changes": "accept"}));
    let [mut alice, mut bob] = pair(&agent);
    for way in ["reboot", "triple-fault"] {
        assert_eq!(alice.ask("set-mac 02:00:00:00:0a:99"), "ok");
        assert_eq!(alice.ask(way), "ok");
        alice.wait_for_ready();
        // A boot begins with the address of the adapter's specification.
        bring_up(&mut alice, ALICE, "10.0.0.1");
        assert_talks(&mut bob, "10.0.0.1");
    }
    agent.act("alice", VmAction::Stop).unwrap();
    agent.act("alice", VmAction::Boot).unwrap();
    alice.guest.begin_anew();
    alice.wait_for_ready();
    bring_up(&mut alice, ALICE, "10.0.0.1");
    assert_talks(&mut bob, "10.0.0.1");
}

#[test]
fn what_a_hostile_guest_does_to_its_vf_hurts_nobody_else() {
    let agent = start();
    port_group(&agent, json!({}));
    let [mut mallory, mut bob] = pair(&agent);
    let mut carol = guest(&agent, "carol", "02:00:00:00:0c:01", "10.0.0.3");
    for command in ["rings", "indices", "buffers", "endless", "messages", "resets", "widths"] {
        assert_eq!(mallory.ask(&format!("hostile {command}")), "ok", "{command}");
        assert_talks(&mut bob, "10.0.0.3");
    }
    for (seed, what) in (1..).zip(["mailbox", "registers", "vectors", "config", "all"]) {
        let result = mallory.ask(&format!("fuzz {what} seed={seed} steps=1000"));
        assert_eq!(result, "ok steps=1000", "{what}");
        assert_talks(&mut carol, "10.0.0.2");
    }
    // The guest was throttled, and then works as before.
    assert_eq!(mallory.ask("wait 1500"), "ok");
    assert_eq!(mallory.ask("down-up"), format!("ok mac={ALICE} reply={ALICE}"));
    assert_talks(&mut bob, "10.0.0.1");
    for vm in ["alice", "bob", "carol"] {
        assert_eq!(agent.vm(vm).status.state, VmState::Running, "{vm}");
    }
}

/// A virtual router's address: VRRP's backup requests it at its start, and its driver does not repeat the request.
#[test]
fn an_address_moves_to_the_guest_that_waits_for_it() {
    const VIRTUAL: &str = "00:00:5e:00:01:33";
    let agent = start();
    port_group(
        &agent,
        json!({"mac_changes": {"list": ["00:00:5e:00:01:00/ff:ff:ff:ff:ff:00"]}, "unicast_limit": 1}),
    );
    let [mut master, mut backup] = pair(&agent);
    let mut other = guest(&agent, "carol", "02:00:00:00:0c:01", "10.0.0.3");
    let add = format!("mac-filter add {VIRTUAL}");
    assert_eq!((master.ask(&add), backup.ask(&add)), ("ok".into(), "nack".into()));
    let mut arrives = |guest: &mut SmallGuest<'_>| {
        guest.ask("forget");
        other.ask(&format!("send dst={VIRTUAL} text=x"));
        guest.ask("expect 300 text=x") != "none"
    };
    // The master's driver rewrites its list, as Linux' does whenever a group is joined: it keeps the address.
    assert_eq!((master.ask("mac-filter clear"), master.ask(&add)), ("ok".into(), "ok".into()));
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!((arrives(&mut master), arrives(&mut backup)), (true, false));

    agent.act("alice", VmAction::Stop).unwrap();
    let begun = Instant::now();
    while !arrives(&mut backup) {
        assert!(begun.elapsed() < Duration::from_secs(20), "the backup never gets the address");
    }
    // An address that its driver has given up meanwhile is not added.
    assert_eq!(backup.ask("mac-filter clear"), "ok");
    let mut master = guest(&agent, "dave", "02:00:00:00:0d:01", "10.0.0.4");
    assert_eq!(
        (master.ask(&add), backup.ask(&add), backup.ask("mac-filter clear")),
        ("ok".into(), "nack".into(), "ok".into())
    );
    agent.act("dave", VmAction::Stop).unwrap();
    std::thread::sleep(Duration::from_secs(4));
    assert!(!arrives(&mut backup), "nobody wants the address");
}

/// A driver ignores the answers to its lists, and does not repeat them.
#[test]
fn lists_that_a_guest_sets_while_the_agent_is_away_are_set_when_it_is_back() {
    const ANOTHER: &str = "02:00:00:00:0b:02";
    const GROUP: &str = "01:00:5e:00:37:07";
    let lists = [format!("mac-filter add {ANOTHER}"), format!("multicast {GROUP}")];
    let mut agent = start();
    port_group(&agent, json!({"mac_changes": "accept", "unicast_limit": 1}));
    {
        let [_alice, bob] = pair(&agent);
        bob.guest.type_line(&format!("wait 1000; {}", lists.join("; ")));
        std::thread::sleep(Duration::from_millis(300));
    }
    agent.kill();
    std::thread::sleep(Duration::from_secs(3));
    agent.restart();
    let [mut alice, mut bob] =
        ["alice", "bob"].map(|name| SmallGuest { guest: Guest::new(&agent, name.to_owned()) });
    for list in &lists {
        assert_eq!(bob.result(list), "nack", "{list}");
    }
    let begun = Instant::now();
    for to in [ANOTHER, GROUP] {
        while seen(&mut alice, &mut bob, &format!("dst={to}")) != "len=60" {
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "the guest never receives what is sent to {to}"
            );
        }
    }
}
