// SPDX-License-Identifier: Apache-2.0

//! `portcullis demo`: its output, and its cleaning up.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::fixture::{
    agent::{binary, test_binary},
    host,
};

fn demo(directory: &Path) -> Command {
    let mut command = Command::new(binary());
    command.args(["demo", "--json"]).env("TMPDIR", directory).stdin(Stdio::null());
    command
}

fn assert_nothing_is_left(directory: &Path) {
    let files: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.is_empty(), "{files:?}");
    let processes = host::processes_of(directory);
    assert!(processes.is_empty(), "{processes:?}");
}

#[test]
fn it_meets_its_expectations_in_ten_seconds() {
    let directory = TempDir::with_prefix("d").unwrap();
    let started = Instant::now();
    let output = demo(directory.path()).output().unwrap();
    let took = started.elapsed();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["passed"], true, "{report:#}");
    assert_eq!(report["steps"].as_array().unwrap().len(), 5);
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_nothing_is_left(directory.path());
}

/// This demo's agent grants everything, so its expectations of denials fail.
#[test]
fn it_fails_if_what_it_expects_does_not_happen() {
    let directory = TempDir::with_prefix("d").unwrap();
    let mut command = Command::new(test_binary());
    command.args(["demo", "--json", "--policy-bypass-for-tests"]).env("TMPDIR", directory.path());
    let output = command.stdin(Stdio::null()).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &report["passed"]), (Some(1), &false.into()), "{report:#}");
    let checks =
        report["steps"].as_array().unwrap().iter().flat_map(|step| step["checks"].as_array().unwrap());
    let failed: Vec<_> = checks.filter(|check| check["passed"] == false).collect();
    assert!(
        failed.iter().any(|check| check["expected"] == "nack" && check["observed"] == "ok"),
        "{report:#}"
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains(&format!("{} of the demo's expectations were not met", failed.len())),
        "{output:?}"
    );
    assert_nothing_is_left(directory.path());
}

/// If the demo runs as root, its processes have other users than the VMs of the host's agent.
#[test]
fn its_processes_have_users_of_their_own() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let directory = TempDir::with_prefix("d").unwrap();
    let mut child = demo(directory.path()).stdout(Stdio::null()).spawn().unwrap();
    let mut users = BTreeSet::new();
    while child.try_wait().unwrap().is_none() {
        for agent in host::processes(&[directory.path().to_str().unwrap(), "serve"]) {
            users.extend(users_of_children(agent));
        }
        thread::sleep(Duration::from_millis(5));
    }
    // Until they drop it, their user is root. Two VMs, and the adapter.
    users.remove(&0);
    assert!(
        users.len() == 3 && users.iter().all(|user| (2_100_100_000..=2_100_115_999).contains(user)),
        "{users:?}"
    );
}

fn users_of_children(parent: u32) -> Vec<u32> {
    let field = |status: &str, name: &str| -> Option<u32> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let statuses = processes.filter_map(|entry| fs::read_to_string(entry.path().join("status")).ok());
    let children = statuses.filter(|status| field(status, "PPid:") == Some(parent));
    children.filter_map(|status| field(&status, "Uid:")).collect()
}

/// The times of the demo's end, in milliseconds from about the start of its agent: during the start, while VMs boot
/// (most of them), and later.
fn moments() -> impl Iterator<Item = u64> {
    (0..120).step_by(20).chain([150, 300, 600])
}

/// After the demo's death only its agent can clean up.
#[test]
fn killed_at_any_time_it_leaves_nothing_but_for_a_moment() {
    for delay in moments() {
        let directory = TempDir::with_prefix("d").unwrap();
        let mut child = demo(directory.path()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while host::processes(&[directory.path().to_str().unwrap(), "serve"]).is_empty() {
            assert!(Instant::now() < deadline, "no agent");
        }
        thread::sleep(Duration::from_millis(delay));
        child.kill().unwrap();
        child.wait().unwrap();
        let settled = || {
            fs::read_dir(directory.path()).unwrap().next().is_none()
                && host::processes_of(directory.path()).is_empty()
        };
        while !settled() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        assert!(settled(), "after {delay} ms: {:?}", host::processes_of(directory.path()));
        assert_nothing_is_left(directory.path());
    }
}

#[test]
fn interrupted_at_any_time_it_leaves_nothing() {
    for delay in moments() {
        let directory = TempDir::with_prefix("d").unwrap();
        let mut child = demo(directory.path()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while fs::read_dir(directory.path()).unwrap().next().is_none() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(delay));
        assert!(child.try_wait().unwrap().is_none(), "it ended before {delay} ms");
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("Interrupted"), "{output:?}");
        assert_nothing_is_left(directory.path());
    }
}

/// Only the demo's agent can end its adapter: no other agent has its directory.
#[test]
fn its_agent_leaves_nothing_running_if_it_cannot_serve() {
    let directory = TempDir::with_prefix("d").unwrap();
    let mut command = Command::new(binary());
    // The directory cannot be made there.
    fs::write(directory.path().join("file"), "").unwrap();
    command.arg("--socket").arg(directory.path().join("file/api.sock"));
    command
        .args(["serve", "--sandbox-off", "unavailable", "--sim-pf", "sim0=2", "--private"])
        .arg(directory.path());
    for (option, name) in [("--state-dir", "state"), ("--run-dir", "run")] {
        command.arg(option).arg(directory.path().join(name));
    }
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("simulated PF started") && said.contains("file/api.sock"), "{said}");
    assert_eq!(host::processes_of(directory.path()), []);
}
