// SPDX-License-Identifier: Apache-2.0

//! Events, for the subscribers of the API.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{RefOr, Schema},
};
use uuid::Uuid;

use super::{Cause, Decision, Owner, Timestamp, VmState};

/// An event: a change or a decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// One more for each event of the agent's store: `Last-Event-ID` goes on after it.
    pub id: u64,
    /// When it happened.
    pub time: Timestamp,
    /// The kind, with its own members.
    #[serde(flatten)]
    pub what: EventKind,
}

/// The kind of an event; `event` names it and is the type of the server-sent event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// A VM's state changed.
    VmState {
        /// The VM.
        vm: Owner,
        /// Its new state.
        state: VmState,
        /// The cause, if it ended.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cause: Option<Cause>,
    },
    /// A request was decided, or the agent acted by itself.
    Decision {
        /// The record, as it is after this.
        decision: Box<Decision>,
    },
    /// An object was created.
    Created {
        /// The object.
        object: Subject,
        /// Its revision.
        revision: u64,
        /// The caller: `uid 0`, `token ci`; absent if the agent acted by itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
    },
    /// An object's specification was changed, or a VM lost a device.
    Changed {
        /// The object.
        object: Subject,
        /// Its revision now.
        revision: u64,
        /// The caller: `uid 0`, `token ci`; absent if the agent acted by itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
    },
    /// An object was deleted.
    Deleted {
        /// The former object.
        object: Subject,
        /// The caller: `uid 0`, `token ci`; absent if the agent acted by itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
    },
    /// A PF went up or down, came or went.
    PfState {
        /// Its interface's name.
        pf: String,
        /// Its new state.
        state: PfState,
    },
    /// Events between the requested one and the next one are no longer kept: read the objects again.
    Gap,
}

/// An object that an event is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Subject {
    /// The kind of object.
    pub kind: ObjectKind,
    // An event has an id of its own, so this one cannot be a member of the event.
    /// Its id.
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

/// The new state of a PF.
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

// The schema of an `Event`: one object with the members of every kind. Generators of clients drop or split a choice of objects
// with common members, and a client of a later agent must take kinds that it does not know.
/// An event: a change or a decision.
#[derive(ToSchema)]
#[cfg_attr(test, derive(Deserialize), serde(deny_unknown_fields))]
#[allow(dead_code, reason = "only its schema is used")]
struct AnyEvent {
    /// One more for each event of the agent's store: `Last-Event-ID` goes on after it.
    id: u64,
    /// When it happened.
    time: Timestamp,
    /// The kind of event, on which the other members depend.
    event: EventName,
    /// `vm_state`: the VM.
    vm: Option<Owner>,
    /// `vm_state`: the VM's new state. `pf_state`: the PF's new state.
    state: Option<NewState>,
    /// `vm_state`: why the VM ended, if it did.
    cause: Option<Cause>,
    /// `decision`: the record, as it is after this.
    decision: Option<Box<Decision>>,
    /// `created`, `changed`, `deleted`: the object.
    object: Option<Subject>,
    /// `created`, `changed`: the object's revision now.
    revision: Option<u64>,
    /// `created`, `changed`, `deleted`: the caller, such as `uid 0` or `token ci`; absent if the agent acted by itself.
    by: Option<String>,
    /// `pf_state`: the PF's interface.
    pf: Option<String>,
}

/// Kinds of events.
#[derive(ToSchema)]
#[cfg_attr(test, derive(Debug, PartialEq, Deserialize))]
#[allow(dead_code, reason = "only its schema is used")]
#[serde(rename_all = "snake_case")]
enum EventName {
    /// A VM's state changed.
    VmState,
    /// A request was decided, or the agent acted by itself.
    Decision,
    /// An object was created.
    Created,
    /// An object's specification was changed, or a VM lost a device.
    Changed,
    /// An object was deleted.
    Deleted,
    /// A PF went up or down, came or went.
    PfState,
    /// Events between the requested one and the next one are no longer kept: read the objects again.
    Gap,
}

/// The state of a VM or PF.
#[derive(ToSchema)]
#[cfg_attr(test, derive(Deserialize))]
#[allow(dead_code, reason = "only its schema is used")]
#[serde(untagged)]
enum NewState {
    /// Of a VM.
    Vm(VmState),
    /// Of a PF.
    Pf(PfState),
}

impl PartialSchema for Event {
    fn schema() -> RefOr<Schema> {
        AnyEvent::schema()
    }
}

impl ToSchema for Event {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        AnyEvent::schemas(schemas);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kind's members lie beside the event's own: no two may have the same name.
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
            // It has only members of its schema.
            let described: AnyEvent =
                serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
            let name: EventName = serde_json::from_value(event.what.name().into()).unwrap();
            assert_eq!((described.id, described.time, described.event), (event.id, event.time, name));
        }
    }
}
