// SPDX-License-Identifier: Apache-2.0

//! The one PCI bus of the machine: 32 slots with function 0 each, reached by ECAM and by the legacy ports.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU32, Ordering},
    },
};

use acpi_tables::{
    Aml,
    aml::{
        self, AddressSpace, AddressSpaceCacheable, EISAName, IO, Memory32Fixed, Name, Path, ResourceTemplate,
    },
};

use super::{DecodedBars, PciFunction, address_map::AddressMap, config, host_bridge::HostBridge};
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

/// The functions, and the addresses at which to find them.
#[derive(Clone)]
struct Snapshot {
    slots: Slots,
    addresses: AddressMap,
}

impl Snapshot {
    fn function(&self, slot: u8) -> Option<&Arc<dyn PciFunction>> {
        self.slots.get(usize::from(slot))?.as_ref()
    }

    fn decoded(&self, slot: u8) -> DecodedBars {
        self.function(slot).map(|function| function.decoded()).unwrap_or_default()
    }

    /// Brings the addresses of a slot in line with its function.
    fn locate(&mut self, slot: u8) {
        let decoded = self.decoded(slot);
        self.addresses.set(slot, decoded);
    }
}

/// Bus 0. The host bridge is in slot 0.
///
/// Accesses work on a snapshot of the slots, so that a function can be removed while vCPUs run: a running access
/// finishes on the old snapshot.
pub struct PciBus {
    /// Locked only to copy or replace the pointer.
    snapshot: RwLock<Arc<Snapshot>>,
    /// Held from the copy of a snapshot to its replacement. A change asks a function under it, so that of two vCPUs
    /// that move a BAR the later one leaves the final address.
    changing: Mutex<()>,
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
        let snapshot = Snapshot { slots, addresses: AddressMap::default() };
        Self {
            snapshot: RwLock::new(Arc::new(snapshot)),
            changing: Mutex::new(()),
            address: AtomicU32::new(0),
            windows,
        }
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
        self.change(|bus| {
            let place = bus.slots.get_mut(usize::from(slot)).ok_or(SlotError::NoSuchSlot(slot))?;
            if place.is_some() {
                return Err(SlotError::Taken(slot));
            }
            *place = Some(function);
            bus.locate(slot);
            Ok(())
        })
    }

    /// Puts a function into the first free slot. Returns its number.
    ///
    /// # Errors
    /// [`SlotError::Full`].
    pub fn add(&self, function: Arc<dyn PciFunction>) -> Result<u8, SlotError> {
        self.change(|bus| {
            let free = (0..SLOTS).zip(bus.slots.iter_mut()).find(|(_, place)| place.is_none());
            let (slot, place) = free.ok_or(SlotError::Full)?;
            *place = Some(function);
            bus.locate(slot);
            Ok(slot)
        })
    }

    /// Removes a function, even while vCPUs run. From then on its slot reads all-ones.
    pub fn remove(&self, slot: u8) -> Option<Arc<dyn PciFunction>> {
        self.change(|bus| {
            let removed = bus.slots.get_mut(usize::from(slot))?.take();
            bus.locate(slot);
            removed
        })
    }

    /// Reads ECAM space at `offset` from its start.
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        for (offset, part) in config::aligned_parts(offset, data.len()) {
            if let (Some((slot, register)), Some(part)) = (ecam_target(offset), data.get_mut(part)) {
                self.config_read(slot, register, part);
            }
        }
    }

    /// Writes ECAM space.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        for (offset, part) in config::aligned_parts(offset, data.len()) {
            if let (Some((slot, register)), Some(part)) = (ecam_target(offset), data.get(part)) {
                self.config_write(slot, register, part);
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
        } else if let Some((slot, register)) = self.port_target(port, data.len()) {
            for (offset, part) in config::aligned_parts(register.into(), data.len()) {
                if let (Ok(offset), Some(part)) = (u16::try_from(offset), data.get_mut(part)) {
                    self.config_read(slot, offset, part);
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
        } else if let Some((slot, register)) = self.port_target(port, data.len()) {
            for (offset, part) in config::aligned_parts(register.into(), data.len()) {
                if let (Ok(offset), Some(part)) = (u16::try_from(offset), data.get(part)) {
                    self.config_write(slot, offset, part);
                }
            }
        }
    }

    /// Reads memory that a function's BAR decodes; false (and all-ones) if none does.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        self.dispatch(gpa, |function| function.mmio_read(gpa, data))
    }

    /// Writes memory that a function's BAR decodes; false if none does.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        self.dispatch(gpa, |function| function.mmio_write(gpa, data))
    }

    /// Lets the function that decodes `gpa` make an access, which returns whether the function does decode it.
    fn dispatch(&self, gpa: u64, mut access: impl FnMut(&dyn PciFunction) -> bool) -> bool {
        let bus = self.snapshot();
        let Some(slot) = bus.addresses.find(gpa) else { return false };
        if bus.function(slot).is_some_and(|function| access(function.as_ref())) {
            return true;
        }
        // The function has stopped decoding there, or the access leaves its BAR: another one may have it.
        let found = bus.slots.iter().flatten().any(|function| access(function.as_ref()));
        self.relocate(slot);
        found
    }

    fn config_read(&self, slot: u8, register: u16, data: &mut [u8]) {
        if let Some(function) = self.snapshot().function(slot) {
            function.config_read(register, data);
        }
    }

    fn config_write(&self, slot: u8, register: u16, data: &[u8]) {
        if let Some(function) = self.snapshot().function(slot) {
            function.config_write(register, data);
        }
        self.relocate(slot);
    }

    /// Follows a function whose BARs may decode other addresses now.
    fn relocate(&self, slot: u8) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let bus = self.snapshot();
        let decoded = bus.decoded(slot);
        if bus.addresses.of(slot) != decoded {
            let mut copy = Snapshot::clone(&bus);
            copy.addresses.set(slot, decoded);
            self.replace(copy);
        }
    }

    fn port_target(&self, port: u16, len: usize) -> Option<(u8, u16)> {
        let byte = port.checked_sub(DATA_PORT).filter(|byte| usize::from(*byte) + len <= 4)?;
        let address = self.address.load(Ordering::Acquire);
        let [register, devfn, bus, _] = address.to_le_bytes();
        if address & ADDRESS_ENABLE == 0 || bus != 0 {
            return None;
        }
        Some((slot_of(devfn)?, u16::from(register & 0xfc) + byte))
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace(&self, snapshot: Snapshot) {
        *self.snapshot.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(snapshot);
    }

    fn change<T>(&self, change: impl FnOnce(&mut Snapshot) -> T) -> T {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut copy = Snapshot::clone(&self.snapshot());
        let result = change(&mut copy);
        self.replace(copy);
        result
    }
}

/// The slot and register of an ECAM offset: bus in bits 20 and up, device in 15 to 19, function in 12 to 14, register
/// below.
fn ecam_target(offset: u64) -> Option<(u8, u16)> {
    let register = u16::try_from(offset & 0xfff).ok()?;
    let devfn = u8::try_from(offset >> 12).ok()?;
    Some((slot_of(devfn)?, register))
}

/// The slot at device and function number `devfn` (5 and 3 bits). There is function 0 only.
fn slot_of(devfn: u8) -> Option<u8> {
    (devfn & 7 == 0).then_some(devfn >> 3)
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
