// SPDX-License-Identifier: Apache-2.0

//! Denies changes that the authority has denied in advance, without a request. With a permit a vCPU thread denies
//! them, so that the guest waits for no other thread. Otherwise the relay's thread does.
//!
//! ```text
//!  relay thread, idle ──Permit──▶ Shared ◀──StandingRefusal── authority
//!                                   │ the next messages are answered by both
//!                                   ▼
//!  relay thread ◀─── FastDenial ── vCPU: answered at once
//! ```
//!
//! A fast denial wakes no thread. The relay's thread notes it at its next poll of the mailbox, within a quarter of a
//! second, or at another wake-up. Until then a permit covers as many messages as the guest's bucket had tokens, up to
//! the number of denials that may wait.

use netpolicy::{MacAddress, OnDenied, Reason, Request, StandingRefusal};

use super::shared::Posted;
use crate::{
    channel::mailbox::{
        channel::{Reply, Response},
        registers::Registers,
    },
    family::{
        Family, Incoming, Outcome, Session,
        address::{DriverAddress, Judgement},
    },
};

/// The most denials that wait for the relay's thread.
pub(crate) const MAX_DENIALS: usize = 16;

/// The state that a thread needs to deny the next messages, as long as they are changes of the address. The relay
/// issues it only while the PF listens to the VF ("clear to send") and no request is under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Permit {
    pub(crate) family: &'static Family,
    pub(crate) session: Session,
    pub(crate) effective: MacAddress,
    pub(crate) driver: DriverAddress,
    /// Tokens in the guest's bucket.
    pub(crate) tokens: u32,
}

/// A change of the address that a vCPU thread denied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FastDenial {
    pub(crate) mac: MacAddress,
    /// Whether the guest saw success.
    pub(crate) silent: bool,
    pub(crate) reason: Reason,
}

impl Permit {
    /// Answers `posted` if the authority has denied it in advance.
    pub(crate) fn deny(
        &mut self,
        posted: &Posted,
        standing: &StandingRefusal,
        registers: &mut Registers,
    ) -> Option<FastDenial> {
        let decoded = self.family.codec.decode(&posted.snapshot.words, self.session);
        let Ok(Incoming::Request(Request::SetMac(mac))) = decoded else { return None };
        self.tokens = self.tokens.checked_sub(1)?;
        let asks = self.driver.judge(mac, Some(self.effective)) == Judgement::Ask;
        if !asks || !standing.covers(mac) {
            return None;
        }
        let silent = standing.on_denied == OnDenied::Silent && !self.driver.must_tell();
        let outcome = Outcome { accepted: silent, clear_to_send: true };
        let response = Response::Result { outcome, from_pf: None };
        let shown = Reply::new(self.family, &posted.snapshot, &response).show(registers, posted.snapshot.seq);
        self.driver.answered(silent);
        shown.then_some(FastDenial { mac, silent, reason: standing.reason })
    }
}
