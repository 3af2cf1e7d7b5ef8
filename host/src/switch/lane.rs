// SPDX-License-Identifier: Apache-2.0

//! One thing after the other for each port.
//!
//! Whatever takes time (the PF, the store, messages through the VF's mailbox) is a job beside the switch's task; a port has
//! at most one. What else is to be done for the port waits in its lane. So nothing that the switch compares with the adapter
//! is ever in the middle of a change, and refusals, which need no job, wait for nobody.

use std::collections::VecDeque;

use api::types::{Pending, PortCounters, Timestamp, Unchecked, UnmadeChange};
use netpolicy::{Change, MacAddress, Request, clipped};
use passthrough::relay::{Cancelled, Forwarded, MAX_CHANGES, Question};
use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, time::Instant};

use super::{
    command::{Leftover, Reply},
    made,
};
use crate::text::printable;

/// More changes than a relay lets wait for its guest's reset. Twice as many, because what it has made may not have been told yet.
const DEFERRED: usize = 2 * MAX_CHANGES;

/// Changes that a port's status shows at most, of those that wait.
const SHOWN: usize = 20;

/// Most characters of a reason: the process of a simulated PF chooses some of them.
const DETAIL: usize = 500;

/// Something to be done for a port when its turn comes.
pub(super) enum Work {
    /// After a restart of the agent: what became of changes that were under way.
    Recover,
    /// A question that needs changes.
    Ask { id: u64, question: Question },
    /// A granted address whose question was cancelled.
    Revert(Revert),
    /// What the policy no longer allows, and what an earlier boot left.
    Correct,
    /// Compare with the PF and put right; `all` if the PF was reset and its driver may show what is not so.
    Repair { all: bool },
    /// The guest begins again.
    Reboot,
    /// The relay may not know the effective address: it was changed while the vmm was not connected.
    Tell,
    /// What became of messages that waited for the guest's reset.
    Confirmed { done: Vec<Change>, failed: Vec<Change> },
    /// The VM is gone.
    Release { reply: Reply<Option<Leftover>> },
}

/// An address that was granted in vain, or is being.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revert {
    /// The address before.
    pub(super) old: MacAddress,
    /// What the guest believed before.
    pub(super) guest: MacAddress,
    /// Why its question was given up.
    pub(super) why: Cancelled,
}

/// The question under way.
pub(super) struct Busy {
    /// Its number, if the job is a question's.
    pub(super) seq: Option<u64>,
    /// It was given up meanwhile.
    pub(super) cancelled: Option<Cancelled>,
    /// Where the job waits to hear what the PF said.
    pub(super) forwarded: Option<oneshot::Sender<Forwarded>>,
}

/// The last granted address: it is taken back if the guest turns out not to have heard of it.
#[derive(Clone, Debug)]
pub(super) struct Granted {
    /// The question; None if it was asked of a former agent.
    pub(super) seq: Option<u64>,
    pub(super) request: Request,
    pub(super) old: MacAddress,
    pub(super) guest: MacAddress,
}

/// A port's lane, and what the switch remembers of the port besides its policy and adapter.
#[derive(Default)]
pub(super) struct Lane {
    pub(super) queue: VecDeque<Work>,
    pub(super) busy: Option<Busy>,
    /// The VM is gone: the guest's wishes no longer count.
    pub(super) closing: bool,
    /// The VF has just become the port's, and its PF is being programmed: a difference between the two is nobody's change.
    pub(super) binding: bool,
    /// What the relay makes at the guest's next reset, in the order of the orders.
    pub(super) deferred: VecDeque<Vec<Change>>,
    /// When the first of these was ordered. Means nothing without one.
    pub(super) deferred_since: Option<Timestamp>,
    /// Changes that the policy wants and that could not be made the last time.
    pub(super) unmade: Vec<UnmadeChange>,
    /// What an earlier boot of the guest left and is still to be taken back.
    pub(super) leftover: Vec<Change>,
    /// The guest begins again, and the work of that is not done.
    pub(super) rebooting: bool,
    /// Something was not confirmed because the vmm was not connected.
    pub(super) owed: bool,
    /// The relay is to be told the effective address when its vmm is connected.
    pub(super) untold: bool,
    pub(super) granted: Option<Granted>,
    /// What is to be reverted, or will be if it comes to be made. The vmm that told of it has forgotten it.
    pub(super) revert: Option<Revert>,
    /// Who made the edit that the port is being corrected for.
    pub(super) edited_by: Option<String>,
    /// What became of changes under a former agent is not known yet.
    pub(super) recovering: bool,
    /// A question to a former agent that was given up.
    pub(super) given_up: Option<(Request, Cancelled)>,
    /// When the question under way came, by its number.
    pub(super) asked: Option<(u64, Instant)>,
    /// The port cannot be compared with its PF.
    pub(super) unchecked: Option<Unchecked>,
    pub(super) counters: PortCounters,
    pub(super) bdf: Option<String>,
}

impl Lane {
    /// Queues work behind what waits. A vmm can ask for most of it as often as it likes: what is queued already is not queued
    /// again, so that a lane is a few items long, whatever its vmm does.
    pub(super) fn push(&mut self, work: Work) {
        match work {
            Work::Correct if self.queue.iter().any(|queued| matches!(queued, Work::Correct)) => return,
            // The one that waits reads the PF when its turn comes: it sees what this one would.
            Work::Repair { all } => {
                let waiting = self.queue.iter_mut().find_map(|queued| match queued {
                    Work::Repair { all } => Some(all),
                    _ => None,
                });
                if let Some(waiting) = waiting {
                    *waiting |= all;
                    return;
                }
            }
            Work::Tell if self.queue.iter().any(|queued| matches!(queued, Work::Tell)) => return,
            // The later one stays: what was queued in between is of the boot that has ended.
            Work::Reboot => self.queue.retain(|queued| !matches!(queued, Work::Reboot)),
            // A guest has one question at a time: an older one is no longer waited for.
            Work::Ask { .. } => self.queue.retain(|queued| !matches!(queued, Work::Ask { .. })),
            _ => {}
        }
        self.queue.push_back(work);
    }

    /// The relay will make these at the guest's next reset. False if it cannot be: a relay keeps fewer.
    pub(super) fn defer(&mut self, changes: Vec<Change>) -> bool {
        if !changes.is_empty() {
            if self.deferred.is_empty() {
                self.deferred_since = Some(Timestamp::now());
            }
            self.deferred.push_back(changes);
        }
        self.deferred.iter().map(Vec::len).sum::<usize>() <= DEFERRED
    }

    /// Notes the changes that could not be made. True if some could not, and those before could.
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

    /// Takes a question that waits out of the lane.
    pub(super) fn withdraw(&mut self, seq: u64) -> bool {
        let before = self.queue.len();
        self.queue.retain(|work| !matches!(work, Work::Ask { question, .. } if question.seq == seq));
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

    fn names(lane: &Lane) -> Vec<&'static str> {
        let name = |work: &Work| match work {
            Work::Ask { .. } => "ask",
            Work::Correct => "correct",
            Work::Repair { all: true } => "repair all",
            Work::Repair { all: false } => "repair",
            Work::Reboot => "reboot",
            _ => "other",
        };
        lane.queue.iter().map(name).collect()
    }

    fn ask(seq: u64) -> Work {
        Work::Ask { id: seq, question: Question { seq, request: Request::Reset } }
    }

    #[test]
    fn what_waits_is_queued_once_and_does_all_that_was_wished() {
        let mut lane = Lane::default();
        for work in [Work::Repair { all: false }, Work::Correct, Work::Repair { all: true }, Work::Correct] {
            lane.push(work);
        }
        assert_eq!(names(&lane), ["repair all", "correct"]);
        lane.push(Work::Repair { all: false });
        assert_eq!(names(&lane), ["repair all", "correct"], "what is lost is made again all the same");
    }

    #[test]
    fn what_is_queued_between_two_reboots_is_of_the_boot_that_has_ended() {
        let mut lane = Lane::default();
        lane.push(Work::Reboot);
        lane.push(ask(1));
        lane.push(Work::Reboot);
        assert_eq!(names(&lane), ["ask", "reboot"]);
        lane.push(ask(2));
        assert_eq!(names(&lane), ["reboot", "ask"], "the guest that has begun again asks");
    }

    #[test]
    fn a_vmm_that_says_the_same_for_ever_fills_no_lane() {
        let mut lane = Lane::default();
        for seq in 0..10_000 {
            lane.push(Work::Repair { all: true });
            lane.push(Work::Reboot);
            lane.push(Work::Correct);
            lane.push(ask(seq));
        }
        assert_eq!(lane.queue.len(), 4);
        assert_eq!(names(&lane), ["repair all", "correct", "reboot", "ask"]);
    }
}
