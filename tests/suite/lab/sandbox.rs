// SPDX-License-Identifier: Apache-2.0

//! The sandbox of a VM with a real VF: all of it is on, and it reaches no other group.

use std::{fs, path::PathBuf, thread, time::Duration};

use api::{
    problem::ProblemCode,
    types::{VmAction, VmState},
};
use serde_json::json;

use super::{bare_spec, spec};
use crate::fixture::{
    Agent, Options,
    attack::{Outcome, agent, attempt, report},
    host,
};

#[test]
fn with_a_real_vf_nothing_is_off_and_every_thread_is_confined() {
    // A VFIO group without an owner.
    host::bind_vfio(host::VF1);
    let agent = Agent::start_with(Options::for_tests(&[]));
    let adapters = json!([{ "id": "eth0", "vf": host::VF0 }]);
    for thread in ["main", "vcpu", "relay", "function-thread"] {
        for what in
            ["open_vfio", "open_vfio_group", "open_file", "connect_tcp", "netlink", "exec", "map_code"]
        {
            let outcome = attempt(&agent, what, thread, &adapters);
            report(&format!("{what:16}{thread:20}{outcome}"));
            assert_eq!(outcome, Outcome::Killed, "{what} on {thread}");
        }
    }
    drop(agent);
    host::unbind(host::VF1);
    let agent = Agent::start_with(Options {
        arguments: ["--sandbox-off", "seccomp"].map(Into::into).into(),
        ..Options::default()
    });
    agent.create(&spec(&agent, "web1", host::VF0)).unwrap();
    let problem = agent.act("web1", VmAction::Boot).unwrap_err();
    assert_eq!(problem.code, ProblemCode::SandboxUnavailable);
    assert!(problem.detail.contains("--sandbox-off") && problem.detail.contains("seccomp"), "{problem}");
}

#[test]
fn each_layer_alone_keeps_vfio_from_a_vm() {
    let filters = ["own_user", "namespaces", "empty_root", "limits", "landlock"];
    let nothing = ["own_user", "namespaces", "empty_root", "limits", "landlock", "seccomp"];
    // The group exists, and no process has it.
    host::bind_vfio(host::VF1);
    for (layers, off) in [
        ("whole sandbox", &[][..]),
        ("seccomp alone", &filters),
        ("user, namespaces, limits", &["seccomp", "landlock"]),
        ("no sandbox", &nothing),
    ] {
        let agent = agent(off);
        // No real VF: an agent that leaves a layer off gives none.
        for what in ["open_vfio", "open_vfio_group"] {
            let outcome = attempt(&agent, what, "vcpu", &json!([]));
            report(&format!("{what:16}{layers:28}{outcome}"));
            assert_eq!(outcome == Outcome::Succeeded, off == nothing, "{what}: {layers}");
        }
    }
    host::unbind(host::VF1);
}

/// Processor time that a process has used, in seconds (`/proc/PID/stat`, fields 14 and 15 in ticks of 10 ms).
fn processor_time(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks = |n: usize| fields[n - 3].parse::<f64>().unwrap();
    (ticks(14) + ticks(15)) / 100.0
}

#[test]
fn a_vm_without_limits_has_a_default_of_memory() {
    let agent = Agent::start();
    let spec = bare_spec(&agent, "web1");
    let mut guest = agent.boot(&spec);
    guest.wait_for_shell();
    let vm = agent.vm("web1");
    let group = PathBuf::from("/sys/fs/cgroup/portcullis").join(vm.id.to_string());
    let limit: u64 = fs::read_to_string(group.join("memory.max")).unwrap().trim().parse().unwrap();
    let guest_memory = vm.spec.memory.bytes();
    assert!(limit > guest_memory + (64 << 20) && limit < guest_memory * 2 + (128 << 20), "{limit}");
    agent.delete("web1").unwrap();
    assert!(!group.exists());
}

/// A busy guest gets its share of the processor and no more. A guest that exceeds its memory limit ends with that
/// cause. No control group is left.
#[test]
fn a_vm_has_no_more_of_its_host_than_its_limits() {
    let mut agent = Agent::start();
    let mut spec = bare_spec(&agent, "web1");
    spec["limits"] = json!({ "cpu_percent": 40, "cpu_weight": 50, "memory": "512MiB" });
    let mut guest = agent.boot(&spec);
    guest.wait_for_shell();
    let id = agent.vm("web1").id;
    let pid = host::processes(&["vmm", &id.to_string()])[0];
    let group = PathBuf::from("/sys/fs/cgroup/portcullis").join(id.to_string());
    let file = |name: &str| fs::read_to_string(group.join(name)).unwrap().trim().to_owned();
    assert_eq!(file("cgroup.procs"), pid.to_string());
    assert_eq!([file("cpu.max"), file("cpu.weight")], ["40000 100000", "50"]);
    assert_eq!(file("memory.max"), (512 << 20).to_string());
    guest.type_line("while :; do :; done");
    thread::sleep(Duration::from_secs(1));
    let before = processor_time(pid);
    thread::sleep(Duration::from_secs(5));
    let used = (processor_time(pid) - before) / 5.0;
    report(&format!("a guest that may have 0.40 of a processor and computes has {used:.2}"));
    assert!((0.2..0.5).contains(&used), "{used}");

    // The effect of a growing guest: a limit below its present memory.
    fs::write(group.join("memory.max"), "16M").unwrap();
    let vm = agent.wait_for_state("web1", VmState::Failed);
    let cause = vm.status.cause.unwrap();
    assert!(cause.detail.contains("limits.memory"), "{cause:?}");
    assert!(!group.exists());

    // Also the group of a VM that an agent did not end itself.
    agent.act("web1", VmAction::Boot).unwrap();
    assert!(group.exists());
    agent.kill();
    host::run("kill", &["-9", &file("cgroup.procs")]);
    agent.restart();
    agent.wait_for_state("web1", VmState::Failed);
    assert!(!group.exists());
}
