// SPDX-License-Identifier: Apache-2.0

//! The relay's dealings with the PF: forwarding messages, revoking changes, polling the mailbox.

use std::time::Duration;

use netpolicy::{Change, MacAddress, Request};

use super::{Message, StateMachine};
use crate::{
    channel::mailbox::{
        channel::{PfReply, Response, SendError},
        message::Words,
        vf_mailbox::VfMailboxError,
    },
    family::Step,
    relay::{
        MAX_CHANGES,
        authority::{Forwarded, RelayEvent},
        disposition::Disposition,
        shared::RelayCommand,
    },
};

impl StateMachine {
    /// Forwards the guest's VTCTRL.RST, within the rate limit.
    pub(super) fn forward_reset(&mut self) {
        if self.reset_due && self.resets.take(self.now()) {
            self.reset_due = false;
            self.channel.reset_vf();
        }
    }

    /// Forwards the guest's reset message without a verdict: only the PF's driver turns the queues on again.
    pub(super) fn reset(&mut self, message: Message) {
        match self.channel.reset(self.left(&message)) {
            Ok(reply) => {
                (self.cts, self.lost) = (true, false);
                self.make_deferred(reply.mac);
                self.request(message, Request::Reset, Some(reply));
            }
            Err(error) => self.reset_failed(&message, &error.to_string()),
        }
    }

    /// Responds to a message that no policy decides.
    pub(super) fn protocol(&mut self, message: &Message, step: &Step) {
        let exchange = match step {
            // The guest must reset first.
            _ if !self.cts => return self.answer_plainly(message, Disposition::NotReset),
            Step::Refuse => return self.answer_plainly(message, Disposition::Denied),
            Step::Forward(exchange) => exchange,
        };
        let sent = self.channel.exchange(exchange, self.left(message));
        let reply = match self.sent(sent) {
            (Forwarded::Accepted, Some(reply)) => self.channel.protocol_reply(exchange, &reply),
            (Forwarded::Unanswered, _) => return self.answer_plainly(message, Disposition::Unanswered),
            _ => None,
        };
        match reply {
            Some(words) => {
                self.finish(message, &Response::Protocol(words), Disposition::Forwarded);
            }
            None => self.answer_plainly(message, Disposition::RefusedByPf),
        }
    }

    /// Sends a granted message to the PF.
    pub(super) fn forward(&mut self, message: &Message, request: &Request) {
        let left = self.left(message);
        let (outcome, reply) = self.send(request, left);
        if let (Request::SetMac(mac), Forwarded::Accepted) = (request, outcome) {
            self.effective = Some(*mac);
        }
        self.note_filters(request, outcome);
        self.authority.event(RelayEvent::Forwarded { seq: message.seq(), outcome });
        let end = match outcome {
            Forwarded::Accepted => Disposition::Forwarded,
            Forwarded::Refused => Disposition::RefusedByPf,
            Forwarded::Unanswered => Disposition::Unanswered,
        };
        self.answer_with(message, request, outcome == Forwarded::Accepted, reply, end);
    }

    pub(super) fn note_filters(&mut self, request: &Request, outcome: Forwarded) {
        match (request, outcome) {
            (Request::AddUnicastFilter(_), Forwarded::Accepted | Forwarded::Unanswered) => {
                self.filters = true
            }
            (Request::ClearUnicastFilters, Forwarded::Accepted) => self.filters = false,
            _ => {}
        }
    }

    /// Sends a request to the PF, and returns its reply if there is one.
    pub(super) fn send(&mut self, request: &Request, limit: Duration) -> (Forwarded, Option<Words>) {
        let Some(effective) = self.effective else { return (Forwarded::Refused, None) };
        let sent = self.channel.send(request, effective, limit);
        let (outcome, reply) = self.sent(sent);
        (outcome, reply.map(|reply| reply.words))
    }

    /// Judges the PF's reply. If the PF no longer listens, makes the guest reset.
    fn sent(&mut self, sent: Result<PfReply, SendError>) -> (Forwarded, Option<PfReply>) {
        match sent {
            Ok(reply) => {
                if !reply.outcome.clear_to_send {
                    self.lose();
                }
                let outcome = if reply.outcome.accepted { Forwarded::Accepted } else { Forwarded::Refused };
                (outcome, Some(reply))
            }
            Err(SendError::NoMessage) => (Forwarded::Refused, None),
            Err(error) => {
                if let Some(suppressed) = self.log_line() {
                    tracing::warn!(adapter = self.config.adapter, %error, suppressed, "Message not forwarded to the PF");
                }
                if error == SendError::Mailbox(VfMailboxError::Gone) {
                    // The PF is not the cause: the device was removed, or is being reset.
                    self.cts = false;
                } else {
                    self.lose();
                }
                (Forwarded::Unanswered, None)
            }
        }
    }

    pub(super) fn handle(&mut self, command: RelayCommand) {
        match command {
            RelayCommand::EffectiveMac(mac) => self.address_is(mac),
            RelayCommand::MakeGuestReset => self.make_guest_reset(),
            RelayCommand::Revoke { id, changes } if self.cts => self.revoke(id, changes),
            RelayCommand::Revoke { id, changes } => {
                let waiting: usize = self.deferred.iter().map(|(_, changes)| changes.len().max(1)).sum();
                if waiting.saturating_add(changes.len()) > MAX_CHANGES {
                    self.authority.event(RelayEvent::Revoked { id, failed: changes, deferred: false });
                } else {
                    self.authority.event(RelayEvent::Revoked { id, failed: Vec::new(), deferred: true });
                    self.deferred.push_back((id, changes));
                }
            }
        }
    }

    /// Sets the effective address, and makes a guest with another address reset. A guest that already has this
    /// address is left alone: a restarting agent repeats changes that were under way, such as the return to the
    /// initial address at a reboot.
    fn address_is(&mut self, mac: MacAddress) {
        let moved = self.effective.replace(mac).is_some_and(|old| old != mac);
        if moved && self.guest.is_some_and(|guest| guest != mac) && !self.is_resetting() {
            self.make_guest_reset();
        }
    }

    fn make_guest_reset(&mut self) {
        let is_news = self.shared.lock().registers.lost_clear_to_send();
        if is_news {
            self.channel.raise_interrupt();
        }
    }

    pub(super) fn make_deferred(&mut self, from_pf: Option<MacAddress>) {
        self.effective = self.effective.or(from_pf);
        for (id, changes) in std::mem::take(&mut self.deferred) {
            self.revoke(id, changes);
        }
    }

    pub(super) fn revoke(&mut self, id: u64, changes: Vec<Change>) {
        let mut failed = Vec::new();
        for change in changes {
            // If the PF no longer answers, waiting for the remaining changes would only stall the guest.
            let outcome = match self.effective.filter(|_| self.cts) {
                Some(mac) => {
                    let sent = self.channel.send_change(&change, mac, self.config.exchange_limit);
                    self.sent(sent).0
                }
                None => Forwarded::Refused,
            };
            match (&change, outcome) {
                (Change::ClearUnicast, Forwarded::Accepted) => self.filters = false,
                (Change::AddUnicast(_), Forwarded::Accepted | Forwarded::Unanswered) => self.filters = true,
                _ => {}
            }
            if outcome != Forwarded::Accepted {
                failed.push(change);
            }
        }
        self.authority.event(RelayEvent::Revoked { id, failed, deferred: false });
    }

    pub(super) fn look(&mut self) {
        let now = self.now();
        if now < self.next_look {
            return;
        }
        self.next_look = now.saturating_add(self.config.look_period);
        self.shared.looking(now);
        let seen = self.channel.poll();
        if seen.gone {
            return;
        }
        if self.cts
            && (seen.resetting || seen.reset_done || seen.message.is_some_and(|one| !one.clear_to_send))
        {
            self.lose();
        }
        let mut state = self.shared.lock();
        state.registers.set_pf_resetting(seen.resetting);
        if let (true, Some(message)) = (self.cts, seen.message) {
            state.registers.pf_message(message.word);
        }
        let tell = self.lost && !seen.resetting;
        if tell {
            // Wait for the end of the PF's reset, because a guest's reset before that would fail.
            state.registers.lost_clear_to_send();
        }
        drop(state);
        if tell {
            self.lost = false;
            self.channel.raise_interrupt();
        }
    }

    /// Notes that the PF has forgotten this VF.
    pub(super) fn lose(&mut self) {
        if !self.cts {
            return;
        }
        (self.cts, self.lost) = (false, true);
        self.shared.set_permit(None, self.effective);
        self.next_look = self.now();
        if let Some(suppressed) = self.log_line() {
            tracing::warn!(
                adapter = self.config.adapter,
                suppressed,
                "The PF has lost the VF's state: the guest must reset the VF"
            );
        }
        self.authority.event(RelayEvent::PfReset);
    }
}
