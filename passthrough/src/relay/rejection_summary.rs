// SPDX-License-Identifier: Apache-2.0

//! Aggregates the relay's own rejections: a guest that floods the relay causes one event a second
//! for each reason.

use std::time::Duration;

use netpolicy::{Reason, Request};

use super::authority::RelayEvent;

struct Entry {
    reason: Reason,
    request: Option<Request>,
    word: u32,
    count: u64,
    told_at: Option<Duration>,
}

/// Rejections by reason, bounded by the number of reasons.
pub(crate) struct RejectionSummary {
    period: Duration,
    entries: Vec<Entry>,
}

impl RejectionSummary {
    pub(crate) fn new(period: Duration) -> Self {
        Self { period, entries: Vec::new() }
    }

    pub(crate) fn add(&mut self, reason: Reason, word: u32, request: Option<Request>) {
        match self.entries.iter_mut().find(|entry| entry.reason == reason) {
            Some(entry) => {
                entry.count = entry.count.saturating_add(1);
                entry.word = word;
                entry.request = request;
            }
            None => self.entries.push(Entry { reason, request, word, count: 1, told_at: None }),
        }
    }

    /// Takes an event that is due.
    pub(crate) fn due(&mut self, now: Duration) -> Option<RelayEvent> {
        let period = self.period;
        let entry =
            self.entries.iter_mut().find(|entry| entry.due_at(period).is_some_and(|due| due <= now))?;
        entry.told_at = Some(now);
        let count = std::mem::take(&mut entry.count);
        Some(RelayEvent::Refused {
            request: entry.request.take(),
            word: entry.word,
            reason: entry.reason,
            count,
        })
    }

    /// The time at which the next event is due.
    pub(crate) fn next(&self) -> Option<Duration> {
        self.entries.iter().filter_map(|entry| entry.due_at(self.period)).min()
    }
}

impl Entry {
    fn due_at(&self, period: Duration) -> Option<Duration> {
        (self.count > 0).then(|| self.told_at.map_or(Duration::ZERO, |told| told.saturating_add(period)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_the_others_are_counted() {
        let mut refusals = RejectionSummary::new(Duration::from_secs(1));
        let mut told = Vec::new();
        for ms in [0, 10, 20, 999, 1000, 1001, 2500] {
            refusals.add(Reason::UnknownMessage, ms, None);
            while let Some(RelayEvent::Refused { word, count, .. }) =
                refusals.due(Duration::from_millis(ms.into()))
            {
                told.push((word, count));
            }
        }
        assert_eq!(told, [(0, 1), (1000, 4), (2500, 2)]);
        assert_eq!(refusals.next(), None);
    }

    #[test]
    fn reasons_are_apart() {
        let mut refusals = RejectionSummary::new(Duration::from_secs(1));
        refusals.add(Reason::UnknownMessage, 7, None);
        refusals.add(Reason::MacInvalid, 2, None);
        let reasons: Vec<_> = std::iter::from_fn(|| refusals.due(Duration::ZERO)).collect();
        assert_eq!(reasons.len(), 2);
    }
}
