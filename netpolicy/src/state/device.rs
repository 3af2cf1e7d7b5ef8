// SPDX-License-Identifier: Apache-2.0

//! The state that a port's VF has been given, and the state that it must have.

use std::num::NonZeroU32;

use super::{Corrections, StateError, SwitchState};
use crate::{
    capabilities::ResetClears,
    ident::PortId,
    mac::MacAddress,
    objects::{PfSettings, Port},
    policy::{EffectivePolicy, ForgedTransmits, Mtu, Rate},
    request::{Change, LinkState, PromiscuousMode, Reason, Request, Route},
};

impl SwitchState {
    /// The settings that the PF must have before the guest starts: the initial address and the policy.
    ///
    /// # Errors
    /// No such port.
    pub fn baseline(&self, port: PortId) -> Result<PfSettings, StateError> {
        let initial = self.lineage(port)?.0.initial_mac;
        Ok(pf_settings(&self.effective_policy(port)?, initial))
    }

    /// The settings that the PF must have now, with the effective address. A difference from them is drift.
    ///
    /// # Errors
    /// No such port.
    pub fn expected(&self, port: PortId) -> Result<PfSettings, StateError> {
        let effective = self.lineage(port)?.0.effective_mac();
        Ok(pf_settings(&self.effective_policy(port)?, effective))
    }

    /// Begins changes. From now on no other port is granted their addresses, and
    /// [`revocations_for_reboot`](Self::revocations_for_reboot) counts them as made. If one [needs
    /// trust](Change::needs_trust), the VF counts as trusted until it is bound again, even if the change fails. Ends
    /// with [`commit`](Self::commit) or [`abort`](Self::abort).
    ///
    /// # Errors
    /// No such port, changes are pending already, or an address has been granted to another port meanwhile.
    pub fn begin(&mut self, id: PortId, changes: &[Change]) -> Result<(), StateError> {
        if !self.lineage(id)?.0.pending.is_empty() {
            return Err(StateError::Pending(id));
        }
        self.edit(id, |port| {
            port.pending = changes.to_vec();
            if changes.iter().any(Change::needs_trust) {
                port.device.was_trusted = Some(true);
            }
        })
    }

    /// Records changes that the adapter has: all or some of those begun, or [corrections](Corrections). Returns the
    /// corrections that must follow at once if the policy has changed meanwhile.
    ///
    /// # Errors
    /// No such port, or an address that is another port's (which `begin` would have found): nothing is recorded, undo
    /// the changes.
    pub fn commit(&mut self, id: PortId, changes: &[Change]) -> Result<Corrections, StateError> {
        let clears = self.reset_clears(id)?;
        self.edit(id, |port| {
            port.pending.clear();
            for change in changes {
                apply(port, change, clears);
            }
        })?;
        self.corrections(id)
    }

    /// Sets the state that the VFs of a PF lose by a reset. Until this call a reset clears nothing.
    pub fn set_reset_clears(&mut self, pf: &str, clears: ResetClears) {
        self.reset_clears.insert(pf.to_owned(), clears);
    }

    pub(super) fn reset_clears(&self, id: PortId) -> Result<ResetClears, StateError> {
        let vf = self.lineage(id)?.0.vf.as_ref();
        Ok(vf.and_then(|vf| self.reset_clears.get(&vf.pf)).copied().unwrap_or_default())
    }

    /// Ends begun changes that were not made, or have been undone.
    ///
    /// # Errors
    /// No such port.
    pub fn abort(&mut self, id: PortId) -> Result<(), StateError> {
        self.edit(id, |port| port.pending.clear())
    }

    /// Records a response to the guest. After a success the guest believes that it has the requested address, granted
    /// or silently denied.
    ///
    /// # Errors
    /// No such port.
    pub fn note_answer(&mut self, id: PortId, request: &Request, success: bool) -> Result<(), StateError> {
        match request {
            Request::SetMac(mac) if success => {
                self.ports.get_mut(&id).ok_or(StateError::NoPort(id))?.guest_mac = *mac;
                Ok(())
            }
            // A driver rewrites its list by clearing it and adding each address.
            Request::ClearUnicastFilters if success => {
                self.edit(id, |port| port.device.wanted_unicast.clear())
            }
            _ => Ok(()),
        }
    }

    /// Records a denial. An address that another port has is kept for the time when that port gives it up, as far as
    /// the unicast limit has room for it.
    ///
    /// # Errors
    /// No such port.
    pub fn note_refusal(&mut self, id: PortId, request: &Request, reason: Reason) -> Result<(), StateError> {
        let (Request::AddUnicastFilter(mac), Reason::MacInUse) = (request, reason) else { return Ok(()) };
        let limit = self.effective_policy(id)?.unicast_limit.value;
        self.edit(id, |port| {
            let device = &mut port.device;
            let held = device.unicast.union(&device.wanted_unicast).count();
            if limit.allows(held + 1) {
                device.wanted_unicast.insert(*mac);
            }
        })
    }

    /// Forgets a wanted address that the adapter refused, so that it is not added when it becomes free.
    ///
    /// # Errors
    /// No such port.
    pub fn forget_wanted(&mut self, id: PortId, mac: MacAddress) -> Result<(), StateError> {
        self.edit(id, |port| {
            port.device.wanted_unicast.remove(&mac);
        })
    }

    /// All that the VF may have of its tenant, to be revoked in this order before a reboot. The reset always comes
    /// first: PF drivers ignore all other messages of a VF that was not reset.
    ///
    /// # Errors
    /// No such port.
    pub fn revocations_for_reboot(&self, id: PortId) -> Result<Vec<Change>, StateError> {
        Ok(revocations(self.lineage(id)?.0, false))
    }

    /// The same for another tenant, with two additions.
    ///
    /// The longest frame goes back to that of an MTU of 1500 bytes, since no reset shortens it. Addresses that the VF
    /// may have been given without the agent's knowledge are removed: the record of a VF that was trusted is only as
    /// true as its vmm's reports.
    ///
    /// # Errors
    /// No such port.
    pub fn revocations_for_release(&self, id: PortId) -> Result<Vec<Change>, StateError> {
        let port = self.lineage(id)?.0;
        let mut changes = revocations(port, port.device.was_trusted.unwrap_or(true));
        let asked = port.pending.iter().filter_map(|change| match change {
            Change::SetMaxFrame(bytes) => Some(*bytes),
            _ => None,
        });
        let longest = asked.chain(port.device.max_frame).max();
        // If the VF needs a message anyway, set the frame length, too: its vmm may have concealed a change of it.
        let speaks =
            changes.iter().any(|change| change.route() == Route::Mailbox && *change != Change::Reset);
        if speaks || longest > Some(Mtu::STANDARD.max_frame()) {
            changes.push(Change::SetMaxFrame(Mtu::STANDARD.max_frame()));
        }
        Ok(changes)
    }
}

/// With `untold`, also removes further addresses that are not on record.
fn revocations(port: &Port, untold: bool) -> Vec<Change> {
    // Does not rely on the reset's own effect. Of a pending SetMulticast only its existence is known.
    let mut device = port.device.clone();
    // A pending address may or may not have replaced the recorded one.
    let mut foreign = device.pf.mac != port.initial_mac;
    for change in &port.pending {
        match change {
            Change::SetMac(pending) => foreign |= *pending != port.initial_mac,
            Change::AddUnicast(mac) => drop(device.unicast.insert(*mac)),
            Change::JoinVlan(vlan) => drop(device.vlans.insert(*vlan)),
            Change::SetMulticast(hashes) => device.multicast.extend(hashes),
            Change::SetPromiscuous(mode) => {
                device.promiscuous.multicast |= mode.multicast;
                device.promiscuous.unicast |= mode.unicast;
            }
            _ => {}
        }
    }
    let mut changes = vec![Change::Reset];
    changes.extend(device.vlans.union(&device.stale_vlans).map(|vlan| Change::LeaveVlan(*vlan)));
    changes.extend((untold || !device.unicast.is_empty()).then_some(Change::ClearUnicast));
    changes.extend((!device.multicast.is_empty()).then_some(Change::SetMulticast(Vec::new())));
    let promiscuous = device.promiscuous != PromiscuousMode::OFF;
    changes.extend(promiscuous.then_some(Change::SetPromiscuous(PromiscuousMode::OFF)));
    changes.extend(foreign.then_some(Change::SetMac(port.initial_mac)));
    changes
}

pub(super) fn pf_settings(policy: &EffectivePolicy, mac: MacAddress) -> PfSettings {
    PfSettings {
        mac,
        port_vlan: policy.vlan.value.access(),
        spoof_check: policy.forged_transmits.value == ForgedTransmits::Reject,
        trust: false,
        max_tx_rate: max_tx_rate(policy.rate.value),
        link: if policy.blocked.value { LinkState::Down } else { LinkState::Auto },
    }
}

fn max_tx_rate(rate: Rate) -> Option<NonZeroU32> {
    match rate {
        Rate::Unlimited => None,
        Rate::MaxTxMbit(rate) => Some(rate),
    }
}

fn apply(port: &mut Port, change: &Change, clears: ResetClears) {
    let device = &mut port.device;
    match change {
        Change::Reset => {
            // Further addresses and the frame length stay.
            device.stale_vlans.append(&mut device.vlans);
            if clears.multicast {
                device.multicast.clear();
            }
            if clears.promiscuous {
                device.promiscuous = PromiscuousMode::OFF;
            }
            // The guest's driver requests them again.
            device.wanted_unicast.clear();
            // The reply carries the address, and the driver adopts it.
            port.guest_mac = device.pf.mac;
        }
        Change::SetMac(mac) => {
            device.wanted_unicast.remove(mac);
            device.pf.mac = *mac;
        }
        Change::AddUnicast(mac) => {
            device.wanted_unicast.remove(mac);
            device.unicast.insert(*mac);
        }
        Change::ClearUnicast => device.unicast.clear(),
        Change::SetMulticast(hashes) => device.multicast.clone_from(hashes),
        Change::JoinVlan(vlan) => {
            device.stale_vlans.remove(vlan);
            device.vlans.insert(*vlan);
        }
        Change::LeaveVlan(vlan) => {
            device.stale_vlans.remove(vlan);
            device.vlans.remove(vlan);
        }
        Change::SetMaxFrame(bytes) => device.max_frame = Some(*bytes),
        Change::SetPromiscuous(mode) => device.promiscuous = *mode,
        Change::SetPortVlan(vlan) => device.pf.port_vlan = *vlan,
        Change::SetSpoofCheck(on) => device.pf.spoof_check = *on,
        Change::SetTrust(on) => device.pf.trust = *on,
        Change::SetMaxTxRate(rate) => device.pf.max_tx_rate = *rate,
        Change::SetLink(link) => device.pf.link = *link,
    }
}
