// SPDX-License-Identifier: Apache-2.0

//! Publishes events to connected subscribers, and keeps the latest ones for those that reconnect.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use api::types::{Event, EventKind, Timestamp};
use netpolicy::{Decision, Weight};
use tokio::sync::mpsc;

/// Events kept for returning subscribers, in each of the two rings.
const KEPT: usize = 1024;

/// Events that may wait for a subscriber, besides those that it missed. The hub drops a subscriber
/// with more.
const BACKLOG: usize = 256;

/// Most subscribers at once.
const SUBSCRIBERS: usize = 256;

/// Ids for each millisecond since the epoch. Ids begin with the time of the agent's start, so that
/// they grow over restarts: an id of a former agent is lower than all kept ones.
const IDS_PER_MS: u64 = 1000;

/// The hub that publishes events. A publisher never waits for a subscriber.
#[derive(Clone, Debug)]
pub struct EventHub(Arc<Mutex<Hub>>);

#[derive(Debug)]
struct Hub {
    next: u64,
    /// The first id of this agent.
    first: u64,
    /// Light decisions, of which a guest can cause many, and all other events. Neither ring
    /// displaces the other.
    kept: [VecDeque<Event>; 2],
    /// The newest id that is no longer kept.
    dropped: u64,
    subscribers: Vec<mpsc::Sender<Event>>,
}

impl Default for EventHub {
    fn default() -> Self {
        Self::starting(Timestamp::now())
    }
}

impl EventHub {
    fn starting(now: Timestamp) -> Self {
        let first = now.unix_ms().saturating_mul(IDS_PER_MS);
        let hub = Hub { next: first, first, kept: Default::default(), dropped: 0, subscribers: Vec::new() };
        Self(Arc::new(Mutex::new(hub)))
    }

    fn hub(&self) -> MutexGuard<'_, Hub> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes an event to all subscribers.
    pub fn publish(&self, what: EventKind) {
        self.publish_as(what, false);
    }

    /// Publishes a decision. Light decisions displace only each other, because a guest can cause
    /// many.
    pub fn publish_decision(&self, decision: Decision) {
        let is_light = decision.weight() == Weight::Light;
        self.publish_as(EventKind::Decision { decision: Box::new(decision.into()) }, is_light);
    }

    fn publish_as(&self, what: EventKind, is_light: bool) {
        let mut hub = self.hub();
        let event = Event { id: hub.next, time: Timestamp::now(), what };
        hub.next = hub.next.saturating_add(1);
        hub.subscribers.retain(|subscriber| subscriber.try_send(event.clone()).is_ok());
        let [light, others] = &mut hub.kept;
        let kept = if is_light { light } else { others };
        let oldest = if kept.len() >= KEPT { kept.pop_front() } else { None };
        kept.push_back(event);
        hub.dropped = oldest.map_or(0, |event| event.id).max(hub.dropped);
    }

    /// Subscribes to the events after the id `after`; None: from now on. A [`EventKind::Gap`] comes
    /// first if some of them are no longer kept. The channel closes for a subscriber that reads too
    /// slowly. Returns None when there are too many subscribers.
    #[must_use]
    pub fn subscribe(&self, after: Option<u64>) -> Option<mpsc::Receiver<Event>> {
        let mut hub = self.hub();
        hub.subscribers.retain(|subscriber| !subscriber.is_closed());
        if hub.subscribers.len() >= SUBSCRIBERS {
            return None;
        }
        // An id that is not used yet comes from a former agent, before the clock was set back.
        let is_foreign = after.is_some_and(|after| after < hub.first || after >= hub.next);
        let after = if is_foreign { 0 } else { after.unwrap_or(u64::MAX) };
        let mut missed: Vec<Event> =
            hub.kept.iter().flatten().filter(|event| event.id > after).cloned().collect();
        missed.sort_unstable_by_key(|event| event.id);
        let (sender, receiver) = mpsc::channel(BACKLOG.saturating_add(missed.len()).saturating_add(1));
        if is_foreign || after < hub.dropped {
            let id = missed.first().map_or(hub.next, |event| event.id).saturating_sub(1);
            drop(sender.try_send(Event { id, time: Timestamp::now(), what: EventKind::Gap }));
        }
        for event in missed {
            drop(sender.try_send(event));
        }
        hub.subscribers.push(sender);
        Some(receiver)
    }
}

#[cfg(test)]
mod tests {
    use api::types::{ObjectKind, Subject};

    use super::*;

    fn happens(hub: &EventHub, n: usize) {
        let id = uuid::Uuid::from_u128(n as u128);
        hub.publish(EventKind::Deleted {
            object: Subject { kind: ObjectKind::Vm, id, name: n.to_string() },
            by: None,
        });
    }

    /// The names of the waiting events; "gap" for a gap.
    fn heard(receiver: &mut mpsc::Receiver<Event>) -> Vec<String> {
        let mut heard = Vec::new();
        while let Ok(event) = receiver.try_recv() {
            heard.push(match event.what {
                EventKind::Deleted { object, .. } => object.name,
                other => other.name().into(),
            });
        }
        heard
    }

    #[test]
    fn a_subscriber_goes_on_without_a_gap_or_is_told_of_it() {
        let hub = EventHub::starting(Timestamp::from_unix_ms(1_000));
        let mut live = hub.subscribe(None).unwrap();
        happens(&hub, 0);
        happens(&hub, 1);
        let first = live.try_recv().unwrap().id;
        assert_eq!(heard(&mut live), ["1"]);
        assert_eq!(heard(&mut hub.subscribe(Some(first)).unwrap()), ["1"]);
        assert_eq!(heard(&mut hub.subscribe(Some(first + 1)).unwrap()), [""; 0]);
        assert_eq!(heard(&mut hub.subscribe(None).unwrap()), [""; 0]);
        for n in 2..KEPT + 10 {
            happens(&hub, n);
        }
        let back = heard(&mut hub.subscribe(Some(first)).unwrap());
        assert_eq!((back[0].as_str(), back[1].as_str(), back.len()), ("gap", "10", KEPT + 1));
        let newer = EventHub::starting(Timestamp::from_unix_ms(5_000));
        happens(&newer, 7);
        assert_eq!(heard(&mut newer.subscribe(Some(first)).unwrap()), ["gap", "7"]);
    }

    #[test]
    fn decisions_of_a_guest_that_repeats_itself_displace_nothing_else() {
        let hub = EventHub::starting(Timestamp::from_unix_ms(1_000));
        happens(&hub, 0);
        for _ in 0..3 * KEPT {
            hub.publish_decision(crate::decisions::tests::decision(1, "x", netpolicy::Outcome::Denied, 1));
        }
        happens(&hub, 1);
        let heard = heard(&mut hub.subscribe(Some(0)).unwrap());
        assert_eq!((heard[0].as_str(), heard[1].as_str(), heard.last().unwrap().as_str()), ("gap", "0", "1"));
        assert_eq!(heard.len(), KEPT + 3);
    }

    #[test]
    fn a_subscriber_is_told_of_a_gap_when_the_clock_was_set_back() {
        let before = EventHub::starting(Timestamp::from_unix_ms(5_000));
        happens(&before, 0);
        let last = before.hub().kept[1][0].id;
        let after = EventHub::starting(Timestamp::from_unix_ms(1_000));
        happens(&after, 1);
        assert_eq!(heard(&mut after.subscribe(Some(last)).unwrap()), ["gap", "1"]);
    }

    #[test]
    fn a_slow_subscriber_is_left_behind_and_nobody_else() {
        let hub = EventHub::starting(Timestamp::from_unix_ms(1_000));
        let (mut slow, mut quick) = (hub.subscribe(None).unwrap(), hub.subscribe(None).unwrap());
        let mut count = 0;
        for n in 0..BACKLOG * 3 {
            happens(&hub, n);
            count += heard(&mut quick).len();
        }
        assert_eq!(count, BACKLOG * 3);
        assert_eq!(heard(&mut slow).len(), BACKLOG + 1);
        assert!(matches!(slow.try_recv(), Err(mpsc::error::TryRecvError::Disconnected)));
    }
}
