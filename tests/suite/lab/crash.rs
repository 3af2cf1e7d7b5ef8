// SPDX-License-Identifier: Apache-2.0

//! Kills the agent or a vmm at every point of a VM's life; nothing may be lost. VFs of the lab's igb.

use std::{fs, time::Duration};

use failpoints::{Point, Victim};
use serde_json::json;

use crate::fixture::{
    Agent, Options, SmallGuest,
    checker::Checker,
    crash::Matrix,
    host,
    small_story::{SmallStory, wait_for_script},
};

/// Gives VFs addresses of an administrator. The stock driver would choose another address each time that it is bound,
/// and the checker could not recognize the former state.
struct Addressed;

impl Addressed {
    fn new() -> Self {
        Self::set(|vf| format!("02:00:00:00:ad:{vf:02x}"));
        Self
    }

    fn set(mac: impl Fn(usize) -> String) {
        for vf in 0..host::vf_count() {
            host::run("ip", &["link", "set", host::PF, "vf", &vf.to_string(), "mac", &mac(vf)]);
        }
    }
}

impl Drop for Addressed {
    fn drop(&mut self) {
        Self::set(|_| "00:00:00:00:00:00".to_owned());
    }
}

/// Kills at the points with these beginnings of their names, each time that the story reaches one, but at most `most`
/// times.
fn die_at(groups: &[&str], most: u32) {
    let _addressed = Addressed::new();
    let agent = Agent::start_with(Options::for_tests(&[]));
    // `local::crash` has the steps of disks and NICs, which need no adapter.
    let story = SmallStory::of_adapter(&agent);
    let of_group = |point: &&Point| groups.contains(&point.name().split('.').next().unwrap());
    Matrix::new(agent, story).die_at(Point::ALL.iter().filter(of_group).copied(), most);
}

/// Proves that the checker sees the differences that the tests above rely on.
#[test]
fn the_checker_sees_what_is_wrong_with_a_vf() {
    let _addressed = Addressed::new();
    let mut agent = Agent::start_with(Options::for_tests(&[]));
    let mut checker = Checker::new(agent.directory());
    drop(agent.boot(&SmallStory::spec_for(&agent, None)));
    wait_for_script(&agent, "web1", 1).unwrap();
    let rest = agent.create(&SmallGuest::spec(&agent, "rest", json!([]), "")).unwrap().id;
    checker.assert_settled("before anything is planted", Duration::from_secs(20));
    // The VM has VF 0; VF 1 has no owner.
    let used = agent.vfs().into_iter().find(|vf| vf.owner.is_some()).unwrap();
    assert_eq!(used.bdf.to_string(), host::VF0);
    let mac = host::vf_mac(0);
    // A running agent could repair the differences.
    agent.kill();
    let set = |vf: &str, setting: &[&str]| {
        host::run("ip", &[&["link", "set", host::PF, "vf", vf], setting].concat());
    };
    let mut reported = |what: &str| {
        let found = checker.differences();
        assert_eq!(found.len(), usize::from(!what.is_empty()), "{what}: {found:#?}");
        assert!(found.iter().all(|found| found.contains(what)), "{what}: {found:#?}");
    };

    for (what, planted, before) in [
        ("the trust of its VF", ["trust", "on"], ["trust", "off"]),
        ("the spoof check of its VF", ["spoofchk", "off"], ["spoofchk", "on"]),
        ("the rate of its VF", ["max_tx_rate", "7"], ["max_tx_rate", "100"]),
        ("the VLAN of its VF", ["vlan", "5"], ["vlan", "0"]),
        ("the mac of its VF", ["mac", "02:00:00:00:0e:66"], ["mac", &mac]),
    ] {
        set("0", &planted);
        reported(what);
        set("0", &before);
        reported("");
    }
    for (planted, before) in [
        (["trust", "on"], ["trust", "off"]),
        (["mac", "02:00:00:00:0e:66"], ["mac", "02:00:00:00:ad:01"]),
        (["max_tx_rate", "7"], ["max_tx_rate", "0"]),
    ] {
        set("1", &planted);
        reported("which nobody has");
        set("1", &before);
        reported("");
    }
    let group = format!("/sys/fs/cgroup/portcullis/{rest}");
    fs::create_dir(&group).unwrap();
    reported("the control group");
    fs::remove_dir(&group).unwrap();
    reported("");
    let device = format!("/sys/bus/pci/devices/{}", host::VF1);
    let write = |file: &str, what: &str| fs::write(format!("{device}/{file}"), what).unwrap();
    write("driver_override", "vfio-pci");
    reported("which nobody has");
    write("driver_override", "\n");
    reported("");
    write("driver/unbind", host::VF1);
    reported("which nobody has");
    fs::write("/sys/bus/pci/drivers/igbvf/bind", host::VF1).unwrap();
    reported("");
    agent.restart();
}

#[test]
fn an_agent_that_dies_while_it_makes_a_vm_leaves_nothing_wrong() {
    die_at(&["create", "claim", "baseline", "boot"], 1);
}

/// Binding to vfio-pci, and back to the VF's former driver.
#[test]
fn an_agent_that_dies_while_it_binds_leaves_nothing_wrong() {
    let hardware = |point: &&Point| point.victim() == Victim::AgentWithHardware;
    assert_eq!(Point::ALL.iter().filter(hardware).count(), 3);
    die_at(&["bind"], 2);
}

#[test]
fn an_agent_that_dies_while_it_decides_leaves_nothing_wrong() {
    die_at(&["pf", "ask"], 1);
}

#[test]
fn an_agent_that_dies_while_it_gives_back_leaves_nothing_wrong() {
    die_at(&["stop", "release", "delete"], 1);
}

#[test]
fn a_vmm_that_dies_leaves_nothing_wrong() {
    die_at(&["vmm"], 1);
}
