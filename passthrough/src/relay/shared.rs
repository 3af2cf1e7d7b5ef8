//! What vCPU threads, the vmm's event loop and the relay thread share: the registers and the relay's inbox.
//!
//! One lock, held for register work only. Every slot is bounded: a later reset voids an earlier message, there is one
//! message in flight and so one verdict that counts.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use netpolicy::{Change, MacAddress};

use super::{
    authority::Verdict,
    stats::{RelayStats, Stats},
};
use crate::mailbox::{
    layout::Layout,
    port::Clock,
    registers::{Effect, Read, Registers, Snapshot},
};

/// Orders that wait for the relay thread.
const MAX_ORDERS: usize = 64;

/// What the vmm wants of the relay thread.
#[derive(Debug)]
pub(crate) enum Order {
    EffectiveMac(MacAddress),
    TakeBack { id: u64, changes: Vec<Change> },
    MakeGuestReset,
}

/// A message and when it was posted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Posted {
    pub(crate) snapshot: Snapshot,
    pub(crate) at: Duration,
}

/// What came in since the relay thread last looked. A reset in it is older than the message in it.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    pub(crate) posted: Option<Posted>,
    pub(crate) vf_reset: bool,
    pub(crate) function_reset: bool,
    pub(crate) hint: bool,
    pub(crate) verdict: Option<Verdict>,
    pub(crate) orders: VecDeque<Order>,
    pub(crate) stop: bool,
}

impl Inbox {
    fn is_empty(&self) -> bool {
        self.posted.is_none()
            && !(self.vf_reset || self.function_reset || self.hint || self.stop)
            && self.verdict.is_none()
            && self.orders.is_empty()
    }
}

/// Behind the lock.
pub(crate) struct State {
    pub(crate) registers: Registers,
    pub(crate) stats: Stats,
    inbox: Inbox,
    /// Until then the real mailbox was looked at just now, or is about to be: the guest's reads are no hints, and wake nobody.
    hints_from: Duration,
}

pub(crate) struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    clock: Arc<dyn Clock>,
    /// The shortest time between two hints.
    look_gap: Duration,
}

impl Shared {
    pub(crate) fn new(layout: &'static Layout, clock: Arc<dyn Clock>, look_gap: Duration) -> Self {
        let state = State {
            registers: Registers::new(layout),
            stats: Stats::default(),
            inbox: Inbox::default(),
            hints_from: Duration::ZERO,
        };
        Self { state: Mutex::new(state), wake: Condvar::new(), clock, look_gap }
    }

    pub(crate) fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Nothing behind the lock can be left half done by a panic that matters to the next owner.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A read by the guest, on a vCPU thread.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Read {
        let now = self.clock.now();
        let mut state = self.lock();
        let read = state.registers.read(offset, len);
        let hint = matches!(read, Read::Shadow { hint: true, .. }) && state.hints_from <= now;
        if hint {
            state.hints_from = now.saturating_add(self.look_gap);
            state.inbox.hint = true;
        }
        drop(state);
        if hint {
            self.wake.notify_one();
        }
        read
    }

    /// A write by the guest, on a vCPU thread. Returns whether it was the first touch of an unknown register.
    pub(crate) fn write(&self, offset: u64, len: usize, value: u32) -> bool {
        let at = self.clock.now();
        let mut state = self.lock();
        let (effect, first) = state.registers.write(offset, len, value);
        match effect {
            Effect::None => return first,
            Effect::Ring(snapshot) => state.inbox.posted = Some(Posted { snapshot, at }),
            Effect::Reset(_) => {
                state.inbox.posted = None;
                state.inbox.verdict = None;
                state.inbox.vf_reset = true;
            }
        }
        // Woken with the lock held, the relay would only wait for it: here and below.
        drop(state);
        self.wake.notify_one();
        first
    }

    pub(crate) fn function_reset(&self) {
        let mut state = self.lock();
        state.registers.function_reset();
        state.inbox.posted = None;
        state.inbox.verdict = None;
        state.inbox.vf_reset = false;
        state.inbox.function_reset = true;
        self.wake.notify_one();
    }

    pub(crate) fn verdict(&self, verdict: Verdict) {
        let mut state = self.lock();
        if state.registers.in_flight() && state.registers.seq() == verdict.seq {
            state.inbox.verdict = Some(verdict);
            drop(state);
            self.wake.notify_one();
        }
    }

    /// Gives the order back if too many wait.
    pub(crate) fn order(&self, order: Order) -> Option<Order> {
        let mut state = self.lock();
        if state.inbox.orders.len() >= MAX_ORDERS || state.inbox.stop {
            return Some(order);
        }
        state.inbox.orders.push_back(order);
        self.wake.notify_one();
        None
    }

    pub(crate) fn stop(&self) {
        self.lock().inbox.stop = true;
        self.wake.notify_one();
    }

    pub(crate) fn stats(&self) -> RelayStats {
        let state = self.lock();
        state.stats.snapshot(state.registers.counts())
    }

    /// Takes what came in. An order to stop stays.
    pub(crate) fn take(&self) -> Inbox {
        let mut state = self.lock();
        let stop = state.inbox.stop;
        std::mem::replace(&mut state.inbox, Inbox { stop, ..Inbox::default() })
    }

    /// The real mailbox is looked at, at `now`.
    pub(crate) fn looking(&self, now: Duration) {
        self.lock().hints_from = now.saturating_add(self.look_gap);
    }

    /// Waits for something to come in, until `time` at the latest.
    pub(crate) fn wait(&self, time: Duration) {
        let mut state = self.lock();
        while state.inbox.is_empty() {
            let left = time.saturating_sub(self.clock.now());
            if left.is_zero() {
                return;
            }
            state = self.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
