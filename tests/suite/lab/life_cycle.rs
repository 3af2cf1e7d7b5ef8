// SPDX-License-Identifier: Apache-2.0

//! Pause, resume, reboot, shut down, delete.

use std::{thread, time::Duration};

use api::types::{VmAction, VmState};
use serde_json::json;

use super::{configure, ping, spec};
use crate::fixture::{Agent, host};

#[test]
fn pause_stops_the_guests_work_and_resume_continues_it() {
    let agent = Agent::start();
    let mut guest = agent.boot(&spec(&agent, "web1", host::VF0));
    guest.wait_for_shell();
    guest.type_line("while :; do echo tick; sleep 0.05; done");
    guest.wait_for("tick");
    guest.wait_for("tick");
    assert_eq!(agent.act("web1", VmAction::Pause).unwrap().status.state, VmState::Paused);
    let written = agent.vm("web1").status.console.end;
    thread::sleep(Duration::from_secs(1));
    assert_eq!(agent.vm("web1").status.console.end, written, "a paused guest writes nothing");
    assert_eq!(agent.act("web1", VmAction::Resume).unwrap().status.state, VmState::Running);
    let unread = guest.unread().len();
    thread::sleep(Duration::from_millis(500));
    assert!(guest.unread().len() > unread, "a resumed guest goes on");
}

/// Reboots a guest in the middle of traffic: DMA of the old boot must not reach the memory of the next.
///
/// There are twenty reboots in all, in four tests, since the lab breaks about once in twenty of them, and a broken
/// test runs again as a whole. Every boot counts: a triple fault, which would boot the guest once more, fails the
/// test.
fn reboots_under_traffic(by_guest: [bool; 5]) {
    let agent = Agent::start();
    let mut guest = agent.boot(&spec(&agent, "web1", host::VF0));
    for (boot, by_guest) in (1..).zip(by_guest) {
        guest.wait_for_shell();
        configure(&mut guest, "10.0.2.21");
        ping(&mut guest, host::GATEWAY, 2);
        let log = guest.must("dmesg | grep -icE 'corrupt|BUG:|Oops|bad page|general protection' || true");
        assert_eq!(log, "0", "boot {boot}");
        // An answered flood: the adapter receives until it is reset.
        guest.type_line(&format!(
            "ping -q -s 1400 -i 0.001 {} >/dev/null & sleep 0.3; echo flooding",
            host::GATEWAY
        ));
        guest.wait_for("flooding\r\n");
        if by_guest {
            guest.type_line("echo b >/proc/sysrq-trigger");
        } else {
            agent.act("web1", VmAction::Reboot).unwrap();
        }
        guest.wait_for("portcullis-guest: init reached");
        let vm = agent.vm("web1");
        let faults = agent.stats("web1").exits.get("shutdown").copied().unwrap_or(0);
        assert_eq!((faults, vm.status.boots, vm.status.state), (0, boot + 1, VmState::Running));
    }
    guest.wait_for_shell();
    configure(&mut guest, "10.0.2.21");
    ping(&mut guest, host::GATEWAY, 5);
}

#[test]
fn reboots_under_traffic_by_api_never_corrupt_the_next_boot() {
    reboots_under_traffic([false; 5]);
}

#[test]
fn reboots_under_traffic_by_the_guest_never_corrupt_the_next_boot() {
    reboots_under_traffic([true; 5]);
}

#[test]
fn reboots_under_traffic_by_both_never_corrupt_the_next_boot() {
    reboots_under_traffic([false, true, false, true, false]);
}

#[test]
fn reboots_under_traffic_by_both_in_turn_never_corrupt_the_next_boot() {
    reboots_under_traffic([true, false, true, false, true]);
}

/// Frames that reach the adapter between a reset and the next boot's driver must reach no memory: the last boot's
/// receive rings are no longer valid. The test searches the process's memory, where it finds frames of a live
/// interface.
#[test]
fn nothing_that_comes_after_a_reset_is_written_by_the_last_boots_rings() {
    let agent = Agent::start();
    let mut guest = agent.boot(&spec(&agent, "web1", host::VF0));
    let id = agent.vm("web1").id.to_string();
    let mac = host::vf_mac(0);
    // A byte that fills neither memory nor frames otherwise; another one for each boot.
    for (boot, by_guest, before, after) in [(1, false, "a7", "b9"), (2, true, "c7", "d9")] {
        guest.wait_for_shell();
        configure(&mut guest, "10.0.2.21");
        ping(&mut guest, host::GATEWAY, 2);
        host::send_filled("10.0.2.21", &mac, before);
        // Of 40 frames two may share a page, and the guest's kernel uses the pages of received frames again. After a reset
        // it would use none again.
        let found = host::pages_filled(&id, before);
        assert!(found >= 4, "boot {boot}: the interface receives, and frames can be found: {found}");
        if by_guest {
            guest.type_line("echo b >/proc/sysrq-trigger");
        } else {
            agent.act("web1", VmAction::Reboot).unwrap();
        }
        agent.wait_for_boots("web1", boot + 1);
        host::send_filled("10.0.2.21", &mac, after);
        assert_eq!(host::pages_filled(&id, after), 0, "after boot {boot}");
        guest.wait_for("portcullis-guest: init reached");
    }
}

#[test]
fn the_power_button_shuts_a_guest_down_that_listens() {
    let agent = Agent::start();
    let mut guest = agent.boot(&spec(&agent, "web1", host::VF0));
    guest.wait_for_shell();
    let vm = agent.act("web1", VmAction::Shutdown).unwrap();
    assert_eq!(vm.status.state, VmState::Stopped, "{:?}", vm.status);
    assert_eq!(host::processes(&["vmm", &vm.id.to_string()]), [] as [u32; 0]);
    // A stopped VM can be booted again.
    agent.act("web1", VmAction::Boot).unwrap();
    guest.begin_anew();
    guest.wait_for_shell();
}

#[test]
fn delete_gives_the_vf_back_as_it_was() {
    let agent = Agent::start();
    for settings in [
        &["mac", "02:11:22:33:44:55"][..],
        &["vlan", "100", "qos", "3"],
        &["spoofchk", "off"],
        &["trust", "on"],
        &["max_tx_rate", "50"],
    ] {
        let arguments = [&["link", "set", host::PF, "vf", "0"], settings].concat();
        host::run("ip", &arguments);
    }
    let before = host::snapshot(host::VF0, 0);
    assert_eq!(host::driver(host::VF0).as_deref(), Some("igbvf"), "the lab binds VFs to igbvf");

    let mut guest = agent.boot(&spec(&agent, "web1", host::VF0));
    guest.wait_for_shell();
    assert_eq!(host::driver(host::VF0).as_deref(), Some("vfio-pci"));
    let during = host::vf(0);
    assert_eq!(
        (&during["spoofchk"], &during["trust"], &during["vlan_list"][0]["vlan"]),
        (&json!(true), &json!(false), &json!(null)),
        "{during}"
    );
    agent.delete("web1").unwrap();
    assert_eq!(host::snapshot(host::VF0, 0), before);
    assert_eq!(host::vf_mac(0), "02:11:22:33:44:55");

    for settings in [
        &["vlan", "0"][..],
        &["spoofchk", "on"],
        &["trust", "off"],
        &["max_tx_rate", "0"],
        &["mac", "00:00:00:00:00:00"],
    ] {
        let arguments = [&["link", "set", host::PF, "vf", "0"], settings].concat();
        host::run("ip", &arguments);
    }
}

#[test]
fn a_killed_vmm_is_a_failed_vm_and_its_vf_goes_back() {
    let agent = Agent::start();
    let before = host::snapshot(host::VF0, 0);
    let mut guest = agent.boot(&spec(&agent, "web1", host::VF0));
    guest.wait_for_shell();
    let pid = agent.vm("web1").status.pid.unwrap();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(field("CapEff:"), "0000000000000000");
    assert_eq!(field("CapPrm:"), "0000000000000000");
    assert_eq!(field("CapBnd:"), "0000000000000000");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert!(
        field("Uid:").split(' ').all(|uid| uid.parse::<u32>().unwrap() >= 2_100_000_000),
        "{}",
        field("Uid:")
    );
    assert_eq!(std::fs::read_dir(format!("/proc/{pid}/root")).unwrap().count(), 0, "its root is empty");

    host::run("kill", &["-9", &pid.to_string()]);
    agent.wait_for_state("web1", VmState::Failed);
    assert_eq!(host::snapshot(host::VF0, 0), before);
}

#[test]
fn a_killed_agent_leaves_its_vms_running_and_its_successor_finds_them() {
    let mut agent = Agent::start();
    let name = {
        let mut guest = agent.boot(&spec(&agent, "web1", host::VF0));
        guest.wait_for_shell();
        guest.type_line("while :; do echo tick; sleep 0.1; done");
        guest.wait_for("tick");
        guest.name
    };
    let pid = agent.vm(&name).status.pid;
    agent.kill_and_restart();
    let vm = agent.wait_for_state(&name, VmState::Running);
    assert_eq!((vm.status.pid, vm.status.boots), (pid, 1));
    let written = vm.status.console.end;
    thread::sleep(Duration::from_millis(500));
    assert!(agent.vm(&name).status.console.end > written);
    agent.delete(&name).unwrap();
    assert_eq!(host::processes(&["vmm", &vm.id.to_string()]), [] as [u32; 0]);
}

#[test]
fn a_guest_that_resets_itself_boots_again() {
    let agent = Agent::start();
    let mut guest = agent.boot(&spec(&agent, "web1", host::VF0));
    for (boot, command) in (2..).zip(["reboot -f", "echo b >/proc/sysrq-trigger"]) {
        guest.wait_for_shell();
        guest.type_line(command);
        guest.wait_for_within("portcullis-guest: init reached", Duration::from_secs(40));
        agent.wait_for_boots("web1", boot);
    }
}
