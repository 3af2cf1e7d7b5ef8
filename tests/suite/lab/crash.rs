//! The agent or a vmm is killed at every point of a VM's life, and nothing is lost: VFs of the lab's igb.

use passthrough::fail::{Point, Victim};

use crate::fixture::{Agent, Options, crash::Matrix, host, small_story::SmallStory};

/// VFs have the addresses of an administrator: the stock driver would choose another one each time that it is bound, and that
/// it is as before could not be told.
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

/// Kills at the points whose names begin so, each time that one is reached but `most` times at most.
fn die_at(groups: &[&str], most: u32) {
    let _addressed = Addressed::new();
    let agent = Agent::start_with(Options::for_tests(&[]));
    let story = SmallStory::new(SmallStory::spec_for(&agent));
    let of_group = |point: &&Point| groups.contains(&point.name().split('.').next().unwrap());
    Matrix::new(agent, story).die_at(Point::ALL.iter().filter(of_group).copied(), most);
}

#[test]
fn an_agent_that_dies_while_it_makes_a_vm_leaves_nothing_wrong() {
    die_at(&["create", "claim", "baseline", "boot"], 1);
}

/// To vfio-pci, and back to the driver that the VF had.
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
