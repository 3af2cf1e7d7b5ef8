// SPDX-License-Identifier: Apache-2.0

//! How many streams without an end are served at once.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{Problem, ProblemCode};

/// The most followers of events.
pub(super) const MAX_EVENTS: usize = 64;

/// The most clients that read consoles.
pub(super) const MAX_CONSOLES: usize = 64;

/// Room for streams: fewer than there are connections, so that there is always one for a request.
#[derive(Clone)]
pub(super) struct Streams {
    events: Arc<Semaphore>,
    consoles: Arc<Semaphore>,
}

impl Default for Streams {
    fn default() -> Self {
        Streams {
            events: Arc::new(Semaphore::new(MAX_EVENTS)),
            consoles: Arc::new(Semaphore::new(MAX_CONSOLES)),
        }
    }
}

impl Streams {
    pub(super) fn events(&self) -> Result<OwnedSemaphorePermit, Problem> {
        take(&self.events, "follow events")
    }

    pub(super) fn consoles(&self) -> Result<OwnedSemaphorePermit, Problem> {
        take(&self.consoles, "read consoles")
    }
}

fn take(room: &Arc<Semaphore>, what: &str) -> Result<OwnedSemaphorePermit, Problem> {
    Arc::clone(room).try_acquire_owned().map_err(|_| {
        let detail = format!("As many clients {what} as the agent serves at once: end one of them.");
        Problem::new(ProblemCode::TooManyClients, detail)
    })
}

/// A stream that has its room as long as it is there.
pub(super) struct Counted<S> {
    pub(super) stream: S,
    pub(super) _room: OwnedSemaphorePermit,
}

impl<S: Stream + Unpin> Stream for Counted<S> {
    type Item = S::Item;
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<S::Item>> {
        Pin::new(&mut self.stream).poll_next(context)
    }
}
