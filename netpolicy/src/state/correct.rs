// SPDX-License-Identifier: Apache-2.0

//! The corrections that bring a port's VF to its policy, no more and no less.

use serde::{Deserialize, Serialize};

use super::{StateError, SwitchState, device::pf_settings, policy_of};
use crate::{
    ident::{PortId, SwitchId, VfRef},
    mac::MacAddress,
    objects::{DeviceState, Port},
    policy::{EffectivePolicy, MacSharing, Setting},
    request::{Change, DecidedBy, LinkState, PromiscuousMode},
    vlan::VlanId,
};

/// One step towards the policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Correction {
    /// The change.
    pub change: Change,
    /// The setting that requires it; none for a state that is never left on.
    pub decided_by: Option<DecidedBy>,
    /// Whether it revokes something from the guest, which is recorded. Else it grants or only re-adjusts.
    pub revokes: bool,
    /// The value that the device has.
    pub old: String,
}

/// The corrections of one port that has a VF, to be made in this order, then [committed](SwitchState::commit).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[must_use]
pub struct Corrections {
    /// The port.
    pub port: PortId,
    /// Its VF.
    pub vf: Option<VfRef>,
    /// The steps. Changes that the PF makes by itself, and that cut off most, come first. The port VLAN comes last,
    /// as PF drivers ignore VLAN messages of a VF that has one.
    pub list: Vec<Correction>,
}

impl Corrections {
    /// The changes alone.
    #[must_use]
    pub fn changes(&self) -> Vec<Change> {
        self.list.iter().map(|correction| correction.change.clone()).collect()
    }
}

impl SwitchState {
    /// The corrections that a port's VF needs now. Empty without a VF, and after the corrections were committed.
    ///
    /// # Errors
    /// No such port.
    pub fn corrections(&self, id: PortId) -> Result<Corrections, StateError> {
        let (port, group, switch) = self.lineage(id)?;
        let mut list = Vec::new();
        if port.vf.is_some() {
            let policy = policy_of(port, group, switch);
            let mut corrector = Corrector { state: self, port, switch: switch.id, policy, list: &mut list };
            corrector.pf();
            corrector.vlans();
            let kept = corrector.unicast();
            corrector.wanted(kept);
            corrector.others();
            corrector.port_vlan();
        }
        Ok(Corrections { port: id, vf: port.vf.clone(), list })
    }
}

struct Corrector<'a> {
    state: &'a SwitchState,
    port: &'a Port,
    switch: SwitchId,
    policy: EffectivePolicy,
    list: &'a mut Vec<Correction>,
}

impl<'a> Corrector<'a> {
    fn push(&mut self, setting: Option<Setting>, revokes: bool, change: Change, old: impl ToString) {
        let decided_by = setting.map(|setting| DecidedBy { setting, source: self.policy.source(setting) });
        self.list.push(Correction { change, decided_by, revokes, old: old.to_string() });
    }

    fn device(&self) -> &'a DeviceState {
        &self.port.device
    }

    fn pf(&mut self) {
        let (has, initial) = (&self.device().pf, self.port.initial_mac);
        let wants = pf_settings(&self.policy, has.mac);
        if let Some(setting) = self.forbids(has.mac) {
            self.push(Some(setting), true, Change::SetMac(initial), has.mac);
        }
        if has.spoof_check != wants.spoof_check {
            let change = Change::SetSpoofCheck(wants.spoof_check);
            self.push(Some(Setting::ForgedTransmits), wants.spoof_check, change, on_off(has.spoof_check));
        }
        if has.trust {
            self.push(None, true, Change::SetTrust(false), on_off(true));
        }
        if has.link != wants.link {
            let down = wants.link == LinkState::Down;
            self.push(
                Some(Setting::Blocked),
                down,
                Change::SetLink(wants.link),
                if down { "auto" } else { "down" },
            );
        }
        if has.max_tx_rate != wants.max_tx_rate {
            let old = has.max_tx_rate.map_or("unlimited".into(), |rate| format!("{rate} Mbit/s"));
            self.push(Some(Setting::Rate), false, Change::SetMaxTxRate(wants.max_tx_rate), old);
        }
    }

    fn vlans(&mut self) {
        let (device, limit) = (self.device(), usize::from(self.policy.vlan_limit.value.get()));
        // Keep as many as allowed: the guest's own before stale ones, lower ones first.
        let mut kept = 0;
        let mut leave: Vec<(VlanId, Setting)> = Vec::new();
        for vlan in device.vlans.iter().chain(device.stale_vlans.difference(&device.vlans)) {
            if !self.policy.vlan.value.allows(*vlan) {
                leave.push((*vlan, Setting::Vlan));
            } else if kept == limit {
                leave.push((*vlan, Setting::VlanLimit));
            } else {
                kept += 1;
            }
        }
        for (vlan, setting) in leave {
            self.push(Some(setting), true, Change::LeaveVlan(vlan), vlan);
        }
    }

    /// Returns the number of addresses that stay.
    fn unicast(&mut self) -> usize {
        let (device, limit) = (self.device(), usize::from(self.policy.unicast_limit.value.get()));
        let forbidden = device.unicast.iter().find_map(|mac| self.forbids(*mac));
        if forbidden.is_none() && device.unicast.len() <= limit {
            return device.unicast.len();
        }
        // No message removes a single address.
        let allowed = device.unicast.iter().copied().filter(|mac| self.forbids(*mac).is_none());
        let keep: Vec<_> = allowed.take(limit).collect();
        let held: Vec<_> = device.unicast.iter().map(ToString::to_string).collect();
        let setting = forbidden.unwrap_or(Setting::UnicastLimit);
        self.push(Some(setting), true, Change::ClearUnicast, held.join(","));
        let kept = keep.len();
        for mac in keep {
            self.push(Some(setting), false, Change::AddUnicast(mac), "");
        }
        kept
    }

    /// The setting because of which the port loses an address that it has.
    fn forbids(&self, mac: MacAddress) -> Option<Setting> {
        if !self.state.allows_mac(&self.policy, mac, self.port) {
            return Some(Setting::MacChanges);
        }
        let kept = self.policy.mac_sharing.value == MacSharing::SameVm;
        (!kept && self.state.is_shared(self.switch, mac, self.port)).then_some(Setting::MacSharing)
    }

    /// Adds addresses that the guest requested and that have become free, besides those that stay.
    fn wanted(&mut self, kept: usize) {
        let (device, policy, state) = (self.device(), &self.policy, self.state);
        let allowed = |mac: &MacAddress| {
            !policy.blocked.value
                && state.allows_mac(policy, *mac, self.port)
                && *mac != device.pf.mac
                && state.is_free(self.switch, *mac)
                && !state.freed.contains_key(&(self.switch, *mac))
        };
        let room = usize::from(policy.unicast_limit.value.get()).saturating_sub(kept);
        let add: Vec<_> = device.wanted_unicast.iter().copied().filter(allowed).take(room).collect();
        for mac in add {
            self.push(None, false, Change::AddUnicast(mac), "");
        }
    }

    fn others(&mut self) {
        let device = self.device();
        let limit = usize::from(self.policy.multicast_limit.value.get());
        if device.multicast.len() > limit {
            let keep = device.multicast.iter().copied().take(limit).collect();
            let old = format!("{} hashes", device.multicast.len());
            self.push(Some(Setting::MulticastLimit), true, Change::SetMulticast(keep), old);
        }
        let (mode, policy) = (device.promiscuous, self.policy.promiscuous.value);
        if !policy.allows(mode) {
            let multicast = PromiscuousMode { multicast: mode.multicast, unicast: false };
            let mode = if policy.allows(multicast) { multicast } else { PromiscuousMode::OFF };
            self.push(Some(Setting::Promiscuous), true, Change::SetPromiscuous(mode), device.promiscuous);
        }
        let longest = self.policy.mtu.value.max_frame();
        if let Some(bytes) = device.max_frame.filter(|bytes| *bytes > longest) {
            self.push(Some(Setting::Mtu), true, Change::SetMaxFrame(longest), format!("{bytes} bytes"));
        }
    }

    fn port_vlan(&mut self) {
        let (has, wants) = (self.device().pf.port_vlan, self.policy.vlan.value.access());
        if has != wants {
            let old = has.map_or("none".into(), |vlan| vlan.to_string());
            self.push(Some(Setting::Vlan), false, Change::SetPortVlan(wants), old);
        }
    }
}

fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}
