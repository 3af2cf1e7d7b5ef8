// SPDX-License-Identifier: Apache-2.0

//! VMs that live no longer than the command that runs them, whatever ends it.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use api::types::VmState;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tempfile::TempDir;

use crate::fixture::{Agent, Options, SmallGuest, agent::binary};

const PATIENCE: Duration = Duration::from_secs(60);

/// The wait of an agent that starts, in milliseconds: far more than a client needs to come again.
const GRACE_MS: u64 = 4000;

fn start() -> Agent {
    let grace = GRACE_MS.to_string();
    Agent::start_with(Options::for_tests(&["--sim-pf", "sim0=1", "--lease-grace-for-tests", &grace]))
}

fn file(agent: &Agent, directory: &Path) -> String {
    let path = directory.join("web1.json");
    fs::write(&path, SmallGuest::spec(agent, "web1", json!([{"id": "eth0"}]), "").to_string()).unwrap();
    path.display().to_string()
}

/// `run --rm`, and the lines that its guest writes.
struct Run {
    child: Child,
    lines: Receiver<String>,
}

impl Run {
    fn start(agent: &Agent, file: &str) -> Self {
        let mut command = Command::new(binary());
        command.arg("--socket").arg(agent.directory().join("api.sock")).args(["run", "--rm", file]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let run = Self { child, lines };
        run.shows("ready");
        run
    }

    fn shows(&self, line: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.lines.recv_timeout(deadline - Instant::now()).expect("the guest's line") != line {}
    }

    fn kill(mut self) {
        kill_process(Pid::from_child(&self.child), Signal::KILL).unwrap();
        self.child.wait().unwrap();
    }
}

/// Waits until nothing is left of the VM, and says how long that took.
fn is_gone(agent: &Agent) -> Duration {
    let begun = Instant::now();
    while !agent.ask(agent.client.list_vms()).unwrap().is_empty() {
        assert!(begun.elapsed() < PATIENCE, "it stays: {:?}\n{}", agent.vm("web1").status, agent.log());
        thread::sleep(Duration::from_millis(10));
    }
    assert!(agent.vfs().iter().all(|vf| vf.owner.is_none()));
    begun.elapsed()
}

#[test]
fn a_command_that_is_killed_leaves_no_vm() {
    let agent = start();
    let directory = TempDir::with_prefix("vm").unwrap();
    let file = file(&agent, directory.path());
    // The second finds the name and the only VF free.
    for _ in 0..2 {
        Run::start(&agent, &file).kill();
        let took = is_gone(&agent);
        assert!(took < Duration::from_millis(GRACE_MS), "at once, not after a wait: {took:?}");
    }
}

/// Two commands with one file that begin at the same time.
#[test]
fn one_of_two_commands_gets_the_vm() {
    let agent = start();
    let directory = TempDir::with_prefix("vm").unwrap();
    let file = file(&agent, directory.path());
    for round in 0..5 {
        let mut commands: Vec<Child> = (0..2)
            .map(|_| {
                let mut command = Command::new(binary());
                command.arg("--socket").arg(agent.directory().join("api.sock")).args(["run", "--rm", &file]);
                command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
                command.spawn().unwrap()
            })
            .collect();
        let deadline = Instant::now() + PATIENCE;
        let loser = loop {
            let ended = commands.iter_mut().position(|command| command.try_wait().unwrap().is_some());
            if let Some(loser) = ended {
                break commands.remove(loser).wait_with_output().unwrap();
            }
            assert!(Instant::now() < deadline, "round {round}: both have the VM\n{}", agent.log());
            thread::sleep(Duration::from_millis(5));
        };
        let error = String::from_utf8_lossy(&loser.stderr);
        assert_eq!(loser.status.code(), Some(5), "round {round}: {error}");
        assert!(error.contains("web1"), "{error}");
        let mut winner = commands.remove(0);
        let output = BufReader::new(winner.stdout.take().unwrap());
        assert!(output.lines().map_while(Result::ok).any(|line| line == "ready"), "round {round}");
        kill_process(Pid::from_child(&winner), Signal::TERM).unwrap();
        winner.wait().unwrap();
        is_gone(&agent);
    }
}

#[test]
fn a_vm_lives_on_when_the_agent_is_restarted_under_its_command() {
    let mut agent = start();
    let directory = TempDir::with_prefix("vm").unwrap();
    let file = file(&agent, directory.path());
    let mut run = Run::start(&agent, &file);
    let pid = agent.vm("web1").status.pid;
    for crash in [true, false] {
        if !crash {
            agent.signal_and_wait(&[Signal::TERM]);
        }
        agent.restart();
        let deadline = Instant::now() + PATIENCE;
        while agent.vm("web1").status.lease.is_none_or(|lease| lease.until.is_some()) {
            assert!(Instant::now() < deadline, "its command does not come again\n{}", agent.log());
            thread::sleep(Duration::from_millis(10));
        }
        thread::sleep(Duration::from_millis(GRACE_MS + 1000));
        let vm = agent.vm("web1");
        assert_eq!((vm.status.state, vm.status.pid), (VmState::Running, pid));
        let word = format!("still-here-{crash}");
        agent.ask(agent.client.write_console("web1", format!("echo {word}\n"))).unwrap();
        run.shows(&word);
    }
    agent.ask(agent.client.write_console("web1", "poweroff\n")).unwrap();
    assert!(run.child.wait().unwrap().success());
    is_gone(&agent);
}

#[test]
fn a_vm_goes_after_a_time_whose_command_was_killed_while_there_was_no_agent() {
    let mut agent = start();
    let directory = TempDir::with_prefix("vm").unwrap();
    let file = file(&agent, directory.path());
    let run = Run::start(&agent, &file);
    agent.kill();
    run.kill();
    agent.restart();
    let vm = agent.wait_for_state("web1", VmState::Running);
    assert!(vm.status.lease.is_some_and(|lease| lease.until.is_some()), "{:?}", vm.status);
    assert!(vm.status.adapters[0].vf.is_some());
    is_gone(&agent);
}

/// Detached by its key, the VM is the user's own again.
#[test]
fn a_vm_whose_command_was_detached_lives_on_without_it() {
    let agent = start();
    let directory = TempDir::with_prefix("vm").unwrap();
    let file = file(&agent, directory.path());
    let mut command = Command::new(binary());
    command.arg("--socket").arg(agent.directory().join("api.sock")).args(["run", "--rm", &file]);
    let mut terminal = crate::fixture::OnTerminal::new(command);
    terminal.shows("ready\n");
    assert!(agent.vm("web1").status.lease.is_some());
    terminal.type_keys(b"\x1d");
    assert_eq!(terminal.ends(), Some(0));
    thread::sleep(Duration::from_secs(1));
    let vm = agent.vm("web1");
    assert_eq!((vm.status.state, vm.status.lease), (VmState::Running, None));
}
