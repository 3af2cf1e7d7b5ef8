// SPDX-License-Identifier: Apache-2.0

//! The machine's devices and their buses: four hops from a guest's store to a device (exit handler, board, bus,
//! device).
//!
//! A device of the machine is a file of its own that implements [`Device`], and a line of the table in this file.

mod disk_contents;
mod nics;
mod port;
#[cfg(any(test, feature = "test-support"))]
pub(crate) mod probe;
mod virtio;

pub use disk_contents::DiskContents;
pub use nics::Nics;
pub use virtio::{DiskError, Disks};

use std::{
    collections::BTreeSet,
    error::Error,
    io::{self, Write},
    sync::Arc,
};

use devices::{
    acpi::{self, AcpiRegisters},
    bus::{Bus, BusError},
    device::{Device, ResetError, Space},
    doorbell::Doorbells,
    i8042::I8042,
    interrupt::MsiRouter,
    io_thread::IoThread,
    machine::{EventLatch, MachineEvent},
    memory::GuestMapper,
    pci::bus::{CONFIG_PORT, CONFIG_PORTS, PciBus, Windows},
    serial::{self, Serial},
};
use kvm_ioctls::VmFd;
use protocol::{Files, MachineSpec};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    bars::BarAllocator,
    console::Console,
    doorbells::KvmDoorbells,
    interrupts::Routes,
    layout,
    memory::GuestMemory,
    passthrough_devices::NicPorts,
    vcpu::{Events, exit::Ports},
};

/// Builds devices of one kind: none, if the machine has none of that kind.
type Build = fn(&Board, &mut Parts<'_>) -> Result<Vec<Arc<dyn Device>>, BoardError>;

/// The machine's devices, but for those of [`ON_BUS`]. Buses come first, so that they outlast the devices on them.
const TABLE: &[Build] = &[
    |board, _| Ok(vec![board.pci.clone()]),
    |board, _| Ok(vec![board.serial.clone()]),
    |board, _| Ok(vec![board.acpi.clone()]),
    |board, _| Ok(vec![Arc::new(I8042::new(board.latch.clone()))]),
    #[cfg(any(test, feature = "test-support"))]
    probe::build,
];

/// Devices in slots of the PCI bus. They come after the assigned functions, whose slots stay the same with and without
/// them: a guest names its network interfaces by slots.
const ON_BUS: &[Build] = &[nics::build, virtio::disks, virtio::entropy];

/// Errors of building the machine's devices.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// Devices overlap: a bug.
    #[error("The machine's layout is contradictory; this is a bug of Portcullis")]
    Layout(#[from] BusError),
    /// An interrupt of a device cannot be connected.
    #[error("Cannot connect an interrupt")]
    Interrupt(#[source] io::Error),
    /// A disk's file is not an image of its format, or is damaged.
    #[error("The disk {id} cannot be used")]
    Disk {
        /// The disk's name.
        id: String,
        /// The cause.
        source: ::virtio::disk::qcow2::OpenError,
    },
    /// A device cannot be built.
    #[error("Cannot build device {device}")]
    Device {
        /// The device's name.
        device: String,
        /// The cause.
        source: Box<dyn Error + Send + Sync>,
    },
}

/// The parts of a machine that its devices are connected to.
pub struct Parts<'a> {
    /// The VM.
    pub vm: &'a Arc<VmFd>,
    /// The machine's specification.
    pub spec: &'a MachineSpec,
    /// Guest memory.
    pub memory: &'a GuestMemory,
    /// KVM's memory slots.
    pub mapper: &'a Arc<dyn GuestMapper>,
    /// The interrupt routes.
    pub routes: &'a Arc<Routes>,
    /// Guest-physical addresses of the PCI bus.
    pub pci: &'a Windows,
    /// The allocator of BARs' addresses.
    pub bars: &'a mut BarAllocator,
    /// The machine's files. A device takes its own by name.
    pub files: &'a mut Files,
    /// Receives the facts of the disks.
    pub disks: &'a mut Disks,
    /// Receives the counters of the NICs.
    pub nics: &'a mut Nics,
    /// The ports of NICs under a port group. A NIC takes the one with its name.
    pub ports: &'a mut NicPorts,
    /// Receives the events of devices.
    pub events: &'a Arc<Events>,
}

impl Parts<'_> {
    /// Doorbells of devices.
    #[must_use]
    pub fn doorbells(&self) -> Arc<dyn Doorbells> {
        Arc::new(KvmDoorbells::new(Arc::clone(self.vm)))
    }

    /// Message-signalled interrupts of devices.
    #[must_use]
    pub fn router(&self) -> Arc<dyn MsiRouter> {
        self.routes.clone()
    }
}

/// The machine's devices and their buses. Fixed before the first vCPU runs, except that the event loop removes a lost
/// function from the PCI bus.
pub struct Board {
    /// The serial port.
    pub serial: Arc<Serial>,
    /// Sleep, reset and event registers.
    pub acpi: Arc<AcpiRegisters>,
    /// The PCI bus.
    pub pci: Arc<PciBus>,
    /// All devices, the three above among them.
    devices: Vec<Arc<dyn Device>>,
    ports: Bus,
    memory: Bus,
    latch: Arc<EventLatch>,
}

impl Board {
    /// Builds the devices of the table. The guest's output goes to `console`.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub fn new(parts: &mut Parts<'_>, console: Console) -> Result<Self, BoardError> {
        let mut board = Self::empty(|gsi| parts.routes.pin(gsi), parts.pci.clone(), Box::new(console))
            .map_err(BoardError::Interrupt)?;
        board.build(TABLE, parts)?;
        Ok(board)
    }

    /// Builds the devices in slots of the bus that no assigned function has taken.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub fn fill_bus(&mut self, parts: &mut Parts<'_>) -> Result<(), BoardError> {
        self.build(ON_BUS, parts)
    }

    fn build(&mut self, table: &[Build], parts: &mut Parts<'_>) -> Result<(), BoardError> {
        for build in table {
            for device in build(self, parts)? {
                self.add(device)?;
            }
        }
        Ok(())
    }

    /// A board with empty buses. `pin` connects an interrupt line to an eventfd.
    fn empty(
        pin: impl Fn(u32) -> io::Result<EventFd>,
        pci: Windows,
        console: Box<dyn Write + Send>,
    ) -> io::Result<Self> {
        let latch = Arc::new(EventLatch::new());
        let serial = serial::Place { port: layout::SERIAL_PORT, gsi: layout::SERIAL_GSI };
        let acpi = acpi::Place { port: layout::ACPI_PORT, gsi: layout::ACPI_EVENT_GSI };
        Ok(Self {
            serial: Arc::new(Serial::new(serial, pin(serial.gsi)?, console)),
            acpi: Arc::new(AcpiRegisters::new(acpi, latch.clone(), pin(acpi.gsi)?)),
            pci: Arc::new(PciBus::new(pci)),
            devices: Vec::new(),
            ports: Bus::new(),
            memory: Bus::new(),
            latch,
        })
    }

    /// Adds a device and its registers.
    ///
    /// # Errors
    /// An address belongs to another device.
    pub fn add(&mut self, device: Arc<dyn Device>) -> Result<(), BusError> {
        for decoded in Arc::clone(&device).decodes() {
            let bus = match decoded.space {
                Space::Ports => &mut self.ports,
                Space::Memory => &mut self.memory,
            };
            bus.insert(decoded.range, decoded.registers)?;
        }
        self.devices.push(device);
        Ok(())
    }

    /// The I/O threads that the devices need, each with its device's number.
    #[must_use]
    pub fn io_threads(&self) -> Vec<(usize, IoThread)> {
        let threads = |(number, device): (usize, &Arc<dyn Device>)| {
            Arc::clone(device).io_threads().into_iter().map(move |thread| (number, thread))
        };
        self.devices.iter().enumerate().flat_map(threads).collect()
    }

    /// The devices' parts of the DSDT.
    #[must_use]
    pub fn aml(&self) -> Vec<u8> {
        self.devices.iter().flat_map(|device| device.aml()).collect()
    }

    /// Stops the devices' own activity. The vCPUs are parked.
    pub fn pause(&self) {
        self.devices.iter().rev().for_each(|device| device.pause());
    }

    /// Lets the devices act. The I/O threads run next, then the vCPUs.
    pub fn resume(&self) {
        self.devices.iter().for_each(|device| device.resume());
    }

    /// Resets the devices to their power-on state. They are paused.
    ///
    /// # Errors
    /// The first device that does not reset: the machine must not boot again.
    pub fn reset(&self) -> Result<(), ResetError> {
        self.devices.iter().rev().try_for_each(|device| device.reset())?;
        // Drop an event that a second vCPU raised during the reset: this reset covers it.
        self.latch.take();
        Ok(())
    }

    /// Releases the devices' resources of the host. The devices are paused, and no vCPU is left. Skips devices `in_use`
    /// by an I/O thread that was left behind: their shutdown could hang as the thread does. The end of the process
    /// releases their resources.
    pub fn shutdown(&self, in_use: &BTreeSet<usize>) {
        let unused = self.devices.iter().enumerate().rev().filter(|(number, _)| !in_use.contains(number));
        unused.for_each(|(_, device)| device.shutdown());
    }
}

fn is_pci_config(port: u16) -> bool {
    port.checked_sub(CONFIG_PORT).is_some_and(|offset| offset < CONFIG_PORTS.into())
}

impl Ports for Board {
    fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        self.ports.read(u64::from(port), data)
    }

    fn port_write(&self, port: u16, data: &[u8]) -> Option<MachineEvent> {
        self.ports.write(u64::from(port), data);
        // Only devices on other ports raise events: an access to PCI must not take the event of another vCPU.
        if is_pci_config(port) { None } else { self.latch.take() }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        self.memory.read(gpa, data)
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) -> Option<MachineEvent> {
        self.memory.write(gpa, data);
        // No device raises events by a write to memory.
        None
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use devices::machine::MachineEvents;

    use super::*;

    /// The devices of every machine, without KVM.
    pub(crate) fn board() -> Board {
        let pci = Windows {
            ecam: layout::ECAM.start,
            low: layout::PCI_WINDOW_32,
            high: layout::pci_window_64(4 << 20, 46),
        };
        let mut board = Board::empty(|_| EventFd::new(0), pci, Box::new(io::sink())).unwrap();
        let i8042 = Arc::new(I8042::new(board.latch.clone()));
        let devices: [Arc<dyn Device>; 4] =
            [board.pci.clone(), board.serial.clone(), board.acpi.clone(), i8042];
        devices.into_iter().for_each(|device| board.add(device).unwrap());
        board
    }

    /// The event is not lost, but the vCPU that raised it would run on until the event loop parks
    /// it.
    #[test]
    fn accesses_to_pci_and_memory_leave_the_event_of_another_vcpu_in_place() {
        let board = board();
        board.latch.raise(MachineEvent::PowerOff);
        for gpa in [layout::ECAM.start, layout::PCI_WINDOW_32.start, layout::RAM_64] {
            assert_eq!(board.mmio_write(gpa, &[0; 4]), None);
        }
        for port in CONFIG_PORT..CONFIG_PORT + u16::from(CONFIG_PORTS) {
            assert_eq!(board.port_write(port, &[0]), None, "port {port:#x}");
        }
        assert_eq!(board.port_write(layout::SERIAL_PORT, b"x"), Some(MachineEvent::PowerOff));
        assert_eq!(board.port_write(0x64, &[0xfe]), Some(MachineEvent::Reset));
    }
}
