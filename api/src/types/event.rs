// SPDX-License-Identifier: Apache-2.0

//! What happens, as subscribers hear of it.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Cause, Decision, Owner, Timestamp, VmState};

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// One more for each event of the agent's store: `Last-Event-ID` goes on after it.
    pub id: u64,
    /// When it happened.
    pub time: Timestamp,
    /// What happened.
    #[serde(flatten)]
    pub what: EventKind,
}

/// What happened; `event` names it and is the type of the server-sent event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// A VM's state changed.
    VmState {
        /// The VM.
        vm: Owner,
        /// Its new state.
        state: VmState,
        /// Why, if it ended.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cause: Option<Cause>,
    },
    /// A request was decided, or the agent did something by itself.
    Decision {
        /// The record, as it is after this.
        decision: Box<Decision>,
    },
    /// An object was created.
    Created {
        /// It.
        object: Subject,
        /// Its revision.
        revision: u64,
        /// Who did it: `uid 0`, `token ci`; absent if the agent did it by itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
    },
    /// An object's specification was changed, or a VM lost a device.
    Changed {
        /// It.
        object: Subject,
        /// Its revision now.
        revision: u64,
        /// Who did it: `uid 0`, `token ci`; absent if the agent did it by itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
    },
    /// An object was deleted.
    Deleted {
        /// What it was.
        object: Subject,
        /// Who did it: `uid 0`, `token ci`; absent if the agent did it by itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
    },
    /// A PF went up or down, came or went.
    PfState {
        /// Its interface's name.
        pf: String,
        /// What became of it.
        state: PfState,
    },
    /// Events between the one asked for and the next one are no longer kept: read the objects again.
    Gap,
}

/// An object that an event is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Subject {
    /// What it is.
    pub kind: ObjectKind,
    /// Its id. (Beside the event's own, and so not in the event itself.)
    pub id: Uuid,
    /// Its name.
    pub name: String,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// Kinds of objects that are created, changed and deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ObjectKind {
    /// `/v1/vms`.
    Vm,
    /// `/v1/switches`.
    Switch,
    /// `/v1/port-groups`.
    PortGroup,
    /// `/v1/ports`.
    Port,
    /// `/v1/pfs`: only its specification changes.
    Pf,
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ObjectKind::Vm => "VM",
            ObjectKind::Switch => "switch",
            ObjectKind::PortGroup => "port group",
            ObjectKind::Port => "port",
            ObjectKind::Pf => "PF",
        })
    }
}

/// What became of a PF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PfState {
    /// Its interface was set up.
    Up,
    /// Its interface was set down: its VFs carry nothing.
    Down,
    /// It is new on this host, or has a new name.
    Added,
    /// It is gone from this host, or has another name.
    Removed,
}

impl EventKind {
    /// The name on the wire.
    pub fn name(&self) -> &'static str {
        match self {
            EventKind::VmState { .. } => "vm_state",
            EventKind::Decision { .. } => "decision",
            EventKind::Created { .. } => "created",
            EventKind::Changed { .. } => "changed",
            EventKind::Deleted { .. } => "deleted",
            EventKind::PfState { .. } => "pf_state",
            EventKind::Gap => "gap",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kind's members lie beside the event's own: none may have the name of another.
    #[test]
    fn every_kind_is_read_as_it_is_written() {
        let owner = Owner { vm: Uuid::nil(), name: "web1".to_owned(), adapter: None };
        let object = Subject { kind: ObjectKind::PortGroup, id: Uuid::nil(), name: "web".to_owned() };
        for what in [
            EventKind::VmState { vm: owner, state: VmState::Running, cause: None },
            EventKind::Created { object: object.clone(), revision: 1, by: None },
            EventKind::Changed { object: object.clone(), revision: 2, by: Some("uid 7".to_owned()) },
            EventKind::Deleted { object, by: None },
            EventKind::PfState { pf: "eth0".to_owned(), state: PfState::Down },
            EventKind::Gap,
        ] {
            let event = Event { id: 7, time: Timestamp::from_unix_ms(1), what };
            let json = serde_json::to_value(&event).unwrap();
            assert_eq!(json["event"], event.what.name());
            let text = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event, "{text}");
        }
    }
}
