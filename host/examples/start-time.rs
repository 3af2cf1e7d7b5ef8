// SPDX-License-Identifier: Apache-2.0

//! Time from the start of a VM's process to its guest's first byte, and the process's memory, beside QEMU's microvm in the same
//! run. `resources/bench/run` starts this program, with the paths of the agent's binary and of QEMU:
//! `start-time PORTCULLIS QEMU [RUNS]`.
//!
//! The guest's code has 11 bytes: it writes one byte to the serial port and sleeps. Runs are interleaved, so that other load on
//! the machine hits both alike, and medians are compared.

// A program for people, which may stop at a failure: its script leaves nothing running.
#![allow(clippy::print_stdout, clippy::expect_used, clippy::unwrap_used, clippy::panic)]

use std::{
    fs::{self, File},
    io::Read,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use api::{
    client::Client,
    types::{Protection, VmAction, VmSpec},
};
use protocol::{
    Channel, ChannelError, DiskFormat, DiskLimits, DiskSpec, MachineSpec, ToAgent, ToVmm, VERSION,
    VmmCommand, files as file,
};
use rustix::process::{Pid, Signal, kill_process};
use services::{
    console::Reader,
    vmm_process::{Program, VmDirectory, spawn},
};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use uuid::Uuid;

/// Unlike any other mapping's size, so that guest memory is recognized in `/proc/PID/smaps`.
const GUEST_MIB: u64 = 130;

/// The load address of the guest.
const START: u64 = 0x10_0000;

/// The most of QEMU's time and memory that our vmm may take. The share depends on the machine: the same program took 0.08 to
/// 0.10 on one kind, and 0.116 to 0.128 on another, where QEMU starts in 30 ms instead of 39.
const GOAL_TIME: f64 = 4.5 / 32.0;
const GOAL_MEMORY: f64 = 2.5 / 24.0;
/// The most that a disk adds to the time, in ms, and to the memory, in MiB.
const GOAL_DISK_TIME: f64 = 0.3;
const GOAL_DISK_MEMORY: f64 = 0.3;
/// The size of the disk in bytes.
const DISK: u64 = 1 << 20;

/// The most time for each step.
const PATIENCE: Duration = Duration::from_secs(20);

/// The number of VMs beside which the agent's memory is measured.
const VMS: usize = 4;

/// An ELF image with a PVH note.
fn guest() -> Vec<u8> {
    // mov dx, 0x3f8; mov al, '!'; out dx, al; cli; hlt; jmp back to the cli
    const CODE: [u8; 11] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, 0xfa, 0xf4, 0xeb, 0xfc];
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 20;
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    image.extend([2_u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    image.extend(1_u32.to_le_bytes());
    image.extend([START, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    image.extend(0_u32.to_le_bytes());
    image.extend([64_u16, 56, 2, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    let code = CODE.len() as u64;
    for (kind, offset, address, len) in [(4_u32, HEADERS, 0, NOTE), (1, HEADERS + NOTE, START, code)] {
        image.extend([kind, 7].iter().flat_map(|word| word.to_le_bytes()));
        image.extend([offset, address, address, len, len, 4_u64].iter().flat_map(|word| word.to_le_bytes()));
    }
    let words = [4_u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), u32::try_from(START).expect("below 4 GiB")];
    image.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    image.extend(CODE);
    image
}

/// Proportional set size without guest memory, in KiB.
fn memory(pid: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("only root may look at a vmm");
    let number = |line: &str| line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap();
    let (mut sum, mut is_guest, mut guests) = (0, false, 0);
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            // The kernel may have joined it with a small neighbour.
            is_guest = (GUEST_MIB * 1024..(GUEST_MIB + 8) * 1024).contains(&number(line));
            guests += u32::from(is_guest);
        } else if line.starts_with("Pss:") && !is_guest {
            sum += number(line);
        }
    }
    assert!(guests <= 1, "{guests} mappings of process {pid} have the size of guest memory");
    sum
}

/// Waits for the first byte in a console ring that may not be there yet. Polls often: a long sleep would be measured, too.
fn wait_for_byte(console: &Path) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if Reader::open(console).is_ok_and(|reader| reader.count().is_ok_and(|count| count > 0)) {
            return;
        }
        assert!(Instant::now() < deadline, "no byte in {}", console.display());
        thread::sleep(Duration::from_micros(20));
    }
}

/// Time and memory of one start.
#[derive(Clone, Copy)]
struct Sample {
    time: Duration,
    memory: u64,
}

/// A raw disk.
fn disk_spec() -> DiskSpec {
    DiskSpec {
        id: "disk0".to_owned(),
        format: DiskFormat::Raw,
        backing: Vec::new(),
        read_only: false,
        ephemeral: false,
        serial: String::new(),
        discard: false,
        limits: DiskLimits::default(),
        wait_for_room: false,
    }
}

/// Starts the vmm as the agent does, without the agent, and with a disk in this file.
fn ours(runtime: &Runtime, portcullis: &Path, kernel: &Path, run_dir: &Path, disk: Option<&Path>) -> Sample {
    let vm = Uuid::new_v4();
    let directory = VmDirectory::new(run_dir, vm);
    directory.create().unwrap();
    let root = rustix::process::geteuid().is_root();
    let user = root.then_some(2_000_000_000);
    let off = if root { &[][..] } else { &Protection::OF_ROOT };
    let spec = MachineSpec {
        vm,
        name: "start-time".to_owned(),
        cpus: 1,
        memory: GUEST_MIB << 20,
        hugepages: false,
        cmdline: String::new(),
        initramfs: 0,
        boot_disk: None,
        devices: Vec::new(),
        disks: disk.iter().map(|_| disk_spec()).collect(),
        nics: Vec::new(),
        entropy: false,
        sandbox: host::sandbox::spec(user, off),
        placement: protocol::PlacementSpec::default(),
        features: protocol::CpuFeatures::default(),
    };
    let open = |path: &Path| File::options().read(true).write(true).open(path).unwrap();
    let mut files: Vec<OwnedFd> = vec![
        open(Path::new("/dev/kvm")).into(),
        directory.create_console().unwrap().into(),
        File::open(kernel).unwrap().into(),
    ];
    files.extend(disk.map(|path| OwnedFd::from(open(path))));
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let program = Program { path: portcullis.into(), arguments: vec!["vmm".into()] };

    let begun = Instant::now();
    let mut process = {
        let _in_runtime = runtime.enter();
        spawn(&program, &directory, vm).unwrap()
    };
    let channel = Channel::connect(&directory.control()).unwrap();
    // The vmm reads one command after the other: the next one need not wait for a response.
    channel.send(&ToVmm::Hello { oldest: VERSION, newest: VERSION, vm }, &[]).unwrap();
    let mut names = [file::KVM, file::CONSOLE, file::KERNEL].map(str::to_owned).to_vec();
    names.extend(disk.map(|_| file::disk(&disk_spec().id)));
    let configure = VmmCommand::Configure { spec: Box::new(spec), files: names };
    channel.send(&ToVmm::Command { id: 1, command: configure }, &files).unwrap();
    channel.send(&ToVmm::Command { id: 2, command: VmmCommand::Run }, &[]).unwrap();
    wait_for_byte(&directory.console());
    let time = begun.elapsed();

    let memory = memory(process.identity().pid.try_into().unwrap());
    channel.send(&ToVmm::Command { id: 3, command: VmmCommand::Stop }, &[]).unwrap();
    let exit = runtime.block_on(process.ended());
    assert_eq!(exit.to_string(), "exited with status 0", "{}", directory.log_tail());
    loop {
        match channel.receive::<ToAgent>() {
            Ok((ToAgent::Done { result, .. }, _)) => assert!(result.is_ok(), "{result:?}"),
            Ok(_) => {}
            Err(ChannelError::WouldBlock | ChannelError::Closed) => break,
            Err(error) => panic!("{error}"),
        }
    }
    directory.remove().unwrap();
    Sample { time, memory }
}

/// Starts QEMU as fast as Debian's is: without ACPI it takes qboot instead of SeaBIOS. Some hosts offer IA32_ARCH_CAPABILITIES
/// with bits that they then refuse to have set (MSR 0x10a), and QEMU gives up.
fn qemu(qemu: &Path, kernel: &Path) -> Sample {
    let begun = Instant::now();
    let mut child = Command::new(qemu)
        .args(["-M", "microvm,accel=kvm,acpi=off,x-option-roms=off"])
        .args(["-cpu", "host,arch-capabilities=off", "-m", &format!("{GUEST_MIB}M")])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-kernel"])
        .arg(kernel)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut byte = [0];
    let read = child.stdout.take().unwrap().read(&mut byte);
    let time = begun.elapsed();
    assert!(read.is_ok_and(|n| n == 1) && byte == *b"!", "QEMU's guest says {byte:?}");
    let memory = memory(child.id());
    child.kill().unwrap();
    child.wait().unwrap();
    Sample { time, memory }
}

/// A running agent.
struct Agent {
    child: Child,
    directory: PathBuf,
    client: Client,
}

impl Agent {
    fn start(runtime: &Runtime, portcullis: &Path, directory: &Path) -> Self {
        let at = |name: &str| directory.join(name);
        let child = Command::new(portcullis)
            .arg("--socket")
            .arg(at("api.sock"))
            .args(["serve", "--state-dir"])
            .arg(at("state"))
            .arg("--run-dir")
            .arg(at("run"))
            .arg("--image-dir")
            .arg(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(at("agent.log")).unwrap())
            .spawn()
            .unwrap();
        let agent = Self { child, directory: directory.to_owned(), client: Client::new(at("api.sock")) };
        let deadline = Instant::now() + PATIENCE;
        while runtime.block_on(agent.client.health()).is_err() {
            assert!(Instant::now() < deadline, "the agent does not answer");
            thread::sleep(Duration::from_millis(5));
        }
        agent
    }

    /// Time from the first call to the guest's first byte; the VM goes on.
    fn boot(&self, runtime: &Runtime, name: &str) -> Duration {
        let spec = serde_json::json!({
            "name": name, "memory": format!("{GUEST_MIB}MiB"), "boot": {"kernel": "guest"},
        });
        let spec: VmSpec = serde_json::from_value(spec).unwrap();
        let begun = Instant::now();
        let vm = runtime.block_on(self.client.create_vm(&spec)).unwrap();
        runtime.block_on(self.client.act(name, VmAction::Boot, Duration::ZERO)).unwrap();
        wait_for_byte(&self.directory.join("run/vms").join(vm.id.to_string()).join("console"));
        begun.elapsed()
    }

    fn delete(&self, runtime: &Runtime, name: &str) {
        runtime.block_on(self.client.delete_vm(name, None)).unwrap();
    }

    /// The processes of its VMs.
    fn vmms(&self) -> Vec<u32> {
        let children = format!("/proc/{}/task", self.child.id());
        let mut found = Vec::new();
        for task in fs::read_dir(children).unwrap().flatten() {
            let list = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(list.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        found
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Ok(pid) = self.child.id().try_into()
            && let Some(pid) = Pid::from_raw(pid)
        {
            let _ = kill_process(pid, Signal::TERM);
        }
        drop(self.child.wait());
    }
}

fn median<T: Copy + PartialOrd>(values: impl IntoIterator<Item = T>) -> T {
    let mut values: Vec<T> = values.into_iter().collect();
    values.sort_by(|a, b| a.partial_cmp(b).expect("numbers"));
    values[values.len() / 2]
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[expect(clippy::cast_precision_loss, reason = "memory in MiB")]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// Prints the goal for the costs of a disk, and returns whether it is met.
fn goal_of_disk(what: &str, unit: &str, added: f64, most: f64) -> bool {
    let met = added <= most;
    let word = if met { "met" } else { "MISSED" };
    println!("goal  {what} of a disk: at most {most:.2} {unit}, is {added:.2}: {word}");
    met
}

/// Prints a goal, and returns whether it is met.
fn goal(what: &str, ours: f64, theirs: f64, share: f64) -> bool {
    let met = ours <= theirs * share;
    let word = if met { "met" } else { "MISSED" };
    println!("goal  {what}: at most {share:.3} of QEMU's, is {:.3}: {word}", ours / theirs);
    met
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (Some(portcullis), Some(their)) = (arguments.first(), arguments.get(1)) else {
        println!("usage: start-time PORTCULLIS QEMU [RUNS]");
        return ExitCode::from(2);
    };
    let runs = arguments.get(2).map_or(21, |runs| runs.parse().expect("a number of runs"));
    let (portcullis, their) = (Path::new(portcullis), Path::new(their));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let directory = TempDir::with_prefix("portcullis-bench-").unwrap();
    let kernel = directory.path().join("guest");
    fs::write(&kernel, guest()).unwrap();
    let disk = directory.path().join("disk");
    File::create(&disk).and_then(|file| file.set_len(DISK)).unwrap();
    let agent = Agent::start(&runtime, portcullis, directory.path());

    let mut samples = Vec::new();
    // The first round warms caches up and does not count.
    for round in 0..=runs {
        let sample = (
            ours(&runtime, portcullis, &kernel, &directory.path().join("run"), None),
            ours(&runtime, portcullis, &kernel, &directory.path().join("run"), Some(&disk)),
            agent.boot(&runtime, "bench"),
            qemu(their, &kernel),
        );
        agent.delete(&runtime, "bench");
        if round > 0 {
            samples.push(sample);
        }
    }
    for n in 0..VMS {
        agent.boot(&runtime, &format!("vm{n}"));
    }
    let of_agent = memory(agent.child.id());
    let of_vmms = agent.vmms().into_iter().map(memory).collect::<Vec<_>>();
    assert_eq!(of_vmms.len(), VMS);
    for n in 0..VMS {
        agent.delete(&runtime, &format!("vm{n}"));
    }

    let ours = Sample {
        time: median(samples.iter().map(|(ours, ..)| ours.time)),
        memory: median(samples.iter().map(|(ours, ..)| ours.memory)),
    };
    // Of pairs: other work of the machine hits both.
    let disk_time = median(samples.iter().map(|(without, with, ..)| ms(with.time) - ms(without.time)));
    let disk_memory =
        median(samples.iter().map(|(without, with, ..)| mib(with.memory) - mib(without.memory)));
    let rest = median(samples.iter().map(|(.., rest, _)| *rest));
    let qemu = Sample {
        time: median(samples.iter().map(|(.., qemu)| qemu.time)),
        memory: median(samples.iter().map(|(.., qemu)| qemu.memory)),
    };
    println!("medians of {runs} interleaved runs");
    println!(
        "process start to the guest's first byte, ms: vmm {:.2}, QEMU microvm {:.2}",
        ms(ours.time),
        ms(qemu.time)
    );
    println!("REST create and boot to that byte, ms: {:.2}", ms(rest));
    println!(
        "memory without the guest's, PSS in MiB: vmm {:.2}, QEMU microvm {:.2}",
        mib(ours.memory),
        mib(qemu.memory)
    );
    println!("with {VMS} VMs: agent {:.2}, each vmm {:.2}", mib(of_agent), mib(median(of_vmms)));
    let time = goal("time", ms(ours.time), ms(qemu.time), GOAL_TIME);
    let memory = goal("memory", mib(ours.memory), mib(qemu.memory), GOAL_MEMORY);
    let disk_time = goal_of_disk("time", "ms", disk_time, GOAL_DISK_TIME);
    let disk_memory = goal_of_disk("memory", "MiB", disk_memory, GOAL_DISK_MEMORY);
    if time && memory && disk_time && disk_memory { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
