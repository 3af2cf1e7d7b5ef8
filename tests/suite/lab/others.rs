// SPDX-License-Identifier: Apache-2.0

//! VFs in use by another program on the host, a container or another VMM: the agent detects the use before it touches
//! the VF.

use std::{
    fs,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use api::{problem::ProblemCode, types::VmAction};
use serde_json::json;

use super::{bare_spec, spec};
use crate::fixture::{Agent, agent::PATIENCE, host};

/// The other program's address, which the PF pings.
const OTHER: &str = "10.0.2.31";
const HOST: &str = "10.0.2.9/24";

/// Another program on VF 0. Ends when it is dropped.
struct Other(Child);

/// The output of the other process.
const SAID: &str = "/tmp/portcullis-other";

impl Other {
    fn started(command: &mut Command) -> Self {
        host::run("ip", &["addr", "replace", HOST, "dev", host::PF]);
        let said = fs::File::create(SAID).unwrap();
        Self(command.stdin(Stdio::null()).stdout(said.try_clone().unwrap()).stderr(said).spawn().unwrap())
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        host::run("ip", &["addr", "del", HOST, "dev", host::PF]);
    }
}

/// Checks that a VM that names the VF is refused, that a VM that names none gets another, and that the VF's user goes
/// on.
fn is_left_alone(used_by: &str) {
    let agent = Agent::start();
    let deadline = Instant::now() + PATIENCE;
    while !host::answers(OTHER) {
        if Instant::now() >= deadline {
            let said = fs::read_to_string(SAID).unwrap_or_default();
            // A QEMU that cannot start says why, and a guest says that it boots. A container says nothing.
            if used_by == "VFIO" && said.is_empty() {
                println!("LAB FAULT: QEMU's guest hangs");
            }
            panic!("the other one never answers; it said:\n{said}");
        }
        thread::sleep(Duration::from_millis(200));
    }
    let vf = agent.vfs().into_iter().find(|vf| vf.bdf.to_string() == host::VF0).unwrap();
    assert!(vf.used_by.as_ref().is_some_and(|usage| usage.contains(used_by)), "{vf:?}");
    let before = host::snapshot(host::VF0, 0);
    let mac = host::vf_mac(0);

    agent.create(&spec(&agent, "pinned", host::VF0)).unwrap();
    let problem = agent.act("pinned", VmAction::Boot).unwrap_err();
    assert_eq!((problem.code, problem.status), (ProblemCode::VfInUse, 409), "{problem:?}");
    assert!(problem.detail.contains(host::VF0) && problem.detail.contains(used_by), "{problem:?}");
    for name in ["web1", "web2"] {
        let mut spec = bare_spec(&agent, name);
        spec["adapters"] = json!([{ "id": "eth0" }]);
        agent.create(&spec).unwrap();
        let vm = agent.act(name, VmAction::Boot).unwrap_or_else(|problem| panic!("{problem:?}"));
        assert_ne!(vm.status.adapters[0].vf.unwrap().to_string(), host::VF0);
    }
    // No VF is left: the agent does not take the one in use.
    let mut spec = bare_spec(&agent, "web3");
    spec["adapters"] = json!([{ "id": "eth0" }]);
    agent.create(&spec).unwrap();
    assert_eq!(agent.act("web3", VmAction::Boot).unwrap_err().code, ProblemCode::NoFreeVf);

    assert_eq!((host::snapshot(host::VF0, 0), host::vf_mac(0)), (before, mac));
    host::ping(OTHER);
}

#[test]
fn a_vf_of_a_container_is_left_alone() {
    let container = Other::started(Command::new("unshare").args(["--net", "sleep", "600"]));
    let pid = container.0.id().to_string();
    let space = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    while space(&pid) == space("self") {
        thread::sleep(Duration::from_millis(20));
    }
    let mut names = fs::read_dir(format!("/sys/bus/pci/devices/{}/net", host::VF0)).unwrap();
    let name = names.next().unwrap().unwrap().file_name().into_string().unwrap();
    host::run("ip", &["link", "set", &name, "netns", &pid]);
    let inside = |words: &[&str]| host::run("nsenter", &[&["-t", &pid, "-n", "ip"], words].concat());
    inside(&["addr", "add", &format!("{OTHER}/24"), "dev", &name]);
    inside(&["link", "set", &name, "up"]);
    is_left_alone("network namespace");
    inside(&["link", "show", &name]);
}

#[test]
fn a_vf_of_another_vmm_is_left_alone() {
    let run = format!("portcullis.run=\"ip addr add {OTHER}/24 dev eth0; ip link set eth0 up; sleep 600\"");
    let qemu = Other::started(
        Command::new(host::lab_tool("qemu-guest"))
            .args(["--vf", host::VF0, "--memory", "256M", "--append", &run, "--initrd"])
            .arg(host::initramfs()),
    );
    is_left_alone("VFIO");
    drop(qemu);
    host::unbind(host::VF0);
}
