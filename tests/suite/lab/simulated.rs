// SPDX-License-Identifier: Apache-2.0

//! Debian's own igbvf on simulated VFs: the parts of the model that it needs. The test guest's tests (`local`) show
//! the rest.

use serde_json::{Value, json};

use super::{
    WAIT_FOR_LINK, bare_spec, configure, ping,
    policy::{down_up, eventually},
};
use crate::fixture::{Agent, Guest, Options, agent::PATIENCE, host};

const TAP: &str = "simtap0";
const HOST: &str = "10.9.0.1";

const ALICE: Who = Who { name: "alice", mac: "02:00:00:00:0a:01", ip: "10.9.0.2" };
const BOB: Who = Who { name: "bob", mac: "02:00:00:00:0b:01", ip: "10.9.0.3" };
const OTHER: &str = "02:00:00:00:0a:99";

struct Who {
    name: &'static str,
    mac: &'static str,
    ip: &'static str,
}

/// An agent with a simulated adapter whose uplink is a tap device of the host, and a port group with these settings.
fn agent(settings: &Value) -> Agent {
    let arguments = ["--sim-pf".to_owned(), format!("sim0=2,tap={TAP}")].into();
    let agent = Agent::start_with(Options { arguments, ..Options::default() });
    host::run("ip", &["addr", "add", &format!("{HOST}/24"), "dev", TAP]);
    host::run("ip", &["link", "set", TAP, "up"]);
    let switch = serde_json::from_value(json!({ "uplinks": ["sim0"] })).unwrap();
    agent.ask(agent.client.put_switch("sim", &switch, None)).unwrap();
    let group = serde_json::from_value(json!({ "switch": "sim", "settings": settings })).unwrap();
    agent.ask(agent.client.put_port_group("sim", &group, None)).unwrap();
    agent
}

/// Both guests, their interfaces up.
fn alice_and_bob(agent: &Agent) -> [Guest<'_>; 2] {
    let [mut alice, mut bob] = [ALICE, BOB].map(|who| {
        let mut spec = bare_spec(agent, who.name);
        spec["adapters"] = json!([{ "id": "eth0", "port_group": "sim", "mac": who.mac }]);
        agent.boot(&spec)
    });
    for (guest, who) in [(&mut alice, ALICE), (&mut bob, BOB)] {
        guest.wait_for_shell();
        assert_eq!(mac(guest), who.mac, "the PF tells the address");
        configure(guest, who.ip);
    }
    [alice, bob]
}

fn mac(guest: &mut Guest<'_>) -> String {
    guest.must("cat /sys/class/net/eth0/address")
}

/// Frames that the guest has received.
fn packets(guest: &mut Guest<'_>) -> u64 {
    guest.must("cat /sys/class/net/eth0/statistics/rx_packets").parse().unwrap()
}

#[test]
fn the_stock_driver_probes_talks_and_is_bound_again() {
    let agent = agent(&json!({}));
    let [mut alice, mut bob] = alice_and_bob(&agent);
    let driver = "basename $(readlink /sys/class/net/eth0/device/driver)";
    assert_eq!(alice.must(driver), "igbvf");
    ping(&mut alice, BOB.ip, 10);
    ping(&mut bob, ALICE.ip, 10);
    ping(&mut alice, HOST, 10);
    host::ping(BOB.ip);

    // The adapter cuts long packets, and computes their checksums.
    alice.must("mkdir /run/www; dd if=/dev/urandom of=/run/www/file bs=64k count=16 2>/dev/null");
    alice.must("httpd -h /run/www");
    let sum = alice.must("md5sum /run/www/file").split(' ').next().unwrap().to_owned();
    let url = format!("http://{}/file", ALICE.ip);
    let got = bob.must(&format!("wget -q -O /run/file {url}; md5sum /run/file"));
    assert!(got.starts_with(&sum), "{got}");
    let file = std::env::temp_dir().join("simulated-file");
    let file = file.to_str().unwrap();
    host::busybox(&["wget", "-q", "-O", file, &url]);
    let got = host::busybox(&["md5sum", file]);
    assert!(got.starts_with(&sum), "{got}");

    // All three vectors work.
    let interrupts = alice.must("grep eth0 /proc/interrupts");
    let counts: Vec<u64> =
        interrupts.lines().filter_map(|line| line.split_whitespace().nth(1)?.parse().ok()).collect();
    assert!(counts.len() == 3 && counts.iter().all(|count| *count > 0), "{interrupts}");

    down_up(&mut alice);
    assert_eq!(mac(&mut alice), ALICE.mac);
    ping(&mut alice, BOB.ip, 5);
    alice.must("basename $(readlink -f /sys/class/net/eth0/device) >/run/vf");
    alice.must("cat /run/vf >/sys/class/net/eth0/device/driver/unbind; [ ! -e /sys/class/net/eth0 ]");
    alice.must("cat /run/vf >/sys/bus/pci/drivers/igbvf/bind");
    assert_eq!(mac(&mut alice), ALICE.mac);
    configure(&mut alice, ALICE.ip);
    ping(&mut alice, BOB.ip, 5);
    let warnings = alice.must("dmesg | grep -ciE 'igbvf.*(error|fail|hang|invalid)|NETDEV WATCHDOG' || true");
    assert_eq!(warnings, "0", "{}", alice.must("dmesg | tail -n 50"));
}

#[test]
fn an_address_is_accepted_refused_and_forged_in_vain() {
    let agent = agent(&json!({ "mac_changes": "accept" }));
    let [mut alice, mut bob] = alice_and_bob(&agent);
    ping(&mut alice, BOB.ip, 3);
    let set = format!("ip link set dev eth0 address {OTHER}");
    alice.must(&set);
    bob.must("ip neigh flush dev eth0");
    ping(&mut bob, ALICE.ip, 5);
    down_up(&mut alice);
    assert_eq!(mac(&mut alice), OTHER);

    let edit = |settings: Value| {
        let edit = json!({ "settings": settings });
        agent.ask(agent.client.patch_port_group("sim", &edit, None)).unwrap();
    };
    edit(json!({ "mac_changes": "reject" }));
    // The address is revoked, and the guest is made to reset its VF.
    eventually(&agent, PATIENCE, "the guest has its first address", || mac(&mut alice) == ALICE.mac);
    let output = alice.run(&set);
    assert!(output.status != 0 && output.text.contains("Cannot assign requested address"), "{output:?}");
    assert_eq!(mac(&mut alice), ALICE.mac);
    bob.must("ip neigh flush dev eth0");
    ping(&mut bob, ALICE.ip, 5);

    // The guest believes in its new address, and its frames are forged: the lab's emulated adapter lets such frames
    // pass.
    edit(json!({ "on_denied": "silent" }));
    alice.must(&set);
    assert_eq!(mac(&mut alice), OTHER);
    alice.must(&format!("arp -s {} {}", BOB.ip, BOB.mac));
    let mut arrive = || {
        let before = packets(&mut bob);
        alice.run(&format!("ping -q -c 20 -i 0.05 -W 1 {}", BOB.ip));
        packets(&mut bob) - before
    };
    let arrived = arrive();
    assert!(arrived < 5, "{arrived} of 20 forged frames arrive");
    edit(json!({ "forged_transmits": "accept" }));
    let arrived = arrive();
    assert!(arrived >= 20, "{arrived} of 20 forged frames arrive, which are allowed");
    down_up(&mut alice);
    assert_eq!(mac(&mut alice), ALICE.mac);
    ping(&mut alice, BOB.ip, 5);
}

#[test]
fn vlans_and_frame_sizes_are_those_that_the_drivers_set() {
    let agent = agent(&json!({ "vlan": { "trunk": ["100-110"] }, "mtu": 4000 }));
    let [mut alice, mut bob] = alice_and_bob(&agent);
    for (guest, host_part) in [(&mut alice, 2), (&mut bob, 3)] {
        guest.must("ip link add link eth0 name v105 type vlan id 105 && ip link set v105 up");
        guest.must(&format!("ip addr add 10.9.105.{host_part}/24 dev v105"));
        guest.run("ip link add link eth0 name v200 type vlan id 200");
        guest.must("[ ! -e /sys/class/net/v200 ]");
    }
    ping(&mut alice, "10.9.105.3", 5);
    let long = format!("ping -q -c 3 -s 3000 -W 2 {}", BOB.ip);
    alice.must(&long);
    for guest in [&mut alice, &mut bob] {
        guest.must("ip link set eth0 mtu 3500");
        guest.must(WAIT_FOR_LINK);
    }
    let before = packets(&mut bob);
    alice.must(&long);
    let whole = packets(&mut bob) - before;
    assert!((3..9).contains(&whole), "{whole} packets for three long ones: they came in pieces");
    ping(&mut alice, "10.9.105.3", 5);
}
