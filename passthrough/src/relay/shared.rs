// SPDX-License-Identifier: Apache-2.0

//! The state that vCPU threads, the vmm's event loop and the relay thread share: the registers and the relay's inbox.
//!
//! One lock guards this state. It is held for register work only. Every slot of the inbox is bounded: a reset voids
//! an earlier message, and at most one verdict counts at a time.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use netpolicy::{Change, MacAddress, OnDenied, Reason, StandingRefusal};

use super::{
    authority::{OWN_REQUEST, Verdict},
    disposition::Disposition,
    fast_deny::{FastDenial, MAX_DENIALS, Permit},
    stats::{PassedCounters, RelayStats, Stats},
};
use crate::{
    channel::mailbox::{
        registers::{Effect, Read, Registers, Snapshot},
        vf_mailbox::Clock,
    },
    family::Family,
};

/// The most commands that wait for the relay thread.
const MAX_COMMANDS: usize = 64;

/// A command of the vmm to the relay thread.
#[derive(Debug)]
pub(crate) enum RelayCommand {
    EffectiveMac(MacAddress),
    Revoke { id: u64, changes: Vec<Change> },
    MakeGuestReset,
}

/// A message and the time at which the guest posted it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Posted {
    pub(crate) snapshot: Snapshot,
    pub(crate) at: Duration,
}

/// Input since the relay thread's last turn. The denials in it are older than a reset in it, and the reset is older
/// than the message in it.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    pub(crate) denials: Vec<FastDenial>,
    pub(crate) posted: Option<Posted>,
    pub(crate) vf_reset: bool,
    pub(crate) function_reset: bool,
    pub(crate) hint: bool,
    /// The registers have changed in a way that the guest's driver waits for.
    pub(crate) interrupt: bool,
    pub(crate) verdict: Option<Verdict>,
    pub(crate) commands: VecDeque<RelayCommand>,
    pub(crate) stop: bool,
}

impl Inbox {
    /// Whether the relay thread need not wake for this input.
    fn is_quiet(&self) -> bool {
        self.is_calm() && !(self.hint || self.interrupt || self.stop)
    }

    /// Whether this input leaves the meaning of the next message unchanged.
    fn is_calm(&self) -> bool {
        self.posted.is_none()
            && !(self.vf_reset || self.function_reset)
            && self.verdict.is_none()
            && self.commands.is_empty()
    }
}

/// The state behind the lock.
pub(crate) struct State {
    pub(crate) registers: Registers,
    pub(crate) stats: Stats,
    inbox: Inbox,
    /// The changes that the authority denies in advance.
    standing: Option<StandingRefusal>,
    /// The VF's effective address, if the relay knows it.
    effective: Option<MacAddress>,
    /// Lets a vCPU thread deny the next message.
    permit: Option<Permit>,
    /// Before this time, guest reads do not trigger a poll of the real mailbox: one has just happened, or is about to.
    hints_from: Duration,
}

impl State {
    /// Denies a new message at once, or leaves it to the relay thread. Returns whether the relay thread must wake.
    fn posted(&mut self, posted: Posted) -> bool {
        let denial = match (&mut self.permit, &self.standing) {
            (Some(permit), Some(standing)) if self.inbox.denials.len() < MAX_DENIALS => {
                permit.deny(&posted, standing, &mut self.registers)
            }
            _ => None,
        };
        let Some(denial) = denial else {
            self.permit = None;
            self.inbox.posted = Some(posted);
            return true;
        };
        self.stats.message("set_mac", Disposition::denied(denial.silent));
        self.stats.round_trips.add(Duration::ZERO);
        self.inbox.denials.push(denial);
        false
    }
}

pub(crate) struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    clock: Arc<dyn Clock>,
    /// The shortest time between two hints.
    look_gap: Duration,
    pub(crate) passed: PassedCounters,
}

impl Shared {
    pub(crate) fn new(family: &'static Family, clock: Arc<dyn Clock>, look_gap: Duration) -> Self {
        let state = State {
            registers: Registers::new(family),
            stats: Stats::default(),
            inbox: Inbox::default(),
            effective: None,
            standing: None,
            permit: None,
            hints_from: Duration::ZERO,
        };
        Self {
            state: Mutex::new(state),
            wake: Condvar::new(),
            clock,
            look_gap,
            passed: PassedCounters::default(),
        }
    }

    pub(crate) fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Ignores poisoning: a panic under the lock leaves no half-made change that matters to the next owner.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handles a read by the guest, on a vCPU thread.
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

    /// Handles a write by the guest, on a vCPU thread. Returns whether it was the first touch of an unknown register.
    pub(crate) fn write(&self, offset: u64, len: usize, value: u32) -> bool {
        let at = self.clock.now();
        let mut state = self.lock();
        let (effect, first) = state.registers.write(offset, len, value);
        match effect {
            Effect::None => return first,
            Effect::Ring(snapshot) => {
                if !state.posted(Posted { snapshot, at }) {
                    // The guest's next reads fetch the response, so they need no poll.
                    state.hints_from = at.saturating_add(self.look_gap);
                    return first;
                }
            }
            Effect::Interrupt => state.inbox.interrupt = true,
            Effect::Reset(_) => {
                state.permit = None;
                state.inbox.posted = None;
                state.inbox.verdict = None;
                state.inbox.vf_reset = true;
            }
        }
        // Unlock before the wake-up: otherwise the relay's thread would wake only to wait for the lock.
        drop(state);
        self.wake.notify_one();
        first
    }

    pub(crate) fn function_reset(&self) {
        let mut state = self.lock();
        state.registers.function_reset();
        state.permit = None;
        state.inbox.posted = None;
        state.inbox.verdict = None;
        state.inbox.vf_reset = false;
        state.inbox.function_reset = true;
        drop(state);
        self.wake.notify_one();
    }

    pub(crate) fn verdict(&self, verdict: Verdict) {
        let mut state = self.lock();
        let in_flight = state.registers.in_flight().then(|| state.registers.seq());
        if in_flight.map_or(verdict.seq & OWN_REQUEST != 0, |seq| seq == verdict.seq) {
            state.inbox.verdict = Some(verdict);
            drop(state);
            self.wake.notify_one();
        }
    }

    /// Returns the command if too many are waiting.
    pub(crate) fn send(&self, command: RelayCommand) -> Option<RelayCommand> {
        let mut state = self.lock();
        if state.inbox.commands.len() >= MAX_COMMANDS || state.inbox.stop {
            return Some(command);
        }
        // The command may change the state that the permit relies on.
        state.permit = None;
        state.inbox.commands.push_back(command);
        drop(state);
        self.wake.notify_one();
        None
    }

    pub(crate) fn standing_refusal(&self, standing: Option<StandingRefusal>) {
        self.lock().standing = standing;
    }

    /// The reason and manner of denying a change to `mac`, if the authority has denied it in advance.
    pub(crate) fn refusal_of(&self, mac: MacAddress) -> Option<(Reason, OnDenied)> {
        let state = self.lock();
        let standing = state.standing.as_ref().filter(|standing| standing.covers(mac))?;
        Some((standing.reason, standing.on_denied))
    }

    /// Permits vCPU threads to deny the next messages, until other input arrives. `None` forbids it. Notes the VF's effective
    /// address.
    pub(crate) fn set_permit(&self, permit: Option<Permit>, effective: Option<MacAddress>) {
        let mut state = self.lock();
        state.effective = effective;
        // The permit was computed without the denials that are now in the inbox.
        state.permit = permit.filter(|_| state.inbox.is_calm() && state.inbox.denials.is_empty());
    }

    pub(crate) fn effective(&self) -> Option<MacAddress> {
        self.lock().effective
    }

    pub(crate) fn stop(&self) {
        self.lock().inbox.stop = true;
        self.wake.notify_one();
    }

    pub(crate) fn stats(&self) -> RelayStats {
        let state = self.lock();
        state.stats.snapshot(state.registers.counts(), self.passed.snapshot())
    }

    /// Takes the input. A request to stop stays in the inbox.
    pub(crate) fn take(&self) -> Inbox {
        let mut state = self.lock();
        let stop = state.inbox.stop;
        std::mem::replace(&mut state.inbox, Inbox { stop, ..Inbox::default() })
    }

    /// Notes a poll of the real mailbox at `now`.
    pub(crate) fn looking(&self, now: Duration) {
        self.lock().hints_from = now.saturating_add(self.look_gap);
    }

    /// Waits for input, until `time` at the latest.
    pub(crate) fn wait(&self, time: Duration) {
        let mut state = self.lock();
        while state.inbox.is_quiet() {
            let left = time.saturating_sub(self.clock.now());
            if left.is_zero() {
                return;
            }
            state = self.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
