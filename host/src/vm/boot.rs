// SPDX-License-Identifier: Apache-2.0

//! Builds a machine from a VM's specification and runs it.

use std::{collections::HashSet, fs::File, os::fd::OwnedFd, sync::Arc, time::Duration};

use api::{
    Caller,
    problem::{Problem, ProblemCode},
    types::{
        ByteSize, DiskFormat, DiskLimits, DiskSpec, HugePages, Name, NicSpec, OnFull, Protection,
        SEED_SERIAL, Stage, VmSpec,
    },
};
use failpoints::{Point, reach};
use netpolicy::MacAddress;
use protocol::{DeviceSpec, DiskRate, MachineSpec, SandboxSpec, State, VmmCommand, files as file};
use services::problem::ToProblem;
use services::vmm_process::{
    Allowance, Connection, MachineEvent, Process, VmDirectory, limit_memlock, spawn,
};
use store::Entry;
use text::chain;
use tokio::sync::{OwnedMutexGuard, mpsc};
use uuid::Uuid;

use super::{
    claims::{self, Held},
    problem::BootFile,
};
use crate::{
    backend::MachineDevice,
    credentials,
    disks::{self, Directories, Opened},
    environment::Environment,
    files::{self, Purpose},
    nics, sandbox, seed,
    vm::record::VmRecord,
};

/// How long building a machine may take beside filling its memory: hardware must be reset.
const CONFIGURE: Duration = Duration::from_secs(120);

/// The memory that a host fills in a second at the least.
const FILLED_PER_SECOND: u64 = 256 << 20;

/// How long a command may take that only changes a state.
pub(super) const PROMPT: Duration = Duration::from_secs(30);

/// The files of a machine, opened with the rights of their authors and of the caller.
pub(super) struct Files {
    kvm: File,
    /// None for a VM that boots from a disk.
    kernel: Option<File>,
    /// In the order of the specification.
    initramfs: Vec<File>,
    /// In the order of the specification, each with its backing files.
    disks: Vec<Opened>,
    /// In the order of the specification.
    nics: Vec<nics::Opened>,
    /// The disk for cloud-init.
    seed: Option<File>,
    /// The OEM strings with the credentials.
    oem_strings: Option<File>,
}

/// How long building the machine of a VM may take. All memory is filled meanwhile if it is in huge pages, or if a function
/// locks it.
fn patience(spec: &VmSpec) -> Duration {
    let fills = spec.hugepages != HugePages::Off || spec.functions() > 0;
    let filled = if fills { spec.memory.bytes() } else { 0 };
    CONFIGURE.saturating_add(Duration::from_secs(filled.div_ceil(FILLED_PER_SECOND)))
}

/// Opens the files of the machine. All of `rights` must be able to read each boot file, and to use each disk.
pub(super) async fn open_files(
    env: &Environment,
    rights: Vec<Caller>,
    vm: Uuid,
    spec: &VmSpec,
) -> Result<Files, Problem> {
    let (kvm, dirs, boot) = (env.kvm.clone(), env.image_dirs.clone(), spec.boot.clone());
    let (memory, all, name) = (spec.memory, rights.clone(), spec.name.clone());
    let (texts, credentials) = (spec.cloud_init.clone(), spec.credentials.clone());
    let open = move || {
        let open = |what: BootFile, field: &str, path: &str| {
            files::open_for_all(&all, Purpose::Boot, &dirs, path).map_err(|error| what.problem(field, &error))
        };
        let kernel = boot.kernel.as_deref().map(|path| open(BootFile::Kernel, "boot.kernel", path));
        let kernel = kernel.transpose()?;
        let paths = boot.initramfs.iter().flat_map(|initramfs| initramfs.fields());
        let initramfs = paths.map(|(field, path)| open(BootFile::Initramfs, &field, path));
        let initramfs = initramfs.collect::<Result<Vec<File>, _>>()?;
        fits_the_host(memory.bytes())?;
        // Together with the kernel it may still be too large: only the vmm knows the end of the kernel.
        let sizes = initramfs.iter().filter_map(|file| file.metadata().ok()).map(|data| data.len());
        let size = sizes.fold(0, u64::saturating_add);
        if size > memory.bytes() {
            let detail = format!(
                "The initramfs has {size} bytes, more than the {memory} of the guest: give the VM more memory."
            );
            let field = Some("boot.initramfs".into());
            return Err(Problem { field, ..Problem::new(ProblemCode::InitramfsInvalid, detail) });
        }
        let kvm = File::options().read(true).write(true).open(&kvm).map_err(|error| {
            Problem::new(
                ProblemCode::KvmUnavailable,
                format!(
                    "{} cannot be opened ({error}): load kvm_intel or kvm_amd, enable virtualization in the \
                     firmware, and let the agent open it.",
                    kvm.display()
                ),
            )
        })?;
        let in_memory = |field: &'static str| {
            move |error: std::io::Error| {
                let detail = format!("The file for the guest cannot be made in memory ({error}): try again.");
                Problem { field: Some(field.into()), ..Problem::new(ProblemCode::MemoryUnavailable, detail) }
            }
        };
        let seed = texts.map(|texts| seed::seed(vm, &name, &texts)).transpose();
        let seed = seed.map_err(in_memory("cloud_init"))?;
        if seed.is_some() {
            reach(Point::OpenSeed);
        }
        let oem_strings = credentials::oem_strings(&credentials).map_err(in_memory("credentials"))?;
        Ok(Files { kvm, kernel, initramfs, disks: Vec::new(), nics: Vec::new(), seed, oem_strings })
    };
    let files = blocking(open).await?;
    let disks = open_disks(env, rights, vm, spec).await?;
    Ok(Files { disks, nics: open_nics(env, vm, spec).await?, ..files })
}

/// Runs work that blocks.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let result = tokio::task::spawn_blocking(work).await;
    result.map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?
}

async fn open_disks(
    env: &Environment,
    rights: Vec<Caller>,
    vm: Uuid,
    spec: &VmSpec,
) -> Result<Vec<Opened>, Problem> {
    if spec.disks.is_empty() {
        return Ok(Vec::new());
    }
    let dirs = Directories::of(env);
    let open = |others: Vec<(String, String)>| {
        let (rights, dirs, disks) = (rights.clone(), dirs.clone(), spec.disks.clone());
        blocking(move || disks::open_all(&rights, &dirs, &disks, &others))
    };
    match open(Vec::new()).await {
        // The other VMs are of interest for the error only.
        Err(problem) if problem.code == ProblemCode::DiskInUse => open(disks_of_others(env, vm).await).await,
        result => result,
    }
}

async fn open_nics(env: &Environment, vm: Uuid, spec: &VmSpec) -> Result<Vec<nics::Opened>, Problem> {
    if spec.nics.is_empty() {
        return Ok(Vec::new());
    }
    let plan = match spec.ports().any(|port| port.is_nic) {
        true => super::switch_client::plan(env, vm).await?,
        false => Vec::new(),
    };
    let (allowed, spec) = (env.interfaces.clone(), spec.clone());
    blocking(move || nics::open_all(&allowed, &plan, vm, &spec)).await
}

/// The disks of the VMs that have a process, by the names of the VMs.
async fn disks_of_others(env: &Environment, vm: Uuid) -> Vec<(String, String)> {
    let (Ok(vms), Ok(runs)) = (env.vms.list().await, env.runs.list().await) else { return Vec::new() };
    let running: HashSet<Uuid> =
        runs.into_iter().filter(|run| run.value.process.is_some()).map(|run| run.id).collect();
    let others = vms.into_iter().filter(|other| other.id != vm && running.contains(&other.id));
    let disks = others.flat_map(|other| {
        let name = other.value.spec.name.to_string();
        let paths = other.value.spec.disks.into_iter().flat_map(|disk| {
            let backing = disk.backing.into_iter().map(|backing| backing.path);
            [disk.path].into_iter().chain(backing)
        });
        paths.map(move |path| (name.clone(), path)).collect::<Vec<_>>()
    });
    disks.collect()
}

/// Checks that the host has so much memory and swap space. Memory is reserved page by page: a guest that could never
/// have all of it would be killed in the middle of its work.
fn fits_the_host(bytes: u64) -> Result<(), Problem> {
    let Some(host) = std::fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(memory_and_swap)
    else {
        return Ok(());
    };
    if bytes <= host {
        return Ok(());
    }
    let detail = format!(
        "The VM has {} MiB of memory, and its host only {} MiB with swap space: give the VM less memory.",
        bytes >> 20,
        host >> 20
    );
    Err(Problem { field: Some("memory".into()), ..Problem::new(ProblemCode::MemoryUnavailable, detail) })
}

/// The bytes of all memory and swap space in the text of `/proc/meminfo` (proc(5)).
fn memory_and_swap(meminfo: &str) -> Option<u64> {
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    Some(kib("MemTotal:")?.saturating_add(kib("SwapTotal:").unwrap_or(0)).saturating_mul(1024))
}

/// Starts the vmm process. It may lock as much memory as its devices need.
pub(super) fn start(
    env: &Environment,
    vm: Uuid,
    spec: &VmSpec,
    held: &[Held],
    directory: &VmDirectory,
) -> Result<Process, Problem> {
    let locks_memory = claims::first_with(env, held, |facts| facts.needs_locked_memory)?.is_some();
    directory.create().map_err(|error| {
        let detail = format!("Cannot create the run directory of the VM ({error}): check --run-dir.");
        Problem::new(ProblemCode::VmmFailed, detail)
    })?;
    let process = spawn(&env.program, directory, vm).map_err(|e| e.problem())?;
    let lockable = if locks_memory {
        Some(spec.memory.bytes().saturating_add(env.memlock_slack))
    } else {
        (!env.sandbox_off.contains(&Protection::Limits)).then_some(0)
    };
    if let Some(lockable) = lockable {
        limit_memlock(&process, lockable).map_err(|error| {
            process.kill();
            error.problem()
        })?;
    }
    Ok(process)
}

/// A process that has been started for a machine.
pub(super) struct NewProcess<'a> {
    /// Its directory, in which it listens.
    pub(super) directory: &'a VmDirectory,
    /// The user id that it changes to; None to keep the agent's user.
    pub(super) user: Option<u32>,
    /// The NUMA node of guest memory.
    pub(super) node: Option<u16>,
    /// The limits of its messages.
    pub(super) allowance: &'a Allowance,
    /// The lock of the host's huge pages. An error leaves it here until the process has ended.
    pub(super) filling: &'a mut Option<OwnedMutexGuard<()>>,
}

/// The adapters that messages of the VM's process may be about.
pub(super) fn adapters(spec: &VmSpec) -> HashSet<String> {
    spec.ports().map(|port| port.id.to_string()).collect()
}

/// Builds the machine in the process and runs it.
pub(super) async fn run(
    env: &Environment,
    vm: &Entry<VmRecord>,
    files: Files,
    held: &[Held],
    process: NewProcess<'_>,
    mut enter: impl FnMut(Stage) + Send,
) -> Result<(Connection, mpsc::Receiver<MachineEvent>), Problem> {
    let NewProcess { directory, user, node, allowance, filling } = process;
    // Here, and not before the response to the caller: a command can end this wait.
    *filling = fill_alone(env, &vm.value.spec, node).await?;
    let console = directory.create_console().map_err(|error| {
        Problem::new(ProblemCode::VmmFailed, format!("Cannot create the VM's console file ({error})."))
    })?;
    let (connection, greeting, events) =
        Connection::open(&directory.control(), vm.id, adapters(&vm.value.spec), allowance)
            .await
            .map_err(|e| e.problem())?;
    reach(Point::BootConnected);
    if greeting.state != State::Empty {
        return Err(Problem::new(ProblemCode::VmmFailed, "A new vmm process reports a wrong state."));
    }
    enter(Stage::BuildingMachine);
    let (initramfs, seeded) = (files.initramfs.len(), files.seed.is_some());
    let own = [(file::KVM, files.kvm), (file::CONSOLE, console)].into_iter();
    let own = own.chain(files.kernel.map(|kernel| (file::KERNEL, kernel)));
    let own = own.chain(files.oem_strings.map(|strings| (file::OEM_STRINGS, strings)));
    let parts = files.initramfs.into_iter().enumerate().map(|(number, part)| (file::initramfs(number), part));
    let disks = vm.value.spec.disks.iter().zip(files.disks).flat_map(|(spec, opened)| {
        let id = spec.id.to_string();
        let backing = opened.backing.into_iter().enumerate();
        let own = [(file::disk(&id), opened.file)].into_iter();
        let own = own.chain(opened.overlay.map(|overlay| (file::overlay(&id), overlay)));
        own.chain(backing.map(move |(number, backing)| (file::backing(&id, number), backing)))
    });
    let specs: Vec<_> =
        vm.value.spec.nics.iter().zip(&files.nics).map(|(spec, opened)| nic(spec, opened)).collect();
    let nics = vm.value.spec.nics.iter().zip(files.nics).flat_map(|(spec, opened)| {
        let id = spec.id.to_string();
        let queues = opened.queues.into_iter().enumerate();
        let lock = opened.lock.map(|lock| (file::nic_lock(&id), lock));
        queues.map(move |(number, queue)| (file::nic(&id, number), queue)).chain(lock)
    });
    let (mut names, mut fds): (Vec<String>, Vec<OwnedFd>) = own
        .map(|(name, file)| (name.to_owned(), file))
        .chain(parts)
        .chain(disks)
        .chain(nics)
        .chain(files.seed.map(|seed| (file::disk(file::SEED), seed)))
        .map(|(name, file)| (name, OwnedFd::from(file)))
        .unzip();
    let mut devices = Vec::new();
    for (claim, device) in held.iter().zip(machine_devices(env, held).await?) {
        let bdf = claim.value.bdf.to_string();
        if let Some(connection) = device.connection {
            names.push(file::connection(&bdf));
            fds.push(connection);
        }
        let adapter = claim.value.adapter.as_ref().map(|vf| vf.id.to_string());
        let of_nic =
            vm.value.spec.ports().any(|port| port.is_nic && Some(port.id.as_str()) == adapter.as_deref());
        let backend = if of_nic { device.as_port } else { Some(device.backend) };
        let backend = backend.ok_or_else(|| {
            Problem::new(ProblemCode::Internal, format!("A NIC cannot have the VF {bdf} as its port."))
        })?;
        devices.push(DeviceSpec { bdf, backend, adapter });
    }
    let spec = machine(vm, initramfs, devices, node, sandbox::spec(user, &env.protections_off()));
    let mut spec = Box::new(MachineSpec { nics: specs, ..spec });
    // Not by the specification: an edit may have given it texts since the files were opened.
    spec.disks.extend(seeded.then(seed_disk));
    connection
        .command(VmmCommand::Configure { spec, files: names }, fds, patience(&vm.value.spec))
        .await
        .map_err(|e| e.problem())?;
    *filling = None;
    reach(Point::BootConfigured);
    enter(Stage::StartingVcpus);
    connection.command(VmmCommand::Run, Vec::new(), PROMPT).await.map_err(|e| e.problem())?;
    reach(Point::BootRun);
    Ok((connection, events))
}

/// Waits until no other VM takes huge pages, and checks that there are enough for this one. None for a VM that needs none.
async fn fill_alone(
    env: &Environment,
    spec: &VmSpec,
    node: Option<u16>,
) -> Result<Option<OwnedMutexGuard<()>>, Problem> {
    if spec.hugepages == HugePages::Off {
        return Ok(None);
    }
    let guard = Arc::clone(&env.filling).lock_owned().await;
    let (topology, spec) = (env.topology.clone(), spec.clone());
    blocking(move || topology.check_pool(&spec, node)).await?;
    Ok(Some(guard))
}

/// Prepares the functions for the process, in their order.
async fn machine_devices(env: &Environment, held: &[Held]) -> Result<Vec<MachineDevice>, Problem> {
    let inventory = env.inventory.clone();
    let functions: Vec<_> = held.iter().map(|claim| (claim.value.bdf, claim.value.group)).collect();
    let prepare = move || {
        let device =
            |(bdf, group)| inventory.backend(bdf).map_err(|e| e.problem())?.machine_device(bdf, group);
        functions.into_iter().map(device).collect::<Result<_, _>>()
    };
    tokio::task::spawn_blocking(prepare)
        .await
        .map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?
}

fn machine(
    vm: &Entry<VmRecord>,
    initramfs: usize,
    devices: Vec<DeviceSpec>,
    node: Option<u16>,
    sandbox: SandboxSpec,
) -> MachineSpec {
    let spec = &vm.value.spec;
    MachineSpec {
        vm: vm.id,
        name: spec.name.to_string(),
        cpus: spec.cpus,
        memory: spec.memory.bytes(),
        hugepages: spec.hugepages != HugePages::Off,
        cmdline: spec.boot.cmdline.clone(),
        initramfs,
        boot_disk: spec.boot.disk.as_ref().map(Name::to_string),
        disks: spec.disks.iter().map(disk).collect(),
        nics: Vec::new(),
        entropy: spec.entropy,
        devices,
        sandbox,
        placement: placement(spec, node),
        features: protocol::CpuFeatures { nested: spec.cpu_features.nested, pmu: spec.cpu_features.pmu },
    }
}

fn placement(spec: &VmSpec, node: Option<u16>) -> protocol::PlacementSpec {
    let place = spec.placement.clone().unwrap_or_default();
    protocol::PlacementSpec {
        cpus: place.cpus.iter().map(|(vcpu, cpus)| (vcpu.0, cpus.ranges().to_vec())).collect(),
        io_cpus: place.io_cpus.map(|cpus| cpus.ranges().to_vec()).unwrap_or_default(),
        node,
        giant_pages: spec.hugepages == HugePages::Gib1,
    }
}

fn format(format: DiskFormat) -> protocol::DiskFormat {
    match format {
        DiskFormat::Raw => protocol::DiskFormat::Raw,
        DiskFormat::Qcow2 => protocol::DiskFormat::Qcow2,
    }
}

/// The disk for cloud-init, behind the others.
fn seed_disk() -> protocol::DiskSpec {
    protocol::DiskSpec {
        id: file::SEED.to_owned(),
        format: protocol::DiskFormat::Raw,
        backing: Vec::new(),
        read_only: true,
        ephemeral: false,
        serial: SEED_SERIAL.to_owned(),
        discard: false,
        limits: protocol::DiskLimits::default(),
        wait_for_room: false,
    }
}

fn disk(spec: &DiskSpec) -> protocol::DiskSpec {
    protocol::DiskSpec {
        id: spec.id.to_string(),
        format: format(spec.format),
        backing: spec.backing.iter().map(|backing| format(backing.format)).collect(),
        read_only: spec.read_only,
        ephemeral: spec.ephemeral,
        serial: spec.serial().to_owned(),
        discard: spec.discard,
        limits: disk_limits(spec.limits),
        wait_for_room: spec.on_full == OnFull::Pause,
    }
}

/// The limits of a disk, with bursts of a second unless the specification has others.
pub(super) fn disk_limits(limits: Option<DiskLimits>) -> protocol::DiskLimits {
    let limits = limits.unwrap_or_default();
    let rate = |rate: Option<u64>, burst: Option<u64>| {
        rate.map(|per_second| DiskRate { per_second, burst: burst.unwrap_or(per_second) })
    };
    let bytes = |size: ByteSize| size.bytes();
    protocol::DiskLimits {
        bytes: rate(limits.bytes_per_second.map(bytes), limits.burst_bytes.map(bytes)),
        operations: rate(limits.operations_per_second.map(u64::from), limits.burst_operations.map(u64::from)),
    }
}

fn nic(spec: &NicSpec, opened: &nics::Opened) -> protocol::NicSpec {
    protocol::NicSpec {
        id: spec.id.to_string(),
        mac: MacAddress::new(opened.mac.octets()),
        mtu: opened.mtu,
        queues: u8::try_from(opened.queues.len()).unwrap_or(spec.queues),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn patience_grows_with_memory_that_is_filled() {
        let of = |members: serde_json::Value| {
            let mut spec = json!({ "name": "web1", "memory": "1TiB", "cpus": 1, "boot": { "kernel": "k" } });
            spec.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
            patience(&serde_json::from_value(spec).unwrap()).as_secs()
        };
        assert_eq!(of(json!({})), 120);
        assert_eq!(of(json!({ "hugepages": "1GiB" })), 120 + 4096);
        assert_eq!(of(json!({ "hugepages": true, "memory": "258MiB" })), 122);
        assert_eq!(of(json!({ "adapters": [{ "id": "eth0" }] })), 120 + 4096);
    }

    #[test]
    fn memory_is_what_the_host_has() {
        let meminfo = "MemTotal:       24604580 kB\nMemFree: 1 kB\nSwapTotal:       1024 kB\n";
        assert_eq!(memory_and_swap(meminfo), Some((24_604_580 + 1024) * 1024));
        assert_eq!(memory_and_swap("MemTotal: 7 kB"), Some(7 * 1024));
        assert_eq!(memory_and_swap("nothing"), None);
        assert!(fits_the_host(2 << 20).is_ok());
        let problem = fits_the_host(1 << 60).unwrap_err();
        assert_eq!(
            (problem.code, problem.field.as_deref()),
            (ProblemCode::MemoryUnavailable, Some("memory"))
        );
    }
}
