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
