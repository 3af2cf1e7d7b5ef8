// SPDX-License-Identifier: Apache-2.0

//! One virtual machine. The process's event loop, its only owner, builds it once, then runs, pauses, resets and drops
//! it.

use std::{
    fs::File,
    os::fd::{FromRawFd, IntoRawFd, OwnedFd},
    sync::{Arc, OnceLock, mpsc::Receiver},
    time::{Duration, Instant},
};

use boot_disk::FindError;
use devices::{interrupt::MsiRouter, memory::GuestMapper, pci::bus::Windows};
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_PMU_CAPABILITY, KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE,
    kvm_enable_cap, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use protocol::{CpuFeatures, Failure, FailureCode, FileError, Files, MachineSpec, Stats, files};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    agent_client::RelayReceiver,
    bars::BarAllocator,
    board::{Board, BoardError, Disks, Nics, Parts},
    boot::{self, BootError, InstalledKernel, Payload, Source, acpi::Description},
    console::{self, Console},
    interrupts::Routes,
    io_threads::{IoThreadError, IoThreads},
    layout,
    memory::{self, GuestMemory, MemoryError, Pages, Slots},
    passthrough_devices::{DeviceError, MachineParts, NicPorts, PassthroughDevices},
    placement::{Pinning, PlacementError},
    sandbox::{self, NewNamespaces, SandboxError},
    seccomp::{self, Confinement, SeccompError},
    vcpu::{self, VcpuError, Vcpus, cpuid, exit::Counters, state},
};

/// Errors of building or resetting a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM is missing, or lacks a capability.
    #[error("{0}")]
    NoKvm(&'static str),
    /// KVM refused a call.
    #[error("KVM refused to {0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// The VM has more vCPUs than KVM supports.
    #[error("KVM on this host supports at most {max} vCPUs, and the VM has {wanted}")]
    TooManyCpus {
        /// vCPUs of the specification.
        wanted: u8,
        /// KVM's limit.
        max: usize,
    },
    /// Guest memory cannot be set up.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The threads cannot run on their CPUs.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// KVM lacks a feature of the guest's CPUs.
    #[error(transparent)]
    CpuFeature(#[from] cpuid::FeatureError),
    /// The kernel, the initramfs or the command line cannot be used.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A vCPU failed.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// An I/O thread failed.
    #[error(transparent)]
    IoThread(#[from] IoThreadError),
    /// A passthrough device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The sandbox cannot be built.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A seccomp filter cannot be installed.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// The machine's files are not those that it needs.
    #[error(transparent)]
    File(#[from] FileError),
    /// An eventfd or another file descriptor cannot be made.
    #[error("Cannot {0}")]
    Io(&'static str, #[source] std::io::Error),
    /// The machine's own devices cannot be built.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// A device does not reset.
    #[error(transparent)]
    Reset(#[from] devices::device::ResetError),
}

impl MachineError {
    /// The failure for the control channel: the whole chain of causes in one sentence.
    #[must_use]
    pub fn failure(&self) -> Failure {
        let code = match self {
            Self::NoKvm(_) | Self::Kvm(..) | Self::TooManyCpus { .. } => FailureCode::Kvm,
            Self::Placement(_)
            | Self::Memory(MemoryError::Node(..))
            | Self::Vcpu(VcpuError::Placement(_)) => FailureCode::Placement,
            Self::Memory(_) => FailureCode::Memory,
            Self::CpuFeature(_) => FailureCode::CpuFeature,
            Self::Boot(
                BootError::TablesTooLong { .. } | BootError::StringsTooLong { .. } | BootError::Smbios(_),
            )
            | Self::File(_) => FailureCode::Invalid,
            Self::Boot(BootError::NoKernelOnDisk {
                source: FindError::Read(_) | FindError::Late(_), ..
            })
            | Self::Board(BoardError::Disk { .. }) => FailureCode::Disk,
            Self::Boot(BootError::NoKernelOnDisk { .. }) => FailureCode::NoKernelOnDisk,
            Self::Boot(_) => FailureCode::Kernel,
            Self::Device(error) => error.code(),
            Self::Reset(_)
            | Self::Board(BoardError::Device { .. })
            | Self::IoThread(IoThreadError::Silent(_)) => FailureCode::Device,
            Self::Sandbox(_) | Self::Seccomp(_) => FailureCode::Sandbox,
            Self::Vcpu(_) | Self::IoThread(_) | Self::Io(..) | Self::Board(_) => FailureCode::Internal,
        };
        Failure { code, detail: chain(self) }
    }
}

/// Joins an error and its sources on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // A transparent error repeats its source's text.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// The state of the interrupt controllers right after their creation, which a reset restores.
struct PowerOn {
    chips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

/// A built machine.
pub struct Machine {
    // Dropped in this order after `drop`: memory last.
    vcpus: Vcpus,
    io_threads: IoThreads,
    /// The passthrough devices, which are also on the board.
    pub devices: Arc<PassthroughDevices>,
    /// The disks, which are also on the board.
    pub disks: Disks,
    nics: Nics,
    /// Devices and buses.
    pub board: Arc<Board>,
    payload: Payload,
    description: Description,
    power_on: PowerOn,
    counters: Arc<Counters>,
    first_entry: Arc<OnceLock<Instant>>,
    memory: GuestMemory,
    vm: Arc<VmFd>,
    size: u64,
}

/// The machine's signals to the event loop.
pub struct Signals {
    /// Events of vCPUs and I/O threads. Read the eventfd first, then drain the channel.
    pub vcpu_events: Receiver<vcpu::Event>,
    /// Becomes readable when `vcpu_events` may have an event.
    pub vcpu_signal: EventFd,
    /// Console output.
    pub console: Arc<console::Watch>,
}

impl Machine {
    /// Opens the devices, gives up all privileges, and builds the machine with its vCPUs parked at the kernel's
    /// first instruction.
    ///
    /// # Errors
    /// See [`MachineError`]. The process may have lost its privileges by then: it cannot try again.
    pub fn build(
        spec: &MachineSpec,
        mut files: Files,
        relays: &RelayReceiver,
        namespaces: NewNamespaces,
    ) -> Result<(Self, Signals), MachineError> {
        #[cfg(feature = "attacks")]
        crate::attack::arm(&spec.cmdline, 3).map_err(io("make an attack ready"))?;
        let (kvm, console) = (files.require(files::KVM)?, files.require(files::CONSOLE)?);
        let kernel = match spec.boot_disk {
            None => Some(files.require(files::KERNEL)?),
            Some(_) => None,
        };
        let initramfs = (0..spec.initramfs).map(|number| files.require(&files::initramfs(number)));
        let initramfs = initramfs.collect::<Result<Vec<OwnedFd>, _>>()?;
        let strings = files.take(files::OEM_STRINGS).map(File::from);
        let smbios = boot::smbios::tables(spec, strings)?;
        let pinning = Pinning::begin(&spec.placement, spec.cpus)?;
        let kvm = open_kvm(kvm, spec)?;
        let vm = Arc::new(create_vm(&kvm, spec.features)?);
        // Set up the parts of KVM that no guest influences while a thread makes the namespaces.
        let cpuid = cpuid::supported(&kvm).map_err(|e| MachineError::Kvm("list its CPU features", e))?;
        cpuid::check(&kvm, &cpuid, spec.features)?;
        // Memory first: after the chips the same call takes 4 to 9 ms, before them 0.1 ms (kernel 6.12). Presumably
        // each of their ports begins a grace period, and the call waits for its end.
        let (pages, node) = (Pages::of(spec), spec.placement.node);
        let memory = memory::reserve(spec.memory, pages, node)?;
        let slots: Arc<dyn GuestMapper> = Arc::new(Slots::new(Arc::clone(&vm), &memory)?);
        let power_on = create_chips(&vm)?;
        let fds = create_vcpus(&kvm, &vm, &cpuid, spec)?;

        let root = sandbox::private_root(&spec.sandbox, &spec.devices, namespaces)?;
        let opened = PassthroughDevices::open(&vm, &spec.devices, &mut files)?;
        failpoints::reach(failpoints::Point::VmmOpened);
        sandbox::empty_root(&spec.sandbox, root)?;
        sandbox::drop_privileges(&spec.sandbox)?;
        failpoints::reach(failpoints::Point::VmmConfined);
        // Not before: to enter a mount namespace the process must have one thread. Not later: functions lock all memory.
        let populate = || memory::populate(&memory, pages, node).map_err(MachineError::from);
        match &pinning {
            Some(pinning) if pages != Pages::Ordinary => pinning.on_all_cpus(populate)?,
            _ => populate()?,
        }

        let confinement = Confinement::new(spec.sandbox.seccomp);
        let routes = Arc::new(Routes::new(Arc::clone(&vm)));
        let console = Console::new(File::from(console)).map_err(io("make the console's eventfd"))?;
        let watch = console.watch();
        let pci = Windows {
            ecam: layout::ECAM.start,
            low: layout::PCI_WINDOW_32,
            high: layout::pci_window_64(spec.memory, cpuid::physical_bits(&cpuid)),
        };
        let (events, vcpu_events, vcpu_signal) =
            vcpu::Events::pair().map_err(io("make the vCPUs' eventfd"))?;
        let events = Arc::new(events);
        let (mut bars, mut disks, mut nics) = (BarAllocator::new(&pci), Disks::default(), Nics::default());
        let mut ports = NicPorts::new();
        let mut parts = Parts {
            vm: &vm,
            spec,
            memory: &memory,
            mapper: &slots,
            routes: &routes,
            pci: &pci,
            bars: &mut bars,
            files: &mut files,
            disks: &mut disks,
            nics: &mut nics,
            ports: &mut ports,
            events: &events,
        };
        let mut board = Board::new(&mut parts, console)?;
        let router: Arc<dyn MsiRouter> = routes.clone();
        let devices = Arc::new(opened.assemble(MachineParts {
            memory: &memory,
            router: &router,
            mapper: &slots,
            bus: &board.pci,
            bars: parts.bars,
            relays,
            threads: &confinement.for_functions(),
            ports: parts.ports,
        })?);
        board.add(devices.clone()).map_err(BoardError::Layout)?;
        board.fill_bus(&mut parts)?;
        files.finish()?;
        let description = Description { cpus: spec.cpus, devices: board.aml() };
        let io_threads = IoThreads::start(board.io_threads(), &events, &confinement)?;
        let board = Arc::new(board);

        let counters = Arc::new(Counters::default());
        let first_entry = Arc::new(OnceLock::new());
        let ports: Arc<dyn vcpu::exit::Ports> = board.clone();
        let vcpus =
            Vcpus::start(fds, &ports, &counters, &events, &first_entry, &confinement, pinning.as_ref())?;
        // The first run overlaps the reading of the kernel: only `forbid_threads` must come after it.
        vcpus.begin_first_run()?;
        sandbox::limit_files(&spec.sandbox, disks.longest_file)?;
        // All threads exist now. The kernel image comes from the guest's owner: read it with no more rights than a
        // reboot has.
        confinement.confine(seccomp::Thread::Main)?;
        let mut payload = Payload {
            source: source(spec, kernel, initramfs, &disks)?,
            cmdline: spec.cmdline.clone(),
            smbios,
        };
        let entry = boot::load(&memory, &mut payload, &description)?;
        confinement.wait()?;
        vcpus.wait()?;
        vcpus.enter(entry)?;
        sandbox::forbid_threads(&spec.sandbox)?;
        let machine = Self {
            vcpus,
            io_threads,
            devices,
            disks,
            nics,
            board,
            payload,
            description,
            power_on,
            counters,
            first_entry,
            memory,
            vm,
            size: spec.memory,
        };
        Ok((machine, Signals { vcpu_events, vcpu_signal, console: watch }))
    }

    /// Lets the devices act and the vCPUs run.
    ///
    /// # Errors
    /// A vCPU does not answer, or an I/O thread has ended.
    pub fn run(&self) -> Result<(), MachineError> {
        self.board.resume();
        self.io_threads.run()?;
        Ok(self.vcpus.run()?)
    }

    /// Stops the vCPUs at an instruction boundary, and then the devices. Waits the time `within` for I/O threads.
    ///
    /// # Errors
    /// A vCPU or an I/O thread does not answer, or an I/O thread has ended. After
    /// [`IoThreadError::Silent`] the machine runs on.
    pub fn park(&self, within: Duration) -> Result<(), MachineError> {
        let result = self.stop(within);
        if let Err(MachineError::IoThread(IoThreadError::Silent(_))) = result {
            self.run()?;
        }
        result
    }

    /// Stops the vCPUs and then the devices.
    ///
    /// # Errors
    /// As [`Self::park`], but the vCPUs stay parked.
    pub fn stop(&self, within: Duration) -> Result<(), MachineError> {
        self.vcpus.park()?;
        self.board.pause();
        Ok(self.io_threads.park(within)?)
    }

    /// Goes back to the kernel's first instruction and leaves the vCPUs parked. Devices are reset before memory is
    /// used again, or DMA of the last boot would write into this one. Waits the time `within` for I/O threads.
    ///
    /// # Errors
    /// After [`IoThreadError::Silent`] the vCPUs are parked, and nothing is reset: another call may succeed. After any other
    /// [`MachineError`] the machine cannot go on.
    pub fn reset(&mut self, within: Duration) -> Result<(), MachineError> {
        self.stop(within)?;
        self.io_threads.forget();
        self.board.reset()?;
        for chip in &self.power_on.chips {
            self.vm.set_irqchip(chip).map_err(|e| MachineError::Kvm("reset an interrupt controller", e))?;
        }
        self.vm.set_pit2(&self.power_on.pit).map_err(|e| MachineError::Kvm("reset the timer", e))?;
        // Before loading memory: until then KVM keeps writing the last boot's clocks and steal times into it.
        self.vcpus.power_on()?;
        let entry = boot::load(&self.memory, &mut self.payload, &self.description)?;
        Ok(self.vcpus.enter(entry)?)
    }

    /// Reads the counters. `started` is the start of the process.
    #[must_use]
    pub fn stats(&self, started: Instant, boots: u64) -> Stats {
        let first_entry_ns = self
            .first_entry
            .get()
            .and_then(|at| u64::try_from(at.saturating_duration_since(started).as_nanos()).ok());
        let mut stats = Stats {
            memory: self.size,
            boots,
            first_entry_ns,
            devices: self.devices.stats(),
            disks: self.disks.stats(),
            nics: self.nics.stats(),
            ..Stats::default()
        };
        self.counters.report(&mut stats);
        stats
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.vcpus.end();
        self.board.pause();
        let in_use = self.io_threads.end();
        self.board.shutdown(&in_use);
    }
}

/// The source of the machine's boots.
fn source(
    spec: &MachineSpec,
    kernel: Option<OwnedFd>,
    initramfs: Vec<OwnedFd>,
    disks: &Disks,
) -> Result<Source, MachineError> {
    if let Some(kernel) = kernel {
        let initramfs = initramfs.into_iter().map(File::from).collect();
        return Ok(Source::Files { kernel: File::from(kernel), initramfs });
    }
    let id = spec.boot_disk.clone().unwrap_or_default();
    let contents = disks.contents(&id).ok_or_else(|| FileError::Missing(files::disk(&id)))?;
    Ok(Source::Disk(InstalledKernel::new(id, contents)))
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> MachineError {
    move |e| MachineError::Io(what, e)
}

fn open_kvm(fd: OwnedFd, spec: &MachineSpec) -> Result<Kvm, MachineError> {
    // SAFETY: the descriptor is owned and given away here; the next call checks that it is /dev/kvm.
    let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
    if u32::try_from(kvm.get_api_version()) != Ok(KVM_API_VERSION) {
        return Err(MachineError::NoKvm("The file given as /dev/kvm is not KVM; load kvm_intel or kvm_amd"));
    }
    for (capability, missing) in [
        (Cap::Irqchip, "KVM on this host has no interrupt controllers"),
        (Cap::Irqfd, "KVM on this host has no irqfd"),
        (Cap::Pit2, "KVM on this host has no timer (KVM_CREATE_PIT2)"),
        (Cap::ImmediateExit, "KVM on this host is too old (no immediate_exit); use Linux 4.13 or newer"),
    ] {
        if !kvm.check_extension(capability) {
            return Err(MachineError::NoKvm(missing));
        }
    }
    let max = kvm.get_max_vcpus();
    if usize::from(spec.cpus) > max {
        return Err(MachineError::TooManyCpus { wanted: spec.cpus, max });
    }
    Ok(kvm)
}

/// A VM without vCPUs so far, and without performance counters unless `features` has them.
pub(crate) fn create_vm(kvm: &Kvm, features: CpuFeatures) -> Result<VmFd, MachineError> {
    let vm = kvm.create_vm().map_err(|e| MachineError::Kvm("create a VM", e))?;
    if !features.pmu {
        without_performance_counters(|capability| vm.enable_cap(capability));
    }
    Ok(vm)
}

/// Removes performance counters, the first of which CPUID cannot hide on AMD (Documentation/virt/kvm/api.rst, 8.35).
/// Must come before the first vCPU. A kernel older than 5.18 does not know the capability.
fn without_performance_counters(enable: impl FnOnce(&kvm_enable_cap) -> Result<(), kvm_ioctls::Error>) {
    let mut capability = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..kvm_enable_cap::default() };
    capability.args[0] = KVM_PMU_CAP_DISABLE.into();
    if let Err(error) = enable(&capability) {
        tracing::debug!("The guest keeps the performance counters that CPUID cannot hide: {error}");
    }
}

fn create_chips(vm: &VmFd) -> Result<PowerOn, MachineError> {
    let kvm = |what| move |e| MachineError::Kvm(what, e);
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(kvm("place its identity map"))?;
    vm.set_tss_address(layout::KVM_TSS).map_err(kvm("place its TSS"))?;
    vm.create_irq_chip().map_err(kvm("create the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
    vm.create_pit2(pit).map_err(kvm("create the timer"))?;
    let mut chips = [kvm_irqchip::default(), kvm_irqchip::default(), kvm_irqchip::default()];
    for (id, chip) in (0..).zip(&mut chips) {
        chip.chip_id = id;
        vm.get_irqchip(chip).map_err(kvm("read an interrupt controller"))?;
    }
    let pit = vm.get_pit2().map_err(kvm("read the timer"))?;
    Ok(PowerOn { chips, pit })
}

fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    supported: &CpuId,
    spec: &MachineSpec,
) -> Result<Vec<(kvm_ioctls::VcpuFd, state::PowerOn)>, MachineError> {
    (0..spec.cpus)
        .map(|index| {
            let fd = vm.create_vcpu(index.into()).map_err(|e| MachineError::Kvm("create a vCPU", e))?;
            let entries = cpuid::of_vcpu(supported, index, spec.cpus, spec.features);
            let cpuid = CpuId::from_entries(&entries)
                .map_err(|_| MachineError::NoKvm("KVM on this host lists more CPUID leaves than it takes"))?;
            fd.set_cpuid2(&cpuid).map_err(|e| MachineError::Kvm("set a vCPU's CPUID", e))?;
            let power_on = state::PowerOn::capture(kvm, &fd, spec.features.nested)
                .map_err(|e| MachineError::Kvm("read a vCPU's state", e))?;
            Ok((fd, power_on))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CPUID cannot hide all counters: AMD's first four exist without a bit of it.
    #[test]
    fn a_vm_asks_kvm_for_no_performance_counters() {
        let mut asked = Vec::new();
        without_performance_counters(|capability| {
            asked.push((capability.cap, capability.args, capability.flags));
            // As a kernel before 5.18, or one without counters, responds: the VM is made all the same.
            Err(kvm_ioctls::Error::new(libc::EINVAL))
        });
        assert_eq!(asked, [(KVM_CAP_PMU_CAPABILITY, [u64::from(KVM_PMU_CAP_DISABLE), 0, 0, 0], 0)]);
    }
}
