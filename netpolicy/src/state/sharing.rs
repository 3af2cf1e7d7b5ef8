// SPDX-License-Identifier: Apache-2.0

//! Addresses that two ports of one VM have.
//!
//! A guest that bonds two adapters gives both the address of one (`fail_over_mac=none`), or moves it to the one that is active
//! (`follow`). With `mac_sharing: same_vm` a port may have an address that another port of its VM has. The setting decides about
//! what its own port takes: the initial address of a port that shares nothing may be taken from it, as it may take it back any
//! time. Two guests never have one address.
//!
//! VFs of one PF do not share: their frames come by one receive filter, and which of the two VFs gets them depends on the adapter.

use super::{SwitchState, policy_of};
use crate::{
    ident::{PortId, SwitchId},
    mac::MacAddress,
    objects::Port,
    policy::{EffectivePolicy, MacSharing},
};
use uuid::Uuid;

/// A port that is in the way of another one's new address.
pub(super) struct Conflict<'a> {
    /// The port that has the address.
    pub(super) other: &'a Port,
    /// Why the two do not share it.
    pub(super) why: NotShared,
}

/// Why two ports do not share an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotShared {
    /// They are of two VMs.
    OtherVm,
    /// The policy of the port that asks rejects it.
    Rejected,
    /// The policy of the port that has the address rejects it.
    RejectedThere,
    /// Their VFs are of one PF.
    SamePf,
}

impl Conflict<'_> {
    /// For people.
    pub(super) fn detail(&self) -> String {
        let (adapter, vm) = (&self.other.adapter, &self.other.vm.name);
        match self.why {
            NotShared::OtherVm => format!("The port {vm}/{adapter} has it"),
            NotShared::Rejected => format!("The port {vm}/{adapter} of the same VM has it"),
            NotShared::RejectedThere => {
                format!(
                    "The port {vm}/{adapter} of the same VM has it, and its mac_sharing rejects another holder"
                )
            }
            NotShared::SamePf => format!(
                "The port {vm}/{adapter} of the same VM has it, on the same PF: only VFs of different PFs share an address"
            ),
        }
    }
}

impl SwitchState {
    /// A port that has an address and does not share it with `port`, which is to have it and need not be in the tables.
    pub(super) fn conflict(&self, switch: SwitchId, mac: MacAddress, port: &Port) -> Option<Conflict<'_>> {
        let mut others = self.ports_of_mac(switch, mac).filter(|other| other.id != port.id);
        others.find_map(|other| Some(Conflict { other, why: self.not_shared(mac, port, other)? }))
    }

    fn not_shared(&self, mac: MacAddress, port: &Port, other: &Port) -> Option<NotShared> {
        let one_pf = || port.vf.as_ref().zip(other.vf.as_ref()).is_some_and(|(one, two)| one.pf == two.pf);
        if other.vm.id != port.vm.id {
            Some(NotShared::OtherVm)
        } else if mac == port.initial_mac {
            // A port may always go back.
            None
        } else if !self.shares(port) {
            Some(NotShared::Rejected)
        } else if mac != other.initial_mac && !self.shares(other) {
            Some(NotShared::RejectedThere)
        } else {
            one_pf().then_some(NotShared::SamePf)
        }
    }

    fn shares(&self, port: &Port) -> bool {
        let levels =
            self.groups.get(&port.group).and_then(|group| Some((group, self.switches.get(&group.switch)?)));
        levels.is_some_and(|(group, switch)| {
            policy_of(port, group, switch).mac_sharing.value == MacSharing::SameVm
        })
    }

    /// Whether another port has an address that is not `port`'s initial one.
    pub(super) fn is_shared(&self, switch: SwitchId, mac: MacAddress, port: &Port) -> bool {
        mac != port.initial_mac && self.ports_of_mac(switch, mac).any(|other| other.id != port.id)
    }

    /// Whether the policy of a port lets it have an address, as far as no other port has it.
    pub(super) fn allows_mac(&self, policy: &EffectivePolicy, mac: MacAddress, port: &Port) -> bool {
        mac == port.initial_mac
            || policy.mac_changes.value.allows(mac)
            || self.initials_to_share(policy, port).any(|initial| initial == mac)
    }

    /// The initial addresses of other ports that a port may have: those of its VM, on any switch, if its policy shares.
    pub(super) fn initials_to_share<'a>(
        &'a self,
        policy: &EffectivePolicy,
        port: &'a Port,
    ) -> impl Iterator<Item = MacAddress> + 'a {
        let shares = policy.mac_sharing.value == MacSharing::SameVm;
        let of_vm = (port.vm.id, PortId(Uuid::nil()))..=(port.vm.id, PortId(Uuid::max()));
        let others = shares.then(|| self.by_vm.range(of_vm)).into_iter().flatten();
        others.filter(|(_, id)| *id != port.id).filter_map(|(_, id)| Some(self.ports.get(id)?.initial_mac))
    }
}
