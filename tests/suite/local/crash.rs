// SPDX-License-Identifier: Apache-2.0

//! Kills the agent or a vmm at every point of a VM's life; nothing may be lost. Simulated VFs.

use std::{
    fs::{self, File},
    io::Read as _,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use api::types::{VmAction, VmState};
use failpoints::{Point, Victim};
use serde_json::json;
use simnic::SimPf;
use sriov::{PfControl, VfChange};

use crate::fixture::{
    Agent, Options, SmallGuest,
    bridge::Bridge,
    checker::{Checker, sql, tap_name},
    crash::{Matrix, SETTLE, Story as _},
    host,
    small_story::{SmallStory, wait_for_script},
};

/// The points by the VM's phase: each group is a test.
const GROUPS: [&[&str]; 4] = [
    &["create", "open", "nic", "claim", "baseline", "boot"],
    &["pf", "ask"],
    &["stop", "release", "delete"],
    &["vmm"],
];

fn group(number: usize) -> Vec<Point> {
    let of_group = |point: &&Point| {
        let beginning = point.name().split('.').next().unwrap();
        // Only root makes the interfaces.
        GROUPS[number].contains(&beginning)
            && (beginning != "nic" || rustix::process::geteuid().is_root())
            && point.victim() != Victim::AgentWithHardware
    };
    Point::ALL.iter().filter(of_group).copied().collect()
}

fn start(pf: &str) -> (Agent, SmallStory) {
    let bridge = Bridge::new(pf);
    let mut options = Options::for_tests(&["--sim-pf", &format!("{pf}=2")]);
    options.arguments.extend(bridge.iter().flat_map(Bridge::options));
    let agent = Agent::start_with(options);
    let story = SmallStory::new(&agent, bridge);
    (agent, story)
}

fn matrix(pf: &str) -> Matrix<SmallStory> {
    let (agent, story) = start(pf);
    Matrix::new(agent, story)
}

#[test]
fn an_agent_that_dies_while_it_makes_a_vm_leaves_nothing_wrong() {
    matrix("crash0").die_at(group(0), u32::MAX);
}

#[test]
fn an_agent_that_dies_while_it_decides_leaves_nothing_wrong() {
    matrix("crash1").die_at(group(1), 6);
}

#[test]
fn an_agent_that_dies_while_it_gives_back_leaves_nothing_wrong() {
    matrix("crash2").die_at(group(2), u32::MAX);
}

#[test]
fn a_vmm_that_dies_leaves_nothing_wrong() {
    matrix("crash3").die_at(group(3), 2);
}

#[test]
fn every_point_is_in_one_group_and_there_are_enough() {
    let hardware = Point::ALL.iter().filter(|point| point.victim() == Victim::AgentWithHardware).count();
    let grouped: usize = (0..GROUPS.len()).map(|number| group(number).len()).sum();
    let nics = Point::ALL.iter().filter(|point| point.name().starts_with("nic.")).count();
    let left_out = if rustix::process::geteuid().is_root() { 0 } else { nics };
    assert_eq!(grouped + hardware + left_out, Point::ALL.len());
    assert!(grouped >= 20);
}

/// A process that looks like that of a VM.
fn impostor(agent: &Agent, vm: &str) -> Child {
    let directory = agent.directory().join("run/vms").join(vm);
    fs::create_dir_all(&directory).unwrap();
    let log = fs::File::options().create(true).append(true).open(directory.join("vmm.log")).unwrap();
    // Waits for a line that never comes.
    let mut command = Command::new("sh");
    command.args(["-c", "read x", "vmm", "3", vm]).stdin(Stdio::piped()).stderr(log);
    let child = command.spawn().unwrap();
    // The process exists a moment before its command line.
    while !host::processes(&["vmm 3", vm]).contains(&child.id()) {
        thread::sleep(Duration::from_millis(1));
    }
    child
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn the_checker_sees_what_is_wrong() {
    const STRANGER: &str = "6b1e3f9e-7f1d-4a53-9d5e-0d6e5a1c2b3a";
    let (mut agent, story) = start("crash4");
    let mut checker = Checker::new(agent.directory());
    drop(agent.boot(story.spec()));
    wait_for_script(&agent, "web1", 1).unwrap();
    let vm = agent.vm("web1").id.to_string();
    checker.assert_settled("before anything is planted", SETTLE);
    // A running agent could repair the differences.
    agent.kill();
    let directory = agent.directory().to_owned();
    let mut pf = SimPf::connect(&directory.join("run/sim/0.sock")).unwrap();
    let mut reported = |plant: &str, what: &[&str]| {
        let found = checker.differences();
        for words in what {
            assert!(found.iter().any(|found| found.contains(words)), "{plant}: {words}: {found:#?}");
        }
        assert_eq!(found.is_empty(), what.is_empty(), "{plant}: {found:#?}");
    };

    let mac = "02:00:00:00:0e:66".parse().unwrap();
    pf.set(1, VfChange::Mac(Some(mac))).unwrap();
    reported("a foreign address", &["0e:66", "which nobody has"]);
    pf.set(1, VfChange::Mac(None)).unwrap();
    pf.set(0, VfChange::Trust(true)).unwrap();
    reported("trust", &["the trust of its VF"]);
    pf.set(0, VfChange::Trust(false)).unwrap();
    pf.set(0, VfChange::TxRate { min: 0, max: 7 }).unwrap();
    reported("a rate", &["the rate of its VF"]);
    pf.set(0, VfChange::TxRate { min: 0, max: 100 }).unwrap();
    reported("nothing", &[]);

    let orphan = impostor(&agent, STRANGER);
    reported("an orphan", &["is of 6b1e3f9e", "the run directory of 6b1e3f9e"]);
    end(orphan);
    reported("its directory", &["the run directory of 6b1e3f9e"]);
    fs::remove_dir_all(directory.join("run/vms").join(STRANGER)).unwrap();
    let second = impostor(&agent, &vm);
    reported("a second process", &["is running and has the processes"]);
    end(second);
    let socket = directory.join("run/vms").join(&vm).join("control.sock");
    fs::rename(&socket, directory.join("moved")).unwrap();
    reported("a missing socket", &["has no control socket"]);
    fs::rename(directory.join("moved"), &socket).unwrap();

    for (kind, value) in [
        ("claim", json!({"vm": STRANGER, "bdf": "0000:01:10.0"})),
        ("port", json!({"vm": {"id": STRANGER, "name": "x"}})),
        ("run", json!({"state": "failed"})),
        ("attachment", json!({})),
    ] {
        sql(&directory, &format!("INSERT INTO objects VALUES ('{kind}', '{STRANGER}', 'x', 1, '{value}')"));
        reported(kind, &[&format!("the {kind} {STRANGER} belongs to nothing")]);
        sql(&directory, &format!("DELETE FROM objects WHERE kind = '{kind}' AND id = '{STRANGER}'"));
    }
    let run = format!("kind = 'run' AND id = '{vm}'");
    sql(&directory, &format!("CREATE TABLE kept AS SELECT value FROM objects WHERE {run}"));
    let set = |member: &str, value: &str| {
        sql(
            &directory,
            &format!("UPDATE objects SET value = json_set(value, '{member}', {value}) WHERE {run}"),
        );
    };
    let restore =
        || sql(&directory, &format!("UPDATE objects SET value = (SELECT value FROM kept) WHERE {run}"));
    set("$.process.start_time", "7");
    reported("another start time", &["its process is"]);
    restore();
    set("$.state", "'stopped'");
    reported(
        "a VM at rest with everything",
        &["has process", "has a claim", "its port has VF", "a control socket"],
    );
    restore();
    set("$.state", "'starting'");
    reported("a VM on the way", &["neither running nor at rest"]);
    restore();
    sql(&directory, "DROP TABLE kept");
    reported("nothing any more", &[]);
    agent.restart();
}

/// Each line plants a state that a crash could leave, and takes it back.
#[test]
fn the_checker_sees_what_is_wrong_with_disks_and_nics() {
    let (mut agent, story) = start("crash6");
    let Some(Bridge { bridge, tap }) = story.bridge() else { return };
    let mut checker = Checker::new(agent.directory());
    drop(agent.boot(story.spec()));
    wait_for_script(&agent, "web1", 1).unwrap();
    agent.disk("rest.raw", 1 << 20);
    let mut second = SmallGuest::spec(&agent, "rest", json!([]), "");
    second["disks"] = json!([{ "id": "own", "path": "rest.raw", "format": "raw" }]);
    second["nics"] = json!([{ "id": "nic0", "bridge": bridge }]);
    let rest = agent.create(&second).unwrap().id.to_string();
    let web1 = agent.vm("web1").id.to_string();
    checker.assert_settled("before anything is planted", SETTLE);
    // A running agent could repair the differences.
    agent.kill();
    let directory = agent.directory().canonicalize().unwrap();
    let mut reported = |what: &[&str]| {
        let found = checker.differences();
        assert_eq!(found.len(), what.len(), "{what:?}: {found:#?}");
        assert!(what.iter().zip(&found).all(|(what, found)| found.contains(what)), "{what:?}: {found:#?}");
    };
    let all_of = |found: &[String], what: &[&str]| {
        let missing = what.iter().find(|what| !found.iter().any(|found| found.contains(**what)));
        assert_eq!(missing, None, "{found:#?}");
    };
    reported(&[]);

    // QEMU takes the same locks.
    let own = directory.join("disks/rest.raw");
    let opened = File::open(&own).unwrap();
    reported(&["rest.raw is open in the process"]);
    drop(opened);
    let mut qemu = Command::new("qemu-io");
    qemu.args(["-f", "raw"]).arg(&own).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut qemu = qemu.spawn().unwrap();
    // It prompts once it has opened the file.
    let mut prompt = [0];
    qemu.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
    reported(&["rest.raw is open in the process", "rest.raw has the locks [100,"]);
    end(qemu);
    let base = File::options().write(true).open(directory.join("images/base.raw")).unwrap();
    let modified = base.metadata().unwrap().modified().unwrap();
    base.set_modified(modified + Duration::from_secs(1)).unwrap();
    reported(&["base.raw is open in the process", "base.raw, which is only read, was written"]);
    base.set_modified(modified).unwrap();
    drop(base);
    let overlay = directory.join("state/ephemeral/left");
    let file = File::create(&overlay).unwrap();
    reported(&["an overlay is open in the process", "left has a name"]);
    drop(file);
    fs::remove_file(&overlay).unwrap();
    reported(&[]);

    let ip = |words: &[&str]| host::run("ip", words);
    let own = tap_name(&web1, 0);
    ip(&["link", "set", &own, "down"]);
    reported(&["is down"]);
    ip(&["link", "set", &own, "up"]);
    ip(&["link", "set", &own, "nomaster"]);
    reported(&["is on the bridge none, not"]);
    ip(&["link", "set", &own, "master", bridge]);
    reported(&["is no locked port"]);
    host::run("bridge", &["link", "set", "dev", &own, "locked", "on"]);
    reported(&[]);
    ip(&["link", "set", tap, "master", bridge]);
    reported(&["has the port crash6tap, which no VM has"]);
    ip(&["link", "set", tap, "nomaster"]);
    let left = tap_name(&rest, 0);
    ip(&["tuntap", "add", &left, "mode", "tap"]);
    reported(&["of a VM that does not run exists"]);
    ip(&["link", "delete", &left]);
    reported(&[]);

    // The vmm has all of it, and the agent forgets it.
    let run = format!("kind = 'run' AND id = '{web1}'");
    sql(&directory, &format!("UPDATE objects SET value = json_set(value, '$.state', 'stopped') WHERE {run}"));
    let found = checker.differences();
    all_of(
        &found,
        &[
            "a seed is open in the process",
            "an overlay is open in the process",
            "own.raw is open in the process",
            "base.raw is open in the process",
            "the lock of crash6tap is open in the process",
            "the tap crash6tap is open in the process",
            &format!("the tap {own} is open in the process"),
            &format!("the tap {own} of a VM that does not run exists"),
            "own.raw has the locks [100, 101, 103, 201, 203], not []",
            "base.raw has the locks [100, 201, 203], not []",
        ],
    );
    // And the other way round: a process without any of it.
    sql(&directory, &format!("UPDATE objects SET value = json_set(value, '$.state', 'running') WHERE {run}"));
    assert_eq!(checker.differences(), [""; 0]);
    for pid in host::processes(&["vmm 3", &web1]) {
        host::run("kill", &["-KILL", &pid.to_string()]);
    }
    // The last of its threads closes its files.
    let tap_is_there = || std::path::Path::new("/sys/class/net").join(&own).exists();
    let is_held = |found: &String| found.contains("is open in") || found.contains("locks");
    while tap_is_there() || checker.differences().iter().any(is_held) {
        thread::sleep(Duration::from_millis(1));
    }
    let second = impostor(&agent, &web1);
    let found = checker.differences();
    all_of(
        &found,
        &[
            "a seed is not open in the process",
            "an overlay is not open in the process",
            "own.raw is not open in the process",
            "base.raw is not open in the process",
            "the lock of crash6tap is not open in the process",
            "the tap crash6tap is not open in the process",
            &format!("the tap {own} is not open in the process"),
            &format!("the tap {own} does not exist"),
            "own.raw has the locks [], not [100, 101, 103, 201, 203]",
            "base.raw has the locks [], not [100, 201, 203]",
        ],
    );
    end(second);
    agent.restart();
}

/// The former agent's VMs run on under an agent that offers more versions than they know, and under an agent without
/// a common version, which reports that.
#[test]
fn an_agent_of_a_newer_protocol_takes_vms_up_or_says_why_not() {
    const OFFER: &str = "PORTCULLIS_PROTOCOL_FOR_TESTS";
    let (mut agent, story) = start("crash5");
    let mut checker = Checker::new(agent.directory());
    drop(agent.boot(story.spec()));
    wait_for_script(&agent, "web1", 1).unwrap();
    let pid = agent.vm("web1").status.pid;
    let newest = protocol(&mut agent, OFFER);

    let next = format!("1-{}", newest + 1);
    agent.restart_with(&[(OFFER, &next)]);
    checker.assert_settled("under an agent that offers more", SETTLE);
    agent.act("web1", VmAction::Reboot).unwrap();
    wait_for_script(&agent, "web1", 2).unwrap();
    assert_eq!(agent.vm("web1").status.pid, pid);

    let only_newer = format!("{}-{}", newest + 1, newest + 2);
    agent.restart_with(&[(OFFER, &only_newer)]);
    let vm = agent.vm("web1");
    assert_eq!((vm.status.state, vm.status.pid), (VmState::Running, pid));
    let clear = format!("this process 1 to {newest}");
    let mut problem = agent.act("web1", VmAction::Reboot).unwrap_err();
    for _ in 0..100 {
        if problem.detail.contains(&clear) {
            break;
        }
        thread::sleep(Duration::from_millis(20));
        problem = agent.act("web1", VmAction::Reboot).unwrap_err();
    }
    assert!(problem.detail.contains(&clear), "{problem:?}");
    assert!(problem.detail.contains("stop the VM and boot it again"), "{problem:?}");
    assert!(agent.log().contains(&clear), "{}", agent.log());
    checker.assert_settled("under an agent that speaks another protocol", SETTLE);
    assert_eq!(agent.vm("web1").status.pid, pid, "it runs on");

    // An agent can end a VM that it cannot talk to. The former agent would have gone on with it.
    agent.restart();
    agent.act("web1", VmAction::Reboot).unwrap();
    wait_for_script(&agent, "web1", 3).unwrap();
    assert_eq!(agent.vm("web1").status.pid, pid);
    agent.restart_with(&[(OFFER, &only_newer)]);
    agent.act("web1", VmAction::Stop).unwrap();
    agent.delete("web1").unwrap();
    checker.assert_settled("an agent ended a VM that it could not talk to", SETTLE);
}

/// The newest version that this build's vmms speak, from their refusal of an agent of the far future.
fn protocol(agent: &mut Agent, offer: &str) -> u32 {
    agent.restart_with(&[(offer, "1000-1001")]);
    for _ in 0..250 {
        let log = agent.log();
        if let Some((_, rest)) = log.split_once("this process 1 to ") {
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            return digits.parse().unwrap();
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("no vmm has refused the agent:\n{}", agent.log());
}
