// SPDX-License-Identifier: Apache-2.0

//! Changes of a disk that runs: only its own thread may touch its file and its state.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use devices::io_thread::IoEvent;

use crate::limit::Limits;

/// The changes that the disk's thread has not made yet, and the result of the last growth.
#[derive(Debug, Default)]
struct Changes {
    limits: Option<Limits>,
    size: Option<u64>,
    grown: Option<io::Result<u64>>,
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
    /// has the result, once the disk's thread has called the `on_grown` of [`Block::new`](super::Block::new).
    pub fn grow(&self, size: u64) {
        let mut changes = self.0.lock();
        (changes.size, changes.grown) = (Some(size), None);
        drop(changes);
        self.0.event.signal();
    }

    /// Takes the result of the last growth: the disk's size. None while the growth is under way.
    #[must_use]
    pub fn grown(&self) -> Option<io::Result<u64>> {
        self.0.lock().grown.take()
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

    /// Takes the size to grow to, if there is one.
    pub(super) fn size(&self) -> Option<u64> {
        self.lock().size.take()
    }

    /// Leaves the result of a growth.
    pub(super) fn grown(&self, result: io::Result<u64>) {
        self.lock().grown = Some(result);
    }

    /// Wakes the thread again for a growth whose event was dropped.
    pub(super) fn repeat(&self) {
        if self.lock().size.is_some() {
            self.event.signal();
        }
    }
}

/// Makes both ends.
pub(super) fn pair() -> io::Result<(Remote, Inbox)> {
    let inbox = Inbox { changes: Arc::default(), event: IoEvent::new()? };
    Ok((Remote(inbox.clone()), inbox))
}
