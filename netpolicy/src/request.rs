// SPDX-License-Identifier: Apache-2.0

//! What a VF asks for, what is answered, and the changes that follow.

use std::{fmt, num::NonZeroU32};

use serde::{Deserialize, Serialize};

use crate::{
    mac::{MacAddress, MacPattern},
    policy::{OnDenied, Setting, Source},
    vlan::{AccessVlan, VlanId},
};

/// What a VF's driver asks for in its mailbox, decoded but not yet believed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// VF_RESET: the driver starts over and takes the effective address from the reply.
    Reset,
    /// Another effective address.
    SetMac(MacAddress),
    /// Forget all further unicast addresses.
    ClearUnicastFilters,
    /// A further unicast address.
    AddUnicastFilter(MacAddress),
    /// The multicast addresses to receive, instead of those before.
    SetMulticast {
        /// How many the message claims.
        count: u16,
        /// The hashes that it carries (82576: 12 bits each).
        hashes: Vec<u16>,
    },
    /// Join or leave a VLAN.
    SetVlan {
        /// As in the message; 0 is the priority tag.
        vid: u16,
        /// Join, else leave.
        add: bool,
    },
    /// The longest frame to receive, in bytes with header, tag and checksum: see [`Mtu::max_frame`](crate::Mtu::max_frame).
    SetMaxFrame(u32),
    /// Frames that are not addressed to the VF.
    SetPromiscuous(PromiscuousMode),
    /// A message that has no meaning here.
    Unknown {
        /// Bits 15:0 of the first word.
        opcode: u16,
    },
}

impl Request {
    /// The request's name, as in JSON.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::SetMac(_) => "set_mac",
            Self::ClearUnicastFilters => "clear_unicast_filters",
            Self::AddUnicastFilter(_) => "add_unicast_filter",
            Self::SetMulticast { .. } => "set_multicast",
            Self::SetVlan { .. } => "set_vlan",
            Self::SetMaxFrame(_) => "set_max_frame",
            Self::SetPromiscuous(_) => "set_promiscuous",
            Self::Unknown { .. } => "unknown",
        }
    }
}

/// Frames received though they are not addressed to the VF.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromiscuousMode {
    /// All multicast frames.
    pub multicast: bool,
    /// All unicast frames.
    pub unicast: bool,
}

impl PromiscuousMode {
    /// Only what is addressed to the VF.
    pub const OFF: Self = Self { multicast: false, unicast: false };
}

impl fmt::Display for PromiscuousMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.multicast, self.unicast) {
            (false, false) => "off",
            (true, false) => "multicast",
            (false, true) => "unicast",
            (true, true) => "multicast+unicast",
        })
    }
}

/// One step of programming the adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Reset the VF's queues.
    Reset,
    /// The effective address.
    SetMac(MacAddress),
    /// Add a further unicast address.
    AddUnicast(MacAddress),
    /// Remove all further unicast addresses.
    ClearUnicast,
    /// Receive these multicast hashes, at most 30, and no others.
    SetMulticast(Vec<u16>),
    /// Join a VLAN.
    JoinVlan(VlanId),
    /// Leave a VLAN. Harmless when it was not joined.
    LeaveVlan(VlanId),
    /// The longest frame to receive in bytes, with header, tag and checksum.
    SetMaxFrame(u16),
    /// Frames that are not addressed to the VF.
    SetPromiscuous(PromiscuousMode),
    /// The tag that the adapter adds and strips; `None` for no tag.
    SetPortVlan(Option<AccessVlan>),
    /// Drop sent frames of other source addresses.
    SetSpoofCheck(bool),
    /// Let the PF driver believe the VF.
    SetTrust(bool),
    /// Highest sending rate in Mbit/s; `None` for no bound.
    SetMaxTxRate(Option<NonZeroU32>),
    /// The link as the VF sees it.
    SetLink(LinkState),
}

/// Who makes a [`Change`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// The agent, through the PF's driver.
    Pf,
    /// The VF's relay, by a message to the PF's driver.
    Mailbox,
}

impl Change {
    /// Who makes it: PF drivers offer no other way.
    #[must_use]
    pub const fn route(&self) -> Route {
        match self {
            Self::SetMac(_)
            | Self::SetPortVlan(_)
            | Self::SetSpoofCheck(_)
            | Self::SetTrust(_)
            | Self::SetMaxTxRate(_)
            | Self::SetLink(_) => Route::Pf,
            Self::Reset
            | Self::AddUnicast(_)
            | Self::ClearUnicast
            | Self::SetMulticast(_)
            | Self::JoinVlan(_)
            | Self::LeaveVlan(_)
            | Self::SetMaxFrame(_)
            | Self::SetPromiscuous(_) => Route::Mailbox,
        }
    }

    /// Whether PF drivers take the message only from a trusted VF (one whose address the administrator set, as
    /// always here): the agent switches trust on around it.
    #[must_use]
    pub const fn needs_trust(&self) -> bool {
        match self {
            Self::AddUnicast(_) | Self::ClearUnicast => true,
            Self::SetPromiscuous(mode) => mode.unicast,
            _ => false,
        }
    }
}

/// The link as the VF sees it (IFLA_VF_LINK_STATE).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// As the PF's.
    #[default]
    Auto,
    /// Down.
    Down,
}

/// Why a request is refused. The names are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The policy rejects every change of the address.
    MacChangesRejected,
    /// The policy's list does not have the address.
    MacNotAllowed,
    /// Another port of the switch has the address.
    MacInUse,
    /// A group address or zero.
    MacInvalid,
    /// The policy does not have the VLAN.
    VlanNotAllowed,
    /// The policy rejects it.
    PromiscuousRejected,
    /// More than the policy's number.
    LimitExceeded,
    /// Longer frames than the policy's MTU.
    MtuExceeded,
    /// A message that has no meaning here.
    UnknownMessage,
    /// A known message with impossible contents.
    MalformedMessage,
    /// Too many messages.
    RateLimited,
    /// The port is blocked.
    PortBlocked,
    /// Allowed, but the adapter refused.
    CommitFailed,
    /// The agent did not answer in time.
    AuthorityUnreachable,
}

impl Reason {
    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::MacChangesRejected => "mac_changes_rejected",
            Self::MacNotAllowed => "mac_not_allowed",
            Self::MacInUse => "mac_in_use",
            Self::MacInvalid => "mac_invalid",
            Self::VlanNotAllowed => "vlan_not_allowed",
            Self::PromiscuousRejected => "promiscuous_rejected",
            Self::LimitExceeded => "limit_exceeded",
            Self::MtuExceeded => "mtu_exceeded",
            Self::UnknownMessage => "unknown_message",
            Self::MalformedMessage => "malformed_message",
            Self::RateLimited => "rate_limited",
            Self::PortBlocked => "port_blocked",
            Self::CommitFailed => "commit_failed",
            Self::AuthorityUnreachable => "authority_unreachable",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The setting that decided and the level it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecidedBy {
    /// The setting.
    pub setting: Setting,
    /// The level.
    pub source: Source,
}

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// Why.
    pub reason: Reason,
    /// By which setting; none for what no policy allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decided_by: Option<DecidedBy>,
    /// What the device has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub old: Option<String>,
    /// What was asked for.
    pub requested: String,
    /// For people: the port that has the address, for example.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// The answer to a change of the address that does not depend on anything but the address: whoever knows it can refuse
/// without asking, and must still tell. It is valid until another one, or none, takes its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandingRefusal {
    /// Addresses about which somebody has to be asked. The effective one never needs to be in it.
    pub unless: Vec<MacPattern>,
    /// Why all others are refused.
    pub reason: Reason,
    /// How the guest is told.
    pub on_denied: OnDenied,
}

impl StandingRefusal {
    /// Whether a change to `mac`, which is not the effective address, is refused in any case.
    #[must_use]
    pub fn covers(&self, mac: MacAddress) -> bool {
        !self.unless.iter().any(|pattern| pattern.matches(mac))
    }
}

/// What the policy says to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Make these changes, in this order; none if the device has it already. Then [`commit`](crate::SwitchState::commit).
    Allow(Vec<Change>),
    /// Change nothing.
    Deny(Denial),
}

/// A verdict with what the relay needs to answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The verdict.
    pub verdict: Verdict,
    /// How the guest is told of a refusal.
    pub on_denied: OnDenied,
    /// The effective address before the changes: the reply to a reset carries it.
    pub effective_mac: MacAddress,
}
