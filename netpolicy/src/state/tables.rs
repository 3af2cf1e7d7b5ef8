// SPDX-License-Identifier: Apache-2.0

//! Adding, changing and removing switches, port groups and ports.

use super::{Corrections, Entity, StateError, SwitchState, policy_of};
use crate::{
    ident::{PortGroupId, PortId, SwitchId, VfRef},
    mac::MacAddress,
    objects::{DeviceState, PfSettings, Port, PortGroup, Switch},
    policy::{Setting, Settings},
    request::Change,
};

impl SwitchState {
    /// Adds a switch.
    ///
    /// # Errors
    /// Its identity or name is taken, or an uplink belongs to another switch.
    pub fn add_switch(&mut self, switch: Switch) -> Result<(), StateError> {
        if self.switches.contains_key(&switch.id) {
            return Err(taken(Entity::Switch, &switch.id));
        }
        self.check_switch(&switch)?;
        self.switches.insert(switch.id, switch);
        Ok(())
    }

    /// Replaces a switch. The corrections are for the ports that have a VF.
    ///
    /// # Errors
    /// No such switch, its kind differs, its name is taken, an uplink belongs to another switch, or a removed uplink
    /// has a VF in use.
    pub fn update_switch(&mut self, switch: Switch) -> Result<Vec<Corrections>, StateError> {
        let old = self.switches.get(&switch.id).ok_or(StateError::NoSwitch(switch.id))?;
        if old.kind != switch.kind {
            return Err(StateError::Immutable("kind of a switch"));
        }
        self.check_switch(&switch)?;
        let id = switch.id;
        for port in self.ports_of_switch(id) {
            if let Some(vf) = port.vf.as_ref().filter(|vf| !switch.uplinks.contains(&vf.pf)) {
                return Err(in_use(Entity::Uplink, &vf.pf, &format!("port {}", port.id)));
            }
        }
        self.switches.insert(id, switch);
        let ports: Vec<_> = self.ports_of_switch(id).map(|port| port.id).collect();
        Ok(self.corrections_of(ports))
    }

    /// Removes a switch.
    ///
    /// # Errors
    /// No such switch, or it has port groups.
    pub fn remove_switch(&mut self, id: SwitchId) -> Result<Switch, StateError> {
        let switch = self.switches.get(&id).ok_or(StateError::NoSwitch(id))?;
        if let Some(group) = self.groups.values().find(|group| group.switch == id) {
            return Err(in_use(Entity::Switch, &switch.name, &format!("port group {}", group.name)));
        }
        self.switches.remove(&id).ok_or(StateError::NoSwitch(id))
    }

    /// Adds a port group.
    ///
    /// # Errors
    /// Its identity or name is taken, or its switch does not exist.
    pub fn add_port_group(&mut self, group: PortGroup) -> Result<(), StateError> {
        if self.groups.contains_key(&group.id) {
            return Err(taken(Entity::PortGroup, &group.id));
        }
        self.check_port_group(&group)?;
        self.groups.insert(group.id, group);
        Ok(())
    }

    /// Replaces a port group. The corrections are for its ports that have a VF. Overrides of its ports that it no
    /// longer allows lose their effect.
    ///
    /// # Errors
    /// No such port group, its name is taken, or its switch differs while it has ports.
    pub fn update_port_group(&mut self, group: PortGroup) -> Result<Vec<Corrections>, StateError> {
        let old = self.groups.get(&group.id).ok_or(StateError::NoPortGroup(group.id))?;
        let moved = old.switch != group.switch;
        self.check_port_group(&group)?;
        let id = group.id;
        let ports: Vec<_> = self.ports.values().filter(|port| port.group == id).map(|port| port.id).collect();
        if let Some(port) = ports.first().filter(|_| moved) {
            return Err(in_use(Entity::PortGroup, &group.name, &format!("port {port}")));
        }
        self.groups.insert(id, group);
        Ok(self.corrections_of(ports))
    }

    /// Removes a port group.
    ///
    /// # Errors
    /// No such port group, or it has ports.
    pub fn remove_port_group(&mut self, id: PortGroupId) -> Result<PortGroup, StateError> {
        let group = self.groups.get(&id).ok_or(StateError::NoPortGroup(id))?;
        if let Some(port) = self.ports.values().find(|port| port.group == id) {
            return Err(in_use(
                Entity::PortGroup,
                &group.name,
                &format!("port {} ({})", port.id, port.vm.name),
            ));
        }
        self.groups.remove(&id).ok_or(StateError::NoPortGroup(id))
    }

    /// Adds a port: a [new](Port::new) one, or a stored one with the state of its VF.
    ///
    /// # Errors
    /// Its identity is taken, its group does not exist or does not allow its overrides, its address cannot be an
    /// adapter's, one of its addresses belongs to a port of another VM or is the initial one of a port of its own VM, or its VF
    /// belongs to another port. The overrides of a stored port and its right to share an address are not checked, as its
    /// group may have changed since.
    pub fn attach(&mut self, mut port: Port) -> Result<(), StateError> {
        if self.ports.contains_key(&port.id) {
            return Err(taken(Entity::Port, &port.id));
        }
        let group = self.groups.get(&port.group).ok_or(StateError::NoPortGroup(port.group))?;
        if !port.initial_mac.is_assignable() {
            return Err(StateError::MacInvalid(port.initial_mac));
        }
        let switch = group.switch;
        match &port.vf {
            None => check_overrides(group, &port.overrides)?,
            Some(vf) => self.check_vf(switch, vf)?,
        }
        for mac in port.addresses() {
            self.check_attached(switch, mac, &port)?;
        }
        if port.device.was_trusted.is_none() {
            // Derived from the present policy, which may change.
            let definition = self.switches.get(&switch).ok_or(StateError::NoSwitch(switch))?;
            let may_be = policy_of(&port, group, definition).unicast_limit.value.get() > 0
                || !port.device.unicast.is_empty()
                || port.pending.iter().any(Change::needs_trust);
            port.device.was_trusted = Some(may_be);
        }
        self.enter(switch, &port);
        self.by_vf.extend(port.vf.clone().map(|vf| (vf, port.id)));
        self.by_vm.insert((port.vm.id, port.id));
        self.ports.insert(port.id, port);
        Ok(())
    }

    /// Removes a port and returns it.
    ///
    /// # Errors
    /// No such port, or it has a VF.
    pub fn detach(&mut self, id: PortId) -> Result<Port, StateError> {
        let (port, group, _) = self.lineage(id)?;
        if port.vf.is_some() {
            return Err(StateError::Bound(id));
        }
        let switch = group.switch;
        let port = port.clone();
        self.strike(switch, &port);
        self.by_vm.remove(&(port.vm.id, id));
        self.ports.remove(&id);
        self.note_freed(switch, port.addresses());
        Ok(port)
    }

    /// Replaces a port's overrides. The corrections are empty while it has no VF.
    ///
    /// # Errors
    /// No such port, or its group does not allow an override.
    pub fn update_port(&mut self, id: PortId, overrides: Settings) -> Result<Corrections, StateError> {
        let (_, group, _) = self.lineage(id)?;
        check_overrides(group, &overrides)?;
        self.ports.get_mut(&id).ok_or(StateError::NoPort(id))?.overrides = overrides;
        self.corrections(id)
    }

    /// Gives a port a VF that has no state of an earlier tenant. Returns the settings that the PF must have before
    /// the guest starts: [`baseline`](Self::baseline). Address and policy start from the initial ones.
    ///
    /// # Errors
    /// No such port, it has a VF, the VF is another port's or its PF no uplink of the port's switch.
    pub fn bind(&mut self, id: PortId, vf: VfRef) -> Result<PfSettings, StateError> {
        let (port, group, _) = self.lineage(id)?;
        if port.vf.is_some() {
            return Err(StateError::Bound(id));
        }
        self.check_vf(group.switch, &vf)?;
        let baseline = self.baseline(id)?;
        self.by_vf.insert(vf.clone(), id);
        self.start_over(id, &baseline)?;
        if let Some(port) = self.ports.get_mut(&id) {
            port.vf = Some(vf);
        }
        Ok(baseline)
    }

    /// Prepares a new boot of the VM on the same VF. Call it after
    /// [`revocations_for_reboot`](Self::revocations_for_reboot) is done, and program the PF with the result.
    ///
    /// # Errors
    /// No such port, or it has no VF.
    pub fn restart(&mut self, id: PortId) -> Result<PfSettings, StateError> {
        let port = self.lineage(id)?.0;
        if port.vf.is_none() {
            return Err(StateError::NotBound(id));
        }
        let was_trusted = port.device.was_trusted;
        let baseline = self.baseline(id)?;
        self.start_over(id, &baseline)?;
        if let Some(port) = self.ports.get_mut(&id) {
            // A new boot keeps the vmm, and with it the doubt.
            port.device.was_trusted = was_trusted;
        }
        Ok(baseline)
    }

    /// Takes the VF from a port. Call it after [`revocations_for_release`](Self::revocations_for_release) is done.
    ///
    /// # Errors
    /// No such port, or it has no VF.
    pub fn unbind(&mut self, id: PortId) -> Result<VfRef, StateError> {
        let port = self.ports.get(&id).ok_or(StateError::NoPort(id))?;
        let vf = port.vf.clone().ok_or(StateError::NotBound(id))?;
        let baseline = self.baseline(id)?;
        self.start_over(id, &baseline)?;
        self.by_vf.remove(&vf);
        if let Some(port) = self.ports.get_mut(&id) {
            port.vf = None;
        }
        Ok(vf)
    }

    fn start_over(&mut self, id: PortId, baseline: &PfSettings) -> Result<(), StateError> {
        self.edit(id, |port| {
            port.guest_mac = port.initial_mac;
            port.device = DeviceState { pf: baseline.clone(), ..DeviceState::new(port.initial_mac) };
            port.pending.clear();
        })
    }

    // Puts a port's addresses into the indices.
    fn enter(&mut self, switch: SwitchId, port: &Port) {
        self.by_mac.extend(port.addresses().map(|mac| (switch, mac, port.id)));
        self.wanted.extend(port.device.wanted_unicast.iter().map(|mac| (switch, *mac, port.id)));
    }

    // Takes a port's addresses out of the indices.
    fn strike(&mut self, switch: SwitchId, port: &Port) {
        for mac in port.addresses() {
            self.by_mac.remove(&(switch, mac, port.id));
        }
        for mac in &port.device.wanted_unicast {
            self.wanted.remove(&(switch, *mac, port.id));
        }
    }

    // Notes those of these addresses that no port has any more and another port wants.
    fn note_freed(&mut self, switch: SwitchId, macs: impl Iterator<Item = MacAddress>) {
        for mac in macs {
            if self.is_free(switch, mac) && self.wanting(switch, mac).next().is_some() {
                self.freed.insert((switch, mac), true);
            }
        }
    }

    // Changes a port and keeps the indices exact. Nothing changes if another port has one of its new addresses and does not share it.
    pub(super) fn edit(&mut self, id: PortId, change: impl FnOnce(&mut Port)) -> Result<(), StateError> {
        let (port, group, _) = self.lineage(id)?;
        let switch = group.switch;
        let mut edited = port.clone();
        change(&mut edited);
        for mac in edited.addresses().filter(|mac| !port.addresses().any(|old| old == *mac)) {
            self.check_free(switch, mac, &edited)?;
        }
        let old = port.clone();
        self.strike(switch, &old);
        self.enter(switch, &edited);
        self.ports.insert(id, edited);
        self.note_freed(switch, old.addresses());
        Ok(())
    }

    fn check_free(&self, switch: SwitchId, mac: MacAddress, port: &Port) -> Result<(), StateError> {
        match self.conflict(switch, mac, port) {
            Some(conflict) => Err(mac_in_use(mac, conflict.other)),
            None => Ok(()),
        }
    }

    fn check_attached(&self, switch: SwitchId, mac: MacAddress, port: &Port) -> Result<(), StateError> {
        let in_the_way = |other: &&Port| {
            other.vm.id != port.vm.id || (mac == port.initial_mac && mac == other.initial_mac)
        };
        match self.ports_of_mac(switch, mac).find(in_the_way) {
            Some(other) => Err(mac_in_use(mac, other)),
            None => Ok(()),
        }
    }

    fn check_vf(&self, switch: SwitchId, vf: &VfRef) -> Result<(), StateError> {
        let switch = self.switches.get(&switch).ok_or(StateError::NoSwitch(switch))?;
        if !switch.uplinks.contains(&vf.pf) {
            return Err(StateError::NotAnUplink { pf: vf.pf.clone(), switch: switch.name.clone() });
        }
        match self.port_of_vf(vf) {
            Some(other) => Err(in_use(Entity::Vf, vf, &format!("port {} ({})", other.id, other.vm.name))),
            None => Ok(()),
        }
    }

    fn check_switch(&self, switch: &Switch) -> Result<(), StateError> {
        for other in self.switches.values().filter(|other| other.id != switch.id) {
            if other.name == switch.name {
                return Err(taken(Entity::Switch, &switch.name));
            }
            if let Some(pf) = switch.uplinks.intersection(&other.uplinks).next() {
                return Err(in_use(Entity::Uplink, pf, &format!("switch {}", other.name)));
            }
        }
        Ok(())
    }

    fn check_port_group(&self, group: &PortGroup) -> Result<(), StateError> {
        if !self.switches.contains_key(&group.switch) {
            return Err(StateError::NoSwitch(group.switch));
        }
        match self.groups.values().find(|other| other.id != group.id && other.name == group.name) {
            Some(_) => Err(taken(Entity::PortGroup, &group.name)),
            None => Ok(()),
        }
    }

    fn ports_of_switch(&self, id: SwitchId) -> impl Iterator<Item = &Port> {
        let on_switch =
            move |port: &&Port| self.groups.get(&port.group).is_some_and(|group| group.switch == id);
        self.ports.values().filter(on_switch)
    }

    fn corrections_of(&self, ports: Vec<PortId>) -> Vec<Corrections> {
        let corrections = ports.into_iter().filter_map(|id| self.corrections(id).ok());
        corrections.filter(|corrections| !corrections.list.is_empty()).collect()
    }
}

fn check_overrides(group: &PortGroup, overrides: &Settings) -> Result<(), StateError> {
    let allowed = |setting: &Setting| {
        group.port_overrides.contains(setting)
            || (*setting == Setting::Blocked && overrides.blocked == Some(true))
    };
    match overrides.present().find(|setting| !allowed(setting)) {
        Some(setting) => Err(StateError::OverrideNotAllowed { group: group.name.clone(), setting }),
        None => Ok(()),
    }
}

fn mac_in_use(mac: MacAddress, other: &Port) -> StateError {
    StateError::MacInUse { mac, port: other.id, vm: other.vm.name.clone() }
}

fn taken(what: Entity, name: &dyn std::fmt::Display) -> StateError {
    StateError::Taken { what, name: name.to_string() }
}

fn in_use(what: Entity, name: &dyn std::fmt::Display, user: &str) -> StateError {
    StateError::InUse { what, name: name.to_string(), user: user.into() }
}
