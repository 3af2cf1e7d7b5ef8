// SPDX-License-Identifier: Apache-2.0

//! The whole process on /dev/kvm, with freestanding guests of a few instructions. The tests use its control channel.

use std::{
    collections::VecDeque,
    fs::File,
    io::{Seek, SeekFrom, Write},
    os::{
        fd::{AsFd, IntoRawFd},
        unix::fs::FileExt,
    },
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use protocol::*;
use uuid::Uuid;

use super::main;
use crate::{
    boot::tests::elf,
    console::{HEADER, RING},
};

// 32-bit protected mode without paging, as PVH hands over. Only instructions that KVM's emulator knows.
core::arch::global_asm!(
    ".pushsection .rodata",
    ".code32",
    // Prints a line and powers off through the sleep control register.
    ".globl guest_hello, guest_hello_end",
    "guest_hello:",
    "  mov dx, 0x3f8",
    "  mov al, 'h'",
    "  out dx, al",
    "  mov al, 'i'",
    "  out dx, al",
    "  mov al, 10",
    "  out dx, al",
    "  mov dx, 0x624",
    "  mov al, 0x34", // SLP_EN, SLP_TYP 5
    "  out dx, al",
    "1: hlt",
    "  jmp 1b",
    "guest_hello_end:",
    // First boot: marks memory and resets through the keyboard controller. Second boot: prints B and spins, printing
    // a dot now and then; 'q' on the serial port powers off.
    ".globl guest_reset, guest_reset_end",
    "guest_reset:",
    "  mov ebx, 0x180000",
    "  cmp dword ptr [ebx], 0x5a5a5a5a",
    "  je 2f",
    "  mov dword ptr [ebx], 0x5a5a5a5a",
    "  mov al, 'A'",
    "  mov dx, 0x3f8",
    "  out dx, al",
    "  mov al, 0xfe",
    "  out 0x64, al",
    "1: hlt",
    "  jmp 1b",
    "2:",
    "  mov al, 'B'",
    "  mov dx, 0x3f8",
    "  out dx, al",
    "3:",
    "  mov ecx, 3000",
    "4: dec ecx",
    "  jnz 4b",
    "  mov al, '.'",
    "  mov dx, 0x3f8",
    "  out dx, al",
    "  mov dx, 0x3fd",
    "  in al, dx",
    "  test al, 1",
    "  jz 3b",
    "  mov dx, 0x3f8",
    "  in al, dx",
    "  cmp al, 'q'",
    "  je 6f",
    // 'r' resets through the ACPI reset register.
    "  cmp al, 'r'",
    "  jne 3b",
    "  mov dx, 0x626",
    "  mov al, 1",
    "  out dx, al",
    "7: hlt",
    "  jmp 7b",
    "6:",
    "  mov dx, 0x624",
    "  mov al, 0x34",
    "  out dx, al",
    "5: hlt",
    "  jmp 5b",
    "guest_reset_end:",
    // Prints whether KVM keeps a clock in guest memory (MSR_KVM_SYSTEM_TIME_NEW, Documentation/virt/kvm/x86/msr.rst).
    // First boot: turns the clock on and resets. Second boot: powers off.
    ".globl guest_clock, guest_clock_end",
    "guest_clock:",
    "  mov ecx, 0x4b564d01",
    "  rdmsr",
    "  and al, 1",
    "  add al, '0'",
    "  mov dx, 0x3f8",
    "  out dx, al",
    "  mov ebx, 0x180000",
    "  cmp dword ptr [ebx], 0x5a5a5a5a",
    "  je 2f",
    "  mov dword ptr [ebx], 0x5a5a5a5a",
    "  mov eax, 0x190001",
    "  xor edx, edx",
    "  wrmsr",
    "  mov al, 0xfe",
    "  out 0x64, al",
    "1: hlt",
    "  jmp 1b",
    "2:",
    "  mov dx, 0x624",
    "  mov al, 0x34",
    "  out dx, al",
    "3: hlt",
    "  jmp 3b",
    "guest_clock_end:",
    ".code64",
    ".popsection",
);

macro_rules! guest {
    ($start:ident, $end:ident) => {{
        unsafe extern "C" {
            static $start: u8;
            static $end: u8;
        }
        let (start, end) = (&raw const $start, &raw const $end);
        // SAFETY: both symbols delimit one object in .rodata, defined above.
        let bytes = unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) };
        elf(true, bytes)
    }};
}

mod counters;
mod placement;
mod probe;
mod simulated;

/// A vmm process in a thread, and the agent's end of its control channel.
struct Fixture {
    dir: tempfile::TempDir,
    vm: Uuid,
    channel: Channel,
    console: File,
    events: Vec<VmmEvent>,
    /// Requests that came before the result of a command: relays send them by themselves.
    early: VecDeque<ToAgent>,
    process: Option<thread::JoinHandle<ExitCode>>,
    next: u64,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let vm = Uuid::from_u128(7);
        let path = dir.path().join("control.sock");
        let listener = Listener::bind(&path).unwrap();
        let fd = listener.as_fd().try_clone_to_owned().unwrap().into_raw_fd();
        drop(listener);
        let arguments = [fd.to_string(), vm.to_string()];
        let process = thread::spawn(move || main(&arguments));
        let console =
            File::options().read(true).write(true).create_new(true).open(dir.path().join("console"));
        let console = console.unwrap();
        console.set_len(HEADER + RING).unwrap();
        let channel = Channel::connect(&path).unwrap();
        let mut fixture = Self {
            dir,
            vm,
            channel,
            console,
            events: Vec::new(),
            early: VecDeque::new(),
            process: Some(process),
            next: 0,
        };
        fixture.hello();
        fixture
    }

    fn hello(&mut self) -> (State, u64) {
        let hello = ToVmm::Hello { oldest: 1, newest: 99, vm: self.vm };
        self.channel.send(&hello, &[]).unwrap();
        match self.receive() {
            ToAgent::Hello { version, state, boots } => {
                assert_eq!(version, VERSION);
                (state, boots)
            }
            other => panic!("{other:?}"),
        }
    }

    fn reconnect(&mut self) -> (State, u64) {
        self.channel = Channel::connect(&self.dir.path().join("control.sock")).unwrap();
        self.hello()
    }

    fn receive(&mut self) -> ToAgent {
        self.early.pop_front().unwrap_or_else(|| self.receive_new())
    }

    fn receive_new(&self) -> ToAgent {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.channel.receive() {
                Ok((message, _)) => return message,
                Err(ChannelError::WouldBlock) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn command(&mut self, command: VmmCommand, fds: &[&File]) -> Result<Outcome, Failure> {
        self.next += 1;
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        self.channel.send(&ToVmm::Command { id: self.next, command }, &fds).unwrap();
        loop {
            match self.receive_new() {
                guest_request @ ToAgent::Request { .. } => self.early.push_back(guest_request),
                ToAgent::Done { id, result } if id == self.next => return result,
                ToAgent::Event { event, .. } => self.events.push(event),
                other => panic!("{other:?}"),
            }
        }
    }

    fn configure(&mut self, kernel: &[u8]) -> Result<Outcome, Failure> {
        self.configure_with(kernel, Vec::new(), &[])
    }

    fn spec(&self, devices: Vec<DeviceSpec>) -> MachineSpec {
        MachineSpec {
            vm: self.vm,
            name: "test".into(),
            cpus: 2,
            memory: 4 << 20,
            hugepages: false,
            cmdline: String::new(),
            initramfs: 0,
            boot_disk: None,
            devices,
            disks: Vec::new(),
            nics: Vec::new(),
            entropy: false,
            sandbox: SandboxSpec::of_threads(),
            placement: PlacementSpec::default(),
            features: CpuFeatures::default(),
        }
    }

    fn configure_with(
        &mut self,
        kernel: &[u8],
        devices: Vec<DeviceSpec>,
        others: &[(&str, &File)],
    ) -> Result<Outcome, Failure> {
        let spec = self.spec(devices);
        self.configure_as(spec, kernel, others)
    }

    fn configure_as(
        &mut self,
        spec: MachineSpec,
        kernel: &[u8],
        others: &[(&str, &File)],
    ) -> Result<Outcome, Failure> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("/dev/kvm is needed");
        let mut image = tempfile::tempfile().unwrap();
        image.write_all(kernel).unwrap();
        image.seek(SeekFrom::Start(0)).unwrap();
        let console = self.console.try_clone().unwrap();
        let own = [(files::KVM, &kvm), (files::CONSOLE, &console), (files::KERNEL, &image)];
        let (names, fds): (Vec<_>, Vec<_>) =
            own.into_iter().chain(others.iter().copied()).map(|(name, file)| (name.to_owned(), file)).unzip();
        self.command(VmmCommand::Configure { spec: Box::new(spec), files: names }, &fds)
    }

    fn wait_for(&mut self, what: impl Fn(&VmmEvent) -> bool) {
        while !self.events.iter().any(&what) {
            match self.receive() {
                ToAgent::Event { event, .. } => self.events.push(event),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Waits until the guest has written exactly `text` since its start.
    fn wait_for_output(&self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.output().len() < text.len() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.output(), text);
    }

    fn output(&self) -> String {
        let mut count = [0; 8];
        self.console.read_exact_at(&mut count, 0).unwrap();
        let mut bytes = vec![0; usize::try_from(u64::from_le_bytes(count)).unwrap()];
        self.console.read_exact_at(&mut bytes, HEADER).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    fn exit(&mut self) {
        self.channel.send(&ToVmm::Noted { upto: u64::MAX }, &[]).unwrap();
        self.process.take().unwrap().join().unwrap();
    }
}

#[test]
fn a_guest_prints_and_powers_off() {
    let mut vm = Fixture::new();
    vm.configure(&guest!(guest_hello, guest_hello_end)).unwrap();
    assert_eq!(
        vm.command(VmmCommand::Pause, &[]).unwrap_err().code,
        FailureCode::WrongState,
        "not running yet"
    );
    vm.command(VmmCommand::Run, &[]).unwrap();
    vm.wait_for(|event| matches!(event, VmmEvent::Ended { end: End::PoweredOff }));
    assert_eq!(vm.output(), "hi\n");
    assert_eq!(vm.command(VmmCommand::Run, &[]).unwrap_err().code, FailureCode::WrongState);
    vm.exit();
}

#[test]
fn a_guest_resets_pauses_resumes_and_is_reached_by_a_second_agent() {
    let mut vm = Fixture::new();
    vm.configure(&guest!(guest_reset, guest_reset_end)).unwrap();
    vm.command(VmmCommand::Run, &[]).unwrap();
    vm.wait_for(|event| *event == VmmEvent::State { state: State::Running, boots: 2 });
    vm.command(VmmCommand::ConsoleWait { offset: 20 }, &[]).unwrap();
    assert!(vm.output().starts_with("AB...."), "{}", vm.output());

    vm.command(VmmCommand::Pause, &[]).unwrap();
    let still = vm.output();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(vm.output(), still, "a paused guest does nothing");
    assert_eq!(vm.reconnect(), (State::Paused, 2));
    vm.command(VmmCommand::Run, &[]).unwrap();
    vm.command(VmmCommand::ConsoleWait { offset: still.len() as u64 }, &[]).unwrap();
    assert!(vm.output().len() > still.len());

    let Outcome::Stats(stats) = vm.command(VmmCommand::Stats, &[]).unwrap() else { panic!() };
    assert!(stats.exits["io_out"] > 20 && stats.exits["io_in"] > 4, "{:?}", stats.exits);
    assert_eq!((stats.boots, stats.memory), (2, 4 << 20));

    vm.command(VmmCommand::Reboot, &[]).unwrap();
    vm.events.clear();
    vm.command(VmmCommand::ConsoleInput { bytes: b"r".to_vec() }, &[]).unwrap();
    vm.wait_for(|event| *event == VmmEvent::State { state: State::Running, boots: 4 });
    let boots = vm.output().matches('B').count();
    assert!(boots >= 1);
    assert_eq!(
        vm.command(VmmCommand::ConsoleInput { bytes: b"xq".to_vec() }, &[]),
        Ok(Outcome::ConsoleTaken { taken: 2 })
    );
    vm.wait_for(|event| matches!(event, VmmEvent::Ended { end: End::PoweredOff }));
    vm.exit();
}

/// KVM must not write the last boot's clock into the memory of the next boot.
#[test]
fn a_reset_takes_kvms_clock_out_of_memory() {
    let mut vm = Fixture::new();
    vm.configure(&guest!(guest_clock, guest_clock_end)).unwrap();
    vm.command(VmmCommand::Run, &[]).unwrap();
    vm.wait_for(|event| matches!(event, VmmEvent::Ended { end: End::PoweredOff }));
    assert_eq!(vm.output(), "00", "no clock at either boot");
    vm.exit();
}

#[test]
fn a_command_to_stop_ends_a_busy_guest_and_the_process() {
    let mut vm = Fixture::new();
    vm.configure(&guest!(guest_reset, guest_reset_end)).unwrap();
    vm.command(VmmCommand::Run, &[]).unwrap();
    vm.command(VmmCommand::Stop, &[]).unwrap();
    vm.process.take().unwrap().join().unwrap();
}

#[test]
fn what_is_no_kernel_is_refused_with_its_own_code() {
    let mut vm = Fixture::new();
    let failure = vm.configure(b"#!/bin/sh\n").unwrap_err();
    assert_eq!(failure.code, FailureCode::Kernel);
    assert!(failure.detail.contains("neither"), "{failure}");
    vm.wait_for(|event| matches!(event, VmmEvent::Ended { end: End::Failed { .. } }));
    vm.exit();
}

#[test]
fn the_machine_s_files_have_the_names_that_it_knows() {
    let spare = tempfile::tempfile().unwrap();
    for (others, cause) in [
        (vec![("floppy", &spare)], "called floppy"),
        (vec![("initramfs", &spare)], "called initramfs"),
        (vec![("kernel", &spare)], "Two files of the machine are called kernel"),
    ] {
        let mut vm = Fixture::new();
        let failure = vm.configure_with(&guest!(guest_hello, guest_hello_end), vec![], &others).unwrap_err();
        assert_eq!(failure.code, FailureCode::Invalid);
        assert!(failure.detail.contains(cause), "{failure}");
        vm.command(VmmCommand::Stop, &[]).unwrap();
        vm.process.take().unwrap().join().unwrap();
    }
    let mut vm = Fixture::new();
    let configure = VmmCommand::Configure { spec: Box::new(vm.spec(Vec::new())), files: vec!["kvm".into()] };
    let failure = vm.command(configure.clone(), &[]).unwrap_err();
    assert_eq!(failure.code, FailureCode::Invalid);
    assert!(failure.detail.contains("names 1 files, and 0 came"), "{failure}");
    let failure = vm.command(configure, &[&spare]).unwrap_err();
    assert!(failure.detail.contains("file console is missing"), "{failure}");
    vm.exit();
}

#[test]
fn an_agent_without_a_common_version_or_for_another_vm_is_refused() {
    let mut vm = Fixture::new();
    for hello in [
        ToVmm::Hello { oldest: 50, newest: 60, vm: vm.vm },
        ToVmm::Hello { oldest: 1, newest: 1, vm: Uuid::from_u128(8) },
    ] {
        vm.channel = Channel::connect(&vm.dir.path().join("control.sock")).unwrap();
        vm.channel.send(&hello, &[]).unwrap();
        assert!(matches!(vm.receive(), ToAgent::Refused { .. }));
    }
    vm.reconnect();
    vm.command(VmmCommand::Stop, &[]).unwrap();
    vm.process.take().unwrap().join().unwrap();
}
