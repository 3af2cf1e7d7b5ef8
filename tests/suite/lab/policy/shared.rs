// SPDX-License-Identifier: Apache-2.0

//! An address that two guests share, as VRRP's master and backup do: keepalived has it on a macvlan above the VF, also while it is
//! the backup.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{Relay, agent_with, configure, decisions, eventually, reason, spec};
use crate::fixture::{Agent, Guest, agent::PATIENCE, host, registers};
use crate::lab::page;

/// Of virtual router 51 (RFC 5798, 7.3).
const VIRTUAL: &str = "00:00:5e:00:01:33";
const VIRTUAL_IP: &str = "10.0.2.99";

/// The backup waits three times the interval and its skew (RFC 5798, 6.1), here 3.6 s, and the address moves 2 s after the master's
/// VM has given it up. The rest is for the emulated processors.
const TAKEOVER: Duration = Duration::from_secs(12);

/// The configuration of the page on networking inside guests, for a router that its own priority makes master or backup.
fn keepalived_conf(priority: u8) -> String {
    let mut blocks = page::blocks("VRRP", "text");
    blocks.remove(0).replace("priority 100", &format!("priority {priority}"))
}

fn with_keepalived(agent: &Agent, name: &str, vf: &str) -> Value {
    let mut spec = spec(agent, name, vf);
    let files = [("master", 200), ("backup", 100)].map(|(role, priority)| {
        let path = std::env::temp_dir().join(format!("keepalived-{role}.conf"));
        fs::write(&path, keepalived_conf(priority)).unwrap();
        format!("{}:/etc/keepalived/{role}.conf", path.display())
    });
    let files = [files[0].as_str(), &files[1]];
    let initramfs = host::initramfs_of_programs("keepalived", &["macvlan"], &["keepalived"], &files);
    spec["boot"]["initramfs"] = json!(agent.link_image("keepalived", &initramfs));
    spec["adapters"][0]["port_group"] = json!("web");
    spec
}

/// A guest whose keepalived has the virtual address on its macvlan.
fn router<'a>(agent: &'a Agent, name: &str, vf: &str, address: &str, role: &str) -> Guest<'a> {
    let mut guest = agent.boot(&with_keepalived(agent, name, vf));
    guest.wait_for_shell();
    configure(&mut guest, address);
    guest.must(&format!("(keepalived -n -l -D -P -f /etc/keepalived/{role}.conf >/run/vrrp.log 2>&1 &)"));
    let patience = "for i in $(seq 300); do [ -e /sys/class/net/vrrp51 ] && break; sleep 0.1; done";
    guest.must(&format!("{patience}; cat /run/vrrp.log; grep -q {VIRTUAL} /sys/class/net/vrrp51/address"));
    guest
}

fn is_master(guest: &mut Guest<'_>) -> bool {
    guest.run(&format!("ip addr show dev vrrp51 | grep -qF {VIRTUAL_IP}/")).status == 0
}

fn has_it(vf: u32) -> bool {
    registers::addresses_of(vf).contains(VIRTUAL)
}

#[test]
fn a_shared_address_moves_to_the_backup_when_the_master_is_gone() {
    let agent = agent_with(Relay::Policed, &json!({}));
    page::follow_on_host(&agent, "VRRP");
    let mut master = router(&agent, "web2", host::VF0, "10.0.2.22", "master");
    eventually(&agent, PATIENCE, "the first router is the master", || is_master(&mut master));
    let mut backup = router(&agent, "web1", host::VF1, "10.0.2.21", "backup");
    let in_use = || decisions(&agent, "denied").iter().any(|decision| reason(decision) == "mac_in_use");
    eventually(&agent, PATIENCE, "the backup is refused", in_use);
    assert_eq!((has_it(0), has_it(1)), (true, false));
    host::run("ip", &["addr", "replace", "10.0.2.9/24", "dev", host::PF]);
    host::ping(VIRTUAL_IP);

    // igbvf rewrites its whole list at each change of it: for a moment the address has no owner.
    for _ in 0..5 {
        master.must("ip link set eth0 promisc on; ip link set eth0 promisc off");
        thread::sleep(Duration::from_millis(600));
        // A relay without a verdict in time repeats the guest's requests, one a second.
        eventually(&agent, PATIENCE, "the master has the address again", || {
            assert!(!has_it(1), "the backup has taken the address from a living master");
            has_it(0)
        });
    }
    assert!(!is_master(&mut backup), "the backup hears the master");

    let pid = agent.vm("web2").status.pid.unwrap();
    host::run("kill", &["-KILL", &pid.to_string()]);
    let gone = Instant::now();
    eventually(&agent, TAKEOVER, "the backup has the address", || has_it(1));
    // The PF's side has the entry of the virtual address: it is the same one.
    eventually(&agent, TAKEOVER.saturating_sub(gone.elapsed()), "the virtual address answers", || {
        host::answers(VIRTUAL_IP)
    });
    println!("the virtual address answers {:?} after the master's end", gone.elapsed());
    assert!(is_master(&mut backup));
    let text = host::busybox(&["ping", "-q", "-c", "20", "-i", "0.05", "-W", "5", VIRTUAL_IP]);
    assert!(text.contains(" 0% packet loss"), "{text}");
}
