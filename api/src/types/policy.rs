// SPDX-License-Identifier: Apache-2.0

//! Switches, port groups, ports, decisions. Policy values are those of `netpolicy`, so that one definition says which are
//! valid.

use std::collections::BTreeSet;

use netpolicy::{
    Committed, DecidedBy, EffectivePolicy, MacAddress, Outcome, Reason, Setting, Settings, SwitchKind,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::{Bdf, Cursor, Name, Owner, Timestamp};

/// The authority over some uplinks and their port groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Switch {
    /// Immutable; never used again.
    pub id: Uuid,
    /// Unique among switches.
    pub name: Name,
    /// One more for each change of the specification.
    pub revision: u64,
    /// When it was created.
    pub created: Timestamp,
    /// The requested state.
    pub spec: SwitchSpec,
    /// The actual state.
    pub status: SwitchStatus,
}

/// The requested state of a switch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SwitchSpec {
    /// The place of its definition: `standard` on this host.
    #[schema(value_type = super::schema::Kind, example = "standard")]
    pub kind: SwitchKind,
    /// The PFs that its ports get VFs of, by interface name. A PF is an uplink of one switch only.
    #[schema(value_type = Vec<String>, example = json!(["enp1s0"]))]
    pub uplinks: BTreeSet<String>,
    /// The settings that its port groups inherit.
    #[schema(value_type = super::schema::Settings)]
    pub settings: Settings,
}

/// The actual state of a switch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SwitchStatus {
    /// The number of its port groups.
    pub port_groups: u64,
    /// The number of ports of these.
    pub ports: u64,
}

/// A named set of policies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortGroup {
    /// Immutable; never used again.
    pub id: Uuid,
    /// Unique among the port groups of all switches.
    pub name: Name,
    /// One more for each change of the specification.
    pub revision: u64,
    /// When it was created.
    pub created: Timestamp,
    /// The requested state.
    pub spec: PortGroupSpec,
    /// The actual state.
    pub status: PortGroupStatus,
}

/// The requested state of a port group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PortGroupSpec {
    /// The switch; it cannot be changed.
    pub switch: Name,
    /// The settings that it decides in place of the switch.
    #[serde(default)]
    #[schema(value_type = super::schema::Settings)]
    pub settings: Settings,
    /// Names of the settings that its ports may decide in place of it.
    #[serde(default)]
    #[schema(value_type = Vec<super::schema::SettingName>, example = json!(["mtu"]))]
    pub port_overrides: BTreeSet<Setting>,
}

/// The actual state of a port group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortGroupStatus {
    /// The number of its ports.
    pub ports: u64,
    /// Every setting that a port without overrides is subject to, with the level that decided it.
    #[schema(value_type = super::schema::EffectivePolicy)]
    pub policy: EffectivePolicy,
}

/// One VM adapter's attachment to a port group. It comes and goes with the adapter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Port {
    /// Immutable; never used again.
    pub id: Uuid,
    /// VM and adapter, `web1/eth0`.
    #[schema(example = "web1/eth0")]
    pub name: String,
    /// One more for each change of the specification.
    pub revision: u64,
    /// When it was created.
    pub created: Timestamp,
    /// The requested state.
    pub spec: PortSpec,
    /// The actual state.
    pub status: PortStatus,
}

/// The requested state of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PortSpec {
    /// The settings that it decides in place of its group, where the group allows that. `blocked` is always allowed.
    #[schema(value_type = super::schema::Settings)]
    pub settings: Settings,
}

/// The actual state of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortStatus {
    /// The VM and its adapter.
    pub owner: Owner,
    /// The switch's name.
    pub switch: Name,
    /// The port group's name.
    pub port_group: Name,
    /// The PF's interface, while the VM holds a VF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pf: Option<String>,
    /// The VF's PCI address, while the VM holds one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vf: Option<Bdf>,
    /// The VF's number on its PF, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vf_index: Option<u32>,
    /// The address that the adapter was configured with.
    #[schema(value_type = String, example = "02:00:00:00:00:11")]
    pub initial_mac: MacAddress,
    /// The address that the PF lets the VF use.
    #[schema(value_type = String, example = "02:00:00:00:00:11")]
    pub effective_mac: MacAddress,
    /// The address that the guest last requested and believes it has.
    #[schema(value_type = String, example = "02:00:00:00:00:11")]
    pub guest_mac: MacAddress,
    /// Every setting that it is subject to, with the level that decided it.
    #[schema(value_type = super::schema::EffectivePolicy)]
    pub policy: EffectivePolicy,
    /// The time since which the port cannot be compared with its PF, and the reason: foreign changes are not repaired
    /// meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unchecked: Option<Unchecked>,
    /// Changes that the policy requires and that are not made yet, since the guest's interface is down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<Pending>,
    /// Changes that the policy requires and that failed, at most 20. The agent tries them again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unmade: Vec<UnmadeChange>,
    /// Requests since the port was made.
    pub counters: PortCounters,
}

/// A change of a port that its PF or its VM's relay did not make: `policy` is not in force there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnmadeChange {
    /// The change.
    #[schema(example = "set_max_tx_rate 500 Mbit/s")]
    pub change: String,
    /// The reason, in the PF's words where it gave one.
    pub detail: String,
}

/// Changes of a port that wait for its guest's driver to reset the VF. By the word of the VM's process the VF's queues are off
/// until then: it sends and receives nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pending {
    /// The time since which changes wait.
    pub since: Timestamp,
    /// The changes, at most 20 of them.
    #[schema(example = json!(["set_vlan leave 100"]))]
    pub changes: Vec<String>,
}

/// A failed comparison of a port with its PF.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Unchecked {
    /// The first comparison that failed.
    pub since: Timestamp,
    /// The reason that the last one failed.
    pub detail: String,
}

/// The results of a port's requests and corrections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortCounters {
    /// Requests that were allowed and made.
    pub allowed: u64,
    /// Requests that were denied, or allowed and not made.
    pub denied: u64,
    /// Changes that were revoked or rolled back.
    pub taken_back: u64,
    /// Changes that the agent corrected after a foreign change.
    pub repaired: u64,
}

/// The recorded result of a request, or of a change that the agent made by itself. Repetitions are counted in one record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Decision {
    /// Identity of the record.
    pub id: Uuid,
    /// The VM and its adapter.
    pub owner: Owner,
    /// The port.
    pub port: Uuid,
    /// The PF's interface, if the VF was known.
    pub pf: Option<String>,
    /// The VF's number on its PF, if it was known.
    pub vf_index: Option<u32>,
    /// The name of the request or change, `set_mac`.
    #[schema(example = "set_mac")]
    pub request: String,
    /// The result: `allowed`, `denied`, `taken_back`, `repaired`, `reverted`.
    #[schema(value_type = super::schema::Verdict, example = "denied")]
    pub verdict: Outcome,
    /// The reason that it was not allowed.
    #[schema(value_type = Option<String>, example = "mac_changes_rejected")]
    pub reason: Option<Reason>,
    /// The setting that decided.
    #[schema(value_type = Option<super::schema::DecidedBy>)]
    pub decided_by: Option<DecidedBy>,
    /// The device's value before.
    pub old: Option<String>,
    /// The requested value.
    pub requested: Option<String>,
    /// The effective address afterwards.
    #[schema(value_type = String, example = "02:00:00:00:00:11")]
    pub effective_mac: MacAddress,
    /// The way by which the change reached the adapter: `nothing`, `pf`, `mailbox`, `both`, `failed`.
    #[schema(value_type = String, example = "nothing")]
    pub committed: Committed,
    /// Details for people: a failure's text, for example.
    pub detail: Option<String>,
    /// The author of the policy's edit, if the change follows from one: `uid 0`, `token ci`.
    #[schema(example = "uid 0")]
    pub edited_by: Option<String>,
    /// The number of times that it happened.
    pub count: u64,
    /// The first time.
    pub first: Timestamp,
    /// The last time.
    pub last: Timestamp,
}

impl From<netpolicy::Decision> for Decision {
    fn from(decision: netpolicy::Decision) -> Self {
        let (pf, vf_index) = decision.vf.map(|vf| (vf.pf, vf.index)).unzip();
        Decision {
            id: decision.id,
            owner: Owner {
                vm: decision.vm.id.0,
                name: decision.vm.name.to_string(),
                adapter: Some(decision.adapter),
            },
            port: decision.port.0,
            pf,
            vf_index,
            request: decision.request,
            verdict: decision.outcome,
            reason: decision.reason,
            decided_by: decision.decided_by,
            old: decision.old,
            requested: decision.requested,
            effective_mac: decision.effective_mac,
            committed: decision.committed,
            detail: decision.detail,
            edited_by: decision.edited_by,
            count: decision.count,
            first: Timestamp::from_unix_ms(decision.first_ms),
            last: Timestamp::from_unix_ms(decision.last_ms),
        }
    }
}

/// The decisions to list: those that pass every filter, the latest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DecisionFilter {
    /// Name or id of a VM. A name means the VM that has it; if there is none, all that had it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// Id of a port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<Uuid>,
    /// `allowed`, `denied`, `taken_back`, `repaired` or `reverted`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<super::schema::Verdict>, inline)]
    pub verdict: Option<Outcome>,
    /// Those that happened (last) at this time or later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// At most this many, 1 to 1000.
    #[serde(default = "usual_limit")]
    #[param(minimum = 1, maximum = 1000, default = 100)]
    pub limit: u32,
    /// The `next` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<Cursor>,
}

fn usual_limit() -> u32 {
    100
}

impl Default for DecisionFilter {
    fn default() -> Self {
        DecisionFilter {
            vm: None,
            port: None,
            verdict: None,
            since: None,
            limit: usual_limit(),
            cursor: None,
        }
    }
}
