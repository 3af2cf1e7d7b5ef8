// SPDX-License-Identifier: Apache-2.0

//! What a port's VF has been given, and what it must have.

use std::num::NonZeroU32;

use super::{Corrections, StateError, SwitchState};
use crate::{
    ident::PortId,
    mac::MacAddress,
    objects::{PfSettings, Port},
    policy::{EffectivePolicy, ForgedTransmits, Mtu, Rate},
    request::{Change, LinkState, PromiscuousMode, Reason, Request, Route},
};

impl SwitchState {
    /// What the PF must be programmed to before the guest starts: the initial address and what the policy says.
    ///
    /// # Errors
    /// No such port.
    pub fn baseline(&self, port: PortId) -> Result<PfSettings, StateError> {
        let initial = self.lineage(port)?.0.initial_mac;
        Ok(pf_settings(&self.effective_policy(port)?, initial))
    }

    /// What the PF must show now, with the effective address: what is read from it and differs is drift.
    ///
    /// # Errors
    /// No such port.
    pub fn expected(&self, port: PortId) -> Result<PfSettings, StateError> {
        let effective = self.lineage(port)?.0.effective_mac();
        Ok(pf_settings(&self.effective_policy(port)?, effective))
    }

    /// The changes are about to be made: from now on no other port is granted their addresses, and
    /// [`take_back_all`](Self::take_back_all) counts them as made; if one [needs trust](Change::needs_trust), the VF counts as one that
    /// was trusted until it is bound again, whatever becomes of them. Ends with [`commit`](Self::commit) or [`abort`](Self::abort).
    ///
    /// # Errors
    /// No such port, changes are under way already, or an address has been granted to another port meanwhile.
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

    /// The adapter has these changes: all that were begun, some of them, or [corrections](Corrections). The result is
    /// what must follow at once because the policy changed meanwhile.
    ///
    /// # Errors
    /// No such port, or an address that is another port's (which `begin` would have told): nothing is recorded, undo it.
    pub fn commit(&mut self, id: PortId, changes: &[Change]) -> Result<Corrections, StateError> {
        self.edit(id, |port| {
            port.pending.clear();
            for change in changes {
                apply(port, change);
            }
        })?;
        self.corrections(id)
    }

    /// The changes that were begun have not been made, or have been undone.
    ///
    /// # Errors
    /// No such port.
    pub fn abort(&mut self, id: PortId) -> Result<(), StateError> {
        self.edit(id, |port| port.pending.clear())
    }

    /// The guest has been answered: after a success it believes that it has the address that it asked for, granted or
    /// silently refused.
    ///
    /// # Errors
    /// No such port.
    pub fn note_answer(&mut self, id: PortId, request: &Request, success: bool) -> Result<(), StateError> {
        match request {
            Request::SetMac(mac) if success => {
                self.ports.get_mut(&id).ok_or(StateError::NoPort(id))?.guest_mac = *mac;
                Ok(())
            }
            // A driver sets its list anew: it clears it and adds each address.
            Request::ClearUnicastFilters if success => {
                self.edit(id, |port| port.device.wanted_unicast.clear())
            }
            _ => Ok(()),
        }
    }

    /// The guest was refused. An address that another port has is kept for the time when that port gives it up, as far as
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

    /// The address is not added any more when it becomes free: the adapter refused it.
    ///
    /// # Errors
    /// No such port.
    pub fn forget_wanted(&mut self, id: PortId, mac: MacAddress) -> Result<(), StateError> {
        self.edit(id, |port| {
            port.device.wanted_unicast.remove(&mac);
        })
    }

    /// Everything that the VF may have of its tenant, to be taken back in this order before a reboot. The reset comes first
    /// and always: PF drivers hear nothing else from a VF that was not reset.
    ///
    /// # Errors
    /// No such port.
    pub fn take_back_all(&self, id: PortId) -> Result<Vec<Change>, StateError> {
        Ok(take_back(self.lineage(id)?.0, false))
    }

    /// The same for another tenant, with the longest frame of an MTU of 1500 bytes: no reset shortens it. Also what the VF may have been given behind the agent's back. What is on record of a VF that was
    /// trusted is its vmm's word, and says only what that has told.
    ///
    /// # Errors
    /// No such port.
    pub fn take_back_for_release(&self, id: PortId) -> Result<Vec<Change>, StateError> {
        let port = self.lineage(id)?.0;
        let mut changes = take_back(port, port.device.was_trusted.unwrap_or(true));
        let asked = port.pending.iter().filter_map(|change| match change {
            Change::SetMaxFrame(bytes) => Some(*bytes),
            _ => None,
        });
        let longest = asked.chain(port.device.max_frame).max();
        // A VF that says something all the same says this, too: its vmm may not have told of it.
        let speaks =
            changes.iter().any(|change| change.route() == Route::Mailbox && *change != Change::Reset);
        if speaks || longest > Some(Mtu::STANDARD.max_frame()) {
            changes.push(Change::SetMaxFrame(Mtu::STANDARD.max_frame()));
        }
        Ok(changes)
    }
}

/// With `untold`, also further addresses that are not on record.
fn take_back(port: &Port, untold: bool) -> Vec<Change> {
    // The reset's own effect is not counted on, and of a pending SetMulticast only that there is one.
    let mut device = port.device.clone();
    // Nor is it known whether a pending address has replaced the recorded one: either may be there.
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

fn apply(port: &mut Port, change: &Change) {
    let device = &mut port.device;
    match change {
        Change::Reset => {
            // igb forgets these; further unicast addresses outlive a reset, VLANs and the frame length may.
            device.stale_vlans.append(&mut device.vlans);
            device.multicast.clear();
            device.promiscuous = PromiscuousMode::OFF;
            // Its driver asks for them again.
            device.wanted_unicast.clear();
            // The reply carries it, and the driver adopts it.
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
