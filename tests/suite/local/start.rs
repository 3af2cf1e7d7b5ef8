// SPDX-License-Identifier: Apache-2.0

//! The start of an agent on a host, and with the state of an agent with other options.

use std::{
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use api::{
    problem::ProblemCode,
    types::{VmAction, VmState},
};
use serde_json::json;

use crate::fixture::{
    Agent, Options, SmallGuest,
    agent::{PATIENCE, binary},
    host,
};

fn arguments(words: &[&str]) -> Vec<String> {
    ["--sim-pf", "sim0=2"].iter().chain(words).map(ToString::to_string).collect()
}

/// The output of an agent that does not start.
fn refused(directory: &Path, words: &[&str]) -> String {
    let output = Command::new(binary())
        .arg("--socket")
        .arg(directory.join("other.sock"))
        .args(["serve", "--sandbox-off", "unavailable", "--state-dir"])
        .arg(directory.join("other-state"))
        .arg("--run-dir")
        .arg(directory.join("other-run"))
        .args(words)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !text.contains("ready"), "{output:?}");
    text
}

fn user_of(agent: &Agent, vm: &str) -> u32 {
    let pid = agent.vm(vm).status.pid.unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn user_ids_of_an_account_are_refused_with_others_that_are_free() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    // The account `nobody` is 65534 on every distribution.
    let text = refused(directory.path(), &["--vmm-uid-base", "65000", "--vmm-uid-count", "1000"]);
    for part in ["65000 to 65999", "65534", "nobody", "/etc/passwd", "--vmm-uid-base "] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn a_vm_that_the_database_does_not_have_is_named_and_keeps_its_vf() {
    let arguments = ["--sim-pf", "sim0=1"].map(ToString::to_string).into();
    let mut agent = Agent::start_with(Options { arguments, ..Options::default() });
    drop(SmallGuest::boot(&agent, "lost", json!([{"id": "eth0"}])));
    let lost = agent.vm("lost");
    let (pid, vf) = (lost.status.pid.unwrap(), lost.status.adapters[0].vf.unwrap().to_string());
    agent.kill();
    fs::remove_dir_all(agent.directory().join("state")).unwrap();
    agent.restart();
    let line = |line: &&str| line.contains("ERROR") && line.contains("database does not have");
    let log = agent.log();
    assert!(log.lines().find(line).is_some_and(|line| line.contains(&lost.id.to_string())), "{log}");
    let used_by = agent.vfs()[0].used_by.clone();
    assert!(used_by.as_ref().is_some_and(|usage| usage.contains("does not know")), "{used_by:?}");

    let spec = |name: &str, vf: Option<&str>| {
        let adapter = json!({"id": "eth0", "vf": vf});
        SmallGuest::spec(&agent, name, json!([adapter]), "")
    };
    for (name, vf, code) in
        [("any", None, ProblemCode::NoFreeVf), ("named", Some(vf.as_str()), ProblemCode::VfInUse)]
    {
        agent.create(&spec(name, vf)).unwrap();
        assert_eq!(agent.act(name, VmAction::Boot).unwrap_err().code, code);
    }
    assert!(fs::metadata(format!("/proc/{pid}")).is_ok(), "the VM runs on");

    host::run("kill", &["-KILL", &pid.to_string()]);
    let deadline = Instant::now() + PATIENCE;
    while agent.act("any", VmAction::Boot).is_err() {
        assert!(Instant::now() < deadline, "its VF stays in use:\n{}", agent.log());
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_vm_of_an_agent_with_other_user_ids_runs_on_as_its_user() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    // The ids of agents up to 0.2.
    let arguments_before = arguments(&["--vmm-uid-base", "900000"]);
    let mut agent = Agent::start_with(Options { arguments: arguments_before, ..Options::default() });
    drop(SmallGuest::boot(&agent, "old", json!([{"id": "eth0"}])));
    assert_eq!(user_of(&agent, "old"), 900_000);
    agent.restart_with_arguments(arguments(&[]));
    assert_eq!(agent.vm("old").status.state, VmState::Running);
    drop(SmallGuest::boot(&agent, "new", json!([{"id": "eth0"}])));
    assert_eq!([user_of(&agent, "old"), user_of(&agent, "new")], [900_000, 2_100_000_000]);
    for vm in ["old", "new"] {
        agent.delete(vm).unwrap();
    }
}
