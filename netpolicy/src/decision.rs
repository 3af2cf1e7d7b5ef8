// SPDX-License-Identifier: Apache-2.0

//! The record of a decision on a request, or of an action of the agent's own.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    ident::{PortId, VfRef},
    mac::MacAddress,
    objects::{Port, VmRef},
    request::{DecidedBy, Reason},
};

/// The outcome of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Requested, allowed and made.
    Allowed,
    /// Requested and denied.
    Denied,
    /// Granted earlier, and revoked because the policy changed.
    #[serde(rename = "taken_back")]
    Revoked,
    /// Changed by another program on the host, and restored.
    Repaired,
    /// Made after the request was denied for its deadline, and rolled back.
    Reverted,
}

/// The way of the change to the adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Committed {
    /// There was nothing to change.
    Nothing,
    /// Through the PF's driver (netlink).
    Pf,
    /// By a message of the relay in the VF's mailbox.
    Mailbox,
    /// Both.
    Both,
    /// The change failed.
    Failed,
}

/// The record of one decision. Equal decisions are counted in one record: see [`absorb`](Self::absorb).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Identity of the record.
    pub id: Uuid,
    /// The virtual machine.
    pub vm: VmRef,
    /// The adapter's name in the VM.
    pub adapter: String,
    /// The port.
    pub port: PortId,
    /// The VF, if it was known.
    pub vf: Option<VfRef>,
    /// The request or action: a name like `set_mac`.
    pub request: String,
    /// The outcome.
    pub outcome: Outcome,
    /// The reason of a denial.
    pub reason: Option<Reason>,
    /// The setting that decided, and its level.
    pub decided_by: Option<DecidedBy>,
    /// The value that the device had.
    pub old: Option<String>,
    /// The value that the guest requested.
    pub requested: Option<String>,
    /// The effective address afterwards.
    pub effective_mac: MacAddress,
    /// The way of the change to the adapter.
    pub committed: Committed,
    /// A text for users, for example of a failure.
    pub detail: Option<String>,
    /// The user of the policy's edit that led to it: `uid 0`, `token ci`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edited_by: Option<String>,
    /// The number of equal decisions.
    pub count: u64,
    /// The time of the first, in milliseconds since 1970.
    pub first_ms: u64,
    /// The time of the last, in milliseconds since 1970.
    pub last_ms: u64,
}

/// The value of a record beside others of its VM, see [`Decision::weight`]. Lighter records never displace heavier
/// ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Weight {
    /// No lasting change of the guest's identity: denials, no-ops, multicast addresses, lengths of
    /// frames. A guest can cause 50 in a second.
    Light,
    /// The guest has changed its identity or its reach: addresses, VLANs, promiscuous mode.
    GuestChange,
    /// The host has changed the adapter: a revocation, a repair, a rollback.
    HostChange,
}

impl Weight {
    /// All weights, the lightest first.
    pub const ALL: [Self; 3] = [Self::Light, Self::GuestChange, Self::HostChange];
}

impl Decision {
    /// The value of this record beside others of its VM.
    #[must_use]
    pub fn weight(&self) -> Weight {
        match self.outcome {
            Outcome::Revoked | Outcome::Repaired | Outcome::Reverted => Weight::HostChange,
            Outcome::Denied => Weight::Light,
            Outcome::Allowed if self.committed == Committed::Nothing => Weight::Light,
            Outcome::Allowed => match self.request.as_str() {
                "reset" | "set_multicast" | "set_max_frame" => Weight::Light,
                _ => Weight::GuestChange,
            },
        }
    }

    /// Makes a record about a port, at `now_ms` (milliseconds since 1970); the caller fills in the rest.
    #[must_use]
    pub fn new(id: Uuid, port: &Port, request: impl Into<String>, outcome: Outcome, now_ms: u64) -> Self {
        Self {
            id,
            vm: port.vm.clone(),
            adapter: port.adapter.clone(),
            port: port.id,
            vf: port.vf.clone(),
            request: request.into(),
            outcome,
            reason: None,
            decided_by: None,
            old: None,
            requested: None,
            effective_mac: port.effective_mac(),
            committed: Committed::Nothing,
            detail: None,
            edited_by: None,
            count: 1,
            first_ms: now_ms,
            last_ms: now_ms,
        }
    }

    /// Counts `other` in this record, if they differ only in identity, count and time.
    ///
    /// # Errors
    /// Returns `other` when they differ in more.
    #[allow(clippy::result_large_err)] // It is the argument, handed back.
    pub fn absorb(&mut self, other: Self) -> Result<(), Self> {
        let twin = Self {
            id: self.id,
            count: self.count,
            first_ms: self.first_ms,
            last_ms: self.last_ms,
            ..other.clone()
        };
        if twin != *self {
            return Err(other);
        }
        self.count = self.count.saturating_add(other.count);
        self.first_ms = self.first_ms.min(other.first_ms);
        self.last_ms = self.last_ms.max(other.last_ms);
        Ok(())
    }
}
