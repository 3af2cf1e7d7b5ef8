// SPDX-License-Identifier: Apache-2.0

//! Retries of receive lists that had no verdict in time.
//!
//! A driver sets its lists of receive addresses and ignores the responses. If the authority is away (the agent
//! restarts, the PF's driver is busy), a denial would leave the guest without its lists, perhaps for ever. So the relay
//! keeps these requests and repeats them, one at a time, until the authority decides. It waits for a second after a
//! retry without a verdict, and not at all after a verdict. The guest gets no second response: its driver has ignored
//! the first one.

use std::time::Duration;

use netpolicy::{MacAddress, Reason, Request, UnicastLimit};

use super::{StateMachine, Work};
use crate::relay::authority::{Cancelled, Decision, GuestRequest, How, OWN_REQUEST, RelayEvent};

/// Time between two retries.
const PERIOD: Duration = Duration::from_secs(1);

/// The guest's lists that have no verdict yet: at most one request to clear the filters, three filters and one list of
/// multicast hashes.
#[derive(Debug, Default)]
pub(super) struct Undecided {
    clear: bool,
    unicast: Vec<MacAddress>,
    multicast: Option<Request>,
    /// The time of the next retry.
    at: Duration,
    asked: u64,
}

impl Undecided {
    /// Keeps a request of the guest that has no verdict.
    pub(super) fn keep(&mut self, request: &Request, now: Duration) {
        match request {
            Request::ClearUnicastFilters => {
                self.clear = true;
                self.unicast.clear();
            }
            Request::AddUnicastFilter(mac) => self.add(*mac),
            Request::SetMulticast { .. } => self.multicast = Some(request.clone()),
            _ => return,
        }
        self.at = now.saturating_add(PERIOD);
    }

    /// Drops a request that has a verdict.
    pub(super) fn decided(&mut self, request: &Request, granted: bool) {
        match request {
            Request::ClearUnicastFilters => {
                self.clear = false;
                self.unicast.clear();
            }
            // The pending clear will remove this granted filter: add it again afterwards.
            Request::AddUnicastFilter(mac) if granted && self.clear => self.add(*mac),
            Request::AddUnicastFilter(mac) => self.unicast.retain(|one| one != mac),
            Request::SetMulticast { .. } => self.multicast = None,
            _ => {}
        }
    }

    /// Forgets all requests: a guest that starts again sets its lists again.
    pub(super) fn forget(&mut self) {
        *self = Self { asked: self.asked, ..Self::default() };
    }

    fn add(&mut self, mac: MacAddress) {
        if self.unicast.len() < usize::from(UnicastLimit::MAX.get()) && !self.unicast.contains(&mac) {
            self.unicast.push(mac);
        }
    }

    fn next(&self) -> Option<Request> {
        if self.clear {
            return Some(Request::ClearUnicastFilters);
        }
        let filter = self.unicast.first().copied().map(Request::AddUnicastFilter);
        filter.or_else(|| self.multicast.clone())
    }

    /// The time of the next retry, if any request has no verdict.
    pub(super) fn due(&self) -> Option<Duration> {
        self.next().map(|_| self.at)
    }
}

impl StateMachine {
    /// Repeats a request if one is due, no other work is under way and the PF listens.
    pub(super) fn retry_undecided(&mut self) {
        let now = self.now();
        if !self.may_retry() || self.undecided.due().is_none_or(|due| now < due) {
            return;
        }
        let Some(request) = self.undecided.next() else { return };
        self.undecided.at = now.saturating_add(PERIOD);
        // A retry takes a token of the guest's messages, like any work that the guest causes.
        if !self.messages.take(now) {
            return;
        }
        self.undecided.asked = self.undecided.asked.wrapping_add(1);
        let seq = OWN_REQUEST | self.undecided.asked;
        if self.authority.request(GuestRequest { seq, request: request.clone() }).is_ok() {
            let deadline = now.saturating_add(self.config.ask_limit);
            self.work = Work::Retry { seq, request, deadline };
        }
    }

    pub(super) fn may_retry(&self) -> bool {
        matches!(self.work, Work::Idle) && self.cts && !self.reset_due
    }

    /// Carries out the verdict on a retry.
    pub(super) fn retry_decided(&mut self, seq: u64, request: &Request, decision: Decision) {
        match request {
            Request::ClearUnicastFilters => self.undecided.clear = false,
            Request::AddUnicastFilter(mac) => self.undecided.unicast.retain(|one| one != mac),
            _ => self.undecided.multicast = None,
        }
        // The authority decides again, so do not delay the remaining requests.
        self.undecided.at = self.now();
        match decision {
            Decision::Grant { how: How::Local } => {}
            Decision::Grant { how: How::Forward } => {
                let (outcome, _) = self.send(request, self.config.exchange_limit);
                self.note_filters(request, outcome);
                self.authority.event(RelayEvent::Forwarded { seq, outcome });
            }
            Decision::Refuse { reason, .. } => self.note_in_use(request, reason),
        }
    }

    /// Cancels the retry under way, if there is one: the guest has a new message, or no verdict came.
    pub(super) fn withdraw(&mut self) {
        if let Work::Retry { .. } = self.work
            && let Work::Retry { seq, request, .. } = std::mem::replace(&mut self.work, Work::Idle)
        {
            self.authority.event(RelayEvent::Cancelled { seq, request, why: Cancelled::Withdrawn });
        }
    }

    /// Notes a denial because another port has the address. The switch may add the address later, so the relay must not
    /// grant the guest's next clear by itself.
    pub(super) fn note_in_use(&mut self, request: &Request, reason: Reason) {
        self.filters |= reason == Reason::MacInUse && matches!(request, Request::AddUnicastFilter(_));
    }
}
