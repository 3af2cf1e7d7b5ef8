// SPDX-License-Identifier: Apache-2.0

//! Disks and random numbers of a guest, by the virtio driver of the small guest.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use api::{
    problem::ProblemCode,
    types::{VmAction, VmState},
};
use serde_json::{Value, json};

use crate::fixture::{Agent, SmallGuest, host};

/// The bytes of most disks.
pub(super) const SIZE: u64 = 1 << 20;

pub(super) fn spec(agent: &Agent, name: &str, disks: Value) -> Value {
    let mut spec = SmallGuest::spec(agent, name, json!([]), "");
    spec["disks"] = disks;
    spec
}

/// The count of kills of a test. The complete run has a few of each; PORTCULLIS_KILLS has another count.
pub(super) fn kills() -> u64 {
    std::env::var("PORTCULLIS_KILLS").map_or(10, |kills| kills.parse().unwrap())
}

pub(super) fn boot<'a>(agent: &'a Agent, spec: &Value) -> SmallGuest<'a> {
    let mut guest = SmallGuest { guest: agent.boot(spec) };
    guest.wait_for_ready();
    guest
}

/// The text at the beginning of a sector of a file.
pub(super) fn sector(path: &Path, number: u64) -> String {
    let mut bytes = [0; 512];
    File::open(path).unwrap().read_exact_at(&mut bytes, number * 512).unwrap();
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
}

#[test]
fn a_guest_reads_and_writes_its_disk_and_finds_it_again() {
    let agent = Agent::start();
    let path = agent.disk("web1.raw", SIZE);
    let mut guest =
        boot(&agent, &spec(&agent, "web1", json!([{"id": "root", "path": "web1.raw", "format": "raw"}])));
    let probe = guest.ask("disk-probe");
    assert!(probe.starts_with("slot=1 ") && probe.ends_with(" sectors=2048"), "{probe}");
    assert_eq!(guest.ask("disk-serial"), "ok root");
    assert_eq!(guest.ask("disk-write 5 hello count=2"), "ok");
    assert_eq!(guest.ask("disk-flush"), "ok");
    assert_eq!(guest.ask("disk-read 4 count=3"), "ok |hello|hello");
    assert_eq!(
        (sector(&path, 5), sector(&path, 6), sector(&path, 7)),
        ("hello".into(), "hello".into(), String::new())
    );
    assert_eq!(guest.ask("disk-read 2048"), "io-error", "behind the end");
    assert_eq!(guest.ask("disk-read 2047 count=2"), "io-error");
    // The interrupt of the queue woke the guest: it sleeps while it waits.
    let interrupts = guest.ask("interrupts");
    assert!(!interrupts.contains("queue=0 "), "{interrupts}");
    let stats = agent.stats("web1").disks["root"];
    assert_eq!(
        (stats.reads, stats.writes, stats.flushes, stats.written_bytes, stats.errors),
        (1, 1, 1, 1024, 0)
    );
    assert_eq!(guest.ask("reboot"), "ok");
    guest.wait_for_ready();
    guest.ask("disk-probe");
    assert_eq!(guest.ask("disk-read 5"), "ok hello", "after a reboot");
    guest.ask("disk-write 9 last");
    agent.act("web1", VmAction::Stop).unwrap();
    agent.act("web1", VmAction::Boot).unwrap();
    guest.guest.begin_anew();
    guest.wait_for_ready();
    guest.ask("disk-probe");
    assert_eq!(guest.ask("disk-read 9"), "ok last", "after a stop");
    // A doorbell costs no exit to the process.
    let before = agent.stats("web1").exits;
    let timed = guest.ask("disk-time read count=200");
    assert!(timed.starts_with("done=200 "), "{timed}");
    let after = agent.stats("web1").exits;
    let writes = after.get("mmio_write").unwrap_or(&0) - before.get("mmio_write").unwrap_or(&0);
    assert!(writes < 50, "{writes} exits for 200 requests");
}

#[test]
fn disks_have_slots_after_adapters_and_their_order() {
    let agent = super::adapter::start();
    super::adapter::port_group(&agent, json!({}));
    for name in ["a", "b"] {
        let path = agent.disk(name, SIZE);
        File::options().write(true).open(path).unwrap().write_all_at(name.as_bytes(), 0).unwrap();
    }
    let disk =
        |name: &str, serial: &str| json!({"id": name, "path": name, "format": "raw", "serial": serial});
    let mut spec = spec(&agent, "web1", json!([disk("b", "second"), disk("a", "first")]));
    spec["adapters"] = json!([{"id": "eth0", "port_group": "tests"}]);
    let mut guest = boot(&agent, &spec);
    assert!(guest.ask("probe").contains(" slot=1 "));
    for (index, slot, serial, content) in [(0, 2, "second", "b"), (1, 3, "first", "a")] {
        let probe = guest.ask(&format!("disk-probe {index}"));
        assert!(probe.starts_with(&format!("slot={slot} ")), "{probe}");
        assert_eq!(guest.ask("disk-serial"), format!("ok {serial}"));
        assert_eq!(guest.ask("disk-read 0"), format!("ok {content}"));
    }
    assert_eq!(guest.ask("disk-probe 2"), "none");
}

#[test]
fn a_read_only_disk_stays_as_it_is_and_is_shared() {
    let agent = Agent::start();
    agent.image("base.raw", &[b'b'; 4096]);
    let disks = json!([{"id": "base", "path": "base.raw", "format": "raw", "read_only": true}]);
    let mut one = boot(&agent, &spec(&agent, "one", disks.clone()));
    let mut two = boot(&agent, &spec(&agent, "two", disks));
    for guest in [&mut one, &mut two] {
        guest.ask("disk-probe");
        assert_eq!(guest.ask("disk-write 0 changed"), "io-error");
        assert_eq!(guest.ask("disk-zero 0"), "unsupported");
        assert_eq!(guest.ask("disk-flush"), "ok");
        assert!(guest.ask("disk-read 0").starts_with("ok bbb"));
    }
    assert_eq!(fs::read(agent.directory().join("images/base.raw")).unwrap(), [b'b'; 4096]);
}

#[test]
fn discarded_room_goes_back_to_the_host() {
    let agent = Agent::start();
    let path = agent.disk("thin", SIZE);
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    let blocks = || fs::metadata(&path).unwrap().blocks();
    let disks = json!([{"id": "thin", "path": "thin", "format": "raw", "discard": true}]);
    let mut guest = boot(&agent, &spec(&agent, "web1", disks));
    guest.ask("disk-probe");
    let before = blocks();
    assert_eq!(guest.ask("disk-discard 0 count=1024"), "ok");
    assert!(blocks() <= before - 1000, "{} of {before}", blocks());
    assert_eq!(guest.ask("disk-zero 1030 count=2"), "ok");
    assert_eq!(sector(&path, 1029).len(), 512);
    assert_eq!(
        (sector(&path, 1030).len(), sector(&path, 1031).len(), sector(&path, 1032).len()),
        (0, 0, 512)
    );
    assert_eq!(fs::metadata(&path).unwrap().len(), SIZE);
}

/// Noise makes a disk slower, so only a disk that is too fast is a fault.
#[test]
fn a_disk_is_not_faster_than_its_limits() {
    let agent = Agent::start();
    agent.disk("slow", SIZE);
    let disk = |limits: Value| json!([{"id": "slow", "path": "slow", "format": "raw", "limits": limits}]);
    let spec = spec(&agent, "web1", disk(json!({"operations_per_second": 50, "burst_operations": 1})));
    let mut guest = boot(&agent, &spec);
    guest.ask("disk-probe");
    let mut time = |count: u32| {
        let begun = Instant::now();
        let result = guest.ask(&format!("disk-time read count={count}"));
        assert!(result.starts_with(&format!("done={count} ")), "{result}");
        begun.elapsed()
    };
    // All but the first request wait.
    let taken = time(40);
    assert!(taken >= Duration::from_millis(20 * 39), "{taken:?}");
    let set = |agent: &Agent, limits: Value| {
        agent.ask(agent.client.patch_vm("web1", &json!({"disks": disk(limits)}), None)).map(drop)
    };
    set(&agent, json!({"bytes_per_second": "64KiB", "burst_bytes": 512})).unwrap();
    let taken = time(100);
    assert!(taken >= Duration::from_micros(1_000_000 / 128 * 99), "{taken:?}");
    set(&agent, json!({"operations_per_second": 20, "burst_operations": 1})).unwrap();
    let taken = time(10);
    assert!(taken >= Duration::from_millis(50 * 9), "{taken:?}");
    // 1000 requests of 20 in a second would take 50 s, more than the guest's script has.
    set(&agent, Value::Null).unwrap();
    let taken = time(1000);
    assert!(taken < Duration::from_secs(25), "{taken:?}");
}

/// RLIMIT_FSIZE of the process is as long as its longest disk.
#[test]
fn a_disk_may_be_longer_than_other_files_of_the_process() {
    let agent = Agent::start();
    let path = agent.disk("long", 64 << 20);
    let disks = json!([{"id": "long", "path": "long", "format": "raw"}]);
    let mut guest = boot(&agent, &spec(&agent, "web1", disks));
    guest.ask("disk-probe");
    let last = (64 << 20) / 512 - 1;
    assert_eq!(guest.ask(&format!("disk-write {last} end")), "ok");
    assert_eq!(guest.ask("disk-flush"), "ok");
    assert_eq!(sector(&path, last), "end");
    let pid = agent.vm("web1").status.pid.unwrap();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let longest = limits.lines().find(|line| line.starts_with("Max file size")).unwrap();
    assert!(longest.contains(" 67108864 "), "{longest}");
}

#[test]
fn a_disk_in_use_is_refused_by_name_and_stays_whole() {
    let mut agent = Agent::start();
    let path = agent.disk("web1.raw", SIZE);
    let disks = json!([{"id": "root", "path": "web1.raw", "format": "raw"}]);
    let mut guest = boot(&agent, &spec(&agent, "web1", disks.clone()));
    guest.ask("disk-probe");
    agent.create(&spec(&agent, "web2", disks)).unwrap();
    let problem = agent.act("web2", VmAction::Boot).unwrap_err();
    assert_eq!((problem.code, problem.field.as_deref()), (ProblemCode::DiskInUse, Some("disks[0].path")));
    assert!(problem.detail.contains("is in use by the VM web1"), "{problem}");
    let refused = agent.vm("web2").status;
    assert_eq!(
        (refused.state, refused.cause.unwrap().problem),
        (VmState::Defined, Some(ProblemCode::DiskInUse))
    );
    // QEMU's tools see the lock, too, and respect it.
    let resize = || {
        let mut qemu = std::process::Command::new("qemu-img");
        qemu.args(["resize", "-f", "raw"]).arg(&path).arg("2M").output().unwrap()
    };
    assert!(!resize().status.success());
    // The lock is the process's, not the agent's.
    agent.kill_and_restart();
    assert!(!resize().status.success());
    agent.act("web1", VmAction::Stop).unwrap();
    assert!(resize().status.success(), "released");
    agent.act("web2", VmAction::Boot).unwrap();
}

pub(super) fn qemu_img(arguments: &[&str]) -> String {
    host::run("qemu-img", arguments)
}

#[test]
fn wrong_disks_are_refused_by_name_before_anything_is_touched() {
    let agent = Agent::start();
    agent.disk("short", 100);
    agent.disk("good", SIZE);
    for (number, (path, code)) in [
        ("absent", ProblemCode::DiskNotFound),
        ("short", ProblemCode::DiskInvalid),
        ("/dev/null", ProblemCode::DiskUnreadable),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("web{number}");
        let disks = json!([
            {"id": "good", "path": "good", "format": "raw"},
            {"id": "bad", "path": path, "format": "raw"},
        ]);
        agent.create(&spec(&agent, &name, disks)).unwrap();
        let problem = agent.act(&name, VmAction::Boot).unwrap_err();
        assert_eq!((problem.code, problem.field.as_deref()), (code, Some("disks[1].path")), "{path}");
        assert_eq!(
            host::processes_of(agent.directory()).iter().filter(|(_, line)| line.contains(" vmm ")).count(),
            0
        );
    }
    for (disks, field) in [
        (
            json!([{"id": "a", "path": "a", "format": "raw"}, {"id": "a", "path": "b", "format": "raw"}]),
            "disks[1].id",
        ),
        (json!([{"id": "a", "path": "", "format": "raw"}]), "disks[0].path"),
        (json!([{"id": "a", "path": "a", "format": "raw", "serial": "with blank"}]), "disks[0].serial"),
        (json!([{"id": "a", "path": "a", "format": "raw", "serial": "x".repeat(21)}]), "disks[0].serial"),
        (
            json!([{"id": "a", "path": "a", "format": "raw", "read_only": true, "discard": true}]),
            "disks[0].discard",
        ),
        (
            json!([{"id": "a", "path": "a", "format": "raw", "read_only": true, "ephemeral": true}]),
            "disks[0].ephemeral",
        ),
    ] {
        let problem = agent.create(&spec(&agent, "never", disks)).unwrap_err();
        assert_eq!(
            (problem.code, problem.field.as_deref()),
            (ProblemCode::InvalidRequest, Some(field)),
            "{problem}"
        );
    }
}

#[test]
fn a_hostile_driver_breaks_its_own_device_only() {
    let agent = Agent::start();
    let path = agent.disk("web1.raw", SIZE);
    let other = agent.disk("other.raw", SIZE);
    let disks = json!([
        {"id": "root", "path": "web1.raw", "format": "raw"},
        {"id": "other", "path": "other.raw", "format": "raw"},
    ]);
    let mut guest = boot(&agent, &spec(&agent, "web1", disks));
    guest.ask("disk-probe");
    for _ in 0..3 {
        let outcome = guest.ask("disk-hostile");
        assert!(outcome.starts_with("ok faults="), "{outcome}");
    }
    assert_eq!(guest.ask("disk-write 1 works"), "ok");
    assert_eq!(sector(&path, 1), "works");
    assert!(fs::read(&other).unwrap().iter().all(|byte| *byte == 0));
    let id = agent.vm("web1").id;
    let log = fs::read_to_string(agent.directory().join(format!("run/vms/{id}/vmm.log"))).unwrap();
    assert!(log.lines().count() < 30, "{log}");
    guest.ask("disk-probe 1");
    assert_eq!(guest.ask("disk-read 0"), "ok ");
    // Random registers, also those of the devices' BARs and configuration spaces.
    guest.guest.type_line("fuzz memory steps=3000 seed=7");
    guest.guest.wait_for("steps=3000");
    guest.guest.type_line("fuzz ports steps=3000 seed=8");
    guest.guest.wait_for("steps=3000");
    let probe = guest.ask("disk-probe");
    assert!(probe.contains("sectors=2048"), "{probe}");
    assert_eq!(guest.ask("disk-read 1"), "ok works");
}

/// A guest that writes all the time is killed with its vmm, again and again. What it has flushed is there.
#[test]
fn flushed_data_survives_any_kill() {
    let agent = Agent::start();
    let path = agent.disk("web1.raw", SIZE);
    let disks = json!([{"id": "root", "path": "web1.raw", "format": "raw"}]);
    agent.create(&spec(&agent, "web1", disks)).unwrap();
    for round in 0..kills() {
        agent.act("web1", VmAction::Boot).unwrap();
        let mut guest = SmallGuest { guest: crate::fixture::Guest::new(&agent, "web1".to_owned()) };
        guest.guest.wait_for("ready\n");
        guest.ask("disk-probe");
        assert_eq!(guest.ask(&format!("disk-write 100 round{round} count=8")), "ok");
        assert_eq!(guest.ask("disk-flush"), "ok");
        guest.guest.type_line("disk-time write count=100000 flush=1");
        thread::sleep(Duration::from_millis(7 * round % 40));
        let pid = agent.vm("web1").status.pid.unwrap();
        host::run("kill", &["-KILL", &pid.to_string()]);
        agent.wait_for_state("web1", VmState::Failed);
        for at in 100..108 {
            assert_eq!(sector(&path, at), format!("round{round}"));
        }
    }
}

#[test]
fn a_pause_and_a_stop_do_not_wait_for_a_busy_disk() {
    let agent = Agent::start();
    agent.disk("web1.raw", SIZE);
    let disks = json!([{"id": "root", "path": "web1.raw", "format": "raw"}]);
    let mut guest = boot(&agent, &spec(&agent, "web1", disks));
    guest.ask("disk-probe");
    guest.guest.type_line("disk-time write count=1000000");
    let begun = Instant::now();
    for _ in 0..5 {
        agent.act("web1", VmAction::Pause).unwrap();
        let before = agent.stats("web1").disks["root"].writes;
        thread::sleep(Duration::from_millis(20));
        assert_eq!(agent.stats("web1").disks["root"].writes, before, "a paused guest writes");
        agent.act("web1", VmAction::Resume).unwrap();
        thread::sleep(Duration::from_millis(20));
        assert!(agent.stats("web1").disks["root"].writes > before, "it goes on");
    }
    agent.act("web1", VmAction::Stop).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[test]
fn a_guest_gets_random_numbers() {
    let agent = Agent::start();
    let mut spec = spec(&agent, "web1", json!([]));
    spec["entropy"] = json!(true);
    let mut guest = boot(&agent, &spec);
    let (one, two) = (guest.ask("random 32"), guest.ask("random 32"));
    assert_eq!((one.len(), two.len()), (64, 64), "{one} {two}");
    assert_ne!(one, two);
    assert_ne!(one, "0".repeat(64));
    assert_eq!(guest.ask("disk-probe"), "none");
}
