// SPDX-License-Identifier: Apache-2.0

//! The mailbox registers that the guest sees: a state machine without I/O, clock or threads.
//!
//! ```text
//!             REQ: seq+1, snapshot                 complete(seq): reply, PFACK and PFSTS at once
//!  ┌──────┐ ────────────────────────▶ ┌──────────┐ ─────────────────────────────▶ ┌──────────┐
//!  │ idle │                           │ in flight│ ──┐ REQ, buffer writes:        │ answered │
//!  └──────┘ ◀──┐                      └──────────┘ ◀─┘ dropped and counted        └──────────┘
//!     ▲        │ VTCTRL.RST or FLR: seq+1; a completion        │                      │  │
//!     │        │ of an older seq changes nothing ◀─────────────┘                      │  │ REQ: in flight
//!     │        └──────────────────────────────────────────────────────────────────────┘  ▼
//!     └────────────── guest reads word 0, or VTCTRL.RST ─────────────────────────────────
//! ```
//!
//! * The guest changes the state by REQ and VTCTRL.RST, the relay by [`complete`](Registers::complete), the device's
//!   reset by [`function_reset`](Registers::function_reset).
//! * PFU is never shown: a driver that cannot take the buffer for 11 ms gives up silently. PFACK is never shown before
//!   the reply: the driver waits for it for up to a second.
//! * The last reply stays in word 0, where the driver's link check looks for "clear to send".
//! * Once "clear to send" was withdrawn, only the reply to a reset message restores it. Every other reply lacks it. As
//!   soon as the guest has read such a reply, word 0 demands the reset again: otherwise the reply would hide the
//!   demand, and the guest would keep an address, or filters, that its device does not have.
//! * An unsolicited message of the PF is delivered only when the guest cannot take it for a reply: not while a message
//!   is in flight, while the guest owns the buffer, or while a reply is unread.

use super::{
    layout::Register,
    message::{BUFFER_WORDS, Words},
    register_bits::{self, ACK, CTS, PFACK, PFSTS, REQ, RSTD, RSTI, VFU},
};
use crate::family::{Family, LostWords};

/// The 16 words at the moment when the guest set REQ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Number of this message: grows with every message and reset of this VF, never repeats.
    pub seq: u64,
    /// The buffer.
    pub words: [u32; BUFFER_WORDS],
}

/// The relay's work after a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The guest posted a message.
    Ring(Snapshot),
    /// The guest reset its VF; messages up to this sequence number are void.
    Reset(u64),
    /// Word 0 has changed, and the driver waits for the mailbox interrupt.
    Interrupt,
}

/// The result of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// This value. With `hint`, the guest polls for events, and the relay should poll the real mailbox.
    Shadow {
        /// The register's value.
        value: u32,
        /// Whether the real mailbox is worth a poll.
        hint: bool,
    },
    /// No register: reads as zero.
    Unknown {
        /// Whether this is the first access to this register.
        first: bool,
    },
}

/// Accesses ignored since the VF was assigned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegisterCounts {
    /// REQs while a message was in flight.
    pub dropped_requests: u64,
    /// Buffer writes while a message was in flight.
    pub dropped_writes: u64,
    /// Accesses that are not aligned and 32 bit wide.
    pub bad_width: u64,
    /// Accesses to registers that are not emulated.
    pub unknown: u64,
}

/// The mailbox page as the guest sees it.
#[derive(Debug)]
pub struct Registers {
    family: &'static Family,
    words: [u32; BUFFER_WORDS],
    seq: u64,
    in_flight: bool,
    vfu: bool,
    pfsts: bool,
    pfack: bool,
    rsti: bool,
    rstd: bool,
    /// From VTCTRL.RST to the next reply, RSTI is hidden: the driver would give up its reset after 1 ms.
    resetting: bool,
    /// Word 0 has a reply that the guest has not read.
    unread: bool,
    /// An unsolicited message of the PF, held until the guest cannot take it for a reply.
    waiting: Option<u32>,
    /// "Clear to send" was withdrawn, and no reset message has succeeded since.
    must_reset: bool,
    /// Word 0 must demand a reset as soon as the guest cannot take that for a reply.
    reset_unsaid: bool,
    /// The second of the [`LostWords`] follows when the driver acknowledges the first.
    second_word_due: bool,
    seen: [u64; 16],
    counts: RegisterCounts,
}

impl Registers {
    /// Registers after power-on.
    pub fn new(family: &'static Family) -> Self {
        Self {
            family,
            words: [0; BUFFER_WORDS],
            seq: 0,
            in_flight: false,
            vfu: false,
            pfsts: false,
            pfack: false,
            rsti: false,
            rstd: false,
            resetting: false,
            unread: false,
            waiting: None,
            must_reset: false,
            reset_unsaid: false,
            second_word_due: false,
            seen: [0; 16],
            counts: RegisterCounts::default(),
        }
    }

    /// The current sequence number: of the message in flight, the last message or the last reset.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Whether a message is in flight.
    pub fn in_flight(&self) -> bool {
        self.in_flight
    }

    /// The accesses ignored so far.
    pub fn counts(&self) -> RegisterCounts {
        self.counts
    }

    /// Handles a read of `len` bytes by the guest, at a byte offset of the page.
    pub fn read(&mut self, offset: u64, len: usize) -> Read {
        if len != 4 || !offset.is_multiple_of(4) {
            count(&mut self.counts.bad_width);
            return Read::Shadow { value: 0, hint: false };
        }
        match self.family.layout.register(offset) {
            Register::Mailbox => Read::Shadow { value: self.read_mailbox(), hint: self.wants_news() },
            Register::Buffer(0) => {
                let value = self.words[0];
                if !self.in_flight {
                    self.unread = false;
                    self.deliver();
                }
                Read::Shadow { value, hint: self.wants_news() }
            }
            Register::Buffer(index) => {
                Read::Shadow { value: self.words.get(index).copied().unwrap_or(0), hint: false }
            }
            // Reads that the hardware answers do not come here.
            Register::Control | Register::Passed { .. } => Read::Shadow { value: 0, hint: false },
            Register::Unknown => Read::Unknown { first: self.first_touch(offset) },
        }
    }

    /// Handles a write of `len` bytes by the guest, at a byte offset of the page; `value` holds them in its low bytes.
    /// Returns the effect, and whether it was the first touch of an unknown register.
    pub fn write(&mut self, offset: u64, len: usize, value: u32) -> (Effect, bool) {
        if len != 4 || !offset.is_multiple_of(4) {
            count(&mut self.counts.bad_width);
            return (Effect::None, false);
        }
        match self.family.layout.register(offset) {
            Register::Control if value & register_bits::CONTROL_RST != 0 => (self.vf_reset(), false),
            Register::Mailbox => (self.write_mailbox(value), false),
            Register::Buffer(_) if self.in_flight => {
                count(&mut self.counts.dropped_writes);
                (Effect::None, false)
            }
            Register::Buffer(index) => {
                if let Some(word) = self.words.get_mut(index) {
                    *word = value;
                }
                (Effect::None, false)
            }
            Register::Control | Register::Passed { .. } => (Effect::None, false),
            Register::Unknown => (Effect::None, self.first_touch(offset)),
        }
    }

    /// Ends message `seq`: writes the reply, and raises PFACK and PFSTS together. Without a reply it raises PFACK only.
    /// The reply lacks "clear to send" while the guest must reset. Returns false, and changes nothing, if a reset came
    /// first.
    pub fn complete(&mut self, seq: u64, reply: Option<&Words>) -> bool {
        self.end(seq, reply, false)
    }

    /// Like [`complete`](Self::complete), for a reset message that the PF has carried out: the guest need not reset any
    /// more.
    pub fn complete_reset(&mut self, seq: u64, reply: &Words) -> bool {
        self.end(seq, Some(reply), true)
    }

    fn end(&mut self, seq: u64, reply: Option<&Words>, was_reset: bool) -> bool {
        if !self.in_flight || seq != self.seq {
            return false;
        }
        self.must_reset &= !was_reset;
        self.reset_unsaid = self.must_reset;
        self.second_word_due = false;
        self.in_flight = false;
        self.resetting = false;
        self.pfack = true;
        if let Some(reply) = reply {
            for (to, from) in self.words.iter_mut().zip(reply.as_slice()) {
                *to = *from;
            }
            if self.must_reset {
                self.words[0] &= !CTS;
            }
            self.pfsts = true;
            self.unread = true;
            // The driver's link check needs only a word with "clear to send", and the reply is one.
            self.waiting = None;
        }
        self.deliver();
        true
    }

    /// Delivers an unsolicited message of the PF that has "clear to send", once the guest cannot take it for a reply.
    /// Drops it while the guest must reset.
    pub fn pf_message(&mut self, word: u32) {
        if !self.must_reset {
            self.waiting = Some(word);
        }
        self.deliver();
    }

    /// Makes the driver reset its VF, because the PF no longer listens or has changed settings behind the driver's
    /// back. Only the reply to the reset message ([`complete_reset`](Self::complete_reset)) restores "clear to send"; a
    /// reset of the device does not. Returns false if an earlier demand still waits to be shown.
    pub fn lost_clear_to_send(&mut self) -> bool {
        let is_news = !self.reset_unsaid;
        // The driver polls RSTD every 2 s, and looks at word 0 only if it is set.
        self.rstd = true;
        self.waiting = None;
        (self.must_reset, self.reset_unsaid) = (true, true);
        self.deliver();
        is_news
    }

    /// Sets whether a reset of the PF is under way.
    pub fn set_pf_resetting(&mut self, resetting: bool) {
        self.rsti = resetting;
    }

    /// Resets the registers after a reset of the device (FLR, reboot). They are as after power-on, but a guest that had
    /// to reset its VF still must. Returns the new sequence number.
    pub fn function_reset(&mut self) -> u64 {
        *self = Self {
            seq: self.seq.wrapping_add(1),
            must_reset: self.must_reset,
            seen: self.seen,
            counts: self.counts,
            ..Self::new(self.family)
        };
        self.seq
    }

    /// Whether a read by the guest may deliver an event. A read while the driver owns the buffer belongs to its
    /// message: nothing is delivered before it releases the buffer.
    fn wants_news(&self) -> bool {
        !(self.in_flight || self.vfu)
    }

    fn read_mailbox(&mut self) -> u32 {
        let mut value = 0;
        for (bit, set) in [
            (VFU, self.vfu),
            (PFSTS, self.pfsts),
            (PFACK, self.pfack),
            (RSTI, self.rsti && !self.resetting),
            (RSTD, self.rstd),
        ] {
            if set {
                value |= bit;
            }
        }
        self.pfsts = false;
        self.pfack = false;
        self.rstd = false;
        value
    }

    fn write_mailbox(&mut self, value: u32) -> Effect {
        self.vfu = value & VFU != 0;
        if value & REQ == 0 {
            let second = self.family.lost.acknowledged.filter(|_| value & ACK != 0 && self.second_word_due);
            if let Some(word) = second {
                self.second_word_due = false;
                self.words[0] = word;
                self.pfsts = true;
                return Effect::Interrupt;
            }
            self.deliver();
            return Effect::None;
        }
        if self.in_flight {
            count(&mut self.counts.dropped_requests);
            return Effect::None;
        }
        self.in_flight = true;
        self.unread = false;
        self.second_word_due = false;
        self.seq = self.seq.wrapping_add(1);
        Effect::Ring(Snapshot { seq: self.seq, words: self.words })
    }

    fn vf_reset(&mut self) -> Effect {
        self.seq = self.seq.wrapping_add(1);
        self.in_flight = false;
        self.vfu = false;
        self.pfsts = false;
        self.pfack = false;
        self.rstd = false;
        self.unread = false;
        self.waiting = None;
        // The driver would take RSTD for a continuing reset of the PF, and give up.
        self.reset_unsaid = false;
        self.second_word_due = false;
        self.resetting = true;
        Effect::Reset(self.seq)
    }

    fn deliver(&mut self) {
        if !self.wants_news() || self.unread {
            return;
        }
        if self.reset_unsaid {
            let LostWords { first, acknowledged } = self.family.lost;
            self.reset_unsaid = false;
            self.second_word_due = acknowledged.is_some();
            self.words[0] = first;
            self.pfsts = true;
            self.rstd = true;
        } else if let Some(word) = self.waiting.take() {
            self.words[0] = word;
            self.pfsts = true;
        }
    }

    fn first_touch(&mut self, offset: u64) -> bool {
        count(&mut self.counts.unknown);
        let Ok(index) = usize::try_from(offset / 4) else { return false };
        let Some(word) = self.seen.get_mut(index / 64) else { return false };
        let bit = 1 << (index % 64);
        let first = *word & bit == 0;
        *word |= bit;
        first
    }
}

fn count(counter: &mut u64) {
    *counter = counter.saturating_add(1);
}

#[cfg(test)]
mod tests;
