// SPDX-License-Identifier: Apache-2.0

//! A guest's use of its machine, and the API's view of it.

use std::{fs, thread, time::Duration};

use api::{
    problem::ProblemCode,
    types::{CauseCode, VmAction, VmState},
};
use serde_json::{Value, json};

use crate::fixture::{Agent, Options, SmallGuest, host};

/// More vCPUs than any guest of the lab has.
const MANY: usize = 64;

fn booted<'a>(agent: &'a Agent, name: &str) -> SmallGuest<'a> {
    SmallGuest::boot(agent, name, json!([]))
}

/// The kernel gets all files as one, each at a multiple of four bytes.
#[test]
fn an_initramfs_can_be_several_files() {
    let agent = Agent::start();
    let boot = |name: &str, initramfs: Value| {
        let mut spec = SmallGuest::spec(&agent, name, json!([]), "");
        spec["boot"]["initramfs"] = initramfs;
        let mut guest = SmallGuest { guest: agent.boot(&spec) };
        guest.wait_for_ready();
        let found = guest.ask("initramfs");
        assert_eq!(guest.ask("reboot"), "ok");
        guest.wait_for_ready();
        assert_eq!(guest.ask("initramfs"), found, "after a reboot");
        found
    };
    for (name, content) in [("one", &b"first"[..]), ("two", b"second"), ("three", b"x")] {
        agent.image(name, content);
    }
    assert_eq!(boot("none", Value::Null), "none");
    assert_eq!(boot("alone", json!("one")), "5 first");
    assert_eq!(boot("several", json!(["one", "two", "three"])), "17 first...second..x");
    let stored = &agent.vm("several").spec.boot.initramfs;
    assert_eq!(serde_json::to_value(stored).unwrap(), json!(["one", "two", "three"]));
    let mut spec = SmallGuest::spec(&agent, "absent", json!([]), "");
    spec["boot"]["initramfs"] = json!(["one", "nowhere"]);
    agent.create(&spec).unwrap();
    let problem = agent.act("absent", VmAction::Boot).unwrap_err();
    assert_eq!(
        (problem.code, problem.field.as_deref()),
        (ProblemCode::InitramfsNotFound, Some("boot.initramfs[1]"))
    );
}

#[test]
fn a_script_on_the_command_line_runs_and_powers_off() {
    let agent = Agent::start();
    let spec = SmallGuest::spec(&agent, "script", json!([]), "echo \"a;  b\" c; wait 20; poweroff; echo no");
    let mut guest = agent.boot(&spec);
    guest.wait_for("portcullis small guest\nprobe: none\na;  b c\nwait 20: ok\npoweroff: ok\n");
    let vm = agent.wait_for_state("script", VmState::Stopped);
    assert_eq!(vm.status.cause.unwrap().code, CauseCode::PoweredOff);
    assert_eq!(guest.unread(), "");
}

#[test]
fn the_serial_port_takes_whole_lines_and_interrupts_a_sleeping_guest() {
    let agent = Agent::start();
    let mut guest = booted(&agent, "serial");
    let long = "x".repeat(1500);
    guest.guest.type_line(&format!("echo {long}"));
    guest.guest.wait_for(&format!("{long}\n"));
    guest.guest.type_line(&"y".repeat(5000));
    guest.guest.wait_for("error: line too long\n");
    assert_eq!(guest.ask("frobnicate"), "error unknown command; try help");
    assert_eq!(guest.ask("wait"), "error usage: wait MS");
    assert_eq!(guest.ask("in 0x3fd colour=red"), "error usage: in PORT [width=8|16|32]");
    // Without an interrupt the guest would read its port only every 4 s.
    let started = std::time::Instant::now();
    guest.ask("time");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(!guest.ask("interrupts").contains("serial=0"));
}

#[test]
fn string_instructions_reach_one_port_again_and_again() {
    let agent = Agent::start();
    let mut guest = booted(&agent, "strings");
    guest.guest.type_line("outs 0x3f8 ABCDEFGH");
    guest.guest.wait_for("ABCDEFGH\nouts 0x3f8 ABCDEFGH: ok\n");
    // The scratch register, three times.
    assert_eq!(guest.ask("out 0x3ff 0x5a"), "ok");
    assert_eq!(guest.ask("ins 0x3ff 3"), "5a5a5a");
}

#[test]
fn the_guests_clock_is_that_of_the_host() {
    let agent = Agent::start();
    let mut guest = booted(&agent, "clock");
    let started = std::time::Instant::now();
    let begin: u64 = guest.ask("time").parse().unwrap();
    assert_eq!(guest.ask("wait 1000"), "ok");
    let end: u64 = guest.ask("time").parse().unwrap();
    let (guest_took, host_took) = (Duration::from_micros(end - begin), started.elapsed());
    assert!(guest_took >= Duration::from_secs(1), "{guest_took:?}");
    // The host's time includes the calls.
    assert!(guest_took < host_took + Duration::from_millis(100), "{guest_took:?} of {host_took:?}");
}

#[test]
fn many_vcpus_boot_pause_reboot_and_end() {
    let agent = Agent::start();
    let mut spec = SmallGuest::spec(&agent, "wide", json!([]), "");
    spec["cpus"] = json!(MANY);
    let mut guest = SmallGuest { guest: agent.boot(&spec) };
    guest.wait_for_ready();
    let pid = host::processes(&["vmm", &agent.vm("wide").id.to_string()])[0];
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let names = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("comm")).unwrap());
    assert_eq!(names.filter(|name| name.starts_with("vcpu")).count(), MANY);
    for action in [VmAction::Pause, VmAction::Resume, VmAction::Reboot] {
        agent.act("wide", action).unwrap();
    }
    guest.wait_for_ready();
    agent.act("wide", VmAction::Stop).unwrap();
    assert_eq!(agent.vm("wide").status.cause.unwrap().code, CauseCode::Stopped);
}

/// `vmm/src/board/probe.rs` has the device. Its doorbell on a port rings for the value 7.
#[test]
fn a_device_with_a_doorbell_and_an_io_thread_works_in_the_whole_sandbox() {
    let agent = Agent::start_with(Options::for_tests(&[]));
    let spec = SmallGuest::spec(&agent, "probe", json!([]), "device=probe");
    let mut guest = SmallGuest { guest: agent.boot(&spec) };
    guest.wait_for_ready();
    let pid = host::processes(&["vmm", &agent.vm("probe").id.to_string()])[0];
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let names = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("comm")).unwrap());
    assert_eq!(names.filter(|name| name == "io probe\n").count(), 1);
    let ring = |guest: &mut SmallGuest<'_>, answers: &str| {
        assert_eq!(guest.ask("out 0x640 8"), "ok");
        assert_eq!(guest.ask("out 0x640 7"), "ok");
        let tries = (0..200).map(|_| guest.ask("in 0x640"));
        assert!(tries.into_iter().any(|count| count == answers), "{answers}");
    };
    assert_eq!(guest.ask("in 0x640"), "0x00");
    ring(&mut guest, "0x01");
    for action in [VmAction::Pause, VmAction::Resume] {
        agent.act("probe", action).unwrap();
    }
    ring(&mut guest, "0x02");
    agent.act("probe", VmAction::Reboot).unwrap();
    guest.wait_for_ready();
    assert_eq!(guest.ask("in 0x640"), "0x00");
    ring(&mut guest, "0x01");
    agent.act("probe", VmAction::Stop).unwrap();
    assert_eq!(agent.vm("probe").status.cause.unwrap().code, CauseCode::Stopped);
}

#[test]
fn every_way_to_reset_boots_again() {
    let agent = Agent::start();
    let mut guest = booted(&agent, "resets");
    for (boots, way) in (2..).zip(["reboot", "reboot keyboard", "triple-fault"]) {
        assert_eq!(guest.ask(way), "ok");
        guest.wait_for_ready();
        agent.wait_for_boots("resets", boots);
    }
}

/// A kernel with an invalid first instruction: a cut file, or a kernel for another processor. Its guest resets as
/// fast as it may, and does not count as hostile.
#[test]
fn a_guest_that_only_crashes_is_slowed_down_and_given_up() {
    let agent = Agent::start();
    let kernel = agent.image("ud2", &elf_that_crashes());
    let spec = json!({ "name": "crashes", "memory": "2MiB", "boot": { "kernel": kernel } });
    agent.create(&spec).unwrap();
    agent.act("crashes", VmAction::Boot).unwrap();
    thread::sleep(Duration::from_secs(3));
    let boots = agent.vm("crashes").status.boots;
    assert!((8..20).contains(&boots), "8 at once, then 2 a second: {boots}");
    // It can be paused and resumed like others meanwhile, except for the milliseconds of a reboot.
    while let Err(problem) = agent.act("crashes", VmAction::Pause) {
        assert!(problem.detail.contains("is rebooting"), "{problem:?}");
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(Duration::from_millis(700));
    let paused = agent.vm("crashes").status;
    assert_eq!(paused.state, VmState::Paused);
    thread::sleep(Duration::from_millis(700));
    assert_eq!(agent.vm("crashes").status.boots, paused.boots);
    agent.act("crashes", VmAction::Resume).unwrap();
    agent.wait_for_boots_at_least("crashes", paused.boots + 1);

    let vm = agent.wait_for_state("crashes", VmState::Failed);
    let cause = vm.status.cause.unwrap();
    assert_eq!(cause.code, CauseCode::MachineFailed, "{cause:?}");
    assert!(cause.detail.contains("64 times in a row"), "{cause:?}");
    assert!(agent.log().lines().count() < 60, "{}", agent.log());
}

/// A PVH kernel (Xen's `elfnote.h`, type 18) of one `ud2`.
fn elf_that_crashes() -> Vec<u8> {
    const ENTRY: u32 = 0x10_0000;
    let note: Vec<u8> = [4_u32, 4, 18]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .chain(*b"Xen\0")
        .chain(ENTRY.to_le_bytes())
        .collect();
    let mut image = vec![0; 0x1000];
    image[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    // ELF header: executable, x86-64; two program headers of 56 bytes at 64.
    put(16, &2_u16.to_le_bytes());
    put(18, &62_u16.to_le_bytes());
    put(20, &1_u32.to_le_bytes());
    put(24, &u64::from(ENTRY).to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0, 64, 0]);
    let length = note.len() as u64;
    for (at, kind, offset, address, size) in
        [(64, 4_u32, 0x100_u64, 0x10_0200_u64, length), (120, 1, 0x1000, u64::from(ENTRY), 64)]
    {
        put(at, &kind.to_le_bytes());
        put(at + 4, &7_u32.to_le_bytes());
        for (n, word) in [offset, address, address, size, size, 4].into_iter().enumerate() {
            put(at + 8 + 8 * n, &word.to_le_bytes());
        }
    }
    put(0x100, &note);
    image.extend([0x0f, 0x0b]);
    image.resize(0x1040, 0x90);
    image
}

/// A guest that has just been started still masks its button's interrupt.
#[test]
fn a_power_button_that_is_pressed_early_is_not_lost() {
    let agent = Agent::start();
    agent.create(&SmallGuest::spec(&agent, "early", json!([]), "")).unwrap();
    for _ in 0..6 {
        agent.act("early", VmAction::Boot).unwrap();
        agent.act("early", VmAction::Shutdown).unwrap();
        let vm = agent.wait_for_state("early", VmState::Stopped);
        assert_eq!(vm.status.cause.unwrap().code, CauseCode::PoweredOff);
    }
}

#[test]
fn more_memory_than_the_host_has_is_refused() {
    let agent = Agent::start();
    let mut spec = SmallGuest::spec(&agent, "huge", json!([]), "");
    spec["memory"] = json!("1TiB");
    agent.create(&spec).unwrap();
    let problem = agent.act("huge", VmAction::Boot).unwrap_err();
    assert_eq!((problem.code, problem.field.as_deref()), (ProblemCode::MemoryUnavailable, Some("memory")));
}

#[test]
fn the_power_button_reaches_a_sleeping_guest_and_a_busy_one_is_stopped() {
    let agent = Agent::start();
    let mut guest = booted(&agent, "ends");
    agent.act("ends", VmAction::Shutdown).unwrap();
    guest.guest.wait_for("power button: powering off\n");
    agent.wait_for_state("ends", VmState::Stopped);

    agent.act("ends", VmAction::Boot).unwrap();
    guest.guest.begin_anew();
    guest.wait_for_ready();
    assert_eq!(guest.ask("spin"), "for ever");
    agent.act("ends", VmAction::Stop).unwrap();
    assert_eq!(agent.vm("ends").status.cause.unwrap().code, CauseCode::Stopped);
}

#[test]
fn random_accesses_hurt_nobody() {
    let agent = Agent::start();
    let mut guest = booted(&agent, "fuzz");
    for what in ["memory", "ports"] {
        assert_eq!(guest.ask(&format!("fuzz {what} seed=3 steps=3000")), "ok steps=3000");
    }
    assert_eq!(guest.ask("wait 1"), "ok");
    let lines = 3000;
    assert_eq!(guest.ask(&format!("babble {lines}")), "ok");
    assert_eq!(agent.vm("fuzz").status.state, VmState::Running);
}
