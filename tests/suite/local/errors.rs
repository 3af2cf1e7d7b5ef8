// SPDX-License-Identifier: Apache-2.0

//! Errors that need a faulty host, agent or guest.

use std::{fs, os::unix::net::UnixStream, thread, time::Duration};

use api::{
    problem::ProblemCode,
    types::{CauseCode, PortGroupSpec, VmAction, VmState},
};
use serde_json::{Value, json};

use crate::fixture::{Agent, Options, SmallGuest, checker::sql, host, image, wire};

/// The most followers of events, and the most clients, that an agent has.
const FOLLOWERS: usize = 64;
const CLIENTS: usize = 256;

fn start(pf: &str) -> Agent {
    let arguments = ["--sim-pf", &format!("{pf}=2")].map(ToString::to_string).into();
    Agent::start_with(Options { arguments, ..Options::default() })
}

#[test]
fn what_cannot_be_booted_says_why_and_leaves_nothing() {
    let agent = start("sim0");
    let owner = SmallGuest::boot(&agent, "owner", json!([{"id": "eth0"}]));
    let taken = agent.vm("owner").status.adapters[0].vf.unwrap().to_string();
    let free = agent.vfs().into_iter().find(|vf| vf.owner.is_none()).unwrap().bdf.to_string();
    let script = agent.image("script", b"#!/bin/sh\nexit 0\n");
    let large = agent.image("large", &vec![0; (2 << 20) + 1]);
    for (change, code) in [
        (json!({"boot": {"kernel": "no-such-file"}}), ProblemCode::KernelNotFound),
        (json!({"boot": {"kernel": "/dev/null"}}), ProblemCode::KernelUnreadable),
        (json!({"boot": {"kernel": script}}), ProblemCode::KernelInvalid),
        (json!({"boot": {"initramfs": "no-such-file"}}), ProblemCode::InitramfsNotFound),
        (json!({"boot": {"initramfs": "/dev/null"}}), ProblemCode::InitramfsUnreadable),
        (json!({"boot": {"initramfs": large}}), ProblemCode::InitramfsInvalid),
        // No host has so many unused huge pages.
        (json!({"memory": "64GiB", "hugepages": true}), ProblemCode::MemoryUnavailable),
        (json!({"adapters": [{"id": "eth0", "vf": "0000:ff:1f.7"}]}), ProblemCode::VfNotFound),
        (json!({"adapters": [{"id": "eth0", "vf": taken}]}), ProblemCode::VfInUse),
        (json!({"devices": ["0000:ff:1f.7"]}), ProblemCode::DeviceNotFound),
        (json!({"devices": [free]}), ProblemCode::DeviceUnsupported),
    ] {
        let mut spec = SmallGuest::spec(&agent, "web1", json!([]), "");
        merge(&mut spec, &change);
        let vm = agent.create(&spec).unwrap();
        let problem = agent.act("web1", VmAction::Boot).unwrap_err();
        assert_eq!(problem.code, code, "{change}: {problem:?}");
        let status = agent.vm("web1").status;
        // The agent opens the files before the operation begins.
        if status.state != VmState::Defined {
            let cause = status.cause.unwrap();
            assert_eq!((cause.code, cause.problem), (CauseCode::BootFailed, Some(code)));
        }
        assert!(status.state.is_at_rest() && status.pid.is_none(), "{change}: {}", status.state);
        assert_eq!(host::processes(&["vmm", &vm.id.to_string()]), [] as [u32; 0]);
        assert_eq!(agent.vfs().into_iter().filter(|vf| vf.owner.is_some()).count(), 1);
        agent.delete("web1").unwrap();
    }
    let mac = agent.vm("owner").status.adapters[0].mac;
    let spec = SmallGuest::spec(&agent, "web1", json!([{"id": "eth0", "mac": mac}]), "");
    assert_eq!(agent.create(&spec).unwrap_err().code, ProblemCode::MacInUse);
    drop(owner);
}

/// Applies a merge patch, one level deep.
fn merge(spec: &mut Value, change: &Value) {
    for (name, value) in change.as_object().unwrap() {
        match value.as_object() {
            Some(inner) => spec[name].as_object_mut().unwrap().extend(inner.clone()),
            None => spec[name] = value.clone(),
        }
    }
}

#[test]
fn clients_that_are_too_many_are_told_so() {
    let agent = start("sim0");
    let clients: Vec<UnixStream> = (0..CLIENTS).map(|_| connect(&agent)).collect();
    let answer = wire::Answer::read(connect(&agent));
    assert_eq!((answer.status, answer.code()), (503, ProblemCode::TooManyClients));
    drop((agent, clients));

    let agent = start("sim0");
    let followers: Vec<_> = (0..FOLLOWERS).map(|_| agent.ask(agent.client.events(None)).unwrap()).collect();
    let one_more = agent.ask(agent.client.events(None)).map(drop).unwrap_err();
    assert_eq!(one_more.code, ProblemCode::TooManyClients);
    drop(followers);
}

fn connect(agent: &Agent) -> UnixStream {
    wire::connect(&agent.directory().join("api.sock"))
}

#[test]
fn what_the_agent_cannot_read_or_store_is_its_own_error() {
    let agent = start("sim0");
    let vm = agent.create(&SmallGuest::spec(&agent, "web1", json!([]), "")).unwrap();
    agent.act("web1", VmAction::Boot).unwrap();
    agent.act("web1", VmAction::Stop).unwrap();
    let read = || agent.ask(agent.client.read_console("web1", None, false)).map(drop);
    read().unwrap();
    let console = agent.directory().join("run/vms").join(vm.id.to_string()).join("console");
    fs::remove_file(&console).unwrap();
    fs::create_dir(&console).unwrap();
    assert_eq!(read().unwrap_err().code, ProblemCode::Internal);
    fs::remove_dir(&console).unwrap();

    sql(agent.directory(), "ALTER TABLE objects RENAME TO kept");
    let spec = SmallGuest::spec(&agent, "web2", json!([]), "");
    assert_eq!(agent.create(&spec).unwrap_err().code, ProblemCode::Unavailable);
    sql(agent.directory(), "ALTER TABLE kept RENAME TO objects");
    agent.create(&spec).unwrap();
}

/// The PF is present and silent: its VFs can be neither assigned nor scrubbed until it goes on.
#[test]
fn a_pf_that_does_not_answer_refuses_and_keeps_what_it_has_not_cleaned() {
    let agent = start("mute0");
    let settings = json!({"switch": "default", "settings": {"vlan": {"trunk": ["100-110"]}}});
    let group: PortGroupSpec = serde_json::from_value(settings).unwrap();
    agent.ask(agent.client.put_port_group("tests", &group, None)).unwrap();
    let adapters = json!([{"id": "eth0", "port_group": "tests"}]);
    let mut guest = SmallGuest::boot(&agent, "web1", adapters.clone());
    assert!(guest.ask("up").starts_with("ok "));
    assert_eq!(guest.ask("vlan add 100"), "ok");
    agent.create(&SmallGuest::spec(&agent, "web2", adapters, "")).unwrap();

    let pf = host::sim_pf("mute0").unwrap().to_string();
    host::run("kill", &["-STOP", &pf]);
    let boot = agent.act("web2", VmAction::Boot);
    let stop = agent.act("web1", VmAction::Stop);
    let again = agent.act("web1", VmAction::Boot);
    host::run("kill", &["-CONT", &pf]);
    assert_eq!(boot.unwrap_err().code, ProblemCode::PfRefused);
    assert_eq!(stop.unwrap_err().code, ProblemCode::DeviceFailed);
    assert_eq!(again.unwrap_err().code, ProblemCode::DeviceFailed);
    assert!(agent.vfs().iter().any(|vf| vf.owner.is_some()), "it stays claimed");
    for vm in ["web1", "web2"] {
        assert_eq!(agent.act(vm, VmAction::Boot).unwrap().status.state, VmState::Running);
    }
}

#[test]
fn a_guest_that_kvm_cannot_run_is_the_machines_failure() {
    /// `mov eax, 0xfed00000; jmp eax`: an address without memory.
    const AWAY: [u8; 7] = [0xb8, 0x00, 0x00, 0xd0, 0xfe, 0xff, 0xe0];
    let agent = start("sim0");
    let kernel = agent.image("away", &image::pvh(&AWAY));
    agent.create(&json!({"name": "web1", "memory": "2MiB", "boot": {"kernel": kernel}})).unwrap();
    agent.act("web1", VmAction::Boot).unwrap();
    let cause = agent.wait_for_state("web1", VmState::Failed).status.cause.unwrap();
    assert_eq!(cause.code, CauseCode::MachineFailed, "{cause:?}");
}

#[test]
fn a_vm_that_ran_before_the_host_was_restarted_says_so() {
    let mut agent = start("sim0");
    agent.boot(&SmallGuest::spec(&agent, "web1", json!([{"id": "eth0"}]), ""));
    let vm = agent.vm("web1");
    agent.kill();
    // The state after a host's crash: no process, and another boot of the kernel.
    host::run("kill", &["-KILL", &vm.status.pid.unwrap().to_string()]);
    while !host::processes(&["vmm", &vm.id.to_string()]).is_empty() {
        thread::sleep(Duration::from_millis(5));
    }
    let boot = "json_set(value, '$.process.boot_id', 'of-another-boot')";
    sql(
        agent.directory(),
        &format!("UPDATE objects SET value = {boot} WHERE kind = 'run' AND id = '{}'", vm.id),
    );
    agent.restart();
    let cause = agent.wait_for_state("web1", VmState::Failed).status.cause.unwrap();
    assert_eq!(cause.code, CauseCode::HostRestarted, "{cause:?}");
    assert!(agent.vfs().iter().all(|vf| vf.owner.is_none()));
}
