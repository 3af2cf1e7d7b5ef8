// SPDX-License-Identifier: Apache-2.0

//! Changes of a disk that runs: only its own thread may touch its file and its state.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use devices::io_thread::IoEvent;

use crate::limit::Limits;

/// A growth of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Growth {
    /// The machine's number for it.
    pub(super) id: u64,
    /// The new size in bytes.
    pub(super) size: u64,
}

/// The changes that the disk's thread has not made yet, and the result of the last growth.
#[derive(Debug, Default)]
struct Changes {
    limits: Option<Limits>,
    growth: Option<Growth>,
    /// A growth that has begun goes no further.
    cancelled: bool,
    grown: Option<(u64, io::Result<()>)>,
}

/// The machine's end: changes the limits and the size of a disk. A change waits while the disk's thread is busy or
/// parked, and only the last one counts.
#[derive(Clone, Debug)]
pub struct Remote(Inbox);

/// The disk's end.
#[derive(Clone, Debug)]
pub(super) struct Inbox {
    changes: Arc<Mutex<Changes>>,
    pub(super) event: IoEvent,
}

impl Remote {
    /// Replaces the limits.
    pub fn limit(&self, limits: Limits) {
        self.0.lock().limits = Some(limits);
        self.0.event.signal();
    }

    /// Enlarges the disk to `size` bytes, whole sectors. A size that it has already is a success, too. [`Self::grown`]
    /// has the result, once the disk's thread has called [`Reports::on_grown`](super::Reports::on_grown). The caller
    /// gives each growth another `id`.
    pub fn grow(&self, id: u64, size: u64) {
        self.0.lock().growth = Some(Growth { id, size });
        self.0.event.signal();
    }

    /// Ends a growth that is not complete. The disk keeps its size.
    pub fn cancel_growth(&self) {
        let mut changes = self.0.lock();
        (changes.growth, changes.cancelled) = (None, true);
        drop(changes);
        self.0.event.signal();
    }

    /// Takes the result of growth `id`. None while it is under way. Results of earlier growths are dropped.
    #[must_use]
    pub fn grown(&self, id: u64) -> Option<io::Result<()>> {
        let (of, result) = self.0.lock().grown.take()?;
        (of == id).then_some(result)
    }
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the new limits, if there are any.
    pub(super) fn limits(&self) -> Option<Limits> {
        self.lock().limits.take()
    }

    /// Takes a new growth, which replaces the `present` one.
    pub(super) fn growth(&self, present: Option<Growth>) -> Option<Growth> {
        let mut changes = self.lock();
        let cancelled = std::mem::take(&mut changes.cancelled);
        let present = present.filter(|_| !cancelled);
        changes.growth.take().or(present)
    }

    /// Leaves the result of a growth.
    pub(super) fn grown(&self, id: u64, result: io::Result<()>) {
        self.lock().grown = Some((id, result));
    }

    /// Wakes the thread again for a growth whose event was dropped.
    pub(super) fn repeat(&self, present: Option<Growth>) {
        if present.is_some() || self.lock().growth.is_some() {
            self.event.signal();
        }
    }
}

/// Makes both ends.
pub(super) fn pair() -> io::Result<(Remote, Inbox)> {
    let inbox = Inbox { changes: Arc::default(), event: IoEvent::new()? };
    Ok((Remote(inbox.clone()), inbox))
}
