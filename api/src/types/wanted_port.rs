// SPDX-License-Identifier: Apache-2.0

//! The ports of a VM at its switches.

use super::{Bdf, Name, UnicastMac, VmSpec};
use crate::problem::Problem;

/// A port that a VM has at a switch: that of an adapter, or of a NIC under a port group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WantedPort<'a> {
    /// The id of the adapter or NIC: unique among the VM's ports.
    pub id: &'a Name,
    /// Its place in the specification, such as `adapters[0]`.
    pub field: String,
    /// The port group; None for the default one.
    pub port_group: Option<&'a Name>,
    /// The address of the specification.
    pub mac: Option<UnicastMac>,
    /// The VF that the specification names.
    pub vf: Option<Bdf>,
    /// Whether it is the port of a NIC.
    pub is_nic: bool,
}

impl VmSpec {
    /// The VM's ports: those of adapters first.
    pub fn ports(&self) -> impl Iterator<Item = WantedPort<'_>> {
        let adapters = self.adapters.iter().enumerate().map(|(n, adapter)| WantedPort {
            id: &adapter.id,
            field: format!("adapters[{n}]"),
            port_group: adapter.port_group.as_ref(),
            mac: adapter.mac,
            vf: adapter.vf,
            is_nic: false,
        });
        let nics = self.nics.iter().enumerate().filter(|(_, nic)| nic.port_group.is_some());
        adapters.chain(nics.map(|(n, nic)| WantedPort {
            id: &nic.id,
            field: format!("nics[{n}]"),
            port_group: nic.port_group.as_ref(),
            mac: nic.mac,
            vf: None,
            is_nic: true,
        }))
    }

    /// The number of functions that the VM claims: one for each port, and its devices.
    #[must_use]
    pub fn functions(&self) -> usize {
        self.ports().count().saturating_add(self.devices.len())
    }

    /// The ids and addresses of ports are unique in the VM.
    pub(super) fn check_ports(&self) -> Result<(), Problem> {
        let ports: Vec<_> = self.ports().collect();
        for (n, port) in ports.iter().enumerate() {
            let before = || ports.iter().take(n);
            let both = |other: &WantedPort<'_>| match (other.is_nic, port.is_nic) {
                (false, false) => "two adapters",
                (true, true) => "two NICs",
                _ => "an adapter and a NIC of a port group",
            };
            if let Some(other) = before().find(|other| other.id == port.id) {
                let detail = format!("The id {} is used by {}.", port.id, both(other));
                return Err(Problem::invalid(format!("{}.id", port.field), detail));
            }
            let same = |other: &&WantedPort<'_>| port.mac.is_some() && other.mac == port.mac;
            if let (Some(mac), Some(other)) = (port.mac, before().find(same)) {
                let detail = format!("The address {mac} is used by {}.", both(other));
                return Err(Problem::invalid(format!("{}.mac", port.field), detail));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(adapters: Value, nics: Value) -> VmSpec {
        let boot = json!({ "kernel": "k" });
        let spec =
            json!({ "name": "web1", "memory": "2MiB", "boot": boot, "adapters": adapters, "nics": nics });
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn a_nic_of_a_port_group_is_a_port_beside_those_of_adapters() {
        let nics = json!([{ "id": "mgmt0", "bridge": "br0" }, { "id": "net0", "port_group": "web" }]);
        let spec = spec(json!([{ "id": "eth0" }]), nics);
        spec.check().unwrap();
        let ports: Vec<_> = spec.ports().map(|port| (port.id.to_string(), port.field, port.is_nic)).collect();
        let expect = [("eth0", "adapters[0]", false), ("net0", "nics[1]", true)];
        assert_eq!(ports, expect.map(|(id, field, is_nic)| (id.to_owned(), field.to_owned(), is_nic)));
        assert_eq!(spec.functions(), 2);
    }

    #[test]
    fn nics_of_port_groups_have_rules_of_their_own() {
        let mac = "02:00:00:00:00:11";
        let eth0 = json!([{ "id": "eth0", "mac": mac }]);
        let many: Vec<Value> =
            (0..8).map(|n| json!({ "id": format!("n{n}"), "port_group": "web" })).collect();
        let full: Vec<Value> = (0..9).map(|n| json!({ "id": format!("eth{n}") })).collect();
        for (adapters, nics, field) in [
            (json!([]), json!([{ "id": "n", "port_group": "web", "bridge": "br0" }]), "nics[0]"),
            (json!([]), json!([{ "id": "n" }]), "nics[0]"),
            (json!([]), json!([{ "id": "n", "port_group": "web", "queues": 2 }]), "nics[0].queues"),
            (json!([]), json!([{ "id": "n", "port_group": "web", "mtu": 9217 }]), "nics[0].mtu"),
            (eth0.clone(), json!([{ "id": "eth0", "port_group": "web" }]), "nics[0].id"),
            (eth0.clone(), json!([{ "id": "n", "port_group": "web", "mac": mac }]), "nics[0].mac"),
            (json!(full), json!(many), "adapters"),
        ] {
            let problem = spec(adapters, nics.clone()).check().unwrap_err();
            assert_eq!(problem.field.as_deref(), Some(field), "{nics}: {}", problem.detail);
        }
        // An interface of the host is none of the switch's.
        spec(eth0, json!([{ "id": "eth0", "bridge": "br0" }])).check().unwrap();
    }
}
