// SPDX-License-Identifier: Apache-2.0

//! The passthrough devices of a machine, VFIO functions or simulated ones: opened before the process drops its
//! privileges, put on the PCI bus afterwards.

use std::{
    collections::BTreeMap,
    ops::Range,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::Duration,
};

use devices::{
    interrupt::MsiRouter,
    memory::GuestMapper,
    pci::bar::{BarError, BarLayout},
    pci::bus::{PciBus, SlotError},
};
use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::VmFd;
use passthrough::{
    family::Family,
    function::{AssignedFunction, FunctionError, HardwareAccess, ResetError, TrappedRange},
    hardware::VfHardware,
    relay::{self, Relay},
    sim::SimVf,
    threads::ThreadStart,
    vfio::{self, Container, KvmVfioDevice, VfioVf},
};
use vm_allocator::{AddressAllocator, AllocPolicy};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    agent_client::RelayReceiver,
    control::{DeviceBackend, DeviceLoss, DeviceSpec, DeviceStats, FailureCode},
    layout,
    memory::GuestMemory,
    sandbox,
};

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
    /// The function does not reset.
    #[error("Device {bdf} cannot be reset")]
    Reset {
        /// The host's PCI address.
        bdf: String,
        /// The cause.
        source: ResetError,
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
}

/// A function's registers, and its request and error eventfds.
type StartedHardware = (Arc<dyn VfHardware>, [Option<EventFd>; 2]);

impl Hardware {
    fn start(
        self,
        bdf: &str,
        memory: &GuestMemory,
        threads: &ThreadStart,
    ) -> Result<StartedHardware, DeviceError> {
        Ok(match self {
            Self::Vfio(vf) => {
                let signals = [vf.request_event()?, vf.error_event()?];
                (vf, signals)
            }
            Self::Simulated(connection) => {
                let failed = |source| DeviceError::Simulated { bdf: bdf.to_owned(), source };
                let vf = SimVf::new(connection, memory.clone(), threads).map_err(failed)?;
                let error = vf.error_event().map_err(failed)?;
                (Arc::new(vf), [None, Some(error)])
            }
        })
    }
}

/// One function in the machine.
struct Function {
    spec: DeviceSpec,
    /// Dropped before the function: the relay must not touch hardware that is being closed.
    relay: Option<Relay>,
    function: Arc<AssignedFunction>,
    slot: u8,
    /// The request eventfd (the host wants the device back) and the error eventfd (it has failed).
    signals: [Option<EventFd>; 2],
}

/// The passthrough devices of one machine.
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
    /// Its slot on the guest's bus.
    pub slot: u8,
    /// Its eventfds, which need no listener any more.
    pub signals: [Option<EventFd>; 2],
}

impl PassthroughDevices {
    /// Opens all functions, those of VFIO in one container. `connections` are those of the simulated functions, in
    /// their sequence. The process still has its privileges.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn open(
        vm: &VmFd,
        devices: &[DeviceSpec],
        connections: Vec<OwnedFd>,
    ) -> Result<OpenedDevices, DeviceError> {
        let mut opened = OpenedDevices { container: None, devices: Vec::new() };
        let mut connections = connections.into_iter();
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
                DeviceBackend::Simulated => {
                    let missing = || DeviceError::NotConnected { bdf: spec.bdf.clone() };
                    Hardware::Simulated(connections.next().ok_or_else(missing)?)
                }
            };
            opened.devices.push((spec.clone(), hardware));
        }
        Ok(opened)
    }

    /// Resets all functions to their power-on state. Blocks, so it must not run on a vCPU thread.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn reset(&self) -> Result<(), DeviceError> {
        for Function { spec, function, .. } in &self.functions {
            match function.reset_and_wait(RESET) {
                // A lost function does no more DMA.
                Err(ResetError::Gone) if function.is_lost() => {}
                result => {
                    result.map_err(|source| DeviceError::Reset { bdf: spec.bdf.clone(), source })?;
                }
            }
        }
        Ok(())
    }

    /// The request and error eventfds, each with the number that [`PassthroughDevices::lost`] takes.
    pub fn loss_signals(&self) -> Vec<(usize, RawFd)> {
        let signals = self.functions.iter().flat_map(|function| &function.signals);
        let with_number = signals.enumerate();
        with_number.filter_map(|(number, signal)| Some((number, signal.as_ref()?.as_raw_fd()))).collect()
    }

    /// Takes the function with signal `number` out of the machine, once.
    pub fn lost(&mut self, number: usize) -> Option<LostDevice> {
        let function = self.functions.get_mut(number / 2)?;
        function.signals.get(number % 2)?.as_ref()?;
        if let Some(relay) = function.relay.take() {
            relay.stop();
        }
        function.function.lose();
        Some(LostDevice {
            bdf: function.spec.bdf.clone(),
            why: if number.is_multiple_of(2) { DeviceLoss::Requested } else { DeviceLoss::Failed },
            slot: function.slot,
            signals: std::mem::take(&mut function.signals),
        })
    }

    /// The relay of an adapter.
    #[must_use]
    pub fn relay(&self, adapter: &str) -> Option<&Relay> {
        let found = self.functions.iter().find(|function| function.spec.adapter.as_deref() == Some(adapter));
        found?.relay.as_ref()
    }

    /// Counters by the host's PCI address.
    #[must_use]
    pub fn stats(&self) -> BTreeMap<String, DeviceStats> {
        let of = |function: &Function| {
            let stats = function.function.stats();
            DeviceStats {
                bar_exits: stats.bar_exits,
                config_exits: stats.config_exits,
                relay: function.relay.as_ref().map(Relay::stats),
            }
        };
        self.functions.iter().map(|function| (function.spec.bdf.clone(), of(function))).collect()
    }
}

/// Allocates guest-physical addresses for BARs at power-on. The guest may move the BARs.
struct BarAllocator {
    low: Option<AddressAllocator>,
    high: Option<AddressAllocator>,
}

impl BarAllocator {
    fn new(pci_window_64: &Range<u64>) -> Self {
        let allocator = |range: &Range<u64>| {
            AddressAllocator::new(range.start, range.end.saturating_sub(range.start)).ok()
        };
        Self { low: allocator(&layout::PCI_WINDOW_32), high: allocator(pci_window_64) }
    }

    fn take(&mut self, layout: BarLayout) -> Option<u64> {
        let from = |allocator: &mut Option<AddressAllocator>| {
            // Give a BAR that is smaller than a page its own page, so that no two share a window.
            let size = layout.size.max(4096);
            let range = allocator.as_mut()?.allocate(size, size, AllocPolicy::FirstMatch).ok()?;
            Some(range.start())
        };
        let high = if layout.is_64bit { from(&mut self.high) } else { None };
        high.or_else(|| from(&mut self.low))
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
    /// Guest-physical addresses for BARs above 4 GiB.
    pub pci_window_64: &'a Range<u64>,
    /// Receives the relays' messages.
    pub relays: &'a RelayReceiver,
    /// The start routine of the functions' threads.
    pub threads: &'a ThreadStart,
}

impl OpenedDevices {
    /// Maps guest memory for DMA and puts the functions on the bus.
    ///
    /// # Errors
    /// See [`DeviceError`].
    pub fn assemble(self, machine: &MachineParts<'_>) -> Result<PassthroughDevices, DeviceError> {
        let MachineParts { memory, router, mapper, bus, pci_window_64, relays, threads } = machine;
        if let Some(container) = &self.container {
            container.map_memory(memory)?;
        }
        let mut bars = BarAllocator::new(pci_window_64);
        let windows: Arc<[Range<u64>]> = [layout::PCI_WINDOW_32, (*pci_window_64).clone()].into();
        let mut functions = Vec::new();
        for (spec, hardware) in self.devices {
            let bdf = || spec.bdf.clone();
            let (hardware, signals) = hardware.start(&spec.bdf, memory, threads)?;
            let access = HardwareAccess::new(hardware);
            let relay = start_relay(&spec, &access, relays, threads)?;
            let traps: Vec<TrappedRange> = relay.iter().flat_map(Relay::trapped_ranges).collect();
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
            functions.push(Function { spec, relay, function, slot, signals });
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
) -> Result<Option<Relay>, DeviceError> {
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
    Ok(Some(relay))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_get_addresses_of_their_own_in_the_window_that_they_can_reach() {
        let mut bars = BarAllocator::new(&(1 << 32..1 << 33));
        let bar = |size, is_64bit| BarLayout { size, is_64bit, prefetchable: false };
        assert_eq!(bars.take(bar(0x4000, true)), Some(1 << 32));
        assert_eq!(bars.take(bar(0x4000, true)), Some((1 << 32) + 0x4000));
        assert_eq!(bars.take(bar(0x10, false)), Some(0xc000_0000));
        assert_eq!(bars.take(bar(0x2000, false)), Some(0xc000_2000));
        assert_eq!(bars.take(bar(1 << 34, true)), None);
        let mut no_upper_window = BarAllocator::new(&(0..0));
        assert_eq!(no_upper_window.take(bar(0x4000, true)), Some(0xc000_0000));
    }
}
