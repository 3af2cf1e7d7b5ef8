// SPDX-License-Identifier: Apache-2.0

//! The agent's end: VMs run on, or are powered off, and the agent releases the host's resources.

use std::time::{Duration, Instant};

use api::types::{CauseCode, VmAction, VmState};
use rustix::process::Signal;
use serde_json::json;

use crate::fixture::{Agent, Options, SmallGuest};

fn start(arguments: &[&str]) -> Agent {
    let all = ["--sim-pf", "sim0=2"].iter().chain(arguments).map(ToString::to_string).collect();
    Agent::start_with(Options { arguments: all, ..Options::default() })
}

fn boot(agent: &Agent, name: &str, script: &str) {
    let mut guest = SmallGuest::boot(agent, name, json!([{"id": "eth0"}]));
    if !script.is_empty() {
        assert_eq!(guest.ask(script), "for ever");
    }
}

/// Whether a process exists and is no zombie.
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with(['Z', 'X']) && !rest.is_empty())
}

fn pid(agent: &Agent, vm: &str) -> u32 {
    agent.vm(vm).status.pid.unwrap()
}

#[test]
fn vms_run_on_and_the_next_agent_finds_them() {
    let mut agent = start(&[]);
    boot(&agent, "stays", "");
    let pid = pid(&agent, "stays");
    let ended = agent.signal_and_wait(&[Signal::TERM]);
    assert!(ended.success(), "{ended}");
    assert!(lives(pid));
    agent.restart();
    let vm = agent.wait_for_state("stays", VmState::Running);
    assert_eq!((vm.status.pid, vm.status.boots), (Some(pid), 1));
    assert!(agent.vfs()[0].owner.is_some(), "its VF is still its own");
    agent.act("stays", VmAction::Stop).unwrap();
    assert!(agent.vfs().iter().all(|vf| vf.owner.is_none()));
}

#[test]
fn guests_are_asked_to_power_off_and_those_that_do_not_are_stopped() {
    let mut agent = start(&["--on-exit", "stop", "--exit-timeout", "2"]);
    boot(&agent, "polite", "");
    boot(&agent, "deaf", "halt");
    let pids = [pid(&agent, "polite"), pid(&agent, "deaf")];
    let begun = Instant::now();
    let ended = agent.signal_and_wait(&[Signal::TERM]);
    assert!(ended.success(), "{ended}");
    assert!((2..30).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    assert!(!pids.into_iter().any(lives), "no process is left");
    agent.restart();
    for (name, code) in [("polite", CauseCode::PoweredOff), ("deaf", CauseCode::Stopped)] {
        let status = agent.vm(name).status;
        assert_eq!((status.state, status.cause.unwrap().code), (VmState::Stopped, code), "{name}");
    }
    assert!(agent.vfs().iter().all(|vf| vf.owner.is_none()), "VFs are given back");
}

#[test]
fn a_second_signal_ends_the_agent_at_once_and_nothing_is_lost() {
    let mut agent = start(&["--on-exit", "stop", "--exit-timeout", "600"]);
    boot(&agent, "deaf", "halt");
    let pid = pid(&agent, "deaf");
    let begun = Instant::now();
    let ended = agent.signal_and_wait(&[Signal::TERM, Signal::TERM]);
    assert_eq!(ended.code(), Some(1), "{ended}");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(lives(pid));
    agent.restart();
    assert_eq!(agent.wait_for_state("deaf", VmState::Running).status.pid, Some(pid));
    agent.act("deaf", VmAction::Stop).unwrap();
}
