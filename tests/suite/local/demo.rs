//! `portcullis demo`: what it shows, and that nothing of it stays.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::fixture::{agent::binary, host};

fn demo(directory: &Path) -> Command {
    let mut command = Command::new(binary());
    command.args(["demo", "--json"]).env("TMPDIR", directory).stdin(Stdio::null());
    command
}

fn assert_nothing_is_left(directory: &Path) {
    let files: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.is_empty(), "{files:?}");
    let processes = host::processes(&[directory.to_str().unwrap()]);
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

/// Nobody is left who could clean up but its agent.
#[test]
fn killed_at_any_time_it_leaves_nothing_but_for_a_moment() {
    for delay in [0, 100, 300, 600] {
        let directory = TempDir::with_prefix("d").unwrap();
        let mut child = demo(directory.path()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut own = None;
        while own.is_none() && Instant::now() < deadline {
            let entries = fs::read_dir(directory.path()).unwrap();
            // From its socket on the agent is there, and has its directory.
            own = entries.map(|entry| entry.unwrap().path()).find(|path| path.join("api.sock").exists());
            thread::sleep(Duration::from_millis(1));
        }
        let own = own.unwrap();
        thread::sleep(Duration::from_millis(delay));
        let vms: Vec<_> = fs::read_dir(own.join("run/vms")).into_iter().flatten().flatten().collect();
        child.kill().unwrap();
        child.wait().unwrap();
        let settled = || {
            let gone = |words: &[&str]| host::processes(words).is_empty();
            !own.exists()
                && gone(&[directory.path().to_str().unwrap()])
                && vms.iter().all(|vm| gone(&["vmm", vm.file_name().to_str().unwrap()]))
        };
        while !settled() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        assert!(settled(), "after {delay} ms");
        assert_nothing_is_left(directory.path());
    }
}

#[test]
fn interrupted_at_any_time_it_leaves_nothing() {
    for delay in [0, 100, 400, 900] {
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
