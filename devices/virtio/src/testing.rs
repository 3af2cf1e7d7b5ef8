// SPDX-License-Identifier: Apache-2.0

//! A machine of one device and its driver, for tests and fuzzing: the driver writes registers and
//! rings, and [`Driver::pump`] does the work of the device's thread.
#![cfg_attr(not(test), allow(dead_code, reason = "tests use all of it, fuzzing a part"))]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::single_range_in_vec_init,
    reason = "a broken law is to end the test or the fuzzer"
)]

use std::{
    io,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use devices::{
    device::Device as _,
    doorbell::{Doorbell, Doorbells},
    interrupt::{MsiMessage, MsiRouter, RouteId},
    io_thread::{IoSource, IoThread},
    pci::PciFunction as _,
};
use vm_memory::{Bytes as _, GuestAddress, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    GuestMemory,
    disk::Disk,
    engine::{Configuration, Engine, Identity},
    queue::{length, write_bytes},
    transport::{Connections, VirtioFunction},
};

/// The state of a [`MemoryDisk`].
#[derive(Default)]
pub(crate) struct Medium {
    pub(crate) bytes: Vec<u8>,
    pub(crate) flushes: u32,
    pub(crate) discarded: Vec<(u64, u64)>,
    pub(crate) zeroed: Vec<(u64, u64, bool)>,
    pub(crate) fail: Option<io::ErrorKind>,
    /// The next step of a growth is not the last one.
    pub(crate) more_steps: bool,
}

/// A disk in memory, whose tests look into it. It asserts that no request leaves it.
#[derive(Clone, Default)]
pub(crate) struct MemoryDisk(Arc<Mutex<Medium>>);

impl MemoryDisk {
    pub(crate) fn of(size: usize) -> Self {
        let disk = Self::default();
        disk.medium().bytes = vec![0; size];
        disk
    }

    pub(crate) fn medium(&self) -> MutexGuard<'_, Medium> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, offset: u64, len: u64) -> io::Result<Range<usize>> {
        if let Some(kind) = self.medium().fail {
            return Err(kind.into());
        }
        let from = usize::try_from(offset).unwrap();
        let range = from..from + usize::try_from(len).unwrap();
        assert!(range.end <= self.medium().bytes.len(), "a range outside of the disk reached it: {range:?}");
        Ok(range)
    }
}

impl Disk for MemoryDisk {
    fn size(&self) -> u64 {
        self.medium().bytes.len() as u64
    }

    fn read(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let range = self.work(offset, length(buffers))?;
        write_bytes(buffers, &self.medium().bytes[range]);
        Ok(())
    }

    fn write(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let range = self.work(offset, length(buffers))?;
        let mut at = range.start;
        for buffer in buffers {
            at += buffer.copy_to(&mut self.medium().bytes[at..at + buffer.len()]);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.work(0, 0)?;
        self.medium().flushes += 1;
        Ok(())
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.work(offset, len)?;
        self.medium().discarded.push((offset, len));
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, may_discard: bool) -> io::Result<()> {
        let range = self.work(offset, len)?;
        self.medium().bytes[range].fill(0);
        self.medium().zeroed.push((offset, len, may_discard));
        Ok(())
    }

    fn grow(&mut self, size: u64) -> io::Result<bool> {
        self.work(0, 0)?;
        if std::mem::replace(&mut self.medium().more_steps, false) {
            return Ok(false);
        }
        self.medium().bytes.resize(usize::try_from(size).unwrap(), 0);
        Ok(true)
    }
}

/// The address of the BAR.
pub(crate) const BASE: u64 = 0x4000_0000;
/// Bytes of guest memory.
pub(crate) const MEMORY: u64 = 1 << 20;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x3000;
const USED: u64 = 0x4000;
/// The distance between the rings of two queues.
const QUEUE_STEP: u64 = 0x4000;

/// Records doorbells and interrupt routes.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) doorbells: Mutex<Vec<u64>>,
    pub(crate) connected: Mutex<Vec<MsiMessage>>,
}

impl Doorbells for Recorder {
    fn connect(&self, doorbell: Doorbell, _: &EventFd) -> io::Result<()> {
        self.doorbells.lock().unwrap().push(doorbell.address);
        Ok(())
    }

    fn disconnect(&self, doorbell: Doorbell, _: &EventFd) -> io::Result<()> {
        let mut all = self.doorbells.lock().unwrap();
        let at = all.iter().position(|address| *address == doorbell.address);
        all.remove(at.ok_or(io::ErrorKind::NotFound)?);
        Ok(())
    }
}

impl MsiRouter for Recorder {
    fn allocate(&self) -> io::Result<RouteId> {
        Ok(RouteId(0))
    }

    fn connect(&self, _: RouteId, _: &EventFd, message: MsiMessage) -> io::Result<()> {
        self.connected.lock().unwrap().push(message);
        Ok(())
    }

    fn disconnect(&self, _: RouteId, _: &EventFd) -> io::Result<()> {
        self.connected.lock().unwrap().pop();
        Ok(())
    }

    fn release(&self, _: RouteId) {}
}

/// The address of a queue's used ring.
pub(crate) fn used(queue: u16) -> u64 {
    USED + u64::from(queue) * QUEUE_STEP
}

/// The address of a queue's available ring.
pub(crate) fn available(queue: u16) -> u64 {
    AVAILABLE + u64::from(queue) * QUEUE_STEP
}

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}

/// A buffer of a request: address, length, and whether the device writes it.
pub(crate) type Buffer = (u64, u32, bool);

/// A driver, with its machine.
pub(crate) struct Driver {
    pub(crate) function: Arc<VirtioFunction>,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) recorder: Arc<Recorder>,
    thread: IoThread,
    sent: Vec<u16>,
    seen: Vec<u16>,
}

impl Driver {
    /// A device at power-on, with its BAR assigned.
    pub(crate) fn new(
        identity: Identity,
        configuration: Arc<Configuration>,
        engine: Box<dyn Engine>,
    ) -> Self {
        let memory = Arc::new(
            GuestMemory::from_ranges(&[(GuestAddress(0), usize::try_from(MEMORY).unwrap())]).unwrap(),
        );
        let recorder = Arc::new(Recorder::default());
        let connections = Connections {
            memory: Arc::clone(&memory),
            router: recorder.clone(),
            doorbells: recorder.clone(),
            windows: Arc::new([BASE..BASE + (1 << 20)]),
        };
        let queues = identity.queues.len();
        let function = Arc::new(VirtioFunction::new(identity, configuration, engine, connections).unwrap());
        function.assign(BASE).unwrap();
        let thread = Arc::clone(&function).io_threads().remove(0);
        Self { function, memory, recorder, thread, sent: vec![0; queues], seen: vec![0; queues] }
    }

    /// Turns on memory and bus mastering.
    pub(crate) fn enable(&self) {
        self.function.config_write(4, &6_u16.to_le_bytes());
    }

    /// Puts the BAR back to its address.
    pub(crate) fn place_bar(&self) {
        self.function.config_write(0x10, &u32::try_from(BASE).unwrap().to_le_bytes());
        self.function.config_write(0x14, &[0; 4]);
        self.enable();
    }

    pub(crate) fn config<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        self.function.config_read(offset, &mut data);
        data
    }

    pub(crate) fn get<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        assert!(self.function.mmio_read(BASE + offset, &mut data));
        data
    }

    pub(crate) fn set(&self, offset: u64, data: &[u8]) {
        assert!(self.function.mmio_write(BASE + offset, data));
    }

    pub(crate) fn status(&self) -> u8 {
        self.get::<1>(0x14)[0]
    }

    pub(crate) fn set_status(&self, status: u8) {
        self.set(0x14, &[status]);
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.set(0, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.get(4)))
        };
        half(0) | half(1) << 32
    }

    /// Accepts `features` and stops before the queues.
    pub(crate) fn negotiate(&self, features: u64) {
        self.enable();
        self.set_status(1);
        self.set_status(3);
        for (select, half) in [(0_u32, features & 0xffff_ffff), (1, features >> 32)] {
            self.set(8, &select.to_le_bytes());
            self.set(0xc, &u32::try_from(half).unwrap().to_le_bytes());
        }
        self.set_status(3 | 8);
        assert_eq!(self.status(), 3 | 8);
    }

    /// Places queue `index` and gives it vector `index + 1`.
    pub(crate) fn place(&self, index: u16, size: u16) {
        let at = u64::from(index) * QUEUE_STEP;
        self.set(0x16, &index.to_le_bytes());
        self.set(0x18, &size.to_le_bytes());
        self.set(0x1a, &(index + 1).to_le_bytes());
        for (register, ring) in [(0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, USED)] {
            self.set(register, &(ring + at).to_le_bytes());
        }
        self.set(0x1c, &[1, 0]);
    }

    /// Negotiates `features`, places all queues with `size` entries, and starts.
    pub(crate) fn start(&mut self, features: u64, size: u16) {
        self.negotiate(features);
        for index in 0..self.sent.len() {
            self.place(u16::try_from(index).unwrap(), size);
            let at = index as u64 * QUEUE_STEP;
            self.memory.write_slice(&[0; 0x3000], GuestAddress(AVAILABLE + at)).unwrap();
            (self.sent[index], self.seen[index]) = (0, 0);
        }
        self.set_status(3 | 8 | 4);
        self.pump();
    }

    /// Makes a request of queue 0 available, at descriptor 0, and rings the doorbell.
    pub(crate) fn send(&mut self, buffers: &[Buffer]) {
        self.send_on(0, 0, buffers);
    }

    /// Makes a request of a queue available, at descriptor `head`, and rings the doorbell.
    pub(crate) fn send_on(&mut self, queue: u16, head: u64, buffers: &[Buffer]) {
        let ring = u64::from(queue) * QUEUE_STEP;
        for (index, (address, len, writable)) in (head..).zip(buffers) {
            let last = index + 1 == head + buffers.len() as u64;
            let flags = u16::from(!last) | u16::from(*writable) << 1;
            let next = u16::try_from(index + 1).unwrap();
            self.write(DESCRIPTORS + ring + 16 * index, &descriptor(*address, *len, flags, next));
        }
        self.offer_on(queue, u16::try_from(head).unwrap());
    }

    pub(crate) fn descriptor(&self, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        self.write(DESCRIPTORS + 16 * index, &descriptor(address, len, flags, next));
    }

    /// The length of the memory that has the rings of all queues.
    pub(crate) fn rings_end(&self) -> u64 {
        QUEUE_STEP * self.sent.len() as u64
    }

    /// Makes the request at descriptor `head` of queue 0 available.
    pub(crate) fn offer(&mut self, head: u16) {
        self.offer_on(0, head);
    }

    fn offer_on(&mut self, queue: u16, head: u16) {
        let (number, ring) = (usize::from(queue), AVAILABLE + u64::from(queue) * QUEUE_STEP);
        let sent = self.sent[number];
        self.memory.write_obj(head, GuestAddress(ring + 4 + 2 * u64::from(sent % 16))).unwrap();
        self.sent[number] = sent.wrapping_add(1);
        self.memory.write_obj(self.sent[number], GuestAddress(ring + 2)).unwrap();
        self.set(0x1000 + 4 * u64::from(queue), &queue.to_le_bytes());
    }

    /// Serves all events, and returns the used entry if the device has returned a request.
    pub(crate) fn pump(&mut self) {
        loop {
            let ready = self.thread.sources.iter().position(IoSource::take);
            let Some(index) = ready else { return };
            (self.thread.work)(index);
        }
    }

    /// Serves one event.
    pub(crate) fn pump_once(&mut self) {
        if let Some(index) = self.thread.sources.iter().position(IoSource::take) {
            (self.thread.work)(index);
        }
    }

    /// Drops pending events, as the machine does before a reset.
    pub(crate) fn forget(&mut self) {
        for source in &self.thread.sources {
            source.take();
        }
    }

    /// The next returned request of queue 0: its head and the count of bytes written.
    pub(crate) fn returned(&mut self) -> Option<(u32, u32)> {
        self.returned_on(0)
    }

    /// The same of any queue.
    pub(crate) fn returned_on(&mut self, queue: u16) -> Option<(u32, u32)> {
        self.pump();
        let (number, ring) = (usize::from(queue), used(queue));
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        if index == self.seen[number] {
            return None;
        }
        let at = ring + 4 + 8 * u64::from(self.seen[number] % 16);
        self.seen[number] = self.seen[number].wrapping_add(1);
        let read = |at| self.memory.read_obj::<u32>(GuestAddress(at)).unwrap();
        Some((read(at), read(at + 4)))
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Addresses of the rings of queue 0, for tests that break them: descriptors, available, used.
    pub(crate) fn rings() -> [u64; 3] {
        [DESCRIPTORS, AVAILABLE, USED]
    }
}
