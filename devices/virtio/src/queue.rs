// SPDX-License-Identifier: Apache-2.0

//! Requests from a split virtqueue (the specification, 2.7), checked.
//!
//! The guest writes the rings. A ring that no driver makes ([`QueueError`]) ends the device until
//! its reset. A request has a bounded count of buffers, all of them in guest memory; buffers to
//! read come before buffers to write.

use std::{
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
};

use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;

/// The vector of a queue without an interrupt (the specification, 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// A ring or a request that no driver makes.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The ring is inconsistent, or not in guest memory.
    #[error("The driver's ring is inconsistent: {0}")]
    Ring(virtio_queue::Error),
    /// A chain has more buffers than the queue can have entries.
    #[error("A request has more than {0} buffers")]
    TooLong(u16),
    /// A buffer is not in guest memory.
    #[error("A buffer of {len} bytes at {address:#x} is not in guest memory")]
    Outside {
        /// Its guest-physical address.
        address: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A buffer to read comes after one to write.
    #[error("A request has a buffer to read behind one to write")]
    Order,
}

impl From<virtio_queue::Error> for QueueError {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Ring(error)
    }
}

/// The buffers of a request. Guest memory may change at any time: read once, then check.
#[derive(Debug)]
pub struct Request<'a> {
    head: u16,
    /// Buffers with the driver's data.
    pub readable: Vec<VolatileSlice<'a>>,
    /// Buffers for the device's data.
    pub writable: Vec<VolatileSlice<'a>>,
}

/// The bytes of buffers.
#[must_use]
pub fn length(buffers: &[VolatileSlice<'_>]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).fold(0, u64::saturating_add)
}

/// The part of `buffers` from byte `offset` on, `len` bytes at most.
#[must_use]
pub fn part<'a>(buffers: &[VolatileSlice<'a>], offset: u64, len: u64) -> Vec<VolatileSlice<'a>> {
    let (mut skip, mut left) = (offset, len);
    let mut part = Vec::new();
    for buffer in buffers {
        let have = buffer.len() as u64;
        if skip >= have {
            skip -= have;
            continue;
        }
        let take = left.min(have - skip);
        if take == 0 {
            break;
        }
        let (Ok(from), Ok(count)) = (usize::try_from(skip), usize::try_from(take)) else { break };
        let Ok(slice) = buffer.subslice(from, count) else { break };
        part.push(slice);
        skip = 0;
        left -= take;
    }
    part
}

/// Copies bytes out of the start of `buffers`. None if they are shorter than `N` bytes.
#[must_use]
pub fn read_array<const N: usize>(buffers: &[VolatileSlice<'_>]) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let mut done = 0;
    for buffer in buffers {
        let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) else { break };
        done += buffer.copy_to(rest);
    }
    (done == N).then_some(bytes)
}

/// Copies `bytes` to the start of `buffers`. Returns the count of bytes that fit.
pub fn write_bytes(buffers: &[VolatileSlice<'_>], bytes: &[u8]) -> usize {
    let mut done = 0;
    for buffer in buffers {
        let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) else { break };
        let count = rest.len().min(buffer.len());
        buffer.copy_from(rest);
        done += count;
    }
    done
}

/// The registers of a queue (the specification, 4.1.4.3), as the driver has written them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// Entries.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Of the available ring.
    pub available: u64,
    /// Of the used ring.
    pub used: u64,
}

/// The interrupt of a queue: the eventfds of all vectors, and the number of the one in use.
#[derive(Clone)]
pub(crate) struct Interrupt {
    pub(crate) vectors: Arc<[EventFd]>,
    pub(crate) vector: Arc<AtomicU16>,
    pub(crate) isr: Arc<AtomicU16>,
}

/// Bit of the ISR status: a queue (the specification, 4.1.4.5).
pub(crate) const ISR_QUEUE: u16 = 1;
/// Bit of the ISR status: the configuration.
pub(crate) const ISR_CONFIG: u16 = 2;

impl Interrupt {
    pub(crate) fn raise(&self, cause: u16) {
        self.isr.fetch_or(cause, Ordering::AcqRel);
        let vector = self.vector.load(Ordering::Acquire);
        if let Some(trigger) = self.vectors.get(usize::from(vector)) {
            // Fails only if the counter is full: then the interrupt is pending already.
            let _ = trigger.write(1);
        }
    }
}

/// A queue in use. It belongs to the worker.
pub struct ActiveQueue {
    queue: Queue,
    memory: Arc<GuestMemory>,
    interrupt: Interrupt,
}

impl ActiveQueue {
    /// A queue at the driver's addresses.
    ///
    /// # Errors
    /// [`QueueError::Ring`] for a size that is no power of two up to `most`, addresses that are not
    /// aligned, and rings outside of guest memory.
    pub(crate) fn new(
        most: u16,
        registers: Registers,
        event_index: bool,
        memory: Arc<GuestMemory>,
        interrupt: Interrupt,
    ) -> Result<Self, QueueError> {
        let mut queue = Queue::new(most)?;
        queue.try_set_size(registers.size)?;
        queue.try_set_desc_table_address(GuestAddress(registers.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(registers.available))?;
        queue.try_set_used_ring_address(GuestAddress(registers.used))?;
        queue.set_event_idx(event_index);
        queue.set_ready(true);
        // The rings' lengths include the two event indices.
        let entries = u64::from(registers.size);
        let rings = [
            (registers.descriptors, 16 * entries),
            (registers.available, 6 + 2 * entries),
            (registers.used, 6 + 8 * entries),
        ];
        for (address, len) in rings {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            if !memory.check_range(GuestAddress(address), len, Permissions::ReadWrite) {
                return Err(QueueError::Ring(virtio_queue::Error::FindMemoryRegion));
            }
        }
        Ok(Self { queue, memory, interrupt })
    }

    /// Takes the next request. None if there is none.
    ///
    /// # Errors
    /// See [`QueueError`]: the device needs a reset.
    pub fn next<'a>(&mut self, memory: &'a GuestMemory) -> Result<Option<Request<'a>>, QueueError> {
        // Of an indirect table, too: a driver whose ring is shorter may not count on that.
        let most = self.queue.max_size();
        let Some(chain) = self.queue.iter(memory)?.next() else { return Ok(None) };
        let head = chain.head_index();
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        for (count, descriptor) in (0..).zip(chain) {
            if count >= most {
                return Err(QueueError::TooLong(most));
            }
            if descriptor.len() == 0 {
                continue;
            }
            let (address, len) = (descriptor.addr(), descriptor.len());
            let outside = || QueueError::Outside { address: address.0, len };
            let side = if descriptor.is_write_only() {
                &mut writable
            } else if writable.is_empty() {
                &mut readable
            } else {
                return Err(QueueError::Order);
            };
            let size = usize::try_from(len).map_err(|_| outside())?;
            for slice in memory.get_slices(address, size, Permissions::ReadWrite).map_err(|_| outside())? {
                side.push(slice.map_err(|_| outside())?);
            }
        }
        Ok(Some(Request { head, readable, writable }))
    }

    /// Gives a request back, with the count of bytes written to its buffers from the first on, and
    /// raises the interrupt if the driver wants it now.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn complete(&mut self, request: &Request<'_>, written: u32) -> Result<(), QueueError> {
        let memory = self.memory.deref();
        self.queue.add_used(memory, request.head, written)?;
        if self.queue.needs_notification(memory)? {
            self.interrupt.raise(ISR_QUEUE);
        }
        Ok(())
    }

    /// Puts the request that [`Self::next`] has returned last back into the ring.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Lets the driver skip its doorbell: the worker looks at the ring by itself.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn doze(&mut self) -> Result<(), QueueError> {
        Ok(self.queue.disable_notification(self.memory.deref())?)
    }

    /// Asks for the doorbell again. Returns whether requests have come meanwhile.
    ///
    /// # Errors
    /// [`QueueError::Ring`].
    pub fn watch(&mut self) -> Result<bool, QueueError> {
        Ok(self.queue.enable_notification(self.memory.deref())?)
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> Arc<GuestMemory> {
        Arc::clone(&self.memory)
    }
}

/// Writes guest memory, for tests.
#[cfg(test)]
pub(crate) fn fill(memory: &GuestMemory, address: u64, bytes: &[u8]) {
    use vm_memory::Bytes as _;
    memory.write_slice(bytes, GuestAddress(address)).unwrap();
}
