// SPDX-License-Identifier: Apache-2.0

//! DPDK's testpmd on the guest's VF, as in `docs/guest-networking.md`. Its driver ignores denials, so the test looks at
//! decisions, at the PF and at frames.

use std::time::Duration;

use serde_json::json;

use super::{
    INITIAL, Relay, X, Y, agent_with, by_policy, edit, eventually, find_decision, reason, spec_in_group,
    wait_for_decision,
};
use crate::fixture::{Agent, Guest, agent::PATIENCE, host, registers};
use crate::lab::page;

const PROMPT: &str = "testpmd> ";
/// Any address of the network: testpmd answers pings to all of them.
const GUEST: &str = "10.0.2.77";
/// testpmd takes about 3 s to its prompt.
const START: Duration = Duration::from_secs(40);
/// The payload of a ping that fills an MTU of 9000.
const LONG: usize = 9000 - 20 - 8;

/// A testpmd at its prompt on the guest's console, which answers pings.
struct Testpmd<'g, 'a> {
    guest: &'g mut Guest<'a>,
}

impl<'g, 'a> Testpmd<'g, 'a> {
    /// Starts it as the page says, with this longest frame in place of the page's. Debian's package finds the
    /// libraries of drivers by itself.
    fn start(guest: &'g mut Guest<'a>, max_frame: &str) -> Self {
        let line = page::blocks("DPDK", "text").remove(0);
        assert!(line.contains("dpdk-testpmd ") && line.contains("max-pkt-len=9018"), "{line}");
        let libraries = "testpmd -d librte_mempool_ring.so.23 -d librte_net_e1000.so.23";
        let line = line.replace("dpdk-testpmd", libraries).replace("9018", max_frame);
        guest.type_line(line.trim());
        guest.wait_for_within("Configuring Port 0", START);
        guest.wait_for_within(PROMPT, START);
        let mut testpmd = Self { guest };
        testpmd.run("start");
        testpmd
    }

    fn run(&mut self, command: &str) -> String {
        self.guest.type_line(command);
        self.guest.wait_for(PROMPT)
    }

    /// Repeats commands until they have their effect: testpmd does not repeat a request that the agent did not answer
    /// in time, as a busy lab's does not.
    fn until(&mut self, agent: &Agent, what: &str, commands: &[&str], so: impl Fn() -> bool) {
        eventually(agent, PATIENCE, what, || {
            if !so() {
                commands.iter().for_each(|command| drop(self.run(command)));
            }
            so()
        });
    }

    fn restart_port(&mut self) {
        for command in ["stop", "port stop 0", "port start 0", "start"] {
            let text = self.run(command);
            assert!(!text.to_lowercase().contains("fail"), "{text}");
        }
    }

    fn quit(self) {
        self.guest.type_line("quit");
        self.guest.wait_for("Bye...");
        self.guest.wait_for("guest# ");
    }
}

/// Whether testpmd answers a ping to the address `mac`. Its answers to ARP keep the address of its start.
fn answers(mac: &str, payload: usize) -> bool {
    host::run("ip", &["neigh", "replace", GUEST, "lladdr", mac, "dev", host::PF, "nud", "reachable"]);
    host::answers_with(GUEST, payload)
}

fn answers_soon(agent: &Agent, mac: &str, payload: usize) {
    let what = format!("testpmd answers {payload} bytes to {mac}");
    eventually(agent, Duration::from_secs(20), &what, || answers(mac, payload));
}

fn set_host_mtu(bytes: &str) {
    host::run("ip", &["link", "set", host::PF, "mtu", bytes]);
    host::wait_for_carrier();
}

fn long_frames(agent: &Agent, testpmd: &mut Testpmd<'_, '_>) {
    wait_for_decision(agent, "allowed", "9026 bytes");
    assert_eq!(registers::max_frame_of(0), 9026);
    answers_soon(agent, INITIAL, LONG);
    testpmd.restart_port();
    assert_eq!(registers::max_frame_of(0), 9026);
    answers_soon(agent, INITIAL, LONG);
    assert!(find_decision(agent, "denied", " bytes").is_none(), "no length is denied");

    // The driver repeats its request when the port starts, ignores the denial, and shorter frames arrive.
    edit(agent, &json!({ "mtu": 1500 }));
    eventually(agent, PATIENCE, "shorter frames", || registers::max_frame_of(0) == 1526);
    testpmd.restart_port();
    assert_eq!(reason(&wait_for_decision(agent, "denied", "9026 bytes")), "mtu_exceeded");
    by_policy(registers::max_frame_of(0) <= 1526, "longer frames do not reach the guest");
    answers_soon(agent, INITIAL, 1400);
    assert!(!(0..2).any(|_| answers(INITIAL, LONG)), "longer frames are not answered");
}

fn addresses(agent: &Agent, testpmd: &mut Testpmd<'_, '_>) {
    let denied = |by: &str| find_decision(agent, "denied", X).is_some_and(|decision| reason(&decision) == by);
    let command = format!("mac_addr set 0 {X}");
    testpmd.until(agent, "the address is denied", &[&command], || denied("mac_changes_rejected"));
    by_policy(host::vf_mac(0) == INITIAL, "the VF keeps its address");
    let shown = testpmd.run("show port info 0").to_lowercase();
    assert!(shown.contains(X), "testpmd shows the address that it does not have: {shown}");
    answers_soon(agent, INITIAL, 56);
    by_policy(!(0..2).any(|_| answers(X, 56)), "frames to that address do not arrive");

    edit(agent, &json!({ "mac_changes": "accept" }));
    let command = format!("mac_addr set 0 {Y}");
    testpmd.until(agent, "the address is granted", &[&command], || host::vf_mac(0) == Y);
    answers_soon(agent, Y, 56);
}

fn promiscuity(agent: &Agent, testpmd: &mut Testpmd<'_, '_>) {
    assert_eq!(reason(&wait_for_decision(agent, "denied", "multicast+unicast")), "promiscuous_rejected");
    assert!(!registers::all_multicast(0));
    edit(agent, &json!({ "promiscuous": "multicast" }));
    let commands = ["set promisc all off", "set allmulti all off", "set allmulti all on"];
    testpmd.until(agent, "all multicast frames", &commands, || registers::all_multicast(0));
}

#[test]
fn testpmd_works_as_the_page_says() {
    set_host_mtu("9000");
    host::run("ip", &["addr", "replace", "10.0.2.9/24", "dev", host::PF]);
    let agent = agent_with(Relay::Policed, &json!({}));
    page::follow_on_host(&agent, "DPDK");
    let mut spec = spec_in_group(&agent, "web1");
    let initramfs = host::initramfs_of_programs("dpdk", &["uio_pci_generic"], &["testpmd"], &[]);
    spec["boot"]["initramfs"] = json!(agent.link_image("dpdk", &initramfs));
    spec["memory"] = json!("512MiB");
    let mut guest = agent.boot(&spec);
    guest.wait_for_shell();
    page::follow_in_guest(&mut guest, "DPDK", &[]);

    let mut testpmd = Testpmd::start(&mut guest, "9018");
    long_frames(&agent, &mut testpmd);
    addresses(&agent, &mut testpmd);
    promiscuity(&agent, &mut testpmd);
    testpmd.quit();
    assert_eq!(reason(&wait_for_decision(&agent, "denied", "00:00:00:00:00:00")), "mac_invalid");
    assert_eq!(host::vf_mac(0), Y);

    // Without the option it takes this length.
    let testpmd = Testpmd::start(&mut guest, "1518");
    wait_for_decision(&agent, "allowed", "1526 bytes");
    answers_soon(&agent, Y, 1400);
    testpmd.quit();
    assert!(find_decision(&agent, "denied", "1526 bytes").is_none());

    agent.delete("web1").unwrap();
    // Other tests use the same lab.
    set_host_mtu("1500");
}
