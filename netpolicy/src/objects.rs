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

/// Where a switch's definition lives.
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

/// The authority over some uplinks and their port groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Switch {
    /// Identity.
    pub id: SwitchId,
    /// Unique among switches.
    pub name: Name,
    /// Where the definition lives.
    #[serde(default)]
    pub kind: SwitchKind,
    /// Names of the PFs whose VFs its ports get. A PF is an uplink of one switch only.
    #[serde(default)]
    pub uplinks: BTreeSet<String>,
    /// What its port groups start from.
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
    /// The switch that it belongs to.
    pub switch: SwitchId,
    /// What it decides instead of the switch.
    #[serde(default)]
    pub settings: Settings,
    /// What its ports may decide instead of it.
    #[serde(default)]
    pub port_overrides: BTreeSet<Setting>,
}

/// A virtual machine as far as a switch knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRef {
    /// Identity.
    pub id: VmId,
    /// Name at the time.
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
    /// What the port decides instead of its group, as far as the group allows it; more is ignored.
    #[serde(default)]
    pub overrides: Settings,
    /// The address that the adapter was configured with.
    pub initial_mac: MacAddress,
    /// The address that the guest last had an answer of success for, or took from a reset.
    pub guest_mac: MacAddress,
    /// The VF, while the VM runs.
    #[serde(default)]
    pub vf: Option<VfRef>,
    /// What the VF has been given.
    pub device: DeviceState,
    /// Changes that were begun and neither committed nor aborted: the device may have them.
    #[serde(default)]
    pub pending: Vec<Change>,
}

impl Port {
    /// A port that has no VF yet.
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

    /// The addresses that no other port of the switch may have while this one is there: the initial one (a take-back
    /// returns to it), the effective one, further ones, and what is on its way.
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

/// What the PF's driver keeps for a VF: set and read back through the PF.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PfSettings {
    /// The effective address.
    pub mac: MacAddress,
    /// The tag that the adapter adds and strips.
    pub port_vlan: Option<AccessVlan>,
    /// Whether sent frames of other source addresses are dropped.
    pub spoof_check: bool,
    /// Whether the driver believes the VF. Always off, but around a message that needs it.
    pub trust: bool,
    /// Highest sending rate in Mbit/s.
    pub max_tx_rate: Option<std::num::NonZeroU32>,
    /// The link as the VF sees it.
    pub link: LinkState,
}

impl PfSettings {
    /// The changes that bring a VF of unknown settings to these. Leave out those that the PF
    /// [does not need](crate::PfCapabilities::can_make).
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

/// What a VF has been given. Where a driver's behaviour is unclear it names what the device may still have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// What the PF's driver keeps for it.
    pub pf: PfSettings,
    /// VLANs that the guest joined.
    pub vlans: BTreeSet<VlanId>,
    /// VLANs joined before the last reset: the PF may or may not have kept them.
    pub stale_vlans: BTreeSet<VlanId>,
    /// Unicast addresses besides the effective one. They outlive a reset.
    pub unicast: BTreeSet<MacAddress>,
    /// Unicast addresses that the guest asked for while another port had them. Its driver does not ask again: each is added when
    /// that port gives it up. With `unicast` never more than the unicast limit was when they were asked for.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub wanted_unicast: BTreeSet<MacAddress>,
    /// Multicast hashes.
    pub multicast: Vec<u16>,
    /// Frames not addressed to it.
    pub promiscuous: PromiscuousMode,
    /// Longest frame in bytes, with header, tag and checksum; `None` until the guest asked for one.
    pub max_frame: Option<u16>,
    /// Whether the PF's driver may have [trusted](Change::needs_trust) the VF since it was bound: whoever has its mailbox could then give it
    /// addresses that nobody else was told of, so that `unicast` may lack some. `None` in a record that an older agent wrote.
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
