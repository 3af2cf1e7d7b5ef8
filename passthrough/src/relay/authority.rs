// SPDX-License-Identifier: Apache-2.0

//! The messages between the relay and its authority (the agent, behind the vmm's control channel).

use netpolicy::{Change, MacAddress, OnDenied, Reason, Request};
use serde::{Deserialize, Serialize};

/// The authority that decides about a guest's requests. Neither call may block, because the relay's thread makes
/// them. The caller of [`Relay::revoke`](super::Relay::revoke) sends events, too.
pub trait Authority: Send + Sync {
    /// Passes a request on. The verdict comes by [`Relay::verdict`](super::Relay::verdict).
    ///
    /// # Errors
    /// [`Unreachable`] if the authority is away: the relay denies the request at once.
    fn request(&self, guest_request: GuestRequest) -> Result<(), Unreachable>;

    /// Takes an event. It must reach the agent, even if the agent is away for some time. The relay bounds the
    /// number of events per second.
    fn event(&self, event: RelayEvent);
}

/// The authority is not connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The agent is not connected: requests are denied until it reconnects")]
pub struct Unreachable;

/// A guest's request, for the authority's verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestRequest {
    /// Number of this message of this VF. It grows and never repeats while the VF is assigned.
    pub seq: u64,
    /// The guest's request. The relay has already forwarded a [`Request::Reset`]: only the effective address in its
    /// verdict matters.
    pub request: Request,
}

/// The authority's verdict on a [`GuestRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Number of the request.
    pub seq: u64,
    /// The VF's effective address *after* this decision.
    pub effective_mac: MacAddress,
    /// The decision.
    pub decision: Decision,
}

/// The action that the relay takes on a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// Acknowledge the message.
    Grant {
        /// Whether the PF must hear the message.
        how: How,
    },
    /// Refuse the message. The PF does not hear it.
    Refuse {
        /// Whether the guest's driver sees an error.
        tell: OnDenied,
        /// The reason, for log lines.
        reason: Reason,
    },
}

/// The way in which a granted message takes effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// It has taken effect by netlink, or needs no change: only acknowledge it.
    Local,
    /// Send it, re-encoded, to the real mailbox, and give the PF's answer to the guest. [`RelayEvent::Forwarded`] follows.
    Forward,
}

/// An event of the relay. The vmm keeps it until the agent confirms it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "notice", rename_all = "snake_case", deny_unknown_fields)]
pub enum RelayEvent {
    /// The relay cancelled the request `seq`. The agent must roll back a commit that it made, or will make, for
    /// this request.
    Cancelled {
        /// Number of the request.
        seq: u64,
        /// The request.
        request: Request,
        /// The reason for the cancellation.
        why: Cancelled,
    },
    /// The relay sent a granted message to the PF.
    Forwarded {
        /// Number of the request.
        seq: u64,
        /// The PF's answer.
        outcome: Forwarded,
    },
    /// The relay rejected messages by itself, without a request to the authority.
    Refused {
        /// The last rejected request; None if the message had no meaning.
        request: Option<Request>,
        /// Word 0 of the last rejected message.
        word: u32,
        /// The reason.
        reason: Reason,
        /// Number of rejections since the last event with this reason.
        count: u64,
    },
    /// The relay denied a change of the address without a request to the authority, by the authority's [standing
    /// refusal](super::Relay::set_standing_refusal).
    Declined {
        /// The requested address.
        mac: MacAddress,
        /// The reason in the standing refusal.
        reason: Reason,
        /// Whether the relay reported success to the guest.
        silent: bool,
    },
    /// The guest now uses this address. Either it is the effective address, which the relay acknowledged by itself,
    /// or a silent denial reported success to the guest. Not every silent denial does that.
    GuestMac {
        /// The address.
        mac: MacAddress,
    },
    /// The PF was reset, went down or no longer answers: its VFs have lost the settings that it does not remember. The
    /// relay makes the guest reset.
    PfReset,
    /// The result of [`Relay::revoke`](super::Relay::revoke).
    #[serde(rename = "taken_back")]
    Revoked {
        /// The caller's number.
        id: u64,
        /// Changes that the PF did not confirm; empty after success.
        failed: Vec<Change>,
        /// The PF does not listen to this VF at the moment, and the VF's queues are off. The relay makes the changes
        /// right after the guest's next reset message, before it answers it. Another event with this id then follows.
        deferred: bool,
    },
}

/// Marks the numbers of requests that a relay makes by itself. The numbers of a guest's messages count up from zero.
pub(crate) const OWN_REQUEST: u64 = 1 << 63;

/// The reason why the relay cancelled a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cancelled {
    /// No verdict came in time: the relay denied the request as [`Reason::AuthorityUnreachable`].
    Deadline,
    /// The guest reset its VF meanwhile.
    GuestReset,
    /// The relay ended.
    Stopped,
    /// The relay withdrew a retry of its own. It retries requests that it denied while the authority was away.
    Withdrawn,
}

/// The result of a forwarded message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Forwarded {
    /// The PF acknowledged it.
    Accepted,
    /// The PF refused it.
    Refused,
    /// The PF did not answer, and may have carried out the message. The guest gets an error, and must reset its VF.
    Unanswered,
}
