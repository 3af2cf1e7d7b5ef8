// SPDX-License-Identifier: Apache-2.0

//! Threads for the blocking work of a device: queues of requests, files, networks.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    sync::Arc,
    time::Duration,
};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A request for an I/O thread: the machine starts it before the guest runs, because no thread can
/// start later.
///
/// The thread waits for the sources and calls `work`. It begins after the device's `resume`, and
/// is parked after its `pause` ([`crate::device::Device`]). The machine clears the sources before
/// `reset`, and ends the thread before `shutdown`. If the thread ends by itself, for example by a
/// panic, the machine ends.
pub struct IoThread {
    /// The thread's name. The kernel shows 15 bytes of it.
    pub name: String,
    /// The system calls of the work, beside those of the loop around it.
    pub calls: Calls,
    /// The sources that wake the thread.
    pub sources: Vec<IoSource>,
    /// The work for the source with this index, after [`IoSource::take`]. It may block, but not
    /// under a lock that a vCPU's thread or the device's `pause` takes. While one call takes more
    /// than 3 seconds, the machine cannot be paused or reset. Each call does a bounded part of the
    /// work, and signals an eventfd if more is left, so that the thread can be parked in between.
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
    /// Reads and writes of network interfaces that are open.
    Network,
    /// Frames and messages of a port under a policy.
    Port,
}

/// A reason for an I/O thread to work.
#[derive(Clone, Debug)]
pub enum IoSource {
    /// A doorbell, or a signal of the device itself.
    Event(IoEvent),
    /// A time.
    Timer(IoTimer),
    /// A file of the host that can be read again. The kernel reports each change once (edge
    /// triggered, `epoll(7)`): the work reads until the file has no more, or signals an eventfd.
    Readable(Arc<OwnedFd>),
}

impl IoSource {
    /// Takes the pending signals. Returns whether there is work: an eventfd's signals may have been
    /// taken before.
    pub fn take(&self) -> bool {
        match self {
            Self::Event(event) => event.take(),
            Self::Timer(timer) => timer.take(),
            Self::Readable(_) => true,
        }
    }

    /// Whether the kernel reports each change only once.
    #[must_use]
    pub fn is_edge_triggered(&self) -> bool {
        matches!(self, Self::Readable(_))
    }
}

impl AsRawFd for IoSource {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Event(event) => event.0.as_raw_fd(),
            Self::Timer(timer) => timer.0.as_raw_fd(),
            Self::Readable(file) => file.as_raw_fd(),
        }
    }
}

/// A timer that wakes an I/O thread once for each time that it is set.
#[derive(Clone, Debug)]
pub struct IoTimer(Arc<OwnedFd>);

impl IoTimer {
    /// Makes a timer that is not set.
    ///
    /// # Errors
    /// Those of `timerfd_create`.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self(Arc::new(timerfd_create(TimerfdClockId::Monotonic, flags)?)))
    }

    /// Sets it, in place of an earlier time. A time of zero is one nanosecond.
    ///
    /// # Errors
    /// Those of `timerfd_settime`.
    pub fn set(&self, after: Duration) -> io::Result<()> {
        let after = after.max(Duration::from_nanos(1));
        let it_value = Timespec::try_from(after).map_err(io::Error::other)?;
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }

    /// Returns whether the time has come since the last call.
    pub fn take(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

/// An eventfd that wakes an I/O thread. It never blocks.
#[derive(Clone, Debug)]
pub struct IoEvent(Arc<EventFd>);

impl From<EventFd> for IoEvent {
    /// The eventfd must not block.
    fn from(event: EventFd) -> Self {
        Self(Arc::new(event))
    }
}

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
