// SPDX-License-Identifier: Apache-2.0

//! Errors that a user will meet: each has its own message and status, and leaves no state behind.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use api::{
    problem::{Problem, ProblemCode},
    types::{CauseCode, VmAction, VmState},
};
use serde_json::{Value, json};

use super::{bare_spec, configure, ping, spec};
use crate::fixture::{Agent, Options, agent, host};

/// Boots a specification that must fail with this code and these words, and leave no state behind.
fn refused(agent: &Agent, spec: &Value, code: ProblemCode, words: &[&str]) -> Problem {
    let before = host::snapshot(host::VF0, 0);
    let name = spec["name"].as_str().unwrap();
    let vm = agent.create(spec).unwrap_or_else(|problem| panic!("{problem:?}"));
    let problem = agent.act(name, VmAction::Boot).expect_err("this cannot be booted");
    assert_eq!(problem.code, code, "{problem:?}\n{}", agent.log());
    for word in words {
        assert!(problem.detail.contains(word), "{word}: {}", problem.detail);
    }
    nothing_left(agent, name, &vm.id.to_string());
    assert_eq!(host::snapshot(host::VF0, 0), before);
    agent.delete(name).unwrap();
    problem
}

fn nothing_left(agent: &Agent, name: &str, id: &str) {
    assert!(agent.vm(name).status.state.is_at_rest(), "{:?}", agent.vm(name).status);
    assert_eq!(host::processes(&["vmm", id]), [] as [u32; 0], "a process is left");
    assert!(agent.vfs().iter().all(|vf| vf.owner.as_ref().is_none_or(|owner| owner.name.as_str() != name)));
}

#[test]
fn a_vf_that_does_not_exist() {
    let agent = Agent::start();
    refused(&agent, &spec(&agent, "web1", "0000:01:1f.7"), ProblemCode::VfNotFound, &["0000:01:1f.7"]);
}

#[test]
fn a_vf_in_use_names_its_owner() {
    let agent = Agent::start();
    let mut owner = agent.boot(&spec(&agent, "owner", host::VF1));
    let problem =
        refused(&agent, &spec(&agent, "web1", host::VF1), ProblemCode::VfInUse, &[host::VF1, "owner"]);
    assert_eq!(problem.status, 409);
    owner.wait_for_shell();
}

#[test]
fn a_device_in_use_names_its_owner() {
    let agent = Agent::with_assignable(&[host::NVME]);
    let mut spec = bare_spec(&agent, "owner");
    spec["devices"] = json!([host::NVME]);
    let mut owner = agent.boot(&spec);
    spec["name"] = json!("web1");
    refused(&agent, &spec, ProblemCode::DeviceInUse, &[host::NVME, "owner"]);
    owner.wait_for_shell();
}

#[test]
fn a_group_that_is_not_viable_names_the_members_in_the_way() {
    let agent = Agent::with_assignable(&[host::IN_SHARED_GROUP]);
    let mut spec = bare_spec(&agent, "web1");
    spec["devices"] = json!([host::IN_SHARED_GROUP]);
    let words = [host::BESIDE_IT, "e1000"];
    refused(&agent, &spec, ProblemCode::GroupNotViable, &words);
    assert_eq!(host::driver(host::IN_SHARED_GROUP).as_deref(), Some("e1000"));
}

#[test]
fn too_little_lockable_memory_names_need_limit_and_cure() {
    // As in a container: root without CAP_SYS_RESOURCE cannot raise the limit for its VMs.
    let through = ["prlimit", "--memlock=67108864", "setpriv", "--bounding-set=-sys_resource"];
    let options = Options { through: through.map(str::to_owned).to_vec(), ..Options::default() };
    let agent = Agent::start_with(options);
    refused(&agent, &spec(&agent, "web1", host::VF0), ProblemCode::MemlockTooSmall, &["64", "LimitMEMLOCK"]);
}

#[test]
fn a_kernel_that_is_missing_or_no_kernel() {
    let agent = Agent::start();
    let mut missing = spec(&agent, "web1", host::VF0);
    missing["boot"]["kernel"] = json!("no-such-file");
    refused(&agent, &missing, ProblemCode::KernelNotFound, &["no-such-file"]);
    let mut script = spec(&agent, "web1", host::VF0);
    script["boot"]["kernel"] = json!(agent.image("script", b"#!/bin/sh\nexit 0\n"));
    refused(&agent, &script, ProblemCode::KernelInvalid, &["ELF", "bzImage"]);
}

#[test]
fn a_kernel_that_the_caller_may_not_read() {
    let agent = Agent::start();
    let secret = std::env::temp_dir().join("portcullis-secret-kernel");
    fs::write(&secret, "secret").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    // The administrator lets all users reach the agent; it still reads no files for others.
    let socket = agent.directory().join("api.sock");
    fs::set_permissions(agent.directory(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    let mut wish = bare_spec(&agent, "web1");
    wish["boot"]["kernel"] = json!(secret);
    agent.create(&wish).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid=1000", "--regid=1000", "--clear-groups"])
        .arg(agent::binary())
        .arg("--socket")
        .arg(&socket)
        .args(["--output", "json", "vm", "boot", "web1"])
        .output()
        .unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success() && text.contains("kernel_unreadable"), "{text}");
    fs::remove_file(secret).unwrap();
    let vm = agent.vm("web1");
    nothing_left(&agent, "web1", &vm.id.to_string());
}

#[test]
fn no_dev_kvm() {
    let agent = Agent::start();
    fs::rename("/dev/kvm", "/dev/kvm.away").unwrap();
    let spec = spec(&agent, "web1", host::VF0);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        refused(&agent, &spec, ProblemCode::KvmUnavailable, &["/dev/kvm"]);
    }));
    fs::rename("/dev/kvm.away", "/dev/kvm").unwrap();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn a_pf_that_is_down() {
    let agent = Agent::start();
    host::run("ip", &["link", "set", host::PF, "down"]);
    let spec = spec(&agent, "web1", host::VF0);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        refused(&agent, &spec, ProblemCode::PfDown, &[host::PF, "up"]);
    }));
    host::run("ip", &["link", "set", host::PF, "up"]);
    host::wait_for_carrier();
    if let Err(panic) = result {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn the_number_of_vfs_stays_while_one_is_in_use() {
    let agent = Agent::start();
    let _guest = agent.boot(&spec(&agent, "web1", host::VF0));
    let problem = agent.ask(agent.client.set_vfs(host::PF, 0, None)).unwrap_err();
    assert_eq!((problem.code, problem.status), (ProblemCode::VfsInUse, 409), "{problem:?}");
    assert!(problem.detail.contains("web1"), "{}", problem.detail);
}

#[test]
fn a_vf_that_its_host_takes_away_ends_the_adapter_and_not_the_guest() {
    let agent = Agent::start();
    let mut guest = agent.boot(&spec(&agent, "web1", host::VF0));
    guest.wait_for_shell();
    configure(&mut guest, "10.0.2.21");
    ping(&mut guest, host::GATEWAY, 3);

    // Blocks until the vmm has closed the device.
    let unbind = thread::spawn(|| {
        let begun = Instant::now();
        fs::write("/sys/bus/pci/drivers/vfio-pci/unbind", host::VF0).unwrap();
        begun.elapsed()
    });
    let took = unbind.join().unwrap();
    assert!(took < Duration::from_secs(20), "the host waited {took:?} for its VF");
    let deadline = Instant::now() + agent::PATIENCE;
    let lost = loop {
        let status = agent.vm("web1").status;
        assert_eq!(status.state, VmState::Running, "{status:?}");
        match &status.adapters[0].lost {
            Some(cause) => break cause.clone(),
            None => assert!(Instant::now() < deadline, "{status:?}"),
        }
        thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(lost.code, CauseCode::VfRemoved, "{lost:?}");
    assert_eq!(guest.must("echo still here"), "still here");
    agent.delete("web1").unwrap();
}
