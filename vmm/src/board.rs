// SPDX-License-Identifier: Apache-2.0

//! The machine's buses: four hops from a guest's store to a device (exit handler, board, bus, device).

use std::sync::Arc;

use devices::{
    acpi::{self, AcpiRegisters},
    bus::{Bus, BusError},
    i8042::{self, I8042},
    machine::{EventLatch, MachineEvent},
    pci::bus::{CONFIG_PORTS, PciBus},
    serial::{self, Serial},
};

use crate::{layout, vcpu::exit::Ports};

/// The machine's devices and their buses. Fixed before the first vCPU runs, except that functions come and go on the
/// PCI bus.
pub struct Board {
    /// The serial port.
    pub serial: Arc<Serial>,
    /// Sleep, reset and event registers.
    pub acpi: Arc<AcpiRegisters>,
    /// The PCI bus.
    pub pci: Arc<PciBus>,
    ports: Bus,
    latch: Arc<EventLatch>,
}

impl Board {
    /// Puts the devices at their addresses.
    ///
    /// # Errors
    /// Overlapping ranges: a bug in [`layout`].
    pub fn new(
        serial: Serial,
        acpi: impl FnOnce(Arc<EventLatch>) -> AcpiRegisters,
        pci: PciBus,
    ) -> Result<Self, BusError> {
        let latch = Arc::new(EventLatch::new());
        let serial = Arc::new(serial);
        let acpi = Arc::new(acpi(Arc::clone(&latch)));
        let mut ports = Bus::new();
        let first = u64::from(layout::SERIAL_PORT);
        ports.insert(first..first + serial::PORTS, serial.clone())?;
        let first = u64::from(layout::ACPI_PORT);
        ports.insert(first..first + acpi::LEN, acpi.clone())?;
        ports.insert(i8042::PORT..i8042::PORT + i8042::PORTS, Arc::new(I8042::new(latch.clone())))?;
        Ok(Self { serial, acpi, pci: Arc::new(pci), ports, latch })
    }

    /// Resets the devices to their power-on state. The machine resets PCI functions, since that takes time.
    pub fn reset(&self) {
        self.serial.reset();
        self.acpi.reset();
        self.pci.reset();
        // Drop an event that a second vCPU raised during the reset: the reset answers it.
        self.latch.take();
    }
}

fn is_pci_config(port: u16) -> bool {
    (layout::PCI_CONFIG_PORT..layout::PCI_CONFIG_PORT + CONFIG_PORTS).contains(&port)
}

impl Ports for Board {
    fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        if is_pci_config(port) {
            self.pci.port_read(port, data);
            return true;
        }
        self.ports.read(u64::from(port), data)
    }

    fn port_write(&self, port: u16, data: &[u8]) -> Option<MachineEvent> {
        if is_pci_config(port) {
            self.pci.port_write(port, data);
            return None;
        }
        self.ports.write(u64::from(port), data);
        self.latch.take()
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        if layout::ECAM.contains(&gpa) {
            self.pci.ecam_read(gpa - layout::ECAM.start, data);
            return true;
        }
        self.pci.mmio_read(gpa, data)
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) -> Option<MachineEvent> {
        if layout::ECAM.contains(&gpa) {
            self.pci.ecam_write(gpa - layout::ECAM.start, data);
        } else {
            self.pci.mmio_write(gpa, data);
        }
        None
    }
}
