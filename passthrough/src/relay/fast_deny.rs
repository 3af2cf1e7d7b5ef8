// SPDX-License-Identifier: Apache-2.0

//! Refusals without a question: what the authority has said it refuses in any case, a vCPU thread refuses where it is
//! asked for, if there is a prompt, else the relay's thread. In the first case the guest waits for no other thread.
//!
//! ```text
//!  relay thread, idle ──Prompt──▶ Shared ◀──StandingRefusal── authority
//!                                   │ the next messages are answered by both
//!                                   ▼
//!  relay thread ◀──── Declined ── vCPU: answered at once
//! ```
//!
//! Nothing is woken for it: the thread takes notice when it looks at the mailbox next, within a quarter of a second, or when
//! anything else wakes it. Until then a prompt is good for as many messages as the guest's bucket had tokens, and as
//! may wait to be noticed.

use netpolicy::{MacAddress, OnDenied, Reason, Request, StandingRefusal};

use super::{
    address::{DriverAddress, Judgement},
    shared::Posted,
};
use crate::mailbox::{igbvf, registers::Registers};

/// Messages that may wait to be noticed.
pub(crate) const MAX_DENIALS: usize = 16;

/// What must be known to refuse the next messages, as long as they are changes of the address. Whoever has one may: the PF
/// listens to the VF ("clear to send") and nothing is under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Permit {
    pub(crate) effective: MacAddress,
    pub(crate) driver: DriverAddress,
    /// Tokens in the guest's bucket.
    pub(crate) tokens: u32,
}

/// A change of the address that was refused where it was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FastDenial {
    pub(crate) mac: MacAddress,
    /// The guest was told that it succeeded.
    pub(crate) silent: bool,
    pub(crate) reason: Reason,
}

/// What a refusal is called in the relay's counters.
pub(crate) fn counted_as(silent: bool) -> &'static str {
    if silent { "refused_silently" } else { "refused" }
}

impl Permit {
    /// Answers `posted` if it is refused in any case.
    pub(crate) fn deny(
        &mut self,
        posted: &Posted,
        standing: &StandingRefusal,
        registers: &mut Registers,
    ) -> Option<FastDenial> {
        let words = &posted.snapshot.words;
        let Ok(Request::SetMac(mac)) = igbvf::decode(words) else { return None };
        self.tokens = self.tokens.checked_sub(1)?;
        let asks = self.driver.judge(mac, Some(self.effective)) == Judgement::Ask;
        if !asks || !standing.covers(mac) {
            return None;
        }
        let silent = standing.on_denied == OnDenied::Silent && !self.driver.must_tell();
        let reply = igbvf::reply(words[0], silent, true);
        let shown = registers.complete(posted.snapshot.seq, Some(&reply));
        self.driver.answered(silent);
        shown.then_some(FastDenial { mac, silent, reason: standing.reason })
    }
}
