// SPDX-License-Identifier: Apache-2.0

//! The eventfds and routes behind the vectors of MSI and MSI-X.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
    sync::Arc,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::interrupt::{MsiMessage, MsiRouter, RouteId};

/// The most router failures to log; the rest is only counted.
const LOGGED_FAILURES: u64 = 8;

/// One trigger eventfd per vector, connected to the guest or not.
///
/// A masked vector is disconnected: its signals stay in the eventfd, which is the vector's pending bit.
pub struct Vectors {
    triggers: Vec<EventFd>,
    routes: Vec<Option<Route>>,
    router: Arc<dyn MsiRouter>,
    failures: u64,
}

struct Route {
    id: RouteId,
    connected: Option<MsiMessage>,
}

impl Vectors {
    /// Makes `count` vectors, none connected.
    ///
    /// # Errors
    /// Those of making eventfds: too many open files.
    pub fn new(count: usize, router: Arc<dyn MsiRouter>) -> io::Result<Self> {
        let make = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let triggers = (0..count).map(|_| make()).collect::<io::Result<_>>()?;
        Ok(Self { triggers, routes: (0..count).map(|_| None).collect(), router, failures: 0 })
    }

    /// The eventfds, one per vector.
    #[must_use]
    pub fn triggers(&self) -> &[EventFd] {
        &self.triggers
    }

    /// The number of refusals by the router.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// Connects a vector to `message`, or disconnects it. A refusal of the router leaves the vector disconnected.
    pub fn set(&mut self, vector: usize, message: Option<MsiMessage>) {
        if let Err(error) = self.try_set(vector, message) {
            self.failures = self.failures.saturating_add(1);
            if self.failures <= LOGGED_FAILURES {
                tracing::warn!(vector, %error, "Interrupt vector cannot be routed: its interrupts stay pending");
            }
        }
    }

    fn try_set(&mut self, vector: usize, message: Option<MsiMessage>) -> io::Result<()> {
        let (Some(trigger), Some(slot)) = (self.triggers.get(vector), self.routes.get_mut(vector)) else {
            return Ok(());
        };
        match message {
            Some(message) => {
                let route = match slot {
                    Some(route) => route,
                    None => slot.insert(Route { id: self.router.allocate()?, connected: None }),
                };
                if route.connected != Some(message) {
                    self.router.connect(route.id, trigger, message)?;
                    route.connected = Some(message);
                }
            }
            None => {
                if let Some(route) = slot
                    && route.connected.take().is_some()
                {
                    self.router.disconnect(route.id, trigger)?;
                }
            }
        }
        Ok(())
    }

    /// Whether a disconnected vector has a pending signal. The check does not consume it.
    #[must_use]
    pub fn pending(&self, vector: usize) -> bool {
        let connected =
            self.routes.get(vector).and_then(Option::as_ref).is_some_and(|r| r.connected.is_some());
        let Some(trigger) = self.triggers.get(vector).filter(|_| !connected) else { return false };
        // SAFETY: the eventfd stays open during the call.
        let trigger = unsafe { BorrowedFd::borrow_raw(trigger.as_raw_fd()) };
        let mut polled = [PollFd::from_borrowed_fd(trigger, PollFlags::IN)];
        poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Disconnects every vector and drops its signals.
    pub fn clear(&mut self) {
        for vector in 0..self.triggers.len() {
            self.set(vector, None);
        }
        for trigger in &self.triggers {
            // The read fails without a signal, which is fine.
            let _ = trigger.read();
        }
    }

    fn release(&mut self) {
        self.clear();
        for route in self.routes.iter_mut().filter_map(Option::take) {
            self.router.release(route.id);
        }
    }
}

impl Drop for Vectors {
    fn drop(&mut self) {
        self.release();
    }
}
