// SPDX-License-Identifier: Apache-2.0

//! Switches, port groups and ports together.
//!
//! A request goes through three calls:
//!
//! ```text
//! evaluate ──Deny──▶ (respond to the guest) ──▶ note_answer
//!     └─Allow(changes)─▶ begin ──▶ (PF, mailbox) ─done──▶ commit ──▶ note_answer
//!                                       └─failed, undone─▶ abort ──▶ note_answer
//! ```
//!
//! `evaluate` only reads. `begin` reserves addresses, so that two ports cannot be granted the same one while the PF
//! is being programmed. `commit` returns the corrections that must follow at once if the policy has changed
//! meanwhile.

mod correct;
mod device;
mod evaluate;
mod sharing;
mod tables;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use thiserror::Error;
use uuid::Uuid;

use crate::{
    capabilities::ResetClears,
    ident::{Name, PortGroupId, PortId, SwitchId, VfRef, VmId},
    mac::MacAddress,
    objects::{Port, PortGroup, Switch},
    policy::{EffectivePolicy, Setting, Source},
};

pub use correct::{Correction, Corrections};

/// All switches of a host. A value without locks: its owner decides alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SwitchState {
    switches: BTreeMap<SwitchId, Switch>,
    groups: BTreeMap<PortGroupId, PortGroup>,
    ports: BTreeMap<PortId, Port>,
    // Exactly `Port::addresses` of all ports. Those that have the same one are of one VM.
    by_mac: BTreeSet<(SwitchId, MacAddress, PortId)>,
    // Exactly `Port::vm` of all ports.
    by_vm: BTreeSet<(VmId, PortId)>,
    // Exactly `Port::vf` of all ports.
    by_vf: BTreeMap<VfRef, PortId>,
    // Exactly `DeviceState::wanted_unicast` of all ports.
    wanted: BTreeSet<(SwitchId, MacAddress, PortId)>,
    // Addresses that another port wanted when their port gave them up, and that are not offered yet; true until
    // `take_freed` returns them.
    freed: BTreeMap<(SwitchId, MacAddress), bool>,
    // By the PF's name.
    reset_clears: BTreeMap<String, ResetClears>,
}

/// The kinds of objects that names and numbers identify.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entity {
    /// A switch.
    Switch,
    /// A PF that a switch has.
    Uplink,
    /// A port group.
    PortGroup,
    /// A port.
    Port,
    /// A VF.
    Vf,
}

impl fmt::Display for Entity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Switch => "Switch",
            Self::Uplink => "Uplink",
            Self::PortGroup => "Port group",
            Self::Port => "Port",
            Self::Vf => "VF",
        })
    }
}

/// Errors of changing the tables. The tables are then unchanged.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StateError {
    /// There is no such switch.
    #[error("Switch {0} does not exist")]
    NoSwitch(SwitchId),
    /// There is no such port group.
    #[error("Port group {0} does not exist")]
    NoPortGroup(PortGroupId),
    /// There is no such port.
    #[error("Port {0} does not exist")]
    NoPort(PortId),
    /// Another object has the identity or name.
    #[error("{what} {name} exists already: choose another name")]
    Taken {
        /// The kind of object.
        what: Entity,
        /// Its name.
        name: String,
    },
    /// Another object depends on it.
    #[error("{what} {name} is used by {user}: remove that first")]
    InUse {
        /// The kind of object.
        what: Entity,
        /// Its name.
        name: String,
        /// The object that depends on it.
        user: String,
    },
    /// The address cannot be an adapter's.
    #[error("Address {0} cannot be an adapter's: it must be unicast and not zero")]
    MacInvalid(MacAddress),
    /// Another port of the switch has the address.
    #[error("Address {mac} is in use by port {port} ({vm}): choose another")]
    MacInUse {
        /// The address.
        mac: MacAddress,
        /// The port that has it.
        port: PortId,
        /// That port's VM.
        vm: Name,
    },
    /// The group does not let its ports decide the setting.
    #[error("Port group {group} does not let its ports override {setting}: allow it there, or leave it out")]
    OverrideNotAllowed {
        /// The group.
        group: Name,
        /// The setting.
        setting: Setting,
    },
    /// The VF's PF is no uplink of the port's switch.
    #[error("PF {pf} is no uplink of switch {switch}: add it there, or take a VF of an uplink")]
    NotAnUplink {
        /// The PF.
        pf: String,
        /// The switch.
        switch: Name,
    },
    /// The edit would change a property that is fixed.
    #[error("The {0} cannot be changed: create another")]
    Immutable(&'static str),
    /// The port has a VF already.
    #[error("Port {0} has a VF: release it first")]
    Bound(PortId),
    /// A port has no VF.
    #[error("Port {0} has no VF")]
    NotBound(PortId),
    /// Changes of the port are under way.
    #[error("Port {0} is being changed: commit or abort that first")]
    Pending(PortId),
}

impl SwitchState {
    /// Makes a host without a switch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks up a switch.
    #[must_use]
    pub fn switch(&self, id: SwitchId) -> Option<&Switch> {
        self.switches.get(&id)
    }

    /// All switches, by identity.
    pub fn switches(&self) -> impl Iterator<Item = &Switch> {
        self.switches.values()
    }

    /// Looks up a port group.
    #[must_use]
    pub fn port_group(&self, id: PortGroupId) -> Option<&PortGroup> {
        self.groups.get(&id)
    }

    /// All port groups, by identity.
    pub fn port_groups(&self) -> impl Iterator<Item = &PortGroup> {
        self.groups.values()
    }

    /// Looks up a port.
    #[must_use]
    pub fn port(&self, id: PortId) -> Option<&Port> {
        self.ports.get(&id)
    }

    /// All ports, by identity.
    pub fn ports(&self) -> impl Iterator<Item = &Port> {
        self.ports.values()
    }

    /// The ports that hold an address on a switch: as their initial, effective or further one, or in a pending change. All
    /// belong to one VM.
    pub fn ports_of_mac(&self, switch: SwitchId, mac: MacAddress) -> impl Iterator<Item = &Port> {
        let holders = (switch, mac, PortId(Uuid::nil()))..=(switch, mac, PortId(Uuid::max()));
        self.by_mac.range(holders).filter_map(|(_, _, id)| self.ports.get(id))
    }

    fn is_free(&self, switch: SwitchId, mac: MacAddress) -> bool {
        self.ports_of_mac(switch, mac).next().is_none()
    }

    /// Takes the addresses that a port has given up since the last call, and that other ports were denied before. A
    /// driver that rewrites its list gives all of it up and requests it again a moment later: wait a while before you
    /// [`offer`](Self::offer) an address.
    pub fn take_freed(&mut self) -> Vec<(SwitchId, MacAddress)> {
        let news = self.freed.iter_mut().filter(|(_, news)| **news);
        news.map(|(freed, news)| {
            *news = false;
            *freed
        })
        .collect()
    }

    /// Offers an address to the ports that were denied it. Returns these ports if the address is still free: the
    /// first one has [corrections](Self::corrections) now.
    pub fn offer(&mut self, switch: SwitchId, mac: MacAddress) -> Vec<PortId> {
        self.freed.remove(&(switch, mac));
        if self.is_free(switch, mac) { self.wanting(switch, mac).collect() } else { Vec::new() }
    }

    fn wanting(&self, switch: SwitchId, mac: MacAddress) -> impl Iterator<Item = PortId> {
        let all = (switch, mac, PortId(Uuid::nil()))..=(switch, mac, PortId(Uuid::max()));
        self.wanted.range(all).map(|(_, _, port)| *port)
    }

    /// The port that has a VF.
    #[must_use]
    pub fn port_of_vf(&self, vf: &VfRef) -> Option<&Port> {
        self.by_vf.get(vf).and_then(|id| self.ports.get(id))
    }

    /// The settings of a port, each with its source.
    ///
    /// # Errors
    /// No such port.
    pub fn effective_policy(&self, port: PortId) -> Result<EffectivePolicy, StateError> {
        let (port, group, switch) = self.lineage(port)?;
        Ok(policy_of(port, group, switch))
    }

    /// The settings of a port group's ports without overrides.
    ///
    /// # Errors
    /// No such port group.
    pub fn group_policy(&self, group: PortGroupId) -> Result<EffectivePolicy, StateError> {
        let group = self.groups.get(&group).ok_or(StateError::NoPortGroup(group))?;
        let switch = self.switches.get(&group.switch).ok_or(StateError::NoSwitch(group.switch))?;
        Ok(EffectivePolicy::resolve(&[
            (Source::Switch, &switch.settings),
            (Source::PortGroup, &group.settings),
        ]))
    }

    // A port with the levels that it inherits from.
    fn lineage(&self, id: PortId) -> Result<(&Port, &PortGroup, &Switch), StateError> {
        let port = self.ports.get(&id).ok_or(StateError::NoPort(id))?;
        let group = self.groups.get(&port.group).ok_or(StateError::NoPortGroup(port.group))?;
        let switch = self.switches.get(&group.switch).ok_or(StateError::NoSwitch(group.switch))?;
        Ok((port, group, switch))
    }
}

fn policy_of(port: &Port, group: &PortGroup, switch: &Switch) -> EffectivePolicy {
    let mut own = port.overrides.clone();
    // A group that withdraws its permission takes effect at once. The port's override counts again with the
    // permission.
    let blocks = own.blocked == Some(true);
    own.retain(|setting| group.port_overrides.contains(&setting) || (setting == Setting::Blocked && blocks));
    EffectivePolicy::resolve(&[
        (Source::Switch, &switch.settings),
        (Source::PortGroup, &group.settings),
        (Source::Port, &own),
    ])
}
