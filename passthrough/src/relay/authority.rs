// SPDX-License-Identifier: Apache-2.0

//! What the relay and its authority (the agent, behind the vmm's control channel) say to each other.

use netpolicy::{Change, MacAddress, OnDenied, Reason, Request};
use serde::{Deserialize, Serialize};

/// Who decides. Neither call may block: they come from the relay's thread (a notice also from the caller of
/// [`Relay::take_back`](super::Relay::take_back)).
pub trait Authority: Send + Sync {
    /// Passes a question on. The answer comes by [`Relay::verdict`](super::Relay::verdict).
    ///
    /// # Errors
    /// [`Unreachable`] if nobody is there to be asked: the request is refused at once.
    fn ask(&self, question: Question) -> Result<(), Unreachable>;

    /// Takes a notice. It must reach the agent, if need be after it is back; the number of notices per second is
    /// bounded by the relay.
    fn notice(&self, notice: Notice);
}

/// The authority is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The agent is not connected: requests are refused until it is back")]
pub struct Unreachable;

/// May this VF do that?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Names this message of this VF; grows, never repeats while the VF is assigned.
    pub seq: u64,
    /// What the guest asks for. For [`Request::Reset`] (which is always forwarded, and was) the verdict's effective
    /// address is what counts.
    pub request: Request,
}

/// The answer to a [`Question`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Of the question.
    pub seq: u64,
    /// The VF's effective address *after* this decision.
    pub effective_mac: MacAddress,
    /// The decision.
    pub decision: Decision,
}

/// What to do with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Acknowledge it.
    Grant {
        /// Whether the PF must hear it.
        how: How,
    },
    /// Refuse it. The PF does not hear of it.
    Refuse {
        /// Whether the guest's driver is to report an error.
        tell: OnDenied,
        /// Why, for log lines.
        reason: Reason,
    },
}

/// How a granted message is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// It is (by netlink), or nothing is to do: only acknowledge it.
    Local,
    /// Send it, re-encoded, to the real mailbox, and answer as the PF does. [`Notice::Forwarded`] follows.
    Forward,
}

/// Something the agent must know. Kept by the vmm until the agent has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "notice", rename_all = "snake_case")]
pub enum Notice {
    /// The question `seq` was given up; the guest was refused or has reset. A commit that was or will be made for it
    /// is to be reverted.
    Cancelled {
        /// Of the question.
        seq: u64,
        /// What was asked.
        request: Request,
        /// Why.
        why: Cancelled,
    },
    /// A granted message was sent to the PF.
    Forwarded {
        /// Of the question.
        seq: u64,
        /// What the PF said.
        outcome: Forwarded,
    },
    /// The relay itself refused messages, without a question.
    Refused {
        /// What the last of them asked; None where it had no meaning.
        request: Option<Request>,
        /// Word 0 of the last of them.
        word: u32,
        /// Why.
        reason: Reason,
        /// How many since the last notice with this reason.
        count: u64,
    },
    /// The relay refused a change of the address without a question, by the authority's
    /// [standing refusal](super::Relay::set_standing_refusal).
    Declined {
        /// The address that was asked for.
        mac: MacAddress,
        /// As the refusal said.
        reason: Reason,
        /// The guest was told that it succeeded.
        silent: bool,
    },
    /// The guest now believes in this address: the relay acknowledged it without a question (it is the effective one), or
    /// told of the success that a silent refusal pretends, which it does not always.
    GuestMac {
        /// The address.
        mac: MacAddress,
    },
    /// The PF was reset, went down or no longer answers: its VFs have lost what it does not remember. The guest is made
    /// to reset.
    PfReset,
    /// Outcome of [`Relay::take_back`](super::Relay::take_back).
    TakenBack {
        /// The caller's number.
        id: u64,
        /// What the PF did not confirm; empty if all was taken back.
        failed: Vec<Change>,
        /// The PF does not listen to this VF at the moment, whose queues are off. The changes are made right after
        /// the guest's next reset message, before it is answered; another notice with this id follows then.
        deferred: bool,
    },
}

/// Marks the numbers of questions that a relay asks by itself. Those of a guest's messages count up from zero.
pub(crate) const OWN_QUESTION: u64 = 1 << 63;

/// Why a question was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cancelled {
    /// No verdict in time: refused as [`Reason::AuthorityUnreachable`].
    Deadline,
    /// The guest reset its VF meanwhile.
    GuestReset,
    /// The relay ended.
    Stopped,
    /// Nobody waits for it: the relay had asked by itself, for a guest that was refused in the authority's absence.
    Withdrawn,
}

/// What became of a forwarded message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Forwarded {
    /// The PF acknowledged it.
    Accepted,
    /// The PF refused it.
    Refused,
    /// The PF did not answer: it may have carried it out. The guest was refused and must reset.
    Unanswered,
}
