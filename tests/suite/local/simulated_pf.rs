// SPDX-License-Identifier: Apache-2.0

//! The process of a simulated PF: its rights, its life time, and its traces.

use std::{fs, path::Path, thread, time::Duration};

use api::{
    problem::ProblemCode,
    types::{PortGroupSpec, Protection, SwitchSpec, VmAction, VmState},
};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::{Value, json};

use crate::fixture::{Agent, Options, host, image};

/// `jmp .`
const SPIN: [u8; 2] = [0xeb, 0xfe];

fn start(name: &str, through: Vec<String>) -> Agent {
    let arguments = vec!["--sim-pf".into(), format!("{name}=2")];
    Agent::start_with(Options { arguments, through, ..Options::default() })
}

fn spec(agent: &Agent, name: &str) -> Value {
    let kernel = agent.image("spin", &image::pvh(&SPIN));
    json!({"name": name, "memory": "2MiB", "boot": {"kernel": kernel}, "adapters": [{"id": "eth0"}]})
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..500 {
        if holds() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("not in 5 s: {what}");
}

fn assert_powerless(pid: u32) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(field("NoNewPrivs:"), "1");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    if !geteuid().is_root() {
        return;
    }
    assert_eq!(field("CapBnd:"), "0000000000000000");
    let users = field("Uid:");
    assert!(!users.split(' ').any(|user| user == "0") && field("Groups:").is_empty(), "{status}");
    let root = Path::new("/proc").join(pid.to_string()).join("root");
    assert_eq!(fs::read_dir(root).unwrap().count(), 0, "its root is empty");
    for namespace in ["mnt", "net", "ipc", "uts"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
}

#[test]
fn it_has_no_privilege_outlives_its_agent_and_ends_with_the_last() {
    let mut agent = start("life0", Vec::new());
    let pid = host::sim_pf("life0").unwrap();
    assert_powerless(pid);
    agent.boot(&spec(&agent, "web1"));
    agent.kill_and_restart();
    assert_eq!(host::sim_pf("life0"), Some(pid));
    let vm = agent.wait_for_state("web1", VmState::Running);
    assert_eq!(vm.status.adapters[0].lost, None);
    assert_eq!(vm.status.sandbox.off.is_empty(), geteuid().is_root());
    let vf = agent.vfs().into_iter().find(|vf| vf.owner.is_some()).unwrap();
    assert!(vf.simulated && vf.mac == Some(vm.status.adapters[0].mac.to_string()), "{vf:?}");
    // Stops all VMs, and the agent as an administrator does.
    drop(agent);
    eventually("no process is left", || host::sim_pf("life0").is_none());
}

#[test]
fn its_end_takes_the_adapter_from_the_guest_and_the_next_boot_has_one() {
    let agent = start("gone0", Vec::new());
    agent.boot(&spec(&agent, "web1"));
    let pid = host::sim_pf("gone0").unwrap();
    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), Signal::KILL).unwrap();
    eventually("the adapter is lost", || agent.vm("web1").status.adapters[0].lost.is_some());
    assert_eq!(agent.vm("web1").status.state, VmState::Running);
    agent.act("web1", VmAction::Stop).unwrap();
    let vm = agent.act("web1", VmAction::Boot).unwrap();
    assert_eq!((vm.status.state, &vm.status.adapters[0].lost), (VmState::Running, &None));
    assert!(host::sim_pf("gone0").is_some_and(|now| now != pid));
}

#[test]
fn a_switch_takes_it_as_an_uplink_and_its_vfs_can_be_more() {
    let arguments = ["--sim-pf", "up0=2", "--sim-pf", "up1=1"].map(Into::into).into();
    let agent = Agent::start_with(Options { arguments, ..Options::default() });
    let switch = SwitchSpec { uplinks: ["up1".into()].into(), ..SwitchSpec::default() };
    agent.ask(agent.client.put_switch("lab", &switch, None)).unwrap();
    let group: PortGroupSpec = serde_json::from_value(json!({"switch": "lab"})).unwrap();
    agent.ask(agent.client.put_port_group("lab", &group, None)).unwrap();
    let create = |name: &str| {
        let mut spec = spec(&agent, name);
        spec["adapters"] = json!([{"id": "eth0", "port_group": "lab"}]);
        agent.create(&spec).unwrap();
    };
    create("web1");
    let vm = agent.act("web1", VmAction::Boot).unwrap();
    assert_eq!(vm.status.adapters[0].pf.as_deref(), Some("up1"));
    create("web2");
    assert_eq!(agent.act("web2", VmAction::Boot).unwrap_err().code, ProblemCode::NoFreeVf);
    let refused = agent.ask(agent.client.set_vfs("up1", 2, None)).unwrap_err();
    assert_eq!(refused.code, ProblemCode::VfsInUse);
    agent.act("web1", VmAction::Stop).unwrap();
    let pf = agent.ask(agent.client.set_vfs("up1", 2, None)).unwrap();
    assert_eq!((pf.status.simulated, pf.spec.vfs, pf.status.vfs), (true, 2, 2));
    for vm in ["web1", "web2"] {
        assert_eq!(agent.act(vm, VmAction::Boot).unwrap().status.adapters[0].pf.as_deref(), Some("up1"));
    }
}

#[test]
fn an_agent_without_root_runs_vms_and_says_what_holds_them_not() {
    if !geteuid().is_root() {
        // In this case all agents of these tests run without root.
        return;
    }
    // The agent's own files, and its own /dev/kvm that it may open.
    let script = r#"set -e; dir=$(dirname "$3"); cp "$1" "$dir/portcullis"; shift; mkdir "$dir/dev"
        mount -t tmpfs none "$dir/dev"; mknod -m 666 "$dir/dev/kvm" c 10 232; mount --bind "$dir/dev/kvm" /dev/kvm
        chown -R 65534:65534 "$dir"/*; chown 65534:65534 "$dir"
        exec setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all "$dir/portcullis" "$@""#;
    let through = ["unshare", "-m", "sh", "-c", script, "sh"].map(Into::into).into();
    let agent = start("user0", through);
    assert!(agent.log().contains("the agent is not root"), "{}", agent.log());
    let pid = host::sim_pf("user0").unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Uid:\t65534") && status.contains("NoNewPrivs:\t1"), "{status}");
    agent.boot(&spec(&agent, "web1"));
    let vm = agent.vm("web1");
    assert_eq!(vm.status.sandbox.off, Protection::OF_ROOT);
    assert_eq!(vm.status.adapters[0].pf.as_deref(), Some("user0"));
    drop(agent);
    eventually("no process is left", || host::sim_pf("user0").is_none());
}
