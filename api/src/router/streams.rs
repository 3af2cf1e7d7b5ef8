// SPDX-License-Identifier: Apache-2.0

//! How many streams without an end are served at once.
//!
//! Each holds a connection. All kinds together leave connections of each listener for requests.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::places::{Bounds, Place, Places, Source};
use crate::{Problem, ProblemCode};

/// The most followers of events.
pub(super) const MAX_EVENTS: usize = 64;

/// The most clients that read consoles.
pub(super) const MAX_CONSOLES: usize = 64;

/// The most leases of VMs that clients hold.
pub(super) const MAX_LEASES: usize = 64;

/// The most leases of one source: one client that takes all that it can leaves some to the others.
const MAX_LEASES_EACH: usize = MAX_LEASES * 3 / 4;

/// Room for streams: fewer than there are connections, so that there is always one for a request.
#[derive(Clone)]
pub(super) struct Streams {
    events: Arc<Semaphore>,
    consoles: Arc<Semaphore>,
    leases: Places,
}

impl Default for Streams {
    fn default() -> Self {
        Streams {
            events: Arc::new(Semaphore::new(MAX_EVENTS)),
            consoles: Arc::new(Semaphore::new(MAX_CONSOLES)),
            leases: Places::new(Bounds { all: MAX_LEASES, each: MAX_LEASES_EACH, displace: false }),
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

    /// Room for a lease of this source.
    ///
    /// # Errors
    /// `too_many_clients` if it, or all sources together, have as many as they may.
    pub(super) fn leases(&self, source: Source) -> Result<Place, Problem> {
        self.leases.take(source).ok_or_else(|| too_many("hold leases"))
    }
}

fn take(room: &Arc<Semaphore>, what: &str) -> Result<OwnedSemaphorePermit, Problem> {
    Arc::clone(room).try_acquire_owned().map_err(|_| too_many(what))
}

fn too_many(what: &str) -> Problem {
    let detail = format!("The agent serves its maximum number of clients that {what}: end one of them.");
    Problem::new(ProblemCode::TooManyClients, detail)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Limits;

    /// A client that holds all streams of a kind must not keep others from requests.
    #[test]
    fn streams_leave_connections_for_requests() {
        let users = Limits::default().users().all;
        assert!(MAX_EVENTS + MAX_CONSOLES + MAX_LEASES + 16 <= users, "{users}");
    }

    #[test]
    fn leases_are_bounded_for_each_source_and_for_all() {
        let streams = Streams::default();
        let user = |uid| Source::User(Some(uid));
        let held: Vec<_> = (0..MAX_LEASES).map_while(|_| streams.leases(user(1000)).ok()).collect();
        assert_eq!(held.len(), 48);
        let others: Vec<_> = (0..MAX_LEASES).map_while(|_| streams.leases(user(1001)).ok()).collect();
        assert_eq!(held.len() + others.len(), MAX_LEASES);
        drop(held);
        assert!(streams.leases(user(1000)).is_ok(), "a lease that has ended leaves its place");
        assert_eq!(streams.leases(user(1002)).map(drop), Ok(()));
        drop(others);
    }
}
