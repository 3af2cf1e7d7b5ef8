//! Refusals without a question: what the authority has said it refuses in any case, a vCPU thread refuses where it is
//! asked for, if there is a prompt, else the relay's thread. In the first case the guest waits for no other thread.
//!
//! ```text
//!  relay thread, idle ──Prompt──▶ Shared ◀──StandingRefusal── authority
//!                                   │ the next message takes the prompt
//!                                   ▼
//!  relay thread ◀──── Declined ── vCPU: answered at once
//! ```
//!
//! There is one prompt for one message, so that all that a message costs and leaves behind (its token, what it says of the
//! driver's addresses, its log line and notice) is the relay thread's before the next one can be refused in this way.

use netpolicy::{MacAddress, OnDenied, Reason, Request, StandingRefusal};

use super::{
    address::{DriverAddress, Judgement},
    shared::Posted,
};
use crate::mailbox::{igbvf, registers::Registers};

/// What must be known to refuse the next message, if it is a change of the address. Whoever has one may: the PF listens to
/// the VF ("clear to send"), nothing is under way, and the guest's bucket has a token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prompt {
    pub(crate) effective: MacAddress,
    pub(crate) driver: DriverAddress,
}

/// A change of the address that was refused where it was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Declined {
    pub(crate) mac: MacAddress,
    /// The guest was told that it succeeded.
    pub(crate) silent: bool,
    pub(crate) reason: Reason,
}

impl Prompt {
    /// Answers `posted` if it is refused in any case.
    pub(crate) fn decline(
        &self,
        posted: &Posted,
        standing: &StandingRefusal,
        registers: &mut Registers,
    ) -> Option<Declined> {
        let words = &posted.snapshot.words;
        let Ok(Request::SetMac(mac)) = igbvf::decode(words) else { return None };
        let asks = self.driver.judge(mac, Some(self.effective)) == Judgement::Ask;
        if !asks || !standing.covers(mac) {
            return None;
        }
        let silent = standing.on_denied == OnDenied::Silent && !self.driver.must_tell();
        let reply = igbvf::reply(words[0], silent, true);
        let shown = registers.complete(posted.snapshot.seq, Some(&reply));
        shown.then_some(Declined { mac, silent, reason: standing.reason })
    }
}
