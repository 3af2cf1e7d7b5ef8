// SPDX-License-Identifier: Apache-2.0

//! What a VM's life is when nobody watches: when it is booted by itself, and copies of it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Name, Timestamp, VmSpec};

/// What becomes of a VM that has ended, unless a request ended it.
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
    /// How often it was, since somebody booted it or it last ran for ten minutes.
    pub attempts: u32,
    /// When it will be next, if that is to come: the time between two attempts doubles from 1 s to at most 5 minutes. Stopping
    /// or deleting the VM, or changing what it is, cancels it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Timestamp>,
}

/// What a copy of a VM differs in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneSpec {
    /// The copy's name: unique among the VMs that exist.
    pub name: Name,
}

impl VmSpec {
    /// A copy under another name. Addresses and VFs of its adapters are left to the agent: they can be one VM's only. Devices stay,
    /// so that the two cannot run at once if there are any.
    pub fn cloned_as(&self, name: Name) -> Self {
        let mut spec = VmSpec { name, ..self.clone() };
        for adapter in &mut spec.adapters {
            (adapter.mac, adapter.vf) = (None, None);
        }
        spec
    }

    /// Whether the two differ in nothing that a running machine is made of: such a change needs no rest.
    pub fn same_machine(&self, other: &Self) -> bool {
        *self == VmSpec { restart: self.restart, autostart: self.autostart, ..other.clone() }
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
        let life = VmSpec { restart: RestartPolicy::Always, autostart: true, ..spec() };
        assert!(life.same_machine(&spec()));
        assert!(!VmSpec { cpus: 2, ..life }.same_machine(&spec()));
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
