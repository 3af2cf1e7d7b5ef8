// SPDX-License-Identifier: Apache-2.0

//! A VM's life without requests: its boots by the agent itself, its lease; and copies of VMs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Name, Timestamp, VmSpec};

/// The reaction to the end of a VM, unless a request ended it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartPolicy {
    /// It stays at rest.
    #[default]
    Never,
    /// It is booted again if it failed, not if its guest powered off.
    OnFailure,
    /// It is booted again.
    Always,
}

impl RestartPolicy {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            RestartPolicy::Never => "never",
            RestartPolicy::OnFailure => "on_failure",
            RestartPolicy::Always => "always",
        }
    }

    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A VM that the agent boots again by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RestartStatus {
    /// The number of boots by the agent since the last one by a request, or since the VM last ran for ten minutes.
    pub attempts: u32,
    /// The time of the next boot by the agent, if one is planned: the time between two attempts doubles from 1 s to at most
    /// 5 minutes. Stopping or deleting the VM, or changing its machine, cancels it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Timestamp>,
}

/// The differences of a copy from its original.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneSpec {
    /// The copy's name: unique among the VMs that exist.
    pub name: Name,
}

impl VmSpec {
    /// A copy under another name. The agent chooses the addresses of its adapters and NICs, and VFs, since two VMs cannot share
    /// them. Devices stay, so that the two cannot run at once if there are any.
    pub fn cloned_as(&self, name: Name) -> Self {
        let mut spec = VmSpec { name, ..self.clone() };
        for adapter in &mut spec.adapters {
            (adapter.mac, adapter.vf) = (None, None);
        }
        for nic in &mut spec.nics {
            nic.mac = None;
        }
        spec
    }

    /// Whether the two describe the same running machine: a change between them is possible without a stop. The texts for
    /// cloud-init, and credentials, are read at the next boot by the agent only.
    pub fn same_machine(&self, other: &Self) -> bool {
        let VmSpec { restart, autostart, cloud_init, credentials, .. } = self.clone();
        let disks = self.disks.clone();
        let same = VmSpec { restart, autostart, cloud_init, credentials, disks, ..other.clone() };
        *self == same && self.same_disks(other)
    }

    /// Whether the disks of the two are the same, but for their limits.
    pub fn same_disks(&self, other: &Self) -> bool {
        let mut pairs = self.disks.iter().zip(&other.disks);
        self.disks.len() == other.disks.len() && pairs.all(|(one, other)| one.same_disk(other))
    }
}

/// The lease of a VM that lives no longer than its client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmLease {
    /// The end of the wait for the client, when the VM is stopped and deleted; absent while a client holds the lease.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec() -> VmSpec {
        serde_json::from_value(json!({
            "name": "web1", "memory": "2MiB", "boot": { "kernel": "k" }, "restart": "on_failure",
            "adapters": [{ "id": "eth0", "port_group": "web", "mac": "02:00:00:00:00:11", "vf": "0000:01:10.0" }],
            "devices": ["0000:02:00.0"],
        }))
        .unwrap()
    }

    #[test]
    fn a_copy_has_nothing_that_only_one_vm_can_have() {
        let copy = spec().cloned_as("web2".parse().unwrap());
        let mut expect = serde_json::to_value(spec()).unwrap();
        expect["name"] = json!("web2");
        expect["adapters"] = json!([{ "id": "eth0", "port_group": "web" }]);
        assert_eq!(serde_json::to_value(copy).unwrap(), expect);
    }

    #[test]
    fn what_the_agent_does_with_a_vm_is_no_part_of_the_machine() {
        let cloud_init = Some(super::super::CloudInitSpec::default());
        let credentials =
            [("a".parse().unwrap(), super::super::Secret::new("b".to_owned()))].into_iter().collect();
        let life =
            VmSpec { restart: RestartPolicy::Always, autostart: true, cloud_init, credentials, ..spec() };
        assert!(life.same_machine(&spec()));
        assert!(!VmSpec { cpus: 2, ..life }.same_machine(&spec()));
        let with = |disks| VmSpec { disks: serde_json::from_value(disks).unwrap(), ..spec() };
        let disk = json!({ "id": "root", "path": "a", "format": "raw" });
        let mut limited = disk.clone();
        limited["limits"] = json!({ "operations_per_second": 5 });
        assert!(with(json!([disk])).same_machine(&with(json!([limited]))));
        for other in [json!([]), json!([{ "id": "root", "path": "b", "format": "raw" }]), json!([disk, disk])]
        {
            assert!(!with(json!([disk])).same_machine(&with(other)));
        }
    }

    #[test]
    fn what_is_not_said_is_not_written() {
        let mut value = serde_json::to_value(spec()).unwrap();
        assert_eq!(value["restart"], "on_failure");
        value.as_object_mut().unwrap().remove("restart");
        let spec: VmSpec = serde_json::from_value(value.clone()).unwrap();
        assert_eq!((spec.restart, spec.autostart), (RestartPolicy::Never, false));
        assert_eq!(serde_json::to_value(spec).unwrap(), value);
    }
}
