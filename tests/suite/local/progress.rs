// SPDX-License-Identifier: Apache-2.0

//! Long operations report their progress: in a VM's status, and on the terminal.

use std::{
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use api::types::{OperationAction, Stage, VmAction, VmOperation, VmState};
use failpoints::Point;
use rusqlite::Connection;
use serde_json::{Value, json};

use crate::fixture::{
    Agent, Held, OnTerminal, SmallGuest,
    agent::{PATIENCE, binary},
    held::A_WHILE,
};

fn start(held: &Held) -> Agent {
    let agent = Agent::start_with(held.options());
    agent.create(&SmallGuest::spec(&agent, "web1", json!([{"id": "eth0"}]), "")).unwrap();
    agent
}

/// Begins an action without waiting for its end.
fn begin(agent: &Agent, action: VmAction) {
    assert!(!agent.ask(agent.client.act("web1", action, Duration::ZERO)).unwrap().complete);
}

fn wait_for_stage(agent: &Agent, stage: Stage) -> VmOperation {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = agent.vm("web1").status;
        if let Some(operation) = status.operation.filter(|operation| operation.stage == stage) {
            return operation;
        }
        assert!(Instant::now() < deadline, "{status:?} in place of {stage}\n{}", agent.log());
        thread::sleep(Duration::from_millis(5));
    }
}

fn place(operation: VmOperation) -> (OperationAction, u32, u32) {
    (operation.action, operation.step, operation.steps)
}

fn command(agent: &Agent, line: &str) -> Command {
    let mut command = Command::new(binary());
    command.arg("--socket").arg(agent.directory().join("api.sock")).args(line.split_whitespace());
    command
}

#[test]
fn a_boot_that_waits_for_the_pf_says_so_and_stores_nothing_of_it() {
    let held = Held::at(Point::PfSet);
    let agent = start(&held);
    held.close();
    begin(&agent, VmAction::Boot);
    let operation = wait_for_stage(&agent, Stage::SettingPolicy);
    assert_eq!(place(operation), (OperationAction::Boot, 4, 7));
    // The operation stays there, and the agent answers other requests.
    thread::sleep(Duration::from_millis(300));
    let vm = agent.vm("web1");
    assert_eq!((vm.status.state, vm.status.operation), (VmState::Starting, Some(operation)));
    let store = Connection::open(agent.directory().join("state/portcullis.db")).unwrap();
    let told =
        "SELECT count(*) FROM objects WHERE value LIKE '%setting_policy%' OR value LIKE '%\"operation\"%'";
    assert_eq!(store.query_row(told, [], |row| row.get::<_, u32>(0)).unwrap(), 0);
    held.open();
    assert_eq!(agent.wait_for_state("web1", VmState::Running).status.operation, None);
}

#[test]
fn a_stop_that_waits_for_a_function_says_so() {
    let held = Held::at(Point::ReleaseReset);
    let agent = start(&held);
    agent.act("web1", VmAction::Boot).unwrap();
    held.close();
    begin(&agent, VmAction::Stop);
    let operation = wait_for_stage(&agent, Stage::ReturningFunction);
    assert_eq!(place(operation), (OperationAction::Stop, 3, 3));
    assert_eq!(agent.vm("web1").status.state, VmState::Stopping);
    held.open();
    assert_eq!(agent.wait_for_state("web1", VmState::Stopped).status.operation, None);
}

#[test]
fn a_terminal_shows_it_in_a_line_that_is_gone_at_the_end() {
    let held = Held::at(Point::VmmGreeted);
    let agent = start(&held);
    held.close();
    let mut boot = command(&agent, "vm boot web1");
    // Independent of the terminal that runs the tests.
    boot.env("TERM", "xterm");
    let mut terminal = OnTerminal::new(boot);
    terminal.shows("\rbooting web1: building machine (6/7, ");
    held.open();
    assert_eq!(terminal.ends(), Some(0));
    terminal.shows("state:  running");
    let seen = terminal.seen();
    let (before, after) = seen.rsplit_once("\r\x1b[K").expect("it is erased");
    assert!(before.contains(" s)\x1b[K") && !before.contains('\n'), "{seen:?}");
    assert!(after.starts_with("name:") && !after.contains("booting"), "{seen:?}");
}

#[test]
fn what_is_no_terminal_gets_the_answer_only() {
    let held = Held::at(Point::VmmGreeted);
    let agent = start(&held);
    held.close();
    let boot = command(&agent, "vm boot web1 --output json")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_stage(&agent, Stage::BuildingMachine);
    thread::sleep(A_WHILE);
    held.open();
    let output = boot.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let vm: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&vm["status"]["state"], vm["status"].get("operation")), (&json!("running"), None));
}
