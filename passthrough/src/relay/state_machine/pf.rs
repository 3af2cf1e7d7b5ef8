// SPDX-License-Identifier: Apache-2.0

//! The relay's dealings with the PF: forwarding messages, revoking changes, polling the mailbox.

use std::time::Duration;

use netpolicy::{Change, MacAddress, Request};

use super::{Message, StateMachine};
use crate::{
    channel::mailbox::{
        message::Words,
        register_bits::{ACK_MESSAGE, CTS},
        vf_mailbox::VfMailboxError,
    },
    family::igb::codec as igbvf,
    relay::{
        MAX_CHANGES,
        authority::{Forwarded, Notice},
        disposition::Disposition,
        shared::RelayCommand,
    },
};

impl StateMachine {
    /// Forwards the guest's VTCTRL.RST, within the rate limit.
    pub(super) fn forward_reset(&mut self) {
        if self.reset_due && self.resets.take(self.now()) {
            self.reset_due = false;
            self.mailbox.reset_vf();
        }
    }

    /// Forwards the guest's reset message, always: only the PF's driver turns the queues on again.
    pub(super) fn reset(&mut self, message: Message) {
        let reply = self.mailbox.exchange(
            &Words::new(&[message.word()]),
            igbvf::RESET_REPLY_WORDS,
            self.left(&message),
        );
        match reply.map(|reply| igbvf::parse_reset_reply(&reply)) {
            Ok(Some(mac)) => {
                (self.cts, self.lost) = (true, false);
                self.make_deferred(mac);
                self.ask(message, Request::Reset, mac);
            }
            Ok(None) => self.reset_failed(&message, "the PF sent another response"),
            Err(error) => self.reset_failed(&message, &error.to_string()),
        }
    }

    /// Sends a granted message to the PF.
    pub(super) fn forward(&mut self, message: &Message, request: &Request) {
        let outcome = self
            .effective
            .and_then(|effective| igbvf::encode(request, effective))
            .map_or(Forwarded::Refused, |words| self.send(&words, self.left(message)));
        if let (Request::SetMac(mac), Forwarded::Accepted) = (request, outcome) {
            self.effective = Some(*mac);
        }
        self.note_filters(request, outcome);
        self.authority.notice(Notice::Forwarded { seq: message.seq(), outcome });
        let end = match outcome {
            Forwarded::Accepted => Disposition::Forwarded,
            Forwarded::Refused => Disposition::RefusedByPf,
            Forwarded::Unanswered => Disposition::Unanswered,
        };
        self.answer(message, request, outcome == Forwarded::Accepted, end);
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

    /// Sends one message to the PF. If the PF no longer listens, makes the guest reset.
    pub(super) fn send(&mut self, words: &Words, limit: Duration) -> Forwarded {
        match self.mailbox.exchange(words, 1, limit) {
            Ok(reply) => {
                if reply.first() & CTS == 0 {
                    self.lose();
                }
                if reply.first() & ACK_MESSAGE != 0 { Forwarded::Accepted } else { Forwarded::Refused }
            }
            Err(error) => {
                if let Some(suppressed) = self.log_line() {
                    tracing::warn!(adapter = self.config.adapter, %error, suppressed, "Message not forwarded to the PF");
                }
                if error == VfMailboxError::Gone {
                    // The PF is not the cause: the device was removed, or is being reset.
                    self.cts = false;
                } else {
                    self.lose();
                }
                Forwarded::Unanswered
            }
        }
    }

    pub(super) fn handle(&mut self, command: RelayCommand) {
        match command {
            RelayCommand::EffectiveMac(mac) => self.address_is(mac),
            RelayCommand::MakeGuestReset => self.make_guest_reset(),
            RelayCommand::TakeBack { id, changes } if self.cts => self.take_back(id, changes),
            RelayCommand::TakeBack { id, changes } => {
                let waiting: usize = self.deferred.iter().map(|(_, changes)| changes.len().max(1)).sum();
                if waiting.saturating_add(changes.len()) > MAX_CHANGES {
                    self.authority.notice(Notice::TakenBack { id, failed: changes, deferred: false });
                } else {
                    self.authority.notice(Notice::TakenBack { id, failed: Vec::new(), deferred: true });
                    self.deferred.push_back((id, changes));
                }
            }
        }
    }

    /// Makes a guest with another address learn the new one. A restarting agent also repeats changes that it finds
    /// begun, such as the return to the initial address at a reboot, when the guest may already have that address.
    fn address_is(&mut self, mac: MacAddress) {
        let moved = self.effective.replace(mac).is_some_and(|old| old != mac);
        if moved && self.guest.is_some_and(|guest| guest != mac) && !self.is_resetting() {
            self.make_guest_reset();
        }
    }

    fn make_guest_reset(&mut self) {
        let is_news = self.shared.lock().registers.lost_clear_to_send();
        if is_news {
            self.mailbox.raise_interrupt();
        }
    }

    pub(super) fn make_deferred(&mut self, from_pf: Option<MacAddress>) {
        self.effective = self.effective.or(from_pf);
        for (id, changes) in std::mem::take(&mut self.deferred) {
            self.take_back(id, changes);
        }
    }

    pub(super) fn take_back(&mut self, id: u64, changes: Vec<Change>) {
        let mut failed = Vec::new();
        for change in changes {
            // Once the PF does not answer, waiting for the remaining changes would only stall the guest.
            let words =
                self.effective.filter(|_| self.cts).and_then(|mac| igbvf::encode_change(&change, mac));
            let outcome =
                words.map_or(Forwarded::Refused, |words| self.send(&words, self.config.exchange_limit));
            match (&change, outcome) {
                (Change::ClearUnicast, Forwarded::Accepted) => self.filters = false,
                (Change::AddUnicast(_), Forwarded::Accepted | Forwarded::Unanswered) => self.filters = true,
                _ => {}
            }
            if outcome != Forwarded::Accepted {
                failed.push(change);
            }
        }
        self.authority.notice(Notice::TakenBack { id, failed, deferred: false });
    }

    pub(super) fn look(&mut self) {
        let now = self.now();
        if now < self.next_look {
            return;
        }
        self.next_look = now.saturating_add(self.config.look_period);
        self.shared.looking(now);
        let seen = self.mailbox.poll();
        if seen.gone {
            return;
        }
        let clear_to_send = seen.message.map(|word| word & CTS != 0);
        if self.cts && (seen.resetting || seen.reset_done || clear_to_send == Some(false)) {
            self.lose();
        }
        let mut state = self.shared.lock();
        state.registers.set_pf_resetting(seen.resetting);
        if let (true, Some(word)) = (self.cts, seen.message) {
            state.registers.pf_message(word);
        }
        let tell = self.lost && !seen.resetting;
        if tell {
            // Not earlier: a guest's reset before the end of the PF's reset would fail.
            state.registers.lost_clear_to_send();
        }
        drop(state);
        if tell {
            self.lost = false;
            self.mailbox.raise_interrupt();
        }
    }

    /// Notes that the PF has forgotten this VF.
    pub(super) fn lose(&mut self) {
        if !self.cts {
            return;
        }
        (self.cts, self.lost) = (false, true);
        self.shared.set_permit(None);
        self.next_look = self.now();
        if let Some(suppressed) = self.log_line() {
            tracing::warn!(
                adapter = self.config.adapter,
                suppressed,
                "The PF has lost the VF's state: the guest must reset the VF"
            );
        }
        self.authority.notice(Notice::PfReset);
    }
}
