// SPDX-License-Identifier: Apache-2.0

//! Events that the vmm must keep, and relays' messages without a receiver.

use std::collections::VecDeque;

use tokio::sync::{mpsc, oneshot};

use super::{CommandError, RelayMessage, RelayMessages, Request};

/// The events that the vmm must keep. It may forget them in their order only.
#[derive(Default)]
pub(super) struct Unnoted {
    /// The first event of the machine that is not stored, or a number before it, and the last one. The store may fail
    /// for long, so that a list of them would grow without bound.
    machine: Option<(u64, u64)>,
    /// Relays' events, with their completions.
    relays: VecDeque<(u64, oneshot::Receiver<()>)>,
    last: u64,
    told: u64,
}

impl Unnoted {
    pub(super) fn machine(&mut self, seq: u64) {
        self.machine = Some((self.machine.map_or(seq, |(first, _)| first), seq));
        self.last = seq;
    }

    pub(super) fn relay(&mut self, seq: u64, done: oneshot::Receiver<()>) {
        self.relays.push_back((seq, done));
        self.last = seq;
    }

    /// The machine's events up to `seq` are stored.
    pub(super) fn noted(&mut self, seq: u64) {
        self.machine = self
            .machine
            .filter(|(_, last)| *last > seq)
            .map(|(first, last)| (first.max(seq.saturating_add(1)), last));
    }

    /// Waits until the first event of a relay is done; for ever if there is none. Returns false if its receiver dropped
    /// it: the vmm must keep it.
    pub(super) async fn relay_done(&mut self) -> bool {
        let done = match self.relays.front_mut() {
            Some((_, done)) => done.await.is_ok(),
            None => return std::future::pending().await,
        };
        if done {
            self.relays.pop_front();
            // One acknowledgement covers the events behind it that are done as well.
            while self.relays.front_mut().is_some_and(|(_, next)| next.try_recv().is_ok()) {
                self.relays.pop_front();
            }
        }
        done
    }

    /// The number up to which the vmm may forget its events, if that is news.
    pub(super) fn news(&mut self) -> Option<u64> {
        let kept = [self.machine.map(|(first, _)| first), self.relays.front().map(|(seq, _)| *seq)];
        let upto = kept.into_iter().flatten().map(|seq| seq.saturating_sub(1)).fold(self.last, u64::min);
        (upto > self.told).then(|| {
            self.told = upto;
            upto
        })
    }

    pub(super) fn len(&self) -> usize {
        self.relays.len()
    }
}

/// Passes on the relays' messages, and keeps them until there is a receiver.
#[derive(Default)]
pub(super) struct Relays {
    pub(super) receiver: Option<Box<dyn RelayMessages>>,
    waiting: VecDeque<RelayMessage>,
}

impl Relays {
    /// Passes on the waiting messages, and waits for room for one more. Until then the vmm's messages stay in the
    /// socket; commands to it need no room.
    pub(super) async fn ready(&mut self) {
        let Some(receiver) = &mut self.receiver else { return };
        receiver.ready().await;
        while let Some(message) = self.waiting.pop_front() {
            receiver.take(message);
            receiver.ready().await;
        }
    }

    /// Passes on the waiting messages after the vmm's last one. Without a receiver, waits for one.
    pub(super) async fn finish(&mut self, inbox: &mut mpsc::Receiver<Request>) {
        while !self.waiting.is_empty() && self.receiver.is_none() {
            match inbox.recv().await {
                None => return,
                Some(Request::Attach(receiver)) => self.receiver = Some(receiver),
                Some(Request::Noted(_)) => {}
                Some(Request::Command { reply, .. }) => drop(reply.send(Err(CommandError::Lost))),
            }
        }
        if !self.waiting.is_empty() {
            self.ready().await;
        }
    }

    pub(super) fn pass(&mut self, message: RelayMessage) {
        match &mut self.receiver {
            Some(receiver) => receiver.take(message),
            None => self.waiting.push_back(message),
        }
    }

    /// The number of waiting messages. [`Unnoted`] counts only the events among them.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
}
