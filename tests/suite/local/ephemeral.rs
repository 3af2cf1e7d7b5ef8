// SPDX-License-Identifier: Apache-2.0

//! Ephemeral disks: VMs share a base, and their writes end with their processes.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use api::{
    problem::ProblemCode,
    types::{CauseCode, VmAction, VmState},
};
use serde_json::{Value, json};

use super::{
    disk_room::Small,
    disks::{boot, qemu_img, spec},
};
use crate::fixture::{Agent, SmallGuest, host};

/// A base of `b`s, and an overlay of QEMU over it. Returns their files.
fn bases(agent: &Agent) -> [PathBuf; 2] {
    agent.image("base.raw", &[b'b'; 1 << 20]);
    let base = agent.directory().join("images/base.raw");
    let top = agent.directory().join("images/top.qcow2");
    let (base_path, top_path) = (base.to_str().unwrap(), top.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base_path, top_path]);
    host::run("qemu-io", &["-f", "qcow2", "-c", "write -q -P 0x74 0 64k", top_path]);
    [base, top]
}

fn raw(path: &str) -> Value {
    json!({"id": "root", "path": path, "format": "raw", "ephemeral": true, "discard": true})
}

/// The open file of a VM's overlay, by a copy of its descriptor.
fn overlay(agent: &Agent, vm: &str, dir: &Path) -> File {
    let pid = agent.vm(vm).status.pid.unwrap();
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let is_inside = |fd: &PathBuf| fs::read_link(fd).is_ok_and(|target| target.starts_with(dir));
    let found: Vec<_> = entries.filter(is_inside).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    File::open(&found[0]).unwrap()
}

#[test]
fn vms_share_a_base_and_lose_their_writes_at_a_stop() {
    let agent = Agent::start();
    let files = bases(&agent);
    let before = files.clone().map(|file| fs::read(file).unwrap());
    let top = json!({"id": "root", "path": "top.qcow2", "format": "qcow2", "ephemeral": true, "discard": true,
                     "backing": [{"path": "base.raw", "format": "raw"}]});
    let dir = agent.directory().canonicalize().unwrap().join("state/ephemeral");
    for (kind, first, disk) in [("raw", "b", raw("base.raw")), ("top", "t", top)] {
        let names = ["one", "two"].map(|name| format!("{kind}-{name}"));
        let mut guests = names.clone().map(|name| boot(&agent, &spec(&agent, &name, json!([disk]))));
        for (guest, name) in guests.iter_mut().zip(&names) {
            let probe = guest.ask("disk-probe");
            assert!(probe.ends_with(" sectors=2048"), "{probe}");
            assert_eq!(guest.ask("disk-read 7"), format!("ok {}", first.repeat(512)));
            assert_eq!(guest.ask(&format!("disk-write 5 {name} count=2")), "ok");
            assert_eq!(guest.ask("disk-discard 1024 count=1024"), "ok");
            assert_eq!(guest.ask("disk-flush"), "ok");
            assert_eq!(guest.ask(&format!("disk-write 9 {name}")), "ok", "not flushed");
            let data = overlay(&agent, name, &dir).metadata().unwrap();
            assert_eq!((data.nlink(), data.mode() & 0o777), (0, 0o600));
        }
        for (guest, name) in guests.iter_mut().zip(&names) {
            assert_eq!(guest.ask("reboot"), "ok");
            guest.wait_for_ready();
            guest.ask("disk-probe");
            assert_eq!(guest.ask("disk-read 5"), format!("ok {name}"), "after a reboot of the guest");
            agent.act(name, VmAction::Reboot).unwrap();
            guest.wait_for_ready();
            guest.ask("disk-probe");
            assert_eq!(guest.ask("disk-read 6"), format!("ok {name}"), "after a reboot by the agent");
            assert_eq!(guest.ask("disk-read 9"), format!("ok {name}"));
            assert_eq!(guest.ask("disk-read 2047"), "ok ", "discarded");
            agent.act(name, VmAction::Stop).unwrap();
            agent.act(name, VmAction::Boot).unwrap();
            guest.guest.begin_anew();
            guest.wait_for_ready();
            guest.ask("disk-probe");
            for sector in [5, 6, 9] {
                assert_eq!(guest.ask(&format!("disk-read {sector}")), format!("ok {}", first.repeat(512)));
            }
            assert_eq!(guest.ask("disk-read 2047"), format!("ok {}", "b".repeat(512)));
        }
        assert!(files.clone().map(|file| fs::read(file).unwrap()) == before, "the base is only read");
    }
    assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
}

#[test]
fn a_base_has_readers_or_a_writer() {
    let agent = Agent::start();
    agent.disk("base.raw", 1 << 20);
    let writable = json!({"id": "root", "path": "base.raw", "format": "raw"});
    for (first, then, cure) in
        [(&writable, &raw("base.raw"), "a copy"), (&raw("base.raw"), &writable, "ephemeral")]
    {
        boot(&agent, &spec(&agent, "first", json!([first])));
        agent.create(&spec(&agent, "then", json!([then]))).unwrap();
        let problem = agent.act("then", VmAction::Boot).unwrap_err();
        assert_eq!((problem.code, problem.field.as_deref()), (ProblemCode::DiskInUse, Some("disks[0].path")));
        assert!(problem.detail.contains("the VM first") && problem.detail.contains(cure), "{problem}");
        agent.act("first", VmAction::Stop).unwrap();
        for vm in ["first", "then"] {
            agent.delete(vm).unwrap();
        }
    }
}

/// A guest of the VM `web1`, whose process has just begun.
fn guest(agent: &Agent) -> SmallGuest<'_> {
    let mut guest = SmallGuest { guest: crate::fixture::Guest::new(agent, "web1".to_owned()) };
    guest.guest.wait_for("ready\n");
    guest.ask("disk-probe");
    guest
}

#[test]
fn nothing_is_left_of_processes_that_are_killed() {
    let mut agent = Agent::start();
    bases(&agent);
    let small = Small::mount(&agent);
    agent.restart_with_arguments(vec!["--ephemeral-dir".to_owned(), small.path("")]);
    agent.create(&spec(&agent, "web1", json!([raw("base.raw")]))).unwrap();
    let empty = small.room();
    for with_agent in [false, true] {
        agent.act("web1", VmAction::Boot).unwrap();
        let mut guest = guest(&agent);
        assert_eq!(guest.ask("disk-read 0"), format!("ok {}", "b".repeat(512)));
        for at in 0..8 {
            assert_eq!(guest.ask(&format!("disk-write {} more count=8", at * 128)), "ok");
        }
        assert_eq!(guest.ask("disk-flush"), "ok");
        assert!(small.room() + (500 << 10) < empty, "{} of {empty}", small.room());
        let pid = agent.vm("web1").status.pid.unwrap();
        if with_agent {
            agent.kill();
        }
        host::run("kill", &["-KILL", &pid.to_string()]);
        let deadline = Instant::now() + Duration::from_secs(10);
        while small.room() < empty {
            assert!(Instant::now() < deadline, "{} of {empty}", small.room());
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(fs::read_dir(small.path("")).unwrap().count(), 0);
        if with_agent {
            agent.restart();
        }
        agent.wait_for_state("web1", VmState::Failed);
    }
}

#[test]
fn a_vm_waits_for_room_for_its_changes() {
    let mut agent = Agent::start();
    bases(&agent);
    let small = Small::mount(&agent);
    agent.restart_with_arguments(vec!["--ephemeral-dir".to_owned(), small.path("")]);
    agent.create(&spec(&agent, "web1", json!([raw("base.raw")]))).unwrap();
    agent.act("web1", VmAction::Boot).unwrap();
    let mut guest = guest(&agent);
    small.fill();
    guest.guest.type_line("disk-write 800 text count=8 patience=60");
    agent.wait_for_state("web1", VmState::Paused);
    let cause = agent.vm("web1").status.cause.unwrap();
    assert_eq!(cause.code, CauseCode::DiskFull);
    assert!(cause.detail.contains(small.path("").trim_end_matches('/')), "{}", cause.detail);
    small.make_room();
    agent.wait_for_state("web1", VmState::Running);
    assert_eq!(guest.result("disk-write 800 text count=8 patience=60"), "ok");
    assert_eq!(guest.ask("disk-read 807"), "ok text");
}

/// The limit of other files of the process is 16 MiB.
#[test]
fn the_changes_may_be_as_long_as_the_base() {
    let agent = Agent::start();
    agent.disk("long", 64 << 20);
    let mut guest = boot(&agent, &spec(&agent, "web1", json!([raw("long")])));
    guest.ask("disk-probe");
    for at in (0..320).map(|cluster| cluster * 128) {
        assert_eq!(guest.ask(&format!("disk-write {at} text")), "ok", "sector {at}");
    }
    assert_eq!(guest.ask("disk-flush"), "ok");
    let dir = agent.directory().canonicalize().unwrap().join("state/ephemeral");
    let len = overlay(&agent, "web1", &dir).metadata().unwrap().len();
    assert!(len > 18 << 20, "{len}");
    let pid = agent.vm("web1").status.pid.unwrap();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let longest = limits.lines().find_map(|line| line.strip_prefix("Max file size")).unwrap();
    let longest: u64 = longest.split_whitespace().next().unwrap().parse().unwrap();
    assert!(((64 << 20)..(2 << 30)).contains(&longest), "{longest}");
}

#[test]
fn a_directory_that_cannot_have_the_changes_is_named() {
    let mut agent = Agent::start();
    bases(&agent);
    let dir = agent.directory().join("changes");
    fs::create_dir(&dir).unwrap();
    agent.restart_with_arguments(vec!["--ephemeral-dir".to_owned(), dir.display().to_string()]);
    fs::remove_dir(&dir).unwrap();
    File::create(&dir).unwrap();
    agent.create(&spec(&agent, "web1", json!([raw("base.raw")]))).unwrap();
    let problem = agent.act("web1", VmAction::Boot).unwrap_err();
    let expect = (ProblemCode::EphemeralUnavailable, Some("disks[0].ephemeral"));
    assert_eq!((problem.code, problem.field.as_deref()), expect, "{problem}");
    assert!(problem.detail.contains("/changes") && problem.detail.contains("--ephemeral-dir"), "{problem}");
    fs::remove_file(&dir).unwrap();
    agent.act("web1", VmAction::Boot).unwrap();
    agent.act("web1", VmAction::Stop).unwrap();
}
