// SPDX-License-Identifier: Apache-2.0

//! Physical and virtual functions of the host.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{Bdf, Owner, Timestamp};

/// A physical function: an SR-IOV network adapter of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pf {
    /// Made from the PCI address, so it survives renaming and restarts.
    pub id: Uuid,
    /// The network interface's name, `enp1s0`.
    #[schema(example = "enp1s0")]
    pub name: String,
    /// One more for each change of the specification.
    pub revision: u64,
    /// When the agent first saw it.
    pub created: Timestamp,
    /// The requested state.
    pub spec: PfSpec,
    /// The actual state.
    pub status: PfStatus,
}

/// The requested state of a PF.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PfSpec {
    /// How many VFs it should have.
    pub vfs: u32,
}

/// The number of VFs that a PF should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VfCount {
    /// 0 removes all.
    pub count: u32,
}

/// The actual state of a PF.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PfStatus {
    /// The host's PCI address.
    pub bdf: Bdf,
    /// Its driver, `igb`; `portcullis-sim` for a simulated one.
    pub driver: Option<String>,
    /// Whether the agent simulates the adapter, without hardware.
    #[serde(default)]
    pub simulated: bool,
    /// PCI vendor and device, `8086:10c9`.
    pub device: String,
    /// The interface's own address.
    #[schema(example = "02:00:00:00:00:01")]
    pub mac: Option<String>,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether it has a link; null if that is unknown.
    pub carrier: Option<bool>,
    /// The interface's MTU in bytes.
    pub mtu: Option<u32>,
    /// VFs that exist.
    pub vfs: u32,
    /// VFs that belong to a VM.
    pub vfs_in_use: u32,
    /// VFs that the hardware can have.
    pub max_vfs: u32,
}

/// A virtual function. It has no specification of its own: the host makes it, a VM's adapter configures it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vf {
    /// Made from the PCI address.
    pub id: Uuid,
    /// The host's PCI address.
    pub bdf: Bdf,
    /// Its PF's interface.
    #[schema(example = "enp1s0")]
    pub pf: String,
    /// Its number on the PF, from 0.
    pub index: u32,
    /// PCI vendor and device, `8086:10ca`.
    pub device: String,
    /// Whether it is one of a simulated PF.
    #[serde(default)]
    pub simulated: bool,
    /// The host driver that holds it; null if there is none.
    pub driver: Option<String>,
    /// Its IOMMU group; null without an IOMMU.
    pub iommu_group: Option<u32>,
    /// The address that the PF has for it, if it has one.
    #[schema(example = "02:00:00:00:00:11")]
    pub mac: Option<String>,
    /// The VM that it belongs to, if any.
    pub owner: Option<Owner>,
    /// Another user of the VF, for people: an interface that is up, another network namespace, another process. No adapter
    /// gets such a VF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by: Option<String>,
}

/// The id of a PCI function of this host: a UUID of version 8 that holds the address.
pub fn host_id(bdf: Bdf) -> Uuid {
    let (domain, bus, device, function) = bdf.parts();
    let [a, b, c, d] = domain.to_be_bytes();
    let bytes = [0, 0, 0, 0, 0, 0, b'p', b'c', b'i', a, b, c, d, bus, device, function];
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_functions_differ_and_stay() {
        let id = |text: &str| host_id(text.parse().unwrap()).to_string();
        assert_eq!(id("0000:01:10.0"), "00000000-0000-8063-a900-000000011000");
        let mut ids: Vec<_> = [
            "0000:01:10.0",
            "0001:01:10.0",
            "f51a0000:01:10.0",
            "0000:02:10.0",
            "0000:01:11.0",
            "0000:01:10.1",
        ]
        .map(id)
        .into();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 6);
    }
}
