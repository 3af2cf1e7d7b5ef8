// SPDX-License-Identifier: Apache-2.0

//! Switches, port groups and ports.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{
    ident::{Name, PortGroupId, PortId, SwitchId, VfRef, VmId},
    mac::MacAddress,
    policy::{Setting, Settings},
    request::{Change, LinkState, PromiscuousMode},
    vlan::{AccessVlan, VlanId},
};

/// The place of a switch's definition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SwitchKind {
    /// On this host.
    #[default]
    Standard,
    /// In a shared store; this host has a copy.
    Distributed,
}

/// Decides for its uplinks and port groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Switch {
    /// Identity.
    pub id: SwitchId,
    /// Unique among switches.
    pub name: Name,
    /// The place of its definition.
    #[serde(default)]
    pub kind: SwitchKind,
    /// The names of its PFs: its ports get VFs of these. A PF is an uplink of at most one switch.
    #[serde(default)]
    pub uplinks: BTreeSet<String>,
    /// The settings that its port groups inherit.
    #[serde(default)]
    pub settings: Settings,
}

/// A named set of policies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortGroup {
    /// Identity.
    pub id: PortGroupId,
    /// Unique among the port groups of all switches.
    pub name: Name,
    /// The switch that owns it.
    pub switch: SwitchId,
    /// The settings that it decides instead of the switch.
    #[serde(default)]
    pub settings: Settings,
    /// The settings that its ports may decide instead of it.
    #[serde(default)]
    pub port_overrides: BTreeSet<Setting>,
}

/// A virtual machine, as far as a switch knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRef {
    /// Identity.
    pub id: VmId,
    /// Its name at the time of the record.
    pub name: Name,
}

/// One VM adapter's attachment to a port group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Identity.
    pub id: PortId,
    /// The VM.
    pub vm: VmRef,
    /// The adapter's name in the VM.
    pub adapter: String,
    /// The port group.
    pub group: PortGroupId,
    /// The settings that the port decides instead of its group. Those that the group does not allow are ignored.
    #[serde(default)]
    pub overrides: Settings,
    /// The address that the adapter was configured with.
    pub initial_mac: MacAddress,
    /// The address in the guest's belief: the last one that a request for it succeeded with, or that a reset's reply
    /// carried.
    pub guest_mac: MacAddress,
    /// The VF, while the VM runs.
    #[serde(default)]
    pub vf: Option<VfRef>,
    /// The state that the VF has been given.
    pub device: DeviceState,
    /// Changes that were begun and neither committed nor aborted: the device may have them.
    #[serde(default)]
    pub pending: Vec<Change>,
}

impl Port {
    /// Makes a port that has no VF yet.
    #[must_use]
    pub fn new(
        id: PortId,
        vm: VmRef,
        adapter: impl Into<String>,
        group: PortGroupId,
        initial_mac: MacAddress,
    ) -> Self {
        Self {
            id,
            vm,
            adapter: adapter.into(),
            group,
            overrides: Settings::default(),
            initial_mac,
            guest_mac: initial_mac,
            vf: None,
            device: DeviceState::new(initial_mac),
            pending: Vec::new(),
        }
    }

    /// The address that the PF has programmed.
    #[must_use]
    pub fn effective_mac(&self) -> MacAddress {
        self.device.pf.mac
    }

    /// The addresses that this port keeps from the other ports of the switch: the initial one (a revocation returns
    /// to it), the effective one, further ones, and those of pending changes.
    pub fn addresses(&self) -> impl Iterator<Item = MacAddress> {
        let pending = self.pending.iter().filter_map(|change| match change {
            Change::SetMac(mac) | Change::AddUnicast(mac) => Some(*mac),
            _ => None,
        });
        [self.initial_mac, self.effective_mac()]
            .into_iter()
            .chain(self.device.unicast.iter().copied())
            .chain(pending)
    }
}

/// The settings that the PF's driver keeps for a VF: set and read back through the PF.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PfSettings {
    /// The effective address.
    pub mac: MacAddress,
    /// The tag that the adapter adds and strips.
    pub port_vlan: Option<AccessVlan>,
    /// Whether the adapter drops frames that the VF sends from other source addresses.
    pub spoof_check: bool,
    /// Whether the driver trusts the VF. Always off, except around a message that needs it.
    pub trust: bool,
    /// The highest sending rate in Mbit/s.
    pub max_tx_rate: Option<std::num::NonZeroU32>,
    /// The link as the VF sees it.
    pub link: LinkState,
}

impl PfSettings {
    /// The changes that bring a VF from unknown settings to these. Leave out those that the PF [does not
    /// need](crate::PfCapabilities::can_make).
    #[must_use]
    pub fn changes(&self) -> Vec<Change> {
        vec![
            Change::SetMac(self.mac),
            Change::SetSpoofCheck(self.spoof_check),
            Change::SetTrust(self.trust),
            Change::SetPortVlan(self.port_vlan),
            Change::SetMaxTxRate(self.max_tx_rate),
            Change::SetLink(self.link),
        ]
    }
}

/// The state that a VF has been given. Where a driver's behaviour is unclear, it lists all that the device may still
/// have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// The settings that the PF's driver keeps.
    pub pf: PfSettings,
    /// VLANs that the guest has joined.
    pub vlans: BTreeSet<VlanId>,
    /// VLANs joined before the last reset: the PF may or may not have kept them.
    pub stale_vlans: BTreeSet<VlanId>,
    /// Unicast addresses besides the effective one.
    pub unicast: BTreeSet<MacAddress>,
    /// Unicast addresses that the guest requested while another port had them. Its driver does not repeat the
    /// request: each is added when that port gives it up. With `unicast` never more than the unicast limit at the
    /// time of the request.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub wanted_unicast: BTreeSet<MacAddress>,
    /// Multicast hashes.
    pub multicast: Vec<u16>,
    /// The reception of frames that are not addressed to the VF.
    pub promiscuous: PromiscuousMode,
    /// The longest frame in bytes, with header, tag and checksum; `None` until the guest requests one.
    pub max_frame: Option<u16>,
    /// Whether the PF's driver may have [trusted](Change::needs_trust) the VF since it was bound. If so, the code in
    /// control of its mailbox could give it addresses without the agent's knowledge, and `unicast` may lack some.
    /// `None` in a record that an older agent wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub was_trusted: Option<bool>,
}

impl DeviceState {
    pub(crate) fn new(mac: MacAddress) -> Self {
        let pf = PfSettings {
            mac,
            port_vlan: None,
            spoof_check: true,
            trust: false,
            max_tx_rate: None,
            link: LinkState::Auto,
        };
        Self {
            pf,
            vlans: BTreeSet::new(),
            stale_vlans: BTreeSet::new(),
            unicast: BTreeSet::new(),
            wanted_unicast: BTreeSet::new(),
            multicast: Vec::new(),
            promiscuous: PromiscuousMode::OFF,
            max_frame: None,
            was_trusted: Some(false),
        }
    }
}
