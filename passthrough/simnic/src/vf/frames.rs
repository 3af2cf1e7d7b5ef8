// SPDX-License-Identifier: Apache-2.0

//! The frames of a VF without queues in guest memory: its owner takes and sends them by a [`FramePort`].
//!
//! ```text
//!   VF's thread ──▶ Inbox (bounded) ──event──▶ FramePort::take      owner's thread
//!   PF ◀────────────── connection ◀─────────── FramePort::send
//! ```

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use passthrough::family::igb::IGBVF;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{self, SendFlags},
};
use vmm_sys_util::eventfd::EventFd;

use super::Shared;
use crate::wire::{Frame, MAX_FRAME, MIN_FRAME, Packet};

/// The most frames, and the most of their bytes, that wait for the owner.
const MOST: usize = 512;
const MOST_BYTES: usize = 2 << 20;
/// The time that the PF has to take a frame when its socket is full.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
/// The mailbox's entry in VTIVAR_MISC: vector 0, valid.
const MAILBOX_ON_VECTOR_0: u32 = 0x80;
/// VTEIMS and VTEIAC: the bit of vector 0.
const VECTOR_0: u32 = 1;
const ENABLE: u16 = 0x1524;
const AUTO_CLEAR: u16 = 0x152c;

/// A received frame, without its outermost tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Priority and VLAN (TCI).
    pub tag: Option<u16>,
    /// From the destination address on, without checksum.
    pub bytes: Vec<u8>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Whether the owner takes frames.
    open: bool,
    frames: VecDeque<Received>,
    bytes: usize,
    /// Frames that were dropped since the owner has asked: there was no room.
    dropped: u64,
}

/// Frames from the PF that wait for the owner.
#[derive(Debug)]
pub(super) struct Inbox {
    waiting: Mutex<Waiting>,
    /// Signalled when frames wait after there were none.
    event: EventFd,
    /// Signalled by the mailbox's interrupt and by a change of the link.
    control: EventFd,
}

impl Inbox {
    pub(super) fn new() -> io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        Ok(Self { waiting: Mutex::default(), event: event()?, control: event()? })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a frame for the owner. Without room the frame is dropped.
    pub(super) fn put(&self, frame: Frame<'_>) {
        let mut waiting = self.lock();
        let bytes = waiting.bytes.saturating_add(frame.bytes.len());
        if !waiting.open {
            return;
        }
        if waiting.frames.len() >= MOST || bytes > MOST_BYTES {
            waiting.dropped = waiting.dropped.saturating_add(1);
            return;
        }
        let first = waiting.frames.is_empty();
        waiting.frames.push_back(Received { tag: frame.tag, bytes: frame.bytes.to_vec() });
        waiting.bytes = bytes;
        drop(waiting);
        if first {
            // It fails only after 2^64 writes without a read.
            let _ = self.event.write(1);
        }
    }

    /// Signals a change of the link to the owner.
    pub(super) fn link_changed(&self) {
        let _ = self.control.write(1);
    }
}

/// The owner's end of a VF without queues.
pub struct FramePort {
    shared: Arc<Shared>,
    connection: Arc<OwnedFd>,
    packet: Vec<u8>,
}

impl FramePort {
    pub(super) fn new(shared: Arc<Shared>, connection: Arc<OwnedFd>) -> Self {
        Self { shared, connection, packet: Vec::new() }
    }

    fn inbox(&self) -> Option<&Inbox> {
        self.shared.frames.as_ref()
    }

    /// An eventfd that is signalled when frames wait after there were none.
    ///
    /// # Errors
    /// Those of duplicating a file descriptor.
    pub fn event(&self) -> io::Result<EventFd> {
        self.inbox().ok_or(io::ErrorKind::Unsupported)?.event.try_clone()
    }

    /// An eventfd that is signalled when the link changes, and by the mailbox's interrupt once [`FramePort::arm`] has
    /// connected it.
    ///
    /// # Errors
    /// Those of duplicating a file descriptor.
    pub fn control_event(&self) -> io::Result<EventFd> {
        self.inbox().ok_or(io::ErrorKind::Unsupported)?.control.try_clone()
    }

    /// Connects the mailbox's interrupt with the control eventfd. Every reset of the VF disconnects it.
    ///
    /// # Errors
    /// Those of duplicating a file descriptor.
    pub fn arm(&self) -> io::Result<()> {
        let event = self.control_event()?;
        let mut registers = self.shared.registers();
        registers.interrupts.connect(vec![event]);
        registers.interrupts.write(AUTO_CLEAR, VECTOR_0);
        registers.interrupts.write(IGBVF.layout.mailbox_vector, MAILBOX_ON_VECTOR_0);
        registers.interrupts.write(ENABLE, VECTOR_0);
        Ok(())
    }

    /// Takes frames from now on, or drops them. Frames that wait are dropped.
    pub fn open(&self, open: bool) {
        if let Some(inbox) = self.inbox() {
            *inbox.lock() = Waiting { open, ..Waiting::default() };
        }
    }

    /// Whether the link is up.
    #[must_use]
    pub fn link_up(&self) -> bool {
        self.shared.registers().link_up
    }

    /// Whether the PF is gone for good.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.shared.gone.load(Ordering::Acquire)
    }

    /// The number of frames that were dropped since the last call, because too many waited.
    #[must_use]
    pub fn take_dropped(&self) -> u64 {
        self.inbox().map_or(0, |inbox| std::mem::take(&mut inbox.lock().dropped))
    }

    /// Takes the next frame.
    #[must_use]
    pub fn take(&self) -> Option<Received> {
        let mut waiting = self.inbox()?.lock();
        let frame = waiting.frames.pop_front()?;
        waiting.bytes = waiting.bytes.saturating_sub(frame.bytes.len());
        Some(frame)
    }

    /// Sends a frame. May wait for the PF, 2 ms at most.
    ///
    /// # Errors
    /// `InvalidInput` for a frame that is too short or too long, `WouldBlock` for a PF that does not read, and those of the
    /// socket: the PF is gone.
    pub fn send(&mut self, frame: Frame<'_>) -> io::Result<()> {
        if !(MIN_FRAME..=MAX_FRAME).contains(&frame.bytes.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Packet::Frame { frame, looped: false }.encode(&mut self.packet);
        let send = || {
            net::send(&*self.connection, &self.packet, SendFlags::NOSIGNAL | SendFlags::DONTWAIT).map(drop)
        };
        match send() {
            Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => {
                poll(&mut [PollFd::new(&*self.connection, PollFlags::OUT)], Some(&PATIENCE))?;
                Ok(send()?)
            }
            result => Ok(result?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(bytes: &[u8]) -> Frame<'_> {
        Frame { tag: None, bytes }
    }

    #[test]
    fn the_frames_that_wait_are_bounded_in_number_and_bytes() {
        let inbox = Inbox::new().unwrap();
        inbox.put(frame(&[0; 60]));
        assert_eq!(inbox.lock().frames.len(), 0, "the inbox is closed");
        inbox.lock().open = true;
        for _ in 0..2 * MOST {
            inbox.put(frame(&[0; 60]));
        }
        assert_eq!(inbox.lock().frames.len(), MOST);
        assert_eq!(inbox.lock().bytes, MOST * 60);
        assert_eq!(inbox.lock().dropped, MOST as u64);
        assert_eq!(inbox.event.read().unwrap(), 1, "one signal for all of them");
        *inbox.lock() = Waiting { open: true, ..Waiting::default() };
        for _ in 0..MOST {
            inbox.put(frame(&[0; MAX_FRAME]));
        }
        let bytes = inbox.lock().bytes;
        assert!(bytes <= MOST_BYTES && bytes > MOST_BYTES - MAX_FRAME, "{bytes}");
    }
}
