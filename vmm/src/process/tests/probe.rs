// SPDX-License-Identifier: Apache-2.0

//! A guest that uses a device with registers, doorbells, an I/O thread and an interrupt.

use std::{collections::BTreeMap, ffi::OsString, fs};

use super::*;
use crate::board::probe::{FILE, THREAD};

// Prints a character for each thing that works, and a new line. Then waits for a character on the
// serial port: 'r' resets, 'q' powers off. '0' to '4' becomes the fault of the I/O thread, rings
// the doorbell, and is printed.
core::arch::global_asm!(
    ".pushsection .rodata",
    ".code32",
    ".globl guest_probe, guest_probe_end",
    "guest_probe:",
    "  mov esp, 0x170000",
    "  mov ebp, 0xfee00000",
    "  mov dword ptr [ebp + 0xf0], 0x1ff", // The local APIC takes interrupts.
    "  mov ebx, 0xfe000000",
    // Finds the device in the ACPI tables.
    "  mov esi, 0xe0000",
    "1: cmp dword ptr [esi], 0x45425250",
    "  je 2f",
    "  inc esi",
    "  cmp esi, 0xe1000",
    "  jb 1b",
    "  jmp 90f",
    "2: mov al, 'T'",
    "  call 80f",
    // Registers.
    "  cmp dword ptr [ebx], 0x45425250",
    "  jne 90f",
    "  mov eax, [ebx + 4]",
    "  call 70f",
    "  mov dword ptr [ebx + 4], 5",
    "  mov eax, [ebx + 4]",
    "  call 70f",
    // Doorbell, I/O thread, interrupt.
    "  mov dword ptr [ebx + 0xc], 0xfee00000",
    "  mov dword ptr [ebx + 0x10], 0x41",
    "  mov dword ptr [ebx + 0x20], 1",
    "  mov ecx, 2",
    "  call 60f",
    // The doorbell moves. A write to its old place reaches the device.
    "  mov dword ptr [ebx + 0x14], 1",
    "  mov dword ptr [ebx + 0x10], 0x42",
    "  mov dword ptr [ebx + 0x20], 1",
    "  mov eax, [ebx + 0x18]",
    "  call 70f",
    "  mov byte ptr [ebx + 0x24], 1",
    "  mov ecx, 4",
    "  call 60f",
    // The port is a doorbell for one value.
    "  mov dword ptr [ebx + 0x10], 0x43",
    "  mov dx, 0x640",
    "  mov al, 8",
    "  out dx, al",
    "  mov eax, [ebx + 0x18]",
    "  call 70f",
    "  mov al, 7",
    "  mov dx, 0x640",
    "  out dx, al",
    "  mov ecx, 8",
    "  call 60f",
    "9: mov al, 10",
    "  call 80f",
    "3: mov dx, 0x3fd",
    "  in al, dx",
    "  test al, 1",
    "  jz 3b",
    "  mov dx, 0x3f8",
    "  in al, dx",
    "  cmp al, 'r'",
    "  jne 4f",
    // Leaves an interrupt and a signal behind.
    "  mov dword ptr [ebx + 0x24], 1",
    "  mov al, 0xfe",
    "  out 0x64, al",
    "4: cmp al, '4'",
    "  ja 6f",
    "  movzx ecx, al",
    "  sub ecx, '0'",
    "  mov [ebx + 0x1c], ecx",
    "  mov dword ptr [ebx + 0x24], 1",
    "  call 80f",
    "  jmp 3b",
    "6: mov dx, 0x624",
    "  mov al, 0x34",
    "  out dx, al",
    "5: hlt",
    "  jmp 5b",
    // Waits until interrupt 0x40 and up is pending, the bit in ecx, and prints the count of
    // answers.
    "60: test [ebp + 0x220], ecx",
    "  jz 60b",
    "  mov al, 'I'",
    "  call 80f",
    "  mov eax, [ebx + 8]",
    "70: add al, '0'",
    "80: mov dx, 0x3f8",
    "  out dx, al",
    "  ret",
    "90: mov al, 'x'",
    "  call 80b",
    "  jmp 9b",
    "guest_probe_end:",
    ".code64",
    ".popsection",
);

/// The threads of this process, with their names.
fn threads() -> BTreeMap<OsString, String> {
    let threads = fs::read_dir("/proc/self/task").unwrap().map(|thread| thread.unwrap());
    threads
        .filter_map(|thread| {
            let name = fs::read_to_string(thread.path().join("comm")).ok()?;
            Some((thread.file_name(), name.trim().to_owned()))
        })
        .collect()
}

/// The names of those that are called like an I/O thread.
fn io_threads() -> Vec<String> {
    threads().into_values().filter(|name| name.starts_with("io ")).collect()
}

fn calls(mut log: File) -> Vec<String> {
    let mut calls = String::new();
    log.seek(SeekFrom::Start(0)).unwrap();
    std::io::Read::read_to_string(&mut log, &mut calls).unwrap();
    calls.lines().map(str::to_owned).collect()
}

/// The output of a boot.
const BOOT: &str = "T05I11I22I3\n";

/// A machine with the device, and the file with the calls to the device.
fn booted() -> (Fixture, File) {
    let log = tempfile::tempfile().unwrap();
    let mut vm = Fixture::new();
    vm.configure_with(&guest!(guest_probe, guest_probe_end), vec![], &[(FILE, &log)]).unwrap();
    vm.command(VmmCommand::Run, &[]).unwrap();
    vm.wait_for_output(BOOT);
    (vm, log)
}

#[test]
fn a_device_of_one_file_and_one_line_has_all_that_a_device_can_have() {
    const WRITES: u64 = 7;
    let log = tempfile::tempfile().unwrap();
    let mut vm = Fixture::new();
    vm.configure_with(&guest!(guest_probe, guest_probe_end), vec![], &[(FILE, &log)]).unwrap();
    assert_eq!(io_threads(), [THREAD]);
    vm.command(VmmCommand::Run, &[]).unwrap();
    vm.wait_for_output(BOOT);
    let Outcome::Stats(stats) = vm.command(VmmCommand::Stats, &[]).unwrap() else { panic!() };
    assert_eq!(stats.exits["mmio_write"], WRITES, "doorbells do not leave the guest");
    vm.command(VmmCommand::Pause, &[]).unwrap();
    vm.command(VmmCommand::Run, &[]).unwrap();
    vm.command(VmmCommand::ConsoleInput { bytes: b"r".to_vec() }, &[]).unwrap();
    vm.wait_for_output(&[BOOT, BOOT].concat());
    vm.command(VmmCommand::ConsoleInput { bytes: b"q".to_vec() }, &[]).unwrap();
    vm.wait_for(|event| matches!(event, VmmEvent::Ended { end: End::PoweredOff }));
    assert!(io_threads().is_empty());
    assert_eq!(calls(log), ["resume", "pause", "resume", "pause", "reset", "resume", "pause", "shutdown"]);
    vm.exit();
}

#[test]
fn a_machine_runs_on_whose_i_o_thread_hangs_and_its_end_does_not_wait_for_it() {
    let (mut vm, log) = booted();
    vm.command(VmmCommand::ConsoleInput { bytes: b"1".to_vec() }, &[]).unwrap();
    vm.wait_for_output(&[BOOT, "1"].concat());
    let failure = vm.command(VmmCommand::Pause, &[]).unwrap_err();
    assert_eq!(failure.code, FailureCode::Device);
    assert!(failure.detail.contains(THREAD), "{failure}");
    vm.command(VmmCommand::ConsoleInput { bytes: b"0".to_vec() }, &[]).unwrap();
    vm.wait_for_output(&[BOOT, "10"].concat());
    vm.command(VmmCommand::Stop, &[]).unwrap();
    vm.process.take().unwrap().join().unwrap();
    assert_eq!(calls(log), ["resume", "pause", "resume", "pause"], "no shutdown beside the thread");
    assert_eq!(io_threads(), [THREAD], "it was left behind");
}

/// A flush to a slow disk takes longer than the event loop may wait.
#[test]
fn a_reset_of_the_guest_waits_for_a_busy_i_o_thread() {
    let (mut vm, _) = booted();
    vm.command(VmmCommand::ConsoleInput { bytes: b"3".to_vec() }, &[]).unwrap();
    vm.wait_for_output(&[BOOT, "3"].concat());
    vm.command(VmmCommand::ConsoleInput { bytes: b"r".to_vec() }, &[]).unwrap();
    vm.wait_for_output(&[BOOT, "3", BOOT].concat());
    // The agent hears of it instead, and the guest runs on.
    vm.command(VmmCommand::ConsoleInput { bytes: b"3".to_vec() }, &[]).unwrap();
    vm.wait_for_output(&[BOOT, "3", BOOT, "3"].concat());
    let failure = vm.command(VmmCommand::Reboot, &[]).unwrap_err();
    assert!(failure.detail.contains("is busy"), "{failure}");
    vm.command(VmmCommand::ConsoleInput { bytes: b"q".to_vec() }, &[]).unwrap();
    vm.wait_for(|event| matches!(event, VmmEvent::Ended { end: End::PoweredOff }));
    vm.exit();
}

/// The agent revokes rights within 5 s, whatever the disks do.
#[test]
fn a_full_disk_beside_a_busy_one_holds_up_no_command() {
    let (mut vm, _) = booted();
    vm.command(VmmCommand::ConsoleInput { bytes: b"4".to_vec() }, &[]).unwrap();
    vm.wait_for_output(&[BOOT, "4"].concat());
    let begun = Instant::now();
    let mut longest = Duration::ZERO;
    while begun.elapsed() < Duration::from_secs(4) {
        let asked = Instant::now();
        vm.command(VmmCommand::Stats, &[]).unwrap();
        longest = longest.max(asked.elapsed());
    }
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    assert!(!vm.events.iter().any(|event| matches!(event, VmmEvent::DiskFull { .. })), "the machine runs on");
    vm.wait_for(|event| matches!(event, VmmEvent::DiskFull { .. }));
    vm.wait_for(|event| matches!(event, VmmEvent::State { state: State::Paused, .. }));
    vm.command(VmmCommand::Stop, &[]).unwrap();
    vm.process.take().unwrap().join().unwrap();
}

#[test]
fn a_reset_ends_the_wait_of_a_full_disk() {
    let (mut vm, _) = booted();
    vm.command(VmmCommand::ConsoleInput { bytes: b"4".to_vec() }, &[]).unwrap();
    vm.wait_for_output(&[BOOT, "4"].concat());
    // The reset waits for the busy thread, but not for longer than 4 s.
    thread::sleep(Duration::from_secs(2));
    vm.command(VmmCommand::ConsoleInput { bytes: b"r".to_vec() }, &[]).unwrap();
    vm.wait_for_output(&[BOOT, "4", BOOT].concat());
    thread::sleep(Duration::from_secs(2));
    vm.command(VmmCommand::Stats, &[]).unwrap();
    let stops = |event: &VmmEvent| {
        matches!(event, VmmEvent::DiskFull { .. } | VmmEvent::State { state: State::Paused, .. })
    };
    assert!(!vm.events.iter().any(stops), "{:?}", vm.events);
    vm.command(VmmCommand::Stop, &[]).unwrap();
    vm.process.take().unwrap().join().unwrap();
}

#[test]
fn a_machine_ends_with_an_i_o_thread() {
    let (mut vm, log) = booted();
    vm.command(VmmCommand::ConsoleInput { bytes: b"2".to_vec() }, &[]).unwrap();
    vm.wait_for(|event| matches!(event, VmmEvent::Ended { .. }));
    let Some(VmmEvent::Ended { end: End::Failed { detail } }) = vm.events.last() else { panic!() };
    assert!(detail.contains("I/O thread io probe has ended"), "{detail}");
    assert_eq!(calls(log), ["resume", "pause", "shutdown"]);
    vm.exit();
}

#[test]
fn a_machine_whose_devices_ask_for_no_thread_has_those_of_its_vcpus_alone() {
    let mut vm = Fixture::new();
    let before = threads();
    vm.configure(&guest!(guest_hello, guest_hello_end)).unwrap();
    let new = || -> Vec<String> {
        let new = threads().into_iter().filter(|(id, _)| !before.contains_key(id));
        // The kernel's thread of KVM, which recovers huge pages, counts as one of this process.
        let mut names: Vec<String> =
            new.map(|(_, name)| name).filter(|name| !name.starts_with("kvm-")).collect();
        names.sort_unstable();
        names
    };
    // A thread of the sandbox may need a moment to end.
    let deadline = Instant::now() + Duration::from_secs(10);
    while new().len() > 2 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(new(), ["vcpu0", "vcpu1"]);
    vm.command(VmmCommand::Run, &[]).unwrap();
    vm.wait_for(|event| matches!(event, VmmEvent::Ended { end: End::PoweredOff }));
    vm.exit();
}
