// SPDX-License-Identifier: Apache-2.0

//! Addresses of adapters, in files and at the agent: the agent refuses an address that is there twice.

use std::collections::BTreeMap;

use api::{
    Problem, ProblemCode,
    types::{AdapterStatus, Name, Port, PortGroup, Vm, VmSpec, WantedPort},
};
use netpolicy::MacAddress;

use super::files::Wanted;

/// The port group of an adapter that names none.
const DEFAULT: &str = "default";

/// The owner of each address, as the agent would see it after each step.
pub(super) struct Addresses {
    /// The VM of each configured address, on any switch.
    configured: BTreeMap<String, Name>,
    /// The VM of each address that a port has at the moment, by switch: its guest may have changed the address.
    ports: BTreeMap<(String, String), String>,
    /// The switch of each port group.
    switches: BTreeMap<String, String>,
}

/// The ports of a VM, in the order of [`VmSpec::ports`].
fn ports_of(vm: &Vm) -> impl Iterator<Item = &AdapterStatus> {
    let of_nics = vm.status.nics.iter().filter_map(|nic| nic.port.as_ref());
    vm.status.adapters.iter().chain(of_nics)
}

impl Addresses {
    pub(super) fn new(vms: &[Vm], ports: &[Port], groups: &[PortGroup], wanted: &[(String, Wanted)]) -> Self {
        let adapters = vms.iter().flat_map(|vm| ports_of(vm).map(move |port| (vm, port)));
        let of_files = wanted.iter().filter_map(|(_, wanted)| match wanted {
            Wanted::PortGroup(name, spec) => Some((name.to_string(), spec.switch.to_string())),
            _ => None,
        });
        let of_agent = groups.iter().map(|group| (group.name.to_string(), group.spec.switch.to_string()));
        let has = |port: &Port, mac: MacAddress| {
            ((port.status.switch.to_string(), mac.to_string()), port.status.owner.name.clone())
        };
        Addresses {
            configured: adapters.map(|(vm, adapter)| (adapter.mac.to_string(), vm.name.clone())).collect(),
            ports: ports
                .iter()
                .flat_map(|port| [has(port, port.status.initial_mac), has(port, port.status.effective_mac)])
                .collect(),
            // A file's group replaces that of the agent.
            switches: of_agent.chain(of_files).collect(),
        }
    }

    /// Gives a VM the addresses of its file.
    ///
    /// # Errors
    /// The agent's problem for an address that another VM has.
    pub(super) fn take(&mut self, spec: &VmSpec) -> Result<(), Problem> {
        let fixed = || spec.ports().filter_map(|port| Some((port.mac?, port)));
        for (mac, port) in fixed() {
            let mac = mac.to_string();
            let group = port.port_group.map_or(DEFAULT, Name::as_str);
            let on_switch =
                self.switches.get(group).and_then(|switch| self.ports.get(&(switch.clone(), mac.clone())));
            let owner =
                self.configured.get(&mac).map(Name::as_str).filter(|owner| *owner != spec.name.as_str());
            let owner = owner.or(on_switch.map(String::as_str).filter(|owner| *owner != spec.name.as_str()));
            if let Some(owner) = owner {
                let detail = format!(
                    "The address {mac} belongs to a port of the VM {owner}: choose another. Nothing was changed."
                );
                let field = Some(format!("{}.mac", port.field).into());
                return Err(Problem { field, ..Problem::new(ProblemCode::MacInUse, detail) });
            }
        }
        // An adapter without an address in the file keeps its own: the agent makes it from the VM and the adapter.
        let own: Vec<_> = fixed().map(|(mac, _)| (mac.to_string(), spec.name.clone())).collect();
        self.configured.extend(own);
        Ok(())
    }

    /// Takes a VM's addresses away, before the VM gets those of its file.
    pub(super) fn release(&mut self, vm: &Vm, spec: &VmSpec) {
        let keeps = |mac: &str| {
            vm.spec.ports().zip(ports_of(vm)).any(|(port, status)| {
                // An adapter and a NIC of one id have different addresses.
                let same = |new: &WantedPort<'_>| (new.id, new.is_nic) == (port.id, port.is_nic);
                let still = spec.ports().any(|new| same(&new) && new.mac.is_none());
                status.mac.to_string() == mac && port.mac.is_none() && still
            })
        };
        self.configured.retain(|mac, owner| *owner != vm.name || keeps(mac));
        self.ports.retain(|(_, mac), owner| owner.as_str() != vm.name.as_str() || keeps(mac));
    }
}
