// SPDX-License-Identifier: Apache-2.0

//! The contract between a device and its worker.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use devices::io_thread::{Calls, IoSource};

use crate::{
    disk::Disk,
    queue::{ActiveQueue, QueueError, Request},
};

/// The longest time for requests of one queue in a row. Then the machine may park the thread.
const TURN: Duration = Duration::from_millis(50);
/// The most requests of one queue in a row.
const MOST: u32 = 256;

/// The facts of a device that its registers show.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The device's name, for logs and its thread: the kernel shows 15 bytes of it.
    pub name: String,
    /// The device id (the specification, 5).
    pub device: u8,
    /// The PCI class code in bits 31 to 8.
    pub class: u32,
    /// Offered features, but for VERSION_1.
    pub features: u64,
    /// The most entries of each queue, powers of two up to 32768. 16 queues at most.
    pub queues: Vec<u16>,
    /// The system calls of the engine.
    pub calls: Calls,
}

/// A device's configuration (the specification, 2.5): bytes, and a generation that changes with
/// them. The driver reads it; the engine, or the machine, changes it.
#[derive(Debug, Default)]
pub struct Configuration(Mutex<(Vec<u8>, u8)>);

impl Configuration {
    /// A configuration of these bytes, 512 at most.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self(Mutex::new((bytes, 0))))
    }

    fn lock(&self) -> MutexGuard<'_, (Vec<u8>, u8)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads bytes from `offset` on. Those behind the end are 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let configuration = self.lock();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = configuration.0.get(from..).unwrap_or_default();
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Replaces bytes from `offset` on. The caller notifies the driver.
    pub fn change(&self, offset: usize, bytes: &[u8]) {
        let mut configuration = self.lock();
        for (to, from) in configuration.0.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
        configuration.1 = configuration.1.wrapping_add(1);
    }

    /// The generation.
    #[must_use]
    pub fn generation(&self) -> u8 {
        self.lock().1
    }
}

/// A device without transport and rings. All calls come from the device's I/O thread, and may
/// block.
pub trait Engine: Send {
    /// Sources of work beside the doorbells, each with the index of the queue that [`Self::serve`]
    /// is called for. Called once, before the thread starts.
    fn sources(&self) -> Vec<(usize, IoSource)> {
        Vec::new()
    }

    /// A driver is ready. `features` are those that it has accepted.
    fn start(&mut self, features: u64) {
        let _ = features;
    }

    /// The source with this index has woken the thread. [`Self::serve`] follows if the driver uses the
    /// source's queue.
    fn wake(&mut self, source: usize) {
        let _ = source;
    }

    /// The driver has been told of the changes that the last [`Self::wake`] made to the configuration.
    fn settled(&mut self) {}

    /// Serves requests of queue `index`: a doorbell has rung. Returns whether requests are left, so
    /// that the worker calls again soon.
    ///
    /// # Errors
    /// [`QueueError`]: the device needs a reset.
    fn serve(&mut self, index: usize, queue: &mut ActiveQueue) -> Result<bool, QueueError>;

    /// Whether the engine has stopped to serve, until the machine has been paused and runs again.
    fn is_stalled(&self) -> bool {
        false
    }

    /// The machine runs again after the engine had stalled: the next call serves.
    fn retry(&mut self) {}

    /// The machine ends in order. Keeps what the driver has not made durable.
    fn close(&mut self) {}

    /// The driver has reset the device, or the machine has: nothing of the last driver's is left.
    fn stop(&mut self) {}

    /// The machine has been reset, after [`Self::stop`]: the device is as at power-on.
    fn power_on(&mut self) {}

    /// The disk behind the device, for the machine while the thread is parked. None for other devices.
    fn disk(&mut self) -> Option<&mut dyn Disk> {
        None
    }
}

/// The end of one attempt to serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It is complete, with this count of bytes written to its buffers.
    Complete(u32),
    /// It stays in the ring, and with it all behind it. The engine has a source that wakes it later.
    Later,
}

/// Serves requests in their order, for a bounded time, until one has to wait.
///
/// # Errors
/// [`QueueError`]: the device needs a reset.
pub fn serve_in_order(
    queue: &mut ActiveQueue,
    mut serve: impl FnMut(&Request<'_>) -> Served,
) -> Result<bool, QueueError> {
    let memory = queue.memory();
    let end = Instant::now() + TURN;
    let mut served = 0;
    queue.doze()?;
    loop {
        while let Some(request) = queue.next(&memory)? {
            let Served::Complete(written) = serve(&request) else {
                queue.put_back(1);
                return Ok(false);
            };
            queue.complete(&request, written)?;
            served += 1;
            if served >= MOST || Instant::now() >= end {
                return Ok(true);
            }
        }
        if !queue.watch()? {
            return Ok(false);
        }
    }
}
