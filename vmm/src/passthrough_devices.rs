// SPDX-License-Identifier: Apache-2.0

//! The passthrough devices of a machine, VFIO functions or simulated ones: opened before the process drops its
//! privileges, put on the PCI bus afterwards.

use std::{
    collections::BTreeMap,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use devices::{
    device::{self, Device},
    interrupt::MsiRouter,
    memory::GuestMapper,
    pci::bar::BarError,
    pci::bus::{PciBus, SlotError},
};
use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::VmFd;
use passthrough::{
    family::Family,
    function::{AssignedFunction, FunctionError, FunctionStats, HardwareAccess, ResetError, TrappedRange},
    hardware::VfHardware,
    relay::{self, Driver, Relay},
    threads::ThreadStart,
    vfio::{self, Container, KvmVfioDevice, VfioVf},
};
use protocol::{DeviceBackend, DeviceLoss, DeviceSpec, DeviceStats, FailureCode, Files, files::connection};
use simnic::{SimVf, vf::FramePort};
use vmm_sys_util::eventfd::EventFd;

use crate::{agent_client::RelayReceiver, bars::BarAllocator, memory::GuestMemory, sandbox};

/// The time limit of a function's reset. VFIO's own FLR waits 100 ms, the PCI core gives a slow device a second, and
/// an emulated device under load needs more.
const RESET: Duration = Duration::from_secs(10);

/// Errors of passthrough devices.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// VFIO refused the device.
    #[error(transparent)]
    Vfio(#[from] vfio::Error),
    /// The agent passed no connection for it.
    #[error("The connection of simulated device {bdf} to its PF is missing: a bug of Portcullis")]
    NotConnected {
        /// The host's PCI address.
        bdf: String,
    },
    /// The simulated VF did not start.
    #[error("Simulated device {bdf} cannot be started")]
    Simulated {
        /// The host's PCI address.
        bdf: String,
        /// The cause.
        source: std::io::Error,
    },
    /// KVM has no VFIO device.
    #[error("KVM refused to create its VFIO device")]
    KvmDevice(#[source] kvm_ioctls::Error),
    /// A guest cannot be given this function.
    #[error("Device {bdf} cannot be assigned")]
    Function {
        /// The host's PCI address.
        bdf: String,
        /// The cause.
        source: FunctionError,
    },
    /// Its BARs do not fit.
    #[error("The guest's PCI windows have no room for a BAR of {size:#x} bytes of device {bdf}")]
    NoRoom {
        /// The host's PCI address.
        bdf: String,
        /// The BAR's size.
        size: u64,
    },
    /// A BAR cannot be placed: a bug.
    #[error("A BAR of device {bdf} cannot be placed")]
    Bar {
        /// The host's PCI address.
        bdf: String,
        /// The cause.
        source: BarError,
    },
    /// No mailbox family matches its PCI ids.
    #[error(
        "Device {bdf} ({vendor:04x}:{device:04x}) is not a VF with a supported mailbox: use an 82576 or i350 \
         VF for adapters, or list the device under `devices`, without a port group"
    )]
    Family {
        /// The host's PCI address.
        bdf: String,
        /// PCI vendor.
        vendor: u16,
        /// PCI device.
        device: u16,
    },
    /// The relay's thread did not start.
    #[error("Cannot start the mailbox relay of device {bdf}")]
    Relay {
        /// The host's PCI address.
        bdf: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The bus is full.
    #[error("The guest's PCI bus has no slot for device {bdf}")]
    Slot {
        /// The host's PCI address.
        bdf: String,
        /// The cause.
        source: SlotError,
    },
}

impl DeviceError {
    /// The stable code for the control channel.
    #[must_use]
    pub fn code(&self) -> FailureCode {
        match self {
            Self::Vfio(vfio::Error::Memlock { .. }) => FailureCode::Memlock,
            Self::Vfio(vfio::Error::GroupNotViable { .. }) => FailureCode::GroupNotViable,
            _ => FailureCode::Device,
        }
    }
}

/// Functions that are open but not yet in a machine.
pub struct OpenedDevices {
    container: Option<Container>,
    devices: Vec<(DeviceSpec, Hardware)>,
}

/// A function that is not yet in a machine.
enum Hardware {
    Vfio(Arc<VfioVf>),
    /// The connection to its PF. It becomes a VF once there is guest memory.
    Simulated(OwnedFd),
    /// The same, for the port of a NIC.
    Port(OwnedFd),
}

/// A function's registers, its request and error eventfds, and its frames if it is the port of a NIC.
struct StartedHardware {
    registers: Arc<dyn VfHardware>,
    signals: [Option<EventFd>; 2],
    port: Option<FramePort>,
}

impl Hardware {
    fn start(
        self,
        bdf: &str,
        memory: &GuestMemory,
        threads: &ThreadStart,
    ) -> Result<StartedHardware, DeviceError> {
        let failed = |source| DeviceError::Simulated { bdf: bdf.to_owned(), source };
        let (vf, port) = match self {
            Self::Vfio(vf) => {
                let signals = [vf.request_event()?, vf.error_event()?];
                return Ok(StartedHardware { registers: vf, signals, port: None });
            }
            Self::Simulated(connection) => {
                (SimVf::new(connection, memory.clone(), threads).map_err(failed)?, None)
            }
            Self::Port(connection) => {
                let (vf, port) = SimVf::with_port(connection, threads).map_err(failed)?;
                (vf, Some(port))
            }
        };
        let error = vf.error_event().map_err(failed)?;
        Ok(StartedHardware { registers: Arc::new(vf), signals: [None, Some(error)], port })
    }
}

/// One function in the machine.
struct Function {
    spec: DeviceSpec,
    /// Stopped before the function closes: the relay must not touch hardware that is being closed.
    relay: Mutex<Option<Arc<Relay>>>,
    face: Face,
    /// The request eventfd (the host wants the device back) and the error eventfd (it has failed).
    signals: Mutex<[Option<EventFd>; 2]>,
}

/// The device that the guest sees.
enum Face {
    /// The function itself, in a slot of the bus.
    Function { function: Arc<AssignedFunction>, slot: u8 },
    /// A NIC of the board: the function is its port.
    Nic { hardware: Arc<dyn VfHardware> },
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Function {
    fn reset(&self) -> Result<(), device::ResetError> {
        let failed = |source| device::ResetError { device: self.spec.bdf.clone(), source };
        match &self.face {
            Face::Function { function, .. } => match function.reset_and_wait(RESET) {
                // A lost function does no more DMA.
                Err(ResetError::Gone) if function.is_lost() => Ok(()),
                result => result.map_err(|source| failed(source.into())),
            },
            Face::Nic { hardware } => {
                let relay = lock(&self.relay).clone();
                relay.iter().for_each(|relay| relay.hardware_reset());
                let result = hardware.reset();
                relay.iter().for_each(|relay| relay.hardware_reset());
                result.map_err(|source| failed(source.into()))
            }
        }
    }

    /// Stops the relay, if there is one.
    fn stop_relay(&self) {
        let relay = lock(&self.relay).take();
        if let Some(relay) = relay {
            relay.stop();
        }
    }
}

/// The passthrough devices of one machine. Its locks are free but for the event loop's calls.
pub struct PassthroughDevices {
    functions: Vec<Function>,
    /// Keeps the DMA mappings until the functions are gone.
    _container: Option<Container>,
}

/// A device that the machine has lost.
pub struct LostDevice {
    /// The host's PCI address.
    pub bdf: String,
    /// The cause.
    pub why: DeviceLoss,
    /// Its slot on the guest's bus. None for the port of a NIC, which stays.
    pub slot: Option<u8>,
    /// Its eventfds, which need no listener any more.
    pub signals: [Option<EventFd>; 2],
}

impl PassthroughDevices {
    /// Opens all functions, those of VFIO in one container. The connections of simulated functions are among `files`.
    /// The process still has its privileges.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn open(vm: &VmFd, devices: &[DeviceSpec], files: &mut Files) -> Result<OpenedDevices, DeviceError> {
        let mut opened = OpenedDevices { container: None, devices: Vec::new() };
        for spec in devices {
            let hardware = match spec.backend {
                DeviceBackend::Vfio { .. } => {
                    let container = match opened.container.take() {
                        Some(container) => container,
                        None => container(vm)?,
                    };
                    let vf = container.open(&sandbox::device_path(&spec.bdf));
                    opened.container = Some(container);
                    Hardware::Vfio(Arc::new(vf?))
                }
                DeviceBackend::Simulated | DeviceBackend::SimulatedPort => {
                    let missing = || DeviceError::NotConnected { bdf: spec.bdf.clone() };
                    let connection = files.take(&connection(&spec.bdf)).ok_or_else(missing)?;
                    match spec.backend {
                        DeviceBackend::SimulatedPort => Hardware::Port(connection),
                        _ => Hardware::Simulated(connection),
                    }
                }
            };
            opened.devices.push((spec.clone(), hardware));
        }
        Ok(opened)
    }

    /// The request and error eventfds, each with the number that [`PassthroughDevices::lost`] takes.
    pub fn loss_signals(&self) -> Vec<(usize, RawFd)> {
        let fds = |function: &Function| {
            lock(&function.signals).each_ref().map(|signal| signal.as_ref().map(AsRawFd::as_raw_fd))
        };
        let signals = self.functions.iter().flat_map(fds).enumerate();
        signals.filter_map(|(number, signal)| Some((number, signal?))).collect()
    }

    /// Takes the function with signal `number` out of the machine, once.
    pub fn lost(&self, number: usize) -> Option<LostDevice> {
        let function = self.functions.get(number / 2)?;
        lock(&function.signals).get(number % 2)?.as_ref()?;
        function.stop_relay();
        let slot = match &function.face {
            Face::Function { function, slot } => {
                function.lose();
                Some(*slot)
            }
            // The port has lost its link.
            Face::Nic { .. } => None,
        };
        Some(LostDevice {
            bdf: function.spec.bdf.clone(),
            why: if number.is_multiple_of(2) { DeviceLoss::Requested } else { DeviceLoss::Failed },
            slot,
            signals: std::mem::take(&mut lock(&function.signals)),
        })
    }

    /// The relay of an adapter.
    #[must_use]
    pub fn relay(&self, adapter: &str) -> Option<Arc<Relay>> {
        let found = self.functions.iter().find(|function| function.spec.adapter.as_deref() == Some(adapter));
        lock(&found?.relay).clone()
    }

    /// Counters by the host's PCI address.
    #[must_use]
    pub fn stats(&self) -> BTreeMap<String, DeviceStats> {
        let of = |function: &Function| {
            let stats = match &function.face {
                Face::Function { function, .. } => function.stats(),
                Face::Nic { .. } => FunctionStats::default(),
            };
            DeviceStats {
                bar_exits: stats.bar_exits,
                config_exits: stats.config_exits,
                relay: lock(&function.relay).as_ref().map(|relay| relay.stats()),
            }
        };
        self.functions.iter().map(|function| (function.spec.bdf.clone(), of(function))).collect()
    }
}

impl Device for PassthroughDevices {
    fn reset(&self) -> Result<(), device::ResetError> {
        self.functions.iter().try_for_each(Function::reset)
    }

    fn shutdown(&self) {
        for function in &self.functions {
            function.stop_relay();
            if let Face::Function { function, .. } = &function.face {
                function.shutdown();
            }
        }
    }
}

/// The parts of a machine that its functions are connected to.
pub struct MachineParts<'a> {
    /// Guest memory.
    pub memory: &'a GuestMemory,
    /// Interrupt routes.
    pub router: &'a Arc<dyn MsiRouter>,
    /// KVM's memory slots.
    pub mapper: &'a Arc<dyn GuestMapper>,
    /// The bus.
    pub bus: &'a PciBus,
    /// Addresses of BARs.
    pub bars: &'a mut BarAllocator,
    /// Receives the relays' messages.
    pub relays: &'a RelayReceiver,
    /// The start routine of the functions' threads.
    pub threads: &'a ThreadStart,
    /// Receives the ports of NICs.
    pub ports: &'a mut NicPorts,
}

/// The ports of NICs, by the NICs' names.
pub type NicPorts = BTreeMap<String, (FramePort, Driver)>;

impl OpenedDevices {
    /// Maps guest memory for DMA and puts the functions on the bus.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn assemble(self, machine: MachineParts<'_>) -> Result<PassthroughDevices, DeviceError> {
        let MachineParts { memory, router, mapper, bus, bars, relays, threads, ports } = machine;
        if let Some(container) = &self.container {
            container.map_memory(memory)?;
        }
        let windows = bus.windows().bars();
        let mut functions = Vec::new();
        for (spec, hardware) in self.devices {
            let bdf = || spec.bdf.clone();
            let StartedHardware { registers, signals, port } = hardware.start(&spec.bdf, memory, threads)?;
            let access = HardwareAccess::new(Arc::clone(&registers));
            let relay = start_relay(&spec, &access, relays, threads)?;
            let signals = Mutex::new(signals);
            if let (Some(port), Some(relay), Some(nic)) = (port, &relay, &spec.adapter) {
                ports.insert(nic.clone(), (port, Driver::new(relay, access.clone())));
                let (relay, face) = (Mutex::new(Some(Arc::clone(relay))), Face::Nic { hardware: registers });
                functions.push(Function { spec, relay, face, signals });
                continue;
            }
            let traps: Vec<TrappedRange> = relay.iter().flat_map(|relay| relay.trapped_ranges()).collect();
            let (mapper, router) = (Arc::clone(mapper), Arc::clone(router));
            let function = AssignedFunction::new(
                &spec.bdf,
                access,
                Arc::clone(&windows),
                &traps,
                mapper,
                router,
                threads,
            )
            .map_err(|source| DeviceError::Function { bdf: bdf(), source })?;
            for (index, bar) in function.bars() {
                let address =
                    bars.take(bar).ok_or_else(|| DeviceError::NoRoom { bdf: bdf(), size: bar.size })?;
                function
                    .assign_bar(index, address)
                    .map_err(|source| DeviceError::Bar { bdf: bdf(), source })?;
            }
            let function = Arc::new(function);
            let slot =
                bus.add(function.clone()).map_err(|source| DeviceError::Slot { bdf: bdf(), source })?;
            let (relay, face) = (Mutex::new(relay), Face::Function { function, slot });
            functions.push(Function { spec, relay, face, signals });
        }
        Ok(PassthroughDevices { functions, _container: self.container })
    }
}

/// The IOMMU domain of a machine, known to KVM.
fn container(vm: &VmFd) -> Result<Container, DeviceError> {
    let mut device = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
    let kvm = vm.create_device(&mut device).map_err(DeviceError::KvmDevice)?;
    Ok(Container::new(Some(KvmVfioDevice::new_from_kvm(kvm)))?)
}

/// Starts the relay of a network VF. A plain device gets none.
fn start_relay(
    spec: &DeviceSpec,
    access: &Arc<HardwareAccess>,
    relays: &RelayReceiver,
    threads: &ThreadStart,
) -> Result<Option<Arc<Relay>>, DeviceError> {
    let Some(adapter) = &spec.adapter else { return Ok(None) };
    let mut ids = [0; 4];
    access.config_read(0, &mut ids);
    let [vendor_low, vendor_high, device_low, device_high] = ids;
    let vendor = u16::from_le_bytes([vendor_low, vendor_high]);
    let device = u16::from_le_bytes([device_low, device_high]);
    let family = Family::of(vendor, device).ok_or_else(|| DeviceError::Family {
        bdf: spec.bdf.clone(),
        vendor,
        device,
    })?;
    let config = relay::Config { adapter: adapter.clone(), ..relay::Config::default() };
    let relay = Relay::start(config, family, access.clone(), Arc::new(relays.client_for(adapter)), threads)
        .map_err(|source| DeviceError::Relay { bdf: spec.bdf.clone(), source })?;
    Ok(Some(Arc::new(relay)))
}
