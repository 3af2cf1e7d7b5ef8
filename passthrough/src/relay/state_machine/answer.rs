// SPDX-License-Identifier: Apache-2.0

//! Replies to the guest, with their records, counters and log lines.

use netpolicy::{MacAddress, Reason, Request};

use super::{Message, StateMachine};
use crate::{
    channel::mailbox::{
        channel::{Reply, Response},
        message::Words,
    },
    family::{Outcome, ResetReply},
    relay::{authority::RelayEvent, disposition::Disposition},
};

impl StateMachine {
    /// Ends a reset message that failed. The driver keeps its address, logs "PF still resetting" and tries again after
    /// its next link check. A nack would make it forget its address.
    pub(super) fn reset_failed(&mut self, message: &Message, cause: &str) {
        if let Some(suppressed) = self.log_line() {
            tracing::warn!(adapter = self.config.adapter, cause, suppressed, "VF reset not completed");
        }
        self.cts = false;
        self.finish(message, &Response::ResetFailed, Disposition::Failed);
    }

    /// Denies a request without a verdict, because the authority is away or late. A reset succeeds, because the PF
    /// has already carried it out and its reply has the address.
    pub(super) fn unreachable(
        &mut self,
        message: &Message,
        request: &Request,
        from_pf: Option<ResetReply>,
        end: Disposition,
    ) {
        if *request == Request::Reset {
            let known = from_pf.and_then(|reply| reply.mac).or(self.effective);
            self.answer_reset(message, known, from_pf, end);
            if let Some(mac) = known {
                self.note_guest_mac(mac);
            }
            return;
        }
        self.undecided.keep(request, self.now());
        if let Some(suppressed) = self.log_line() {
            tracing::warn!(
                adapter = self.config.adapter,
                request = request.name(),
                reason = %Reason::AuthorityUnreachable,
                suppressed,
                "VF request denied"
            );
        }
        self.answer(message, request, false, end);
    }

    /// Nacks a message without asking the authority: it is malformed, unknown or over a rate.
    pub(super) fn refuse(
        &mut self,
        message: &Message,
        request: Option<Request>,
        reason: Reason,
        end: Disposition,
    ) {
        if let Some(suppressed) = self.log_line() {
            let word = format_args!("{:#010x}", message.word());
            tracing::info!(adapter = self.config.adapter, %word, %reason, suppressed, "VF message rejected");
        }
        self.refusals.add(reason, message.word(), request.clone());
        match request {
            Some(request) => self.answer(message, &request, false, end),
            None => self.answer_plainly(message, end),
        }
    }

    pub(super) fn refuse_locally(&mut self, message: &Message, reason: Reason, end: Disposition) {
        if message.is_reset() {
            self.refusals.add(reason, message.word(), Some(Request::Reset));
            self.reset_failed(message, "too many resets");
        } else {
            self.refuse(message, message.request().cloned(), reason, end);
        }
    }

    /// Nacks a message that is not a request.
    pub(super) fn answer_plainly(&mut self, message: &Message, end: Disposition) {
        let outcome = Outcome { accepted: false, clear_to_send: self.cts };
        self.finish(message, &Response::Result { outcome, from_pf: None }, end);
    }

    /// Replies to any request but a reset.
    pub(super) fn answer(&mut self, message: &Message, request: &Request, accepted: bool, end: Disposition) {
        self.answer_with(message, request, accepted, None, end);
    }

    /// Replies to any request but a reset. `from_pf` is the PF's reply, if the message was forwarded.
    pub(super) fn answer_with(
        &mut self,
        message: &Message,
        request: &Request,
        accepted: bool,
        from_pf: Option<Words>,
        end: Disposition,
    ) {
        let outcome = Outcome { accepted, clear_to_send: self.cts };
        let shown = self.finish(message, &Response::Result { outcome, from_pf }, end);
        if let (true, Request::SetMac(mac)) = (shown, request) {
            self.driver.answered(accepted);
            match end {
                // The caller notes the guest address.
                Disposition::Equal => {}
                // The authority cannot know whether the guest saw success: right after a reset, the relay nacks
                // even a silent denial.
                Disposition::DeniedSilently => self.note_guest_mac(*mac),
                _ if accepted => self.guest = Some(*mac),
                _ => {}
            }
        }
    }

    pub(super) fn answer_reset(
        &mut self,
        message: &Message,
        mac: Option<MacAddress>,
        from_pf: Option<ResetReply>,
        end: Disposition,
    ) {
        self.effective = mac.or(self.effective);
        self.undecided.forget();
        if self.finish(message, &Response::Reset { mac, from_pf }, end) {
            self.driver.reset(mac);
        }
    }

    /// Notes a guest address that the authority cannot infer from its verdicts, and reports it.
    pub(super) fn note_guest_mac(&mut self, mac: MacAddress) {
        if self.guest != Some(mac) {
            self.guest = Some(mac);
            self.authority.event(RelayEvent::GuestMac { mac });
        }
    }

    /// Gives the response to the guest, unless the guest has reset. Returns whether the guest sees it.
    pub(super) fn finish(&mut self, message: &Message, response: &Response, end: Disposition) -> bool {
        let reply = Reply::new(self.channel.family(), &message.posted.snapshot, response);
        let time = self.now().saturating_sub(message.posted.at);
        let mut state = self.shared.lock();
        let shown = reply.show(&mut state.registers, message.seq());
        state.stats.message(message.name(), if shown { end } else { Disposition::Dropped });
        if shown {
            state.stats.round_trips.add(time);
        }
        shown
    }

    pub(super) fn log_refusal(&mut self, request: &str, reason: Reason, silent: bool) {
        if let Some(suppressed) = self.log_line() {
            let adapter = &self.config.adapter;
            tracing::info!(adapter, request, %reason, silent, suppressed, "VF request denied");
        }
    }

    pub(super) fn log_line(&mut self) -> Option<u64> {
        let allowed = self.log.allow(self.now());
        if allowed.is_none() {
            let mut state = self.shared.lock();
            state.stats.suppressed = state.stats.suppressed.saturating_add(1);
        }
        allowed
    }
}
