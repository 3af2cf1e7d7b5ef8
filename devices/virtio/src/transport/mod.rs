// SPDX-License-Identifier: Apache-2.0

//! Virtio over PCI (the specification, 4.1), modern only, with MSI-X.
//!
//! One 64-bit BAR of 16 KiB:
//!
//! | offset | |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x0100 | ISR status |
//! | 0x0200 | device configuration, 512 bytes |
//! | 0x1000 | doorbells, 4 bytes for each queue |
//! | 0x2000 | MSI-X table |
//! | 0x3000 | MSI-X pending bits |
//!
//! A doorbell is an ioeventfd while the driver is ready: the vCPU does not leave the kernel. There is
//! no INTx: a driver without MSI-X gets no interrupt, and must look at its rings by itself.

mod common;
mod space;
#[cfg(test)]
mod tests;

use std::{
    io,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use devices::{
    device::{Device, ResetError, Space},
    doorbell::{Doorbell, Doorbells, Ring},
    interrupt::MsiRouter,
    io_thread::{IoEvent, IoSource, IoThread},
    pci::{
        DecodedBars, PciFunction,
        bar::{BarError, BarLayout, Bars},
        config,
        msix::Msix,
    },
};

use vm_memory::VolatileSlice;

use self::{common::Common, space::ConfigSpace};
use crate::{
    GuestMemory,
    disk::SECTOR,
    engine::{Configuration, Engine, Identity},
    worker::{Shared, Worker},
};

/// The BAR.
pub const BAR: usize = 0;
/// Its length in bytes.
pub const BAR_SIZE: u64 = 0x4000;
const ISR: u64 = 0x100;
const DEVICE: u64 = 0x200;
const DEVICE_END: u64 = 0x400;
const NOTIFY: u64 = 0x1000;
/// Bytes between two doorbells.
const NOTIFY_STEP: u64 = 4;
const TABLE: u64 = 0x2000;
const PENDING: u64 = 0x3000;
/// The most queues of a device.
pub const MAX_QUEUES: usize = 16;

/// The parts of a machine that a device is connected to.
#[derive(Clone)]
pub struct Connections {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// Its interrupts.
    pub router: Arc<dyn MsiRouter>,
    /// Its doorbells.
    pub doorbells: Arc<dyn Doorbells>,
    /// The guest-physical ranges in which its BAR may be.
    pub windows: Arc<[Range<u64>]>,
}

/// Errors of making a device.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Too many eventfds, mostly.
    #[error("Cannot make the eventfds of device {name}")]
    Events {
        /// The device.
        name: String,
        /// The cause.
        source: io::Error,
    },
    /// A bug: the BAR is fixed.
    #[error("The BAR of a virtio device is invalid; this is a bug of Portcullis")]
    Bar(#[from] BarError),
}

/// A virtio device as a PCI function of the machine.
pub struct VirtioFunction {
    identity: Identity,
    configuration: Arc<Configuration>,
    connections: Connections,
    shared: Arc<Shared>,
    /// Locked by vCPUs for one access.
    registers: Mutex<Registers>,
    /// Locked by the worker's thread during its work; by the machine while that thread is parked.
    worker: Mutex<Worker>,
}

/// The registers that vCPUs see.
struct Registers {
    space: ConfigSpace,
    bars: Bars,
    msix: Msix,
    common: Common,
    /// The guest-physical address of the first doorbell that is connected.
    connected: Option<u64>,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VirtioFunction {
    /// Makes a device. [`Self::assign`] gives it an address.
    ///
    /// # Errors
    /// See [`TransportError`].
    pub fn new(
        identity: Identity,
        configuration: Arc<Configuration>,
        engine: Box<dyn Engine>,
        connections: Connections,
    ) -> Result<Self, TransportError> {
        let failed = |source| TransportError::Events { name: identity.name.clone(), source };
        let queues = identity.queues.len().min(MAX_QUEUES);
        let vectors = u16::try_from(queues + 1).unwrap_or(1);
        let msix = Msix::new(vectors, Arc::clone(&connections.router)).map_err(failed)?;
        let triggers =
            msix.triggers().iter().map(|trigger| trigger.try_clone()).collect::<io::Result<Vec<_>>>();
        let events = (0..=queues).map(|_| IoEvent::new()).collect::<io::Result<Vec<_>>>().map_err(failed)?;
        let common = Common::new(&identity, triggers.map_err(failed)?.into());
        let shared = Arc::new(Shared::new(&identity.name, events, common.on_change()));
        let worker = Worker::new(Arc::clone(&shared), engine, Arc::clone(&configuration));
        let layout = BarLayout { size: BAR_SIZE, is_64bit: true, prefetchable: false };
        let bars = Bars::new([Some(layout), None, None, None, None, None], Arc::clone(&connections.windows))?;
        let space = ConfigSpace::new(&identity, msix.control());
        let registers = Mutex::new(Registers { space, bars, msix, common, connected: None });
        let worker = Mutex::new(worker);
        Ok(Self { identity, configuration, connections, shared, registers, worker })
    }

    /// The layout of the BAR, for its allocation.
    #[must_use]
    pub fn bar(&self) -> BarLayout {
        BarLayout { size: BAR_SIZE, is_64bit: true, prefetchable: false }
    }

    /// Gives the BAR its address at power-on.
    ///
    /// # Errors
    /// [`BarError`] for an address at which the BAR could not decode.
    pub fn assign(&self, address: u64) -> Result<(), BarError> {
        lock(&self.registers).bars.assign(BAR, address)
    }

    /// The size of the disk behind the device in bytes. None for a device without one.
    #[must_use]
    pub fn disk_size(&self) -> Option<u64> {
        lock(&self.worker).disk().map(|disk| disk.size())
    }

    /// Reads the disk behind the device, with all writes of the guest that are complete. `offset` and the length of `bytes`
    /// are whole sectors inside of the disk. The caller has parked the device's thread. Nothing is written to the host's
    /// file. The disk's limits and counters are for requests of the guest only.
    ///
    /// # Errors
    /// `Unsupported` for a device without a disk, `InvalidInput` for another range, and those of the host's file.
    pub fn read_disk(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut worker = lock(&self.worker);
        let disk = worker.disk().ok_or(io::ErrorKind::Unsupported)?;
        let len = bytes.len() as u64;
        let inside = offset.checked_add(len).is_some_and(|end| end <= disk.size());
        if !inside || !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        disk.read_without_writes(offset, &[VolatileSlice::from(bytes)])
    }

    fn bar_read(&self, registers: &mut Registers, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            0..ISR => registers.common.read(offset, data, &self.shared, &self.configuration),
            ISR => {
                if let Some(first) = data.first_mut() {
                    *first = u8::try_from(self.shared.isr.swap(0, Ordering::AcqRel)).unwrap_or(0);
                }
            }
            DEVICE..DEVICE_END => self.configuration.read(offset - DEVICE, data),
            TABLE..PENDING => registers.msix.table_read(offset - TABLE, data),
            PENDING..BAR_SIZE => registers.msix.pba_read(offset - PENDING, data),
            _ => {}
        }
    }

    fn bar_write(&self, registers: &mut Registers, offset: u64, data: &[u8]) {
        match offset {
            0..ISR => {
                registers.common.write(offset, data, &self.shared, &self.connections.memory);
                self.follow_doorbells(registers);
            }
            // A doorbell that is no ioeventfd at this moment.
            NOTIFY..TABLE => {
                if let Ok(queue) = usize::try_from((offset - NOTIFY) / NOTIFY_STEP) {
                    self.shared.ring(queue);
                }
            }
            TABLE..PENDING => registers.msix.table_write(offset - TABLE, data),
            _ => {}
        }
    }

    /// Connects the doorbells at the BAR's address while the driver is ready.
    fn follow_doorbells(&self, registers: &mut Registers) {
        let base = registers.bars.decoded(BAR).filter(|_| registers.common.runs());
        let wanted = base.map(|range| range.start.saturating_add(NOTIFY));
        if wanted == registers.connected {
            return;
        }
        if let Some(base) = registers.connected.take() {
            for (doorbell, event) in self.doorbells(base) {
                // Fails only for a doorbell that was not connected.
                let _ = self.connections.doorbells.disconnect(doorbell, event.eventfd());
            }
        }
        if let Some(base) = wanted {
            for (doorbell, event) in self.doorbells(base) {
                if let Err(error) = self.connections.doorbells.connect(doorbell, event.eventfd()) {
                    // The guest's writes reach `bar_write` then.
                    tracing::debug!(device = self.identity.name, %error, "A doorbell has no ioeventfd");
                }
            }
            registers.connected = Some(base);
        }
    }

    fn doorbells(&self, base: u64) -> impl Iterator<Item = (Doorbell, &IoEvent)> {
        let addresses = (0..).map(move |queue: u64| base.saturating_add(queue.saturating_mul(NOTIFY_STEP)));
        let at = |address| Doorbell { space: Space::Memory, address, ring: Ring::Any };
        addresses.map(at).zip(self.shared.events.iter().skip(1))
    }

    /// Follows the command register.
    fn follow_command(&self, registers: &mut Registers) {
        let command = registers.space.command();
        registers.bars.set_memory_enabled(command & config::COMMAND_MEMORY != 0);
        let master = command & config::COMMAND_BUS_MASTER != 0;
        if master && !self.shared.bus_master.swap(master, Ordering::AcqRel) {
            self.shared.ring_all();
        }
        self.shared.bus_master.store(master, Ordering::Release);
    }

    /// An access through the window in configuration space (the specification, 4.1.4.9).
    fn window_access(&self, registers: &mut Registers, access: impl FnOnce(&mut Registers, u64, usize)) {
        if let Some((offset, len)) = registers.space.window()
            && offset.checked_add(len as u64).is_some_and(|end| end <= BAR_SIZE)
        {
            access(registers, offset, len);
        }
    }
}

impl PciFunction for VirtioFunction {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut registers = lock(&self.registers);
        if (config::BAR0..config::BARS_END).contains(&offset) {
            return registers.bars.read(offset - config::BAR0, data);
        }
        if space::is_window_data(offset) {
            data.fill(0);
            return self.window_access(&mut registers, |registers, at, len| {
                if let Some(data) = data.get_mut(..len) {
                    self.bar_read(registers, at, data);
                }
            });
        }
        let control = registers.msix.control();
        registers.space.read(offset, data, control);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut registers = lock(&self.registers);
        let registers = &mut *registers;
        if (config::BAR0..config::BARS_END).contains(&offset) {
            registers.bars.write(offset - config::BAR0, data);
        } else if space::is_window_data(offset) {
            self.window_access(registers, |registers, at, len| {
                if let Some(data) = data.get(..len) {
                    self.bar_write(registers, at, data);
                }
            });
        } else {
            if let Some(control) = registers.space.write(offset, data, registers.msix.control()) {
                registers.msix.write_control(control);
            }
            self.follow_command(registers);
        }
        self.follow_doorbells(registers);
    }

    fn decoded(&self) -> DecodedBars {
        let mut decoded = DecodedBars::default();
        if let Some(first) = decoded.first_mut() {
            *first = lock(&self.registers).bars.decoded(BAR);
        }
        decoded
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let mut registers = lock(&self.registers);
        let Some((_, offset)) = registers.bars.decode(gpa, data.len()) else { return false };
        self.bar_read(&mut registers, offset, data);
        true
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        let mut registers = lock(&self.registers);
        let Some((_, offset)) = registers.bars.decode(gpa, data.len()) else { return false };
        self.bar_write(&mut registers, offset, data);
        true
    }
}

impl Device for VirtioFunction {
    fn io_threads(self: Arc<Self>) -> Vec<IoThread> {
        let signals = self.shared.events.iter().cloned().map(IoSource::Event);
        let sources = signals.chain(lock(&self.worker).sources()).collect();
        let (name, calls) = (self.identity.name.clone(), self.identity.calls);
        let same = Arc::clone(&self);
        let work = Box::new(move |event| lock(&self.worker).work(event));
        // Here, because no other thread may write a disk.
        let end = Box::new(move || lock(&same.worker).close());
        vec![IoThread { name, calls, sources, work, end }]
    }

    fn resume(&self) {
        self.shared.resume();
    }

    fn reset(&self) -> Result<(), ResetError> {
        lock(&self.worker).power_on();
        let mut registers = lock(&self.registers);
        let registers = &mut *registers;
        registers.common.reset();
        registers.msix.reset();
        registers.bars.power_on();
        registers.space = ConfigSpace::new(&self.identity, registers.msix.control());
        self.follow_doorbells(registers);
        Ok(())
    }

    fn shutdown(&self) {
        lock(&self.worker).power_on();
        let mut registers = lock(&self.registers);
        registers.common.reset();
        registers.msix.reset();
        self.follow_doorbells(&mut registers);
    }
}
