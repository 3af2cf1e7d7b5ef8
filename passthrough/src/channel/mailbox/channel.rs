// SPDX-License-Identifier: Apache-2.0

//! The mailbox of a VF as a channel: it decodes guests' messages, encodes responses, and sends requests and changes to
//! the PF.
//!
//! Users of this channel interpret no words. The family's codec translates, the registers show the responses to the
//! guest, and [`VfMailbox`] exchanges messages with the PF.

use std::{sync::Arc, time::Duration};

use netpolicy::{Change, MacAddress, Request};

use super::{
    message::Words,
    register_bits::CTS,
    registers::{Registers, Snapshot},
    vf_mailbox::{Clock, Observed, VfMailbox, VfMailboxError},
};
use crate::{
    family::{Context, Exchange, Family, Incoming, Malformed, Outcome, ResetReply, Session},
    hardware::VfHardware,
};

/// A response to a message of the guest.
#[derive(Clone, Copy, Debug)]
pub enum Response {
    /// An acknowledgement without a reply, for a message that is itself marked as an answer.
    Acknowledgement,
    /// The result of a request.
    Result {
        /// The result.
        outcome: Outcome,
        /// The PF's reply, if the request was forwarded.
        from_pf: Option<Words>,
    },
    /// The reset message was carried out.
    Reset {
        /// The VF's address, if it has one.
        mac: Option<MacAddress>,
        /// The PF's reply.
        from_pf: Option<ResetReply>,
    },
    /// The reset message was not carried out. The driver keeps its address and tries again.
    ResetFailed,
    /// The reply to a protocol message.
    Protocol(Words),
}

/// An encoded [`Response`].
#[derive(Clone, Copy, Debug)]
pub struct Reply {
    words: Option<Words>,
    ends_reset: bool,
}

impl Reply {
    /// Encodes the response to a message of this family.
    #[must_use]
    pub fn new(family: &Family, message: &Snapshot, response: &Response) -> Self {
        let codec = family.codec;
        let words = match response {
            Response::Acknowledgement => None,
            Response::Result { outcome, from_pf } => {
                Some(codec.reply(&message.words, *outcome, from_pf.as_ref()))
            }
            Response::Reset { mac, from_pf } => Some(codec.reset_reply(*mac, *from_pf)),
            Response::ResetFailed => Some(Words::new(&[family.lost.first])),
            Response::Protocol(words) => Some(*words),
        };
        Self { words, ends_reset: matches!(response, Response::Reset { .. }) }
    }

    /// Shows the reply to the guest. Returns false, and shows nothing, if the guest has reset its VF since it posted
    /// message `seq`.
    pub fn show(&self, registers: &mut Registers, seq: u64) -> bool {
        match &self.words {
            Some(words) if self.ends_reset => registers.complete_reset(seq, words),
            words => registers.complete(seq, words.as_ref()),
        }
    }
}

/// The PF's reply to a message.
#[derive(Clone, Copy, Debug)]
pub struct PfReply {
    /// Whether the PF acknowledged the message, and whether it listens to the VF.
    pub outcome: Outcome,
    /// The whole reply.
    pub words: Words,
}

/// The reason why a request or change has no usable reply of the PF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The family has no message for the request or change. Nothing was sent.
    #[error("The VF's driver has no message for this")]
    NoMessage,
    /// The PF did not answer.
    #[error(transparent)]
    Mailbox(#[from] VfMailboxError),
    /// The PF's reply to a reset message has another form.
    #[error("the PF sent another response")]
    OtherReply,
}

/// The VF's end of the channel. One thread owns it: see [`VfMailbox`].
pub struct MailboxChannel {
    family: &'static Family,
    mailbox: VfMailbox,
    clock: Arc<dyn Clock>,
    session: Session,
    /// The last accepted message whose refusal [disables](crate::family::Codec::refusal_disables) something, since the
    /// last reset message.
    accepted: Option<Exchange>,
}

impl MailboxChannel {
    /// The channel of this VF. Nothing is written yet.
    pub fn new(family: &'static Family, hardware: Arc<dyn VfHardware>, clock: Arc<dyn Clock>) -> Self {
        let mailbox = VfMailbox::new(hardware, family, clock.clone());
        Self { family, mailbox, clock, session: Session::default(), accepted: None }
    }

    /// The family of the VF.
    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// The protocol agreement between guest and PF since the last reset message.
    pub fn session(&self) -> Session {
        self.session
    }

    /// Decodes a message of the guest.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn decode(&self, message: &Snapshot) -> Result<Incoming, Malformed> {
        self.family.codec.decode(&message.words, self.session)
    }

    /// Resets the VF: its queues are off, and the PF does not listen until the next reset message.
    pub fn reset_vf(&mut self) {
        self.mailbox.reset_vf();
    }

    /// Drops the latched state of the mailbox, after a reset of the device from elsewhere.
    pub fn forget(&mut self) {
        self.mailbox.forget();
    }

    /// Polls for events of the PF's own.
    pub fn poll(&mut self) -> Observed {
        self.mailbox.poll()
    }

    /// Raises the VF's mailbox interrupt, if the guest has given it a vector.
    pub fn raise_interrupt(&mut self) {
        self.mailbox.raise_interrupt();
    }

    /// Sends the reset message, which makes the PF listen and turn the queues on. A new session begins.
    ///
    /// # Errors
    /// [`SendError::Mailbox`], after little more than `limit` at the latest, or [`SendError::OtherReply`].
    pub fn reset(&mut self, limit: Duration) -> Result<ResetReply, SendError> {
        self.session = Session::default();
        self.accepted = None;
        let reply = self.mailbox.exchange(&self.family.codec.reset(), limit)?;
        let parsed = self.family.codec.parse_reset(&reply).ok_or(SendError::OtherReply)?;
        // A message from before the reset may lack "clear to send", which the reset has restored.
        self.mailbox.forget_message();
        Ok(parsed)
    }

    /// Sends a request. `effective` is the VF's effective address.
    ///
    /// # Errors
    /// [`SendError::NoMessage`], or [`SendError::Mailbox`] after `limit`.
    pub fn send(
        &mut self,
        request: &Request,
        effective: MacAddress,
        limit: Duration,
    ) -> Result<PfReply, SendError> {
        let context = Context { effective, session: self.session };
        let exchange = self.family.codec.encode(request, context).ok_or(SendError::NoMessage)?;
        self.exchange(&exchange, limit)
    }

    /// Sends the message that makes a change, after an agreement about the protocol if it needs one. `effective` is the
    /// VF's effective address.
    ///
    /// # Errors
    /// [`SendError::NoMessage`], or [`SendError::Mailbox`] after `limit`.
    pub fn send_change(
        &mut self,
        change: &Change,
        effective: MacAddress,
        limit: Duration,
    ) -> Result<PfReply, SendError> {
        let end = self.clock.now().saturating_add(limit);
        for agreement in self.family.codec.before_change(change, self.session) {
            let reply = self.exchange(&agreement, self.left(end))?;
            if reply.outcome.accepted {
                let _ = self.protocol_reply(&agreement, &reply);
                break;
            }
        }
        let context = Context { effective, session: self.session };
        let exchange = self.family.codec.encode_change(change, context).ok_or(SendError::NoMessage)?;
        self.exchange(&exchange, self.left(end))
    }

    fn left(&self, end: Duration) -> Duration {
        end.saturating_sub(self.clock.now())
    }

    /// Sends a protocol message, or another one with its canonical words.
    ///
    /// # Errors
    /// [`SendError::Mailbox`] after `limit`.
    pub fn exchange(&mut self, exchange: &Exchange, limit: Duration) -> Result<PfReply, SendError> {
        let end = self.clock.now().saturating_add(limit);
        let words = self.mailbox.exchange(exchange, limit)?;
        let outcome = Outcome {
            accepted: self.family.codec.carried_out(&exchange.words, &words),
            clear_to_send: words.first() & CTS != 0,
        };
        if self.family.codec.refusal_disables(&exchange.words) {
            match self.accepted {
                _ if outcome.accepted => self.accepted = Some(*exchange),
                // Only the PF's state matters: the guest gets the response to its own message.
                Some(last) if outcome.clear_to_send => {
                    if let Err(error) = self.mailbox.exchange(&last, self.left(end)) {
                        tracing::debug!(%error, "Last accepted message not repeated");
                    }
                }
                _ => {}
            }
        }
        Ok(PfReply { outcome, words })
    }

    /// The reply that the guest sees to a protocol message that the PF accepted; None if it must be nacked.
    pub fn protocol_reply(&mut self, message: &Exchange, from_pf: &PfReply) -> Option<Words> {
        self.family.codec.protocol_reply(&message.words, &from_pf.words, &mut self.session)
    }
}
