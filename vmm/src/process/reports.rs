// SPDX-License-Identifier: Apache-2.0

//! Reports that the agent has not noted yet.

use std::collections::VecDeque;

use passthrough::relay::Notice;
use protocol::{Report, State};

/// The most reports to keep while no agent is connected: a guest that reboots in a loop must not fill the memory.
const KEPT: usize = 256;

/// A bounded queue with sequence numbers.
///
/// Beyond the bound it drops the oldest report, and logs that once. Reports that a guest can repeat at will go first.
/// The last reboot stays, because the agent must act on it.
#[derive(Debug, Default)]
pub(super) struct Reports {
    queue: VecDeque<(u64, Report)>,
    last: u64,
    lost: u64,
}

impl Reports {
    pub(super) fn push(&mut self, report: Report) -> u64 {
        self.last += 1;
        self.queue.push_back((self.last, report));
        if self.queue.len() > KEPT {
            self.evict();
            if self.lost == 0 {
                tracing::warn!("No agent acknowledges the VM's reports; the oldest are dropped from now on");
            }
            self.lost += 1;
        }
        self.last
    }

    fn evict(&mut self) {
        let refused = |report: &Report| {
            matches!(report, Report::Relay { notice: Notice::Refused { .. } | Notice::Declined { .. }, .. })
        };
        let reboot = |report: &Report| matches!(report, Report::State { state: State::Rebooting, .. });
        let last_reboot = self.queue.iter().rposition(|(_, report)| reboot(report));
        let victim = self.queue.iter().position(|(_, report)| refused(report));
        let oldest = usize::from(last_reboot == Some(0));
        self.queue.remove(victim.unwrap_or(oldest));
    }

    /// The reports that the agent has not noted, oldest first.
    pub(super) fn pending(&self) -> impl Iterator<Item = &(u64, Report)> {
        self.queue.iter()
    }

    pub(super) fn noted(&mut self, upto: u64) {
        while self.queue.front().is_some_and(|(seq, _)| *seq <= upto) {
            self.queue.pop_front();
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use netpolicy::Reason;

    use super::*;

    fn report(boots: u64) -> Report {
        Report::State { state: State::Running, boots }
    }

    #[test]
    fn noted_reports_are_forgotten_and_the_rest_stays_in_order() {
        let mut reports = Reports::default();
        for boots in 0..5 {
            reports.push(report(boots));
        }
        reports.noted(3);
        assert_eq!(reports.pending().map(|(seq, _)| *seq).collect::<Vec<_>>(), [4, 5]);
        reports.noted(99);
        assert!(reports.is_empty());
        assert_eq!(reports.push(report(9)), 6);
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut reports = Reports::default();
        for boots in 0..1000 {
            reports.push(report(boots));
        }
        assert_eq!(reports.pending().count(), KEPT);
        assert_eq!(reports.pending().next().unwrap().0, 1000 - KEPT as u64 + 1);
    }

    /// Each of the two guests repeats its report for as long as no agent is connected.
    #[test]
    fn the_last_reboot_outlasts_what_a_guest_repeats() {
        let refused = || Report::Relay {
            adapter: "eth0".into(),
            notice: Notice::Refused { request: None, word: 0, reason: Reason::MacChangesRejected, count: 1 },
        };
        let rebooting = || Report::State { state: State::Rebooting, boots: 2 };
        for repeated in [refused, || report(2)] {
            let mut reports = Reports::default();
            reports.push(rebooting());
            let last = reports.push(rebooting());
            for _ in 0..3 * KEPT {
                reports.push(repeated());
            }
            assert_eq!(reports.pending().count(), KEPT);
            assert!(reports.pending().any(|(seq, report)| *seq == last && *report == rebooting()));
            assert!(reports.pending().map(|(seq, _)| seq).is_sorted());
        }
    }
}
