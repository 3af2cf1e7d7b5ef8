// SPDX-License-Identifier: Apache-2.0

//! Events that the agent has not noted yet.

use std::collections::VecDeque;

use passthrough::relay::RelayEvent;
use protocol::{State, VmmEvent};

/// The most events to keep while no agent is connected: a guest that reboots in a loop must not fill the memory.
const KEPT: usize = 256;

/// A bounded queue with sequence numbers.
///
/// Beyond the bound it drops the oldest of the events that a guest can repeat at will, otherwise the oldest event.
/// It keeps the last reboot, because the agent must act on it. Only the first loss is logged.
#[derive(Debug, Default)]
pub(super) struct EventQueue {
    queue: VecDeque<(u64, VmmEvent)>,
    last: u64,
    lost: u64,
}

impl EventQueue {
    pub(super) fn push(&mut self, event: VmmEvent) -> u64 {
        self.last += 1;
        self.queue.push_back((self.last, event));
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
        let refused = |event: &VmmEvent| {
            matches!(
                event,
                VmmEvent::Relay { event: RelayEvent::Refused { .. } | RelayEvent::Declined { .. }, .. }
            )
        };
        let reboot = |event: &VmmEvent| matches!(event, VmmEvent::State { state: State::Rebooting, .. });
        let last_reboot = self.queue.iter().rposition(|(_, event)| reboot(event));
        let victim = self.queue.iter().position(|(_, event)| refused(event));
        let oldest = usize::from(last_reboot == Some(0));
        self.queue.remove(victim.unwrap_or(oldest));
    }

    /// The events that the agent has not noted, oldest first.
    pub(super) fn pending(&self) -> impl Iterator<Item = &(u64, VmmEvent)> {
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

    fn event(boots: u64) -> VmmEvent {
        VmmEvent::State { state: State::Running, boots }
    }

    #[test]
    fn noted_events_are_forgotten_and_the_rest_stays_in_order() {
        let mut events = EventQueue::default();
        for boots in 0..5 {
            events.push(event(boots));
        }
        events.noted(3);
        assert_eq!(events.pending().map(|(seq, _)| *seq).collect::<Vec<_>>(), [4, 5]);
        events.noted(99);
        assert!(events.is_empty());
        assert_eq!(events.push(event(9)), 6);
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut events = EventQueue::default();
        for boots in 0..1000 {
            events.push(event(boots));
        }
        assert_eq!(events.pending().count(), KEPT);
        assert_eq!(events.pending().next().unwrap().0, 1000 - KEPT as u64 + 1);
    }

    /// Each of the two guests repeats its event for as long as no agent is connected.
    #[test]
    fn the_last_reboot_outlasts_what_a_guest_repeats() {
        let refused = || VmmEvent::Relay {
            adapter: "eth0".into(),
            event: RelayEvent::Refused {
                request: None,
                word: 0,
                reason: Reason::MacChangesRejected,
                count: 1,
            },
        };
        let rebooting = || VmmEvent::State { state: State::Rebooting, boots: 2 };
        for repeated in [refused, || event(2)] {
            let mut events = EventQueue::default();
            events.push(rebooting());
            let last = events.push(rebooting());
            for _ in 0..3 * KEPT {
                events.push(repeated());
            }
            assert_eq!(events.pending().count(), KEPT);
            assert!(events.pending().any(|(seq, event)| *seq == last && *event == rebooting()));
            assert!(events.pending().map(|(seq, _)| seq).is_sorted());
        }
    }
}
