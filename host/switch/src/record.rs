// SPDX-License-Identifier: Apache-2.0

//! The stored form of switches, port groups and ports.
//!
//! A port is two objects. One is its configuration, whose revision clients compare. The other is
//! the state of its VF, which changes with every request of the guest.

use api::types::{PortCounters, Timestamp};
use netpolicy::{
    Change, DeviceState, MacAddress, Port, PortGroup, PortGroupId, PortId, Settings, Switch, VfRef, VmRef,
};
use serde::{Deserialize, Serialize};
use store::{Record, Scope};

use super::port_queue::{PortQueue, Revert};

/// The first start of an agent with this store. It is the creation time of the default switch and
/// group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FirstStart {
    /// The time of that start.
    pub at: Timestamp,
}

impl Record for FirstStart {
    const KIND: &'static str = "first_start";
}

/// A switch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwitchRecord {
    /// The time of its creation.
    pub created: Timestamp,
    /// The switch.
    pub switch: Switch,
}

impl Record for SwitchRecord {
    const KIND: &'static str = "switch";
    const SCOPE: Scope = Scope::Shared;
}

/// A port group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// The time of its creation.
    pub created: Timestamp,
    /// The port group.
    pub group: PortGroup,
}

impl Record for GroupRecord {
    const KIND: &'static str = "port_group";
    const SCOPE: Scope = Scope::Shared;
}

/// The configuration of a port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PortRecord {
    /// The time of its creation.
    pub created: Timestamp,
    /// The VM.
    pub vm: VmRef,
    /// The adapter's name in the VM.
    pub adapter: String,
    /// The port group.
    pub group: PortGroupId,
    /// The settings that override those of its group.
    #[serde(default)]
    pub overrides: Settings,
    /// The address with which the adapter was configured.
    pub initial_mac: MacAddress,
}

impl Record for PortRecord {
    const KIND: &'static str = "port";
    const SCOPE: Scope = Scope::Shared;
}

impl PortRecord {
    /// The record of a port.
    #[must_use]
    pub fn of(port: &Port, created: Timestamp) -> Self {
        Self {
            created,
            vm: port.vm.clone(),
            adapter: port.adapter.clone(),
            group: port.group,
            overrides: port.overrides.clone(),
            initial_mac: port.initial_mac,
        }
    }

    /// The port, with the state of its VF.
    #[must_use]
    pub fn port(self, id: PortId, attachment: Option<&Attachment>) -> Port {
        let mut port = Port::new(id, self.vm, self.adapter, self.group, self.initial_mac);
        port.overrides = self.overrides;
        if let Some(attachment) = attachment {
            port.guest_mac = attachment.guest_mac;
            port.vf = attachment.vf.clone();
            port.device = attachment.device.clone();
            port.pending = attachment.pending.clone();
        }
        port
    }
}

/// The state of a port's VF. Its id is the port's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    /// The address that the guest believes to have.
    pub guest_mac: MacAddress,
    /// The VF.
    pub vf: Option<VfRef>,
    /// The VF's PCI address.
    #[serde(default)]
    pub bdf: Option<String>,
    /// The settings that the adapter has.
    pub device: DeviceState,
    /// The changes under way.
    #[serde(default)]
    pub pending: Vec<Change>,
    /// A granted address that must be rolled back, if it was set.
    #[serde(default)]
    pub revert: Option<Revert>,
    /// The guest reboots, and the settings of the boot before it are not revoked yet.
    #[serde(default)]
    pub rebooting: bool,
    /// The counts of decisions so far.
    #[serde(default)]
    pub counters: PortCounters,
}

impl Record for Attachment {
    const KIND: &'static str = "attachment";
}

impl Attachment {
    /// The attachment of a port.
    #[must_use]
    pub(super) fn of(port: &Port, port_queue: &PortQueue) -> Self {
        Self {
            guest_mac: port.guest_mac,
            vf: port.vf.clone(),
            bdf: port_queue.bdf.clone(),
            device: port.device.clone(),
            pending: port.pending.clone(),
            revert: port_queue.revert,
            rebooting: port_queue.rebooting,
            counters: port_queue.counters,
        }
    }
}

/// The name under which a port is stored and shown.
#[must_use]
pub fn port_name(port: &Port) -> String {
    format!("{}/{}", port.vm.name, port.adapter)
}
