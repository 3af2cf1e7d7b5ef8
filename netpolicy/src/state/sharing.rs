// SPDX-License-Identifier: Apache-2.0

//! Addresses that two ports of one VM share.
//!
//! A bond in a guest gives both adapters one address (`fail_over_mac=none`), or moves the address to
//! the active adapter (`follow`). With `mac_sharing: same_vm` a port may take an address that another
//! port of its VM has. The other port must share too, except for its own initial address: a port can
//! always return to that. Ports of two VMs never share an address.
//!
//! Two VFs of one PF cannot share: the PF has one receive filter for both, and adapters differ in
//! the VF that they deliver a frame to.

use super::{SwitchState, policy_of};
use crate::{
    ident::{PortId, SwitchId},
    mac::MacAddress,
    objects::Port,
    policy::{EffectivePolicy, MacSharing},
};
use uuid::Uuid;

/// A conflict between a port and the new address of another one.
pub(super) struct Conflict<'a> {
    /// The port that has the address.
    pub(super) other: &'a Port,
    /// The reason that the two ports do not share it.
    pub(super) why: NotShared,
}

/// The reason that two ports do not share an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotShared {
    /// The ports belong to two VMs.
    OtherVm,
    /// The policy of the requesting port rejects it.
    Rejected,
    /// The policy of the port that has the address rejects it.
    RejectedThere,
    /// Both VFs belong to one PF.
    SamePf,
}

impl Conflict<'_> {
    /// The detail of a denial, for users.
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
    /// Finds a port that has `mac` and does not share it with `port`. `port` need not be in the tables.
    pub(super) fn conflict(&self, switch: SwitchId, mac: MacAddress, port: &Port) -> Option<Conflict<'_>> {
        let mut others = self.ports_of_mac(switch, mac).filter(|other| other.id != port.id);
        others.find_map(|other| Some(Conflict { other, why: self.not_shared(mac, port, other)? }))
    }

    fn not_shared(&self, mac: MacAddress, port: &Port, other: &Port) -> Option<NotShared> {
        let one_pf = || port.vf.as_ref().zip(other.vf.as_ref()).is_some_and(|(one, two)| one.pf == two.pf);
        if other.vm.id != port.vm.id {
            Some(NotShared::OtherVm)
        } else if mac == port.initial_mac {
            // A port may always return to its initial address.
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

    /// Whether another port has `mac` too. False for the initial address of `port`.
    pub(super) fn is_shared(&self, switch: SwitchId, mac: MacAddress, port: &Port) -> bool {
        mac != port.initial_mac && self.ports_of_mac(switch, mac).any(|other| other.id != port.id)
    }

    /// Whether the policy of `port` allows `mac`, apart from conflicts with other ports.
    pub(super) fn allows_mac(&self, policy: &EffectivePolicy, mac: MacAddress, port: &Port) -> bool {
        mac == port.initial_mac
            || policy.mac_changes.value.allows(mac)
            || self.initials_to_share(policy, port).any(|initial| initial == mac)
    }

    /// The initial addresses that `port` may share: those of its VM's other ports, on any switch. None if the
    /// policy of `port` does not share.
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
