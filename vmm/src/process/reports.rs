//! Reports that the agent has not noted yet.

use std::collections::VecDeque;

use crate::control::Report;

/// Most reports that are kept while no agent is there: a guest that reboots in a loop must not fill the memory.
const KEPT: usize = 256;

/// A bounded queue with sequence numbers. Beyond the bound the oldest go, and the loss is counted in the log once.
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
            self.queue.pop_front();
            if self.lost == 0 {
                tracing::warn!("No agent notes the reports of this VM; the oldest are dropped from here on");
            }
            self.lost += 1;
        }
        self.last
    }

    /// Those that were not noted, oldest first.
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
    use super::*;
    use crate::control::State;

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
}
