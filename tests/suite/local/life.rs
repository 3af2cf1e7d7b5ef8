// SPDX-License-Identifier: Apache-2.0

//! The agent's own actions: restarts of VMs, and autostart; and VMs that are edited and copied.

use std::{
    thread,
    time::{Duration, Instant},
};

use api::{
    problem::ProblemCode,
    types::{CauseCode, CloneSpec, Vm, VmAction, VmState},
};
use serde_json::{Value, json};

use crate::fixture::{Agent, Options, SmallGuest};

const PATIENCE: Duration = Duration::from_secs(60);

fn start() -> Agent {
    let arguments = ["--sim-pf", "sim0=2"].map(Into::into).into();
    Agent::start_with(Options { arguments, ..Options::default() })
}

fn spec(agent: &Agent, name: &str, life: &Value) -> Value {
    let mut spec = SmallGuest::spec(agent, name, json!([{"id": "eth0"}]), "");
    spec.as_object_mut().unwrap().extend(life.as_object().unwrap().clone());
    spec
}

fn kill(vm: &Vm) {
    let pid = rustix::process::Pid::from_raw(vm.status.pid.unwrap().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

fn until(agent: &Agent, vm: &str, holds: impl Fn(&Vm) -> bool) -> Vm {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = agent.vm(vm);
        if holds(&now) {
            return now;
        }
        assert!(Instant::now() < deadline, "{:?}\n{}", now.status, agent.log());
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_vm_whose_process_dies_is_booted_again_later_each_time() {
    let agent = start();
    agent.boot(&spec(&agent, "web1", &json!({"restart": "on_failure"})));
    let mut waits = Vec::new();
    for attempt in 1..=2 {
        kill(&agent.vm("web1"));
        let failed = until(&agent, "web1", |vm| vm.status.state == VmState::Failed);
        assert_eq!(failed.status.cause.unwrap().code, CauseCode::VmmCrashed);
        let next = failed.status.restart.unwrap().next.unwrap();
        waits.push(next.unix_ms() - failed.status.since.unix_ms());
        let again = until(&agent, "web1", |vm| vm.status.state == VmState::Running);
        assert!(again.status.since >= next, "not earlier than was said");
        assert_eq!(again.status.restart.unwrap().attempts, attempt);
        assert!(again.status.adapters[0].vf.is_some());
    }
    assert!((900..=1000).contains(&waits[0]) && (1900..=2000).contains(&waits[1]), "{waits:?}");
    // A VM that is cancelled while it waits stays stopped.
    kill(&agent.vm("web1"));
    until(&agent, "web1", |vm| vm.status.state == VmState::Failed);
    let vm = agent.act("web1", VmAction::Stop).unwrap();
    assert_eq!(vm.status.restart.and_then(|restart| restart.next), None);
    thread::sleep(Duration::from_secs(5));
    assert_eq!(agent.vm("web1").status.state, VmState::Failed);
}

#[test]
fn autostart_is_at_the_agent_s_start_and_not_after_a_stop() {
    let mut agent = start();
    agent.create(&spec(&agent, "web1", &json!({"autostart": true}))).unwrap();
    agent.create(&spec(&agent, "web2", &json!({}))).unwrap();
    agent.kill_and_restart();
    agent.wait_for_state("web1", VmState::Running);
    assert_eq!(agent.vm("web2").status.state, VmState::Defined);
    agent.act("web1", VmAction::Stop).unwrap();
    agent.kill_and_restart();
    thread::sleep(Duration::from_secs(1));
    assert_eq!(agent.vm("web1").status.state, VmState::Stopped);
}

#[test]
fn a_vm_is_changed_at_rest_renamed_and_copied() {
    let agent = start();
    let guest = agent.boot(&spec(&agent, "web1", &json!({})));
    drop(guest);
    let patch = |name: &str, patch: &Value| agent.ask(agent.client.patch_vm(name, patch, None));
    let problem = patch("web1", &json!({"memory": "4MiB"})).unwrap_err();
    assert_eq!(problem.code, ProblemCode::WrongState);
    assert!(problem.detail.contains("stop it first"), "{problem}");
    patch("web1", &json!({"restart": "always"})).unwrap();

    let copy = CloneSpec { name: "web2".parse().unwrap() };
    let copy = agent.ask(agent.client.clone_vm("web1", &copy)).unwrap();
    let source = agent.vm("web1");
    assert_ne!(copy.status.adapters[0].mac, source.status.adapters[0].mac);
    assert_ne!(copy.id, source.id);
    // Both run at once.
    agent.act("web2", VmAction::Boot).unwrap();
    agent.act("web1", VmAction::Stop).unwrap();

    let before = agent.vm("web1");
    let ports = agent.ask(agent.client.list_ports()).unwrap();
    let port = ports.iter().find(|port| port.name == "web1/eth0").unwrap().id;
    let vm = patch("web1", &json!({"name": "db1", "memory": "4MiB"})).unwrap();
    assert_eq!((vm.id, vm.name.as_str()), (before.id, "db1"));
    assert!(vm.revision > before.revision);
    assert_eq!(agent.ask(agent.client.get_vm("web1")).unwrap_err().code, ProblemCode::NotFound);
    let renamed = agent.ask(agent.client.get_port("db1/eth0")).unwrap();
    assert_eq!(renamed.id, port, "the port is the same");
    let stale = agent.ask(agent.client.put_vm("db1", &vm.spec, Some(before.revision))).unwrap_err();
    assert_eq!(stale.code, ProblemCode::RevisionMismatch);
    agent.act("db1", VmAction::Boot).unwrap();
    assert_eq!(agent.stats("db1").memory, 4 << 20);
}
