// SPDX-License-Identifier: Apache-2.0

//! The one PCI bus of the machine: 32 slots with function 0 each, reached by ECAM and by the legacy ports.

use std::{
    ops::Range,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU32, Ordering},
    },
};

use acpi_tables::{
    Aml,
    aml::{
        self, AddressSpace, AddressSpaceCacheable, EISAName, IO, Memory32Fixed, Name, Path, ResourceTemplate,
    },
};

use super::{PciFunction, config, host_bridge::HostBridge};
use crate::{
    bus::BusDevice,
    device::{Decoded, Device, ResetError},
};

/// Slots of the bus.
pub const SLOTS: u8 = 32;
/// Bytes of ECAM space for this one bus (PCI Express Base 5.0, 7.2.2): 1 MiB.
pub const ECAM_SIZE: u64 = 1 << 20;
/// First port of the legacy mechanism (PCI Local Bus 3.0, 3.2.2.3.2).
pub const CONFIG_PORT: u16 = 0xcf8;
/// Ports of the legacy mechanism: address and data, 4 bytes each.
pub const CONFIG_PORTS: u8 = 8;

const DATA_PORT: u16 = 0xcfc;
const ADDRESS_ENABLE: u32 = 1 << 31;

/// The reason why a function cannot be put into a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// The bus has slots 0 to 31.
    #[error("PCI slot {0} does not exist: use 1 to 31")]
    NoSuchSlot(u8),
    /// Another function has the slot.
    #[error("PCI slot {0} is taken: use another one")]
    Taken(u8),
    /// Every slot is taken.
    #[error("All 32 PCI slots are taken: assign fewer devices")]
    Full,
}

type Slots = [Option<Arc<dyn PciFunction>>; SLOTS as usize];

/// Bus 0. The host bridge is in slot 0.
///
/// Accesses work on a snapshot of the slots, so that a function can be removed while vCPUs run: a running access
/// finishes on the old snapshot.
pub struct PciBus {
    slots: RwLock<Arc<Slots>>,
    /// The legacy mechanism's CONFIG_ADDRESS register.
    address: AtomicU32,
    windows: Windows,
}

/// The bus' guest-physical addresses.
#[derive(Clone, Debug, Default)]
pub struct Windows {
    /// Start of the ECAM space, [`ECAM_SIZE`] bytes below 4 GiB.
    pub ecam: u64,
    /// BARs of 32 and of 64 bits: addresses below 4 GiB.
    pub low: Range<u64>,
    /// BARs of 64 bits. May be empty.
    pub high: Range<u64>,
}

impl Windows {
    /// The ranges in which BARs may decode.
    #[must_use]
    pub fn bars(&self) -> Arc<[Range<u64>]> {
        Arc::new([self.low.clone(), self.high.clone()])
    }
}

impl PciBus {
    /// A bus with only the host bridge.
    #[must_use]
    pub fn new(windows: Windows) -> Self {
        let mut slots: Slots = std::array::from_fn(|_| None);
        slots[0] = Some(Arc::new(HostBridge::new()));
        Self { slots: RwLock::new(Arc::new(slots)), address: AtomicU32::new(0), windows }
    }

    /// Its addresses.
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// Puts a function into a slot.
    ///
    /// # Errors
    /// [`SlotError`] for a slot that does not exist or is taken.
    pub fn insert(&self, slot: u8, function: Arc<dyn PciFunction>) -> Result<(), SlotError> {
        self.change(|slots| {
            let place = slots.get_mut(usize::from(slot)).ok_or(SlotError::NoSuchSlot(slot))?;
            if place.is_some() {
                return Err(SlotError::Taken(slot));
            }
            *place = Some(function);
            Ok(())
        })
    }

    /// Puts a function into the first free slot. Returns its number.
    ///
    /// # Errors
    /// [`SlotError::Full`].
    pub fn add(&self, function: Arc<dyn PciFunction>) -> Result<u8, SlotError> {
        self.change(|slots| {
            let free = (0..SLOTS).zip(slots.iter_mut()).find(|(_, place)| place.is_none());
            let (slot, place) = free.ok_or(SlotError::Full)?;
            *place = Some(function);
            Ok(slot)
        })
    }

    /// Removes a function, even while vCPUs run. From then on its slot reads all-ones.
    pub fn remove(&self, slot: u8) -> Option<Arc<dyn PciFunction>> {
        self.change(|slots| slots.get_mut(usize::from(slot))?.take())
    }

    /// Reads ECAM space at `offset` from its start.
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        for (offset, part) in config::aligned_parts(offset, data.len()) {
            if let (Some((function, register)), Some(part)) = (self.ecam_target(offset), data.get_mut(part)) {
                function.config_read(register, part);
            }
        }
    }

    /// Writes ECAM space.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        for (offset, part) in config::aligned_parts(offset, data.len()) {
            if let (Some((function, register)), Some(part)) = (self.ecam_target(offset), data.get(part)) {
                function.config_write(register, part);
            }
        }
    }

    /// Reads one of the ports 0xcf8 to 0xcff. Only a dword at 0xcf8 is the address register. Bytes and words there
    /// belong to other devices (0xcf9 is a chipset's reset control) and read all-ones.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if port == CONFIG_PORT {
            if let Ok(address) = <&mut [u8; 4]>::try_from(data) {
                *address = self.address.load(Ordering::Acquire).to_le_bytes();
            }
        } else if let Some((function, register)) = self.port_target(port, data.len()) {
            for (offset, part) in config::aligned_parts(register.into(), data.len()) {
                if let (Ok(offset), Some(part)) = (u16::try_from(offset), data.get_mut(part)) {
                    function.config_read(offset, part);
                }
            }
        }
    }

    /// Writes one of the ports 0xcf8 to 0xcff.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        if port == CONFIG_PORT {
            if let Ok(address) = <[u8; 4]>::try_from(data) {
                self.address.store(u32::from_le_bytes(address), Ordering::Release);
            }
        } else if let Some((function, register)) = self.port_target(port, data.len()) {
            for (offset, part) in config::aligned_parts(register.into(), data.len()) {
                if let (Ok(offset), Some(part)) = (u16::try_from(offset), data.get(part)) {
                    function.config_write(offset, part);
                }
            }
        }
    }

    /// Reads memory that a function's BAR decodes; false (and all-ones) if none does.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        self.snapshot().iter().flatten().any(|function| function.mmio_read(gpa, data))
    }

    /// Writes memory that a function's BAR decodes; false if none does.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        self.snapshot().iter().flatten().any(|function| function.mmio_write(gpa, data))
    }

    fn ecam_target(&self, offset: u64) -> Option<(Arc<dyn PciFunction>, u16)> {
        // Bus in bits 20 and up, device in 15 to 19, function in 12 to 14, register below.
        let register = u16::try_from(offset & 0xfff).ok()?;
        let devfn = u8::try_from(offset >> 12).ok()?;
        Some((self.function(devfn)?, register))
    }

    fn port_target(&self, port: u16, len: usize) -> Option<(Arc<dyn PciFunction>, u16)> {
        let byte = port.checked_sub(DATA_PORT).filter(|byte| usize::from(*byte) + len <= 4)?;
        let address = self.address.load(Ordering::Acquire);
        let [register, devfn, bus, _] = address.to_le_bytes();
        if address & ADDRESS_ENABLE == 0 || bus != 0 {
            return None;
        }
        Some((self.function(devfn)?, u16::from(register & 0xfc) + byte))
    }

    /// The function at device and function number `devfn` (5 and 3 bits).
    fn function(&self, devfn: u8) -> Option<Arc<dyn PciFunction>> {
        if devfn & 7 != 0 {
            return None;
        }
        self.snapshot().get(usize::from(devfn >> 3))?.clone()
    }

    fn snapshot(&self) -> Arc<Slots> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change<T>(&self, change: impl FnOnce(&mut Slots) -> T) -> T {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let mut copy = Slots::clone(&slots);
        let result = change(&mut copy);
        *slots = Arc::new(copy);
        result
    }
}

impl Device for PciBus {
    fn decodes(self: Arc<Self>) -> Vec<Decoded> {
        let ecam = self.windows.ecam;
        let mut decoded = vec![
            Decoded::ports(CONFIG_PORT, CONFIG_PORTS.into(), Arc::new(ConfigPorts(Arc::clone(&self)))),
            Decoded::memory(ecam..ecam.saturating_add(ECAM_SIZE), Arc::new(Ecam(Arc::clone(&self)))),
        ];
        for window in [&self.windows.low, &self.windows.high].into_iter().filter(|window| !window.is_empty())
        {
            let registers = BarWindow { bus: Arc::clone(&self), start: window.start };
            decoded.push(Decoded::memory(window.clone(), Arc::new(registers)));
        }
        decoded
    }

    /// The host bridge with its windows, and the ECAM space: Linux uses it only where a motherboard resource reserves
    /// it.
    fn aml(&self) -> Vec<u8> {
        let Windows { ecam, low, high } = &self.windows;
        let mut bytes = Vec::new();
        let bus = AddressSpace::new_bus_number(0_u16, 0);
        let config = IO::new(CONFIG_PORT, CONFIG_PORT, 1, CONFIG_PORTS);
        let below = AddressSpace::new_io(0_u16, CONFIG_PORT - 1, None);
        let above = AddressSpace::new_io(CONFIG_PORT + u16::from(CONFIG_PORTS), 0xffff, None);
        #[expect(clippy::cast_possible_truncation, reason = "the window ends below 4 GiB")]
        let memory_32 = AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            low.start as u32,
            low.end.saturating_sub(1) as u32,
            None,
        );
        let memory_64 = (!high.is_empty()).then(|| {
            AddressSpace::new_memory(
                AddressSpaceCacheable::NotCacheable,
                true,
                high.start,
                high.end - 1,
                None,
            )
        });
        let mut resources: Vec<&dyn Aml> = vec![&bus, &config, &below, &above, &memory_32];
        if let Some(memory_64) = &memory_64 {
            resources.push(memory_64);
        }
        aml::Device::new(
            Path::new("_SB_.PCI0"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
                &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
                &Name::new(Path::new("_SEG"), &0_u8),
                &Name::new(Path::new("_BBN"), &0_u8),
                &Name::new(Path::new("_UID"), &0_u8),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)),
            ],
        )
        .to_aml_bytes(&mut bytes);
        #[expect(clippy::cast_possible_truncation, reason = "1 MiB below 4 GiB")]
        let reserved = Memory32Fixed::new(true, *ecam as u32, ECAM_SIZE as u32);
        aml::Device::new(
            Path::new("_SB_.MBRD"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
                &Name::new(Path::new("_UID"), &0_u8),
                &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&reserved])),
            ],
        )
        .to_aml_bytes(&mut bytes);
        bytes
    }

    /// Resets the address register. The owners of functions reset those.
    fn reset(&self) -> Result<(), ResetError> {
        self.address.store(0, Ordering::Release);
        Ok(())
    }
}

/// The ports of the legacy mechanism.
struct ConfigPorts(Arc<PciBus>);

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Ok(offset) = u16::try_from(offset) {
            self.0.port_read(CONFIG_PORT.saturating_add(offset), data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Ok(offset) = u16::try_from(offset) {
            self.0.port_write(CONFIG_PORT.saturating_add(offset), data);
        }
    }
}

/// The ECAM space.
struct Ecam(Arc<PciBus>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.ecam_read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.ecam_write(offset, data);
    }
}

/// A range in which BARs decode.
struct BarWindow {
    bus: Arc<PciBus>,
    start: u64,
}

impl BusDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.bus.mmio_read(self.start.saturating_add(offset), data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.bus.mmio_write(self.start.saturating_add(offset), data);
    }
}

#[cfg(test)]
mod tests;
