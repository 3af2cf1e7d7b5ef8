// SPDX-License-Identifier: Apache-2.0

//! Changes of a disk that runs: only its own thread may touch its file and its state.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use devices::io_thread::IoEvent;

use crate::limit::Limits;

/// The machine's end: changes the limits of a disk. A change waits while the disk's thread is busy or
/// parked, and only the last one counts.
#[derive(Clone, Debug)]
pub struct Remote(Inbox);

/// The disk's end.
#[derive(Clone, Debug)]
pub(super) struct Inbox {
    limits: Arc<Mutex<Option<Limits>>>,
    pub(super) event: IoEvent,
}

impl Remote {
    /// Replaces the limits.
    pub fn limit(&self, limits: Limits) {
        *self.0.limits.lock().unwrap_or_else(PoisonError::into_inner) = Some(limits);
        self.0.event.signal();
    }
}

impl Inbox {
    /// Takes the new limits, if there are any.
    pub(super) fn take(&self) -> Option<Limits> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Makes both ends.
pub(super) fn pair() -> io::Result<(Remote, Inbox)> {
    let inbox = Inbox { limits: Arc::default(), event: IoEvent::new()? };
    Ok((Remote(inbox.clone()), inbox))
}
