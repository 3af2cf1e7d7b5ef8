// SPDX-License-Identifier: Apache-2.0

//! Switches, port groups and ports as the API shows them.

use api::{
    Missing,
    types::{
        Name, Owner, PortGroupSpec, PortGroupStatus, PortSpec, PortStatus, SwitchSpec, SwitchStatus,
        Timestamp,
    },
};
use netpolicy::{PortGroupId, PortId, SwitchId};
use uuid::Uuid;

use super::{
    actor::{Actor, Meta},
    error::SwitchError,
    record::port_name,
};

impl Actor {
    pub(super) fn view_switches(&self) -> Result<Vec<api::types::Switch>, SwitchError> {
        let mut all =
            self.state.switches().map(|switch| self.view_switch(switch.id)).collect::<Result<Vec<_>, _>>()?;
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    pub(super) fn view_switch(&self, id: SwitchId) -> Result<api::types::Switch, SwitchError> {
        let switch = self.state.switch(id).ok_or(netpolicy::StateError::NoSwitch(id))?;
        let meta = self.meta_of(id.0);
        let groups: Vec<PortGroupId> =
            self.state.port_groups().filter(|group| group.switch == id).map(|group| group.id).collect();
        let ports = self.state.ports().filter(|port| groups.contains(&port.group)).count();
        Ok(api::types::Switch {
            id: id.0,
            name: shown(&switch.name)?,
            revision: meta.revision,
            created: meta.created,
            spec: SwitchSpec {
                kind: switch.kind,
                uplinks: switch.uplinks.clone(),
                settings: switch.settings.clone(),
            },
            status: SwitchStatus { port_groups: number(groups.len()), ports: number(ports) },
        })
    }

    pub(super) fn view_groups(&self) -> Result<Vec<api::types::PortGroup>, SwitchError> {
        let mut all =
            self.state.port_groups().map(|group| self.view_group(group.id)).collect::<Result<Vec<_>, _>>()?;
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    pub(super) fn view_group(&self, id: PortGroupId) -> Result<api::types::PortGroup, SwitchError> {
        let group = self.state.port_group(id).ok_or(netpolicy::StateError::NoPortGroup(id))?;
        let switch = self.state.switch(group.switch).ok_or(netpolicy::StateError::NoSwitch(group.switch))?;
        let meta = self.meta_of(id.0);
        let ports = self.state.ports().filter(|port| port.group == id).count();
        Ok(api::types::PortGroup {
            id: id.0,
            name: shown(&group.name)?,
            revision: meta.revision,
            created: meta.created,
            spec: PortGroupSpec {
                switch: shown(&switch.name)?,
                settings: group.settings.clone(),
                port_overrides: group.port_overrides.clone(),
            },
            status: PortGroupStatus { ports: number(ports), policy: self.state.group_policy(id)? },
        })
    }

    pub(super) fn view_ports(&self) -> Result<Vec<api::types::Port>, SwitchError> {
        let mut all =
            self.state.ports().map(|port| self.view_port(port.id)).collect::<Result<Vec<_>, _>>()?;
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    pub(super) fn view_port(&self, id: PortId) -> Result<api::types::Port, SwitchError> {
        let port = self.state.port(id).ok_or(netpolicy::StateError::NoPort(id))?;
        let group =
            self.state.port_group(port.group).ok_or(netpolicy::StateError::NoPortGroup(port.group))?;
        let switch = self.state.switch(group.switch).ok_or(netpolicy::StateError::NoSwitch(group.switch))?;
        let (meta, port_queue) = (self.meta_of(id.0), self.port_queues.get(&id));
        Ok(api::types::Port {
            id: id.0,
            name: port_name(port),
            revision: meta.revision,
            created: meta.created,
            spec: PortSpec { settings: port.overrides.clone() },
            status: PortStatus {
                owner: Owner {
                    vm: port.vm.id.0,
                    name: port.vm.name.to_string(),
                    adapter: Some(port.adapter.clone()),
                },
                switch: shown(&switch.name)?,
                port_group: shown(&group.name)?,
                pf: port.vf.as_ref().map(|vf| vf.pf.clone()),
                vf: port_queue
                    .and_then(|port_queue| port_queue.bdf.as_ref())
                    .and_then(|bdf| bdf.parse().ok()),
                vf_index: port.vf.as_ref().map(|vf| vf.index),
                initial_mac: port.initial_mac,
                effective_mac: port.effective_mac(),
                guest_mac: port.guest_mac,
                policy: self.state.effective_policy(id)?,
                unchecked: port_queue.and_then(|port_queue| port_queue.unchecked.clone()),
                unmade: port_queue.map(|port_queue| port_queue.unmade.clone()).unwrap_or_default(),
                pending: port_queue.and_then(super::port_queue::PortQueue::pending),
                counters: port_queue.map(|port_queue| port_queue.counters).unwrap_or_default(),
            },
        })
    }

    fn meta_of(&self, id: Uuid) -> Meta {
        self.meta.get(&id).copied().unwrap_or(Meta { created: Timestamp::from_unix_ms(0), revision: 0 })
    }
}

/// A name in the API's type. This fails only for a text that reads as an id.
fn shown(name: &netpolicy::Name) -> Result<Name, SwitchError> {
    let odd = |_| SwitchError::NotFound(Missing::new("name that the API can show for", name));
    name.as_str().parse().map_err(odd)
}

fn number(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}
