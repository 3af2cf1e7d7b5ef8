// SPDX-License-Identifier: Apache-2.0

//! Threads for the blocking work of a device: queues of requests, files, networks.

use std::{io, sync::Arc};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A request for an I/O thread: the machine starts it before the guest runs, because no thread can
/// start later.
///
/// The thread waits for the eventfds and calls `work`. It begins after the device's `resume`, and
/// is parked after its `pause` ([`crate::device::Device`]). The machine clears the eventfds before
/// `reset`, and ends the thread before `shutdown`. If the thread ends by itself, for example by a
/// panic, the machine ends.
pub struct IoThread {
    /// The thread's name. The kernel shows 15 bytes of it.
    pub name: String,
    /// The system calls of the work, beside those of the loop around it.
    pub calls: Calls,
    /// The eventfds that wake the thread: doorbells and the device's own signals.
    pub events: Vec<IoEvent>,
    /// The work for the eventfd with this index, whose count has been read. It may block, but not
    /// under a lock that a vCPU's thread or the device's `pause` takes. While one call takes more
    /// than 3 seconds, the machine cannot be paused or reset. Each call does a bounded part of the
    /// work, and signals its own eventfd if more is left, so that the thread can be parked in
    /// between.
    pub work: Box<dyn FnMut(usize) + Send>,
    /// The last call on the thread, when the machine ends it. Within a second or two: later the process ends.
    pub end: Box<dyn FnOnce() + Send>,
}

/// The kinds of I/O threads by their system calls: each has a seccomp filter of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Calls {
    /// None.
    None,
    /// Reads, writes and flushes of files that are open.
    Disk,
}

/// An eventfd that wakes an I/O thread. It never blocks.
#[derive(Clone, Debug)]
pub struct IoEvent(Arc<EventFd>);

impl IoEvent {
    /// Makes an eventfd without a signal.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)))
    }

    /// Signals it.
    pub fn signal(&self) {
        // Fails only if the counter is full: then the wake-up is already pending.
        let _ = self.0.write(1);
    }

    /// Takes the pending signals. Returns whether there were any.
    pub fn take(&self) -> bool {
        self.0.read().is_ok()
    }

    /// The eventfd, for a doorbell.
    #[must_use]
    pub fn eventfd(&self) -> &EventFd {
        &self.0
    }
}
