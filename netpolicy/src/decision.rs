// SPDX-License-Identifier: Apache-2.0

//! The recorded outcome of a request, or of something that the agent did by itself.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    ident::{PortId, VfRef},
    mac::MacAddress,
    objects::{Port, VmRef},
    request::{DecidedBy, Reason},
};

/// What came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Asked for, allowed and made.
    Allowed,
    /// Asked for and refused.
    Denied,
    /// Given earlier, taken back because the policy changed.
    TakenBack,
    /// Someone else changed the adapter; put right again.
    Repaired,
    /// A change that landed after its refusal by deadline; undone.
    Reverted,
}

/// How the outcome reached the adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Committed {
    /// Nothing had to be changed.
    Nothing,
    /// Through the PF's driver (netlink).
    Pf,
    /// By a message of the relay in the VF's mailbox.
    Mailbox,
    /// Both.
    Both,
    /// It should have been changed, but that failed.
    Failed,
}

/// One decision. Equal ones are counted in one record: see [`absorb`](Self::absorb).
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
    /// What was asked for or done: a request's name like `set_mac`.
    pub request: String,
    /// What came out.
    pub outcome: Outcome,
    /// Why it was not allowed.
    pub reason: Option<Reason>,
    /// By which setting, and its level.
    pub decided_by: Option<DecidedBy>,
    /// What the device had.
    pub old: Option<String>,
    /// What was asked for.
    pub requested: Option<String>,
    /// The effective address afterwards.
    pub effective_mac: MacAddress,
    /// How it reached the adapter.
    pub committed: Committed,
    /// For people: a failure's text, for example.
    pub detail: Option<String>,
    /// Who edited the policy, if it follows from an edit: `uid 0`, `token ci`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edited_by: Option<String>,
    /// How often it happened.
    pub count: u64,
    /// First time, in milliseconds since 1970.
    pub first_ms: u64,
    /// Last time, in milliseconds since 1970.
    pub last_ms: u64,
}

/// How much a record says beside others of its VM, see [`Decision::weight`]. Lighter records never displace heavier ones.
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
    /// All, the lightest first.
    pub const ALL: [Self; 3] = [Self::Light, Self::GuestChange, Self::HostChange];
}

impl Decision {
    /// How much this record says beside others of its VM.
    #[must_use]
    pub fn weight(&self) -> Weight {
        match self.outcome {
            Outcome::TakenBack | Outcome::Repaired | Outcome::Reverted => Weight::HostChange,
            Outcome::Denied => Weight::Light,
            Outcome::Allowed if self.committed == Committed::Nothing => Weight::Light,
            Outcome::Allowed => match self.request.as_str() {
                "reset" | "set_multicast" | "set_max_frame" => Weight::Light,
                _ => Weight::GuestChange,
            },
        }
    }

    /// A decision about a port, at `now_ms` (milliseconds since 1970); the rest is for the caller to fill in.
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

    /// Counts `other` in this record, if they differ in identity, count and time only.
    ///
    /// # Errors
    /// Gives `other` back when they differ in more.
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
