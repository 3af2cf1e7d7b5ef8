// SPDX-License-Identifier: Apache-2.0

//! The queue of one port: its jobs run one after the other.
//!
//! Work that takes time (on the PF, in the store, through the VF's mailbox) is a job beside the switch's task. A port has at
//! most one job; its other work waits in its queue. So the switch never compares an adapter in the middle of a change, and a
//! denial, which needs no job, never waits.

use std::collections::VecDeque;

use api::types::{Pending, PortCounters, Timestamp, Unchecked, UnmadeChange};
use netpolicy::{Change, MacAddress, Request, clipped};
use passthrough::relay::{Cancelled, Forwarded, GuestRequest, MAX_CHANGES};
use serde::{Deserialize, Serialize};
use text::printable;
use tokio::{sync::oneshot, task::AbortHandle, time::Instant};

use super::{
    command::{Leftover, Reply},
    made,
};

/// The most deferred changes that the switch accepts for one port. It is twice the limit of a relay, because the
/// confirmation of changes that the relay has made may still be on its way.
const DEFERRED: usize = 2 * MAX_CHANGES;

/// The most waiting changes that a port's status shows.
const SHOWN: usize = 20;

/// The most characters of a reason: some reasons come from the process of a simulated PF.
const DETAIL: usize = 500;

/// Work for a port, done when its turn comes.
pub(super) enum Task {
    /// After a restart of the agent: find out the result of changes that were under way.
    Recover,
    /// A request that needs changes.
    Request { id: u64, guest_request: GuestRequest },
    /// Roll back a granted address, because its request was cancelled.
    Revert(Revert),
    /// Make the corrections that the policy requires, and revoke changes that an earlier boot left.
    Correct,
    /// Compare with the PF and correct differences; with `all`, also repeat settings that a reset of the PF may have lost
    /// although its driver shows them.
    Repair { all: bool },
    /// The guest reboots.
    Reboot,
    /// Send the relay the effective address, which may have changed while the vmm was not connected.
    Tell,
    /// The results of messages that waited for the guest's reset.
    Confirmed { done: Vec<Change>, failed: Vec<Change> },
    /// The VM is gone.
    Release { reply: Reply<Option<Leftover>> },
}

/// A MAC change to roll back, because its request was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revert {
    /// The effective address before the change.
    pub(super) old: MacAddress,
    /// The guest address before the change.
    pub(super) guest: MacAddress,
    /// The reason for the cancellation.
    pub(super) why: Cancelled,
}

/// The job under way.
pub(super) struct Running {
    /// The number of the request; None if no request caused the job.
    pub(super) seq: Option<u64>,
    /// The reason, if the request was cancelled meanwhile.
    pub(super) cancelled: Option<Cancelled>,
    /// The sender by which the job receives the PF's response.
    pub(super) forwarded: Option<oneshot::Sender<Forwarded>>,
}

/// The last granted address: it is revoked if the guest turns out not to have received the grant.
#[derive(Clone, Debug)]
pub(super) struct Granted {
    /// The number of the request; None if it came to a former agent.
    pub(super) seq: Option<u64>,
    pub(super) request: Request,
    pub(super) old: MacAddress,
    pub(super) guest: MacAddress,
}

/// The time limit of deferred revocations. Dropping it ends its timer, because a guest can cause any number of
/// deferrals.
pub(super) struct Deferral {
    pub(super) since: Instant,
    pub(super) timer: AbortHandle,
}

impl Drop for Deferral {
    fn drop(&mut self) {
        self.timer.abort();
    }
}

/// A port's queue, and the switch's data about the port besides its policy and adapter.
#[derive(Default)]
pub(super) struct PortQueue {
    pub(super) queue: VecDeque<Task>,
    pub(super) busy: Option<Running>,
    /// The VM is gone: the guest's requests no longer count.
    pub(super) closing: bool,
    /// The VF has just been bound to the port, and its PF is being programmed. Until that is done, a difference
    /// between the two is not drift.
    pub(super) binding: bool,
    /// Changes that the relay makes at the guest's next reset, in the order of their commands.
    pub(super) deferred: VecDeque<Vec<Change>>,
    /// The time of the first of these commands. Without a deferred change it has no meaning.
    pub(super) deferred_since: Option<Timestamp>,
    /// The time limit that runs while revocations are deferred, if there is one. It ends only when all revocations
    /// are made: further deferrals, and reboots or connections that the vmm reports, do not restart it.
    pub(super) revoking_since: Option<Deferral>,
    /// Changes that the policy requires and that failed the last time.
    pub(super) unmade: Vec<UnmadeChange>,
    /// Changes of an earlier boot of the guest that are still to be revoked.
    pub(super) leftover: Vec<Change>,
    /// The guest reboots, and the work for that is not finished.
    pub(super) rebooting: bool,
    /// A correction is pending until the vmm reconnects.
    pub(super) owed: bool,
    /// The effective address must be sent to the relay when its vmm connects.
    pub(super) untold: bool,
    pub(super) granted: Option<Granted>,
    /// The MAC change to roll back, at once or after its job has made it. Only the agent still knows this: the vmm
    /// forgets a request that it has cancelled.
    pub(super) revert: Option<Revert>,
    /// The author of the edit that the port is being corrected for.
    pub(super) edited_by: Option<String>,
    /// The result of a former agent's changes is not known yet.
    pub(super) recovering: bool,
    /// A cancelled request to a former agent.
    pub(super) given_up: Option<(Request, Cancelled)>,
    /// The number of the request under way, and the time at which it came.
    pub(super) received: Option<(u64, Instant)>,
    /// The port cannot be compared with its PF.
    pub(super) unchecked: Option<Unchecked>,
    pub(super) counters: PortCounters,
    pub(super) bdf: Option<String>,
}

impl PortQueue {
    /// Queues work behind the waiting work. A vmm can cause most kinds of work as often as it likes. Work that is
    /// already queued is therefore not queued again, and a queue stays a few items long.
    pub(super) fn push(&mut self, work: Task) {
        match work {
            Task::Correct if self.queue.iter().any(|queued| matches!(queued, Task::Correct)) => return,
            // The waiting comparison reads the PF when its turn comes, so it covers this one.
            Task::Repair { all } => {
                let waiting = self.queue.iter_mut().find_map(|queued| match queued {
                    Task::Repair { all } => Some(all),
                    _ => None,
                });
                if let Some(waiting) = waiting {
                    *waiting |= all;
                    return;
                }
            }
            Task::Tell if self.queue.iter().any(|queued| matches!(queued, Task::Tell)) => return,
            // Keep the later reboot: work queued between the two belongs to the boot that has ended.
            Task::Reboot => self.queue.retain(|queued| !matches!(queued, Task::Reboot)),
            // A guest has one request at a time, so an older one no longer needs a response.
            Task::Request { .. } => self.queue.retain(|queued| !matches!(queued, Task::Request { .. })),
            _ => {}
        }
        self.queue.push_back(work);
    }

    /// Notes changes that the relay makes at the guest's next reset. Returns false if there are more than a relay
    /// can defer.
    pub(super) fn defer(&mut self, changes: Vec<Change>) -> bool {
        if !changes.is_empty() {
            if self.deferred.is_empty() {
                self.deferred_since = Some(Timestamp::now());
            }
            self.deferred.push_back(changes);
        }
        self.deferred.iter().map(Vec::len).sum::<usize>() <= DEFERRED
    }

    /// Notes the failed changes. Returns true if some failed now and none failed at the last attempt.
    pub(super) fn note_unmade(&mut self, failed: &[(Change, String)]) -> bool {
        let were_made = self.unmade.is_empty();
        let unmade = |(change, why): &(Change, String)| {
            let detail = printable(&clipped(why, DETAIL));
            UnmadeChange { change: made::describe(change), detail }
        };
        self.unmade = failed.iter().take(SHOWN).map(unmade).collect();
        were_made && !self.unmade.is_empty()
    }

    /// The changes that wait for the guest's reset, for people.
    pub(super) fn pending(&self) -> Option<Pending> {
        let changes: Vec<String> = self.deferred.iter().flatten().take(SHOWN).map(made::describe).collect();
        self.deferred_since.filter(|_| !changes.is_empty()).map(|since| Pending { since, changes })
    }

    /// Removes a waiting request from the queue.
    pub(super) fn withdraw(&mut self, seq: u64) -> bool {
        let before = self.queue.len();
        self.queue
            .retain(|work| !matches!(work, Task::Request { guest_request, .. } if guest_request.seq == seq));
        self.queue.len() != before
    }

    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.busy.is_none() && self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(port_queue: &PortQueue) -> Vec<&'static str> {
        let name = |work: &Task| match work {
            Task::Request { .. } => "request",
            Task::Correct => "correct",
            Task::Repair { all: true } => "repair all",
            Task::Repair { all: false } => "repair",
            Task::Reboot => "reboot",
            _ => "other",
        };
        port_queue.queue.iter().map(name).collect()
    }

    fn request(seq: u64) -> Task {
        Task::Request { id: seq, guest_request: GuestRequest { seq, request: Request::Reset } }
    }

    #[test]
    fn what_waits_is_queued_once_and_does_all_that_was_wished() {
        let mut port_queue = PortQueue::default();
        for work in [Task::Repair { all: false }, Task::Correct, Task::Repair { all: true }, Task::Correct] {
            port_queue.push(work);
        }
        assert_eq!(names(&port_queue), ["repair all", "correct"]);
        port_queue.push(Task::Repair { all: false });
        assert_eq!(names(&port_queue), ["repair all", "correct"], "what is lost is made again all the same");
    }

    #[test]
    fn what_is_queued_between_two_reboots_is_of_the_boot_that_has_ended() {
        let mut port_queue = PortQueue::default();
        port_queue.push(Task::Reboot);
        port_queue.push(request(1));
        port_queue.push(Task::Reboot);
        assert_eq!(names(&port_queue), ["request", "reboot"]);
        port_queue.push(request(2));
        assert_eq!(names(&port_queue), ["reboot", "request"], "the guest that has begun again requests");
    }

    #[test]
    fn a_vmm_that_says_the_same_for_ever_fills_no_lane() {
        let mut port_queue = PortQueue::default();
        for seq in 0..10_000 {
            port_queue.push(Task::Repair { all: true });
            port_queue.push(Task::Reboot);
            port_queue.push(Task::Correct);
            port_queue.push(request(seq));
        }
        assert_eq!(port_queue.queue.len(), 4);
        assert_eq!(names(&port_queue), ["repair all", "correct", "reboot", "request"]);
    }
}
