// SPDX-License-Identifier: Apache-2.0

//! A VF's requests, the verdicts on them, and the changes that follow.

use std::{fmt, num::NonZeroU32};

use serde::{Deserialize, Serialize};

use crate::{
    mac::{MacAddress, MacPattern},
    policy::{OnDenied, Setting, Source},
    vlan::{AccessVlan, VlanId},
};

/// A request from a VF driver's mailbox message, decoded but not yet trusted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// VF_RESET: the driver starts over and takes the effective address from the reply.
    Reset,
    /// Set another effective address.
    SetMac(MacAddress),
    /// Remove all further unicast addresses.
    ClearUnicastFilters,
    /// Add a further unicast address.
    AddUnicastFilter(MacAddress),
    /// Receive these multicast addresses in place of those before.
    SetMulticast {
        /// The count that the message claims.
        count: u16,
        /// The hashes that the message carries (82576: 12 bits each).
        hashes: Vec<u16>,
    },
    /// Join or leave a VLAN.
    SetVlan {
        /// The number in the message; 0 is the priority tag.
        vid: u16,
        /// True to join, false to leave.
        add: bool,
    },
    /// Receive frames up to this length in bytes, with header, tag and checksum: see
    /// [`Mtu::max_frame`](crate::Mtu::max_frame).
    SetMaxFrame(u32),
    /// Receive frames that are not addressed to the VF.
    SetPromiscuous(PromiscuousMode),
    /// A message without a meaning here.
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

/// The reception of frames that are not addressed to the VF.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromiscuousMode {
    /// All multicast frames.
    pub multicast: bool,
    /// All unicast frames.
    pub unicast: bool,
}

impl PromiscuousMode {
    /// Only frames that are addressed to the VF.
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
    /// Set the effective address.
    SetMac(MacAddress),
    /// Add a further unicast address.
    AddUnicast(MacAddress),
    /// Remove all further unicast addresses.
    ClearUnicast,
    /// Receive these multicast hashes, at most 30, and no others.
    SetMulticast(Vec<u16>),
    /// Join a VLAN.
    JoinVlan(VlanId),
    /// Leave a VLAN. Harmless if the VF has not joined it.
    LeaveVlan(VlanId),
    /// Receive frames up to this length in bytes, with header, tag and checksum.
    SetMaxFrame(u16),
    /// Receive frames that are not addressed to the VF.
    SetPromiscuous(PromiscuousMode),
    /// Set the tag that the adapter adds and strips; `None` for no tag.
    SetPortVlan(Option<AccessVlan>),
    /// Drop frames that the VF sends from other source addresses.
    SetSpoofCheck(bool),
    /// Let the PF driver trust the VF.
    SetTrust(bool),
    /// Set the highest sending rate in Mbit/s; `None` for no limit.
    SetMaxTxRate(Option<NonZeroU32>),
    /// Set the link as the VF sees it.
    SetLink(LinkState),
}

/// The component that makes a [`Change`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// The agent, through the PF's driver.
    Pf,
    /// The VF's relay, by a message to the PF's driver.
    Mailbox,
}

impl Change {
    /// The component that makes the change: PF drivers offer no other way.
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

    /// Whether PF drivers accept the message only from a trusted VF, since the administrator has set the VF's
    /// address, as here always. The agent switches trust on around it, unless the PF needs a
    /// reset after a change of trust.
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

/// The reason of a denial. The names are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The policy rejects every change of the address.
    MacChangesRejected,
    /// The policy's list does not contain the address.
    MacNotAllowed,
    /// Another port of the switch has the address.
    MacInUse,
    /// A group address or zero.
    MacInvalid,
    /// The policy does not contain the VLAN.
    VlanNotAllowed,
    /// The policy rejects promiscuous mode.
    PromiscuousRejected,
    /// The request exceeds a limit of the policy.
    LimitExceeded,
    /// The frames are longer than the policy's MTU allows.
    MtuExceeded,
    /// A message without a meaning here.
    UnknownMessage,
    /// A known message with impossible contents.
    MalformedMessage,
    /// Too many messages in a time.
    RateLimited,
    /// The port is blocked.
    PortBlocked,
    /// The policy allows it, but the adapter refused.
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

/// The setting that decided, and its level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecidedBy {
    /// The setting.
    pub setting: Setting,
    /// The level.
    pub source: Source,
}

/// A denial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// The reason.
    pub reason: Reason,
    /// The setting that decided; none if no policy allows the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decided_by: Option<DecidedBy>,
    /// The value that the device has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub old: Option<String>,
    /// The value that the guest requested.
    pub requested: String,
    /// For people: the port that has the address, for example.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// The verdict on changes of the address that depends on nothing but the address. A relay that has it can deny such a
/// request by itself, and must still report it. It is valid until another one, or none, replaces it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandingRefusal {
    /// The addresses that need a request to the agent. The effective one is never needed here.
    pub unless: Vec<MacPattern>,
    /// The reason of the denial of all others.
    pub reason: Reason,
    /// The response to the guest.
    pub on_denied: OnDenied,
}

impl StandingRefusal {
    /// Whether a change to `mac`, which is not the effective address, is denied in any case.
    #[must_use]
    pub fn covers(&self, mac: MacAddress) -> bool {
        !self.unless.iter().any(|pattern| pattern.matches(mac))
    }
}

/// The policy's verdict on a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Make these changes, in this order; none if the device has the state already. Then
    /// [`commit`](crate::SwitchState::commit).
    Allow(Vec<Change>),
    /// Change nothing.
    Deny(Denial),
}

/// A verdict, with the facts that the relay needs for its response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The verdict.
    pub verdict: Verdict,
    /// The response to the guest after a denial.
    pub on_denied: OnDenied,
    /// The effective address before the changes: the response to a reset carries it.
    pub effective_mac: MacAddress,
}
