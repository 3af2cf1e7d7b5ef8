// SPDX-License-Identifier: Apache-2.0

//! An address that two guests share, as VRRP's master and backup do: each has it on a macvlan above its VF.

use std::{thread, time::Duration};

use serde_json::{Value, json};

use super::{Relay, agent_with, configure, decisions, eventually, reason, spec};
use crate::fixture::{Agent, Guest, agent::PATIENCE, host, registers};

/// Of virtual router 51 (RFC 5798, 7.3).
const VIRTUAL: &str = "00:00:5e:00:01:33";
const VIRTUAL_IP: &str = "10.0.2.99";

fn with_macvlan(agent: &Agent, name: &str, vf: &str) -> Value {
    let mut spec = spec(agent, name, vf);
    let initramfs = host::initramfs_with("macvlan", &["macvlan"], &[]);
    spec["boot"]["initramfs"] = json!(agent.link_image("macvlan", &initramfs));
    spec["adapters"][0]["port_group"] = json!("web");
    spec
}

fn router<'a>(agent: &'a Agent, name: &str, vf: &str, address: &str) -> Guest<'a> {
    let mut guest = agent.boot(&with_macvlan(agent, name, vf));
    guest.wait_for_shell();
    configure(&mut guest, address);
    guest.must(&format!(
        "ip link add link eth0 name vrrp51 address {VIRTUAL} type macvlan; ip link set vrrp51 up"
    ));
    guest
}

fn has_it(vf: u32) -> bool {
    registers::addresses_of(vf).contains(VIRTUAL)
}

#[test]
fn a_shared_address_moves_to_the_backup_when_the_master_is_gone() {
    let settings =
        json!({ "mac_changes": { "list": ["00:00:5e:00:01:00/ff:ff:ff:ff:ff:00"] }, "unicast_limit": 1 });
    let agent = agent_with(Relay::Policed, &settings);
    let mut master = router(&agent, "web2", host::VF0, "10.0.2.22");
    let mut backup = router(&agent, "web1", host::VF1, "10.0.2.21");
    let in_use = || decisions(&agent, "denied").iter().any(|decision| reason(decision) == "mac_in_use");
    eventually(&agent, PATIENCE, "the backup is refused", in_use);
    assert_eq!((has_it(0), has_it(1)), (true, false));

    // igbvf rewrites its whole list at each change of it: for a moment the address has no owner.
    for _ in 0..5 {
        master.must("ip link set eth0 promisc on; ip link set eth0 promisc off");
        thread::sleep(Duration::from_millis(600));
        assert_eq!((has_it(0), has_it(1)), (true, false));
    }

    let pid = agent.vm("web2").status.pid.unwrap();
    host::run("kill", &["-KILL", &pid.to_string()]);
    backup.must(&format!("ip addr add {VIRTUAL_IP}/24 dev vrrp51"));
    eventually(&agent, PATIENCE, "the backup has the address", || has_it(1));
    host::run("ip", &["addr", "replace", "10.0.2.9/24", "dev", host::PF]);
    host::run(
        "ip",
        &["neigh", "replace", VIRTUAL_IP, "lladdr", VIRTUAL, "dev", host::PF, "nud", "permanent"],
    );
    host::try_ping(VIRTUAL_IP, 20);
    let received: u64 = backup.must("cat /sys/class/net/vrrp51/statistics/rx_packets").parse().unwrap();
    assert!(received >= 15, "{received} of 20 frames to the shared address");
}
