// SPDX-License-Identifier: Apache-2.0

//! What the store keeps of VMs, of what they hold, and of PFs.

use std::collections::BTreeMap;

use api::{
    Caller, User,
    types::{Cause, Name, Protection, RestartStatus, Timestamp, UnicastMac, VmSpec, VmState},
};
use passthrough::host::{Bdf, PreviousBinding, VfSettings};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{store::Record, vmm_process::Identity};

/// A VM as it was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmRecord {
    /// When it was created.
    pub created: Timestamp,
    /// What was asked.
    pub spec: VmSpec,
    /// Who wrote that; None of an agent that did not note it.
    #[serde(default)]
    pub author: Option<Author>,
}

impl VmRecord {
    /// With whose rights the agent boots it by itself: nobody who can write a specification gets at files that they could not boot. If
    /// it is not known who that was, only image directories are open.
    #[must_use]
    pub fn author(&self) -> Caller {
        match &self.author {
            Some(Author::User { uid, gid }) => Caller::User(User { uid: *uid, gid: *gid, pid: None }),
            Some(Author::Token { name }) => Caller::Token(name.as_str().into()),
            None => Caller::Token("unknown".into()),
        }
    }
}

/// Who wrote a specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Author {
    /// A user of the host.
    User {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// Somebody with a token.
    Token {
        /// The token's name.
        name: String,
    },
}

impl Author {
    /// A caller.
    #[must_use]
    pub fn of(caller: &Caller) -> Self {
        match caller {
            Caller::User(user) => Author::User { uid: user.uid, gid: user.gid },
            Caller::Token(name) => Author::Token { name: name.to_string() },
        }
    }
}

impl Record for VmRecord {
    const KIND: &'static str = "vm";
}

/// A VM as it is. Its id is the VM's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Where it is in its life.
    pub state: VmState,
    /// Since when.
    pub since: Timestamp,
    /// Why it ended.
    #[serde(default)]
    pub cause: Option<Cause>,
    /// Boots of its process.
    #[serde(default)]
    pub boots: u64,
    /// Its process, while it has one.
    #[serde(default)]
    pub process: Option<Identity>,
    /// The user that its process runs as, if it is one of its own.
    #[serde(default)]
    pub user: Option<u32>,
    /// The protections that its process does without; None for one of an agent that did not say so.
    #[serde(default)]
    pub off: Option<Vec<Protection>>,
    /// Functions that the running guest lost, by address.
    #[serde(default)]
    pub lost: BTreeMap<String, Cause>,
    /// When its guest was started; None while it was not.
    #[serde(default)]
    pub booted: Option<Timestamp>,
    /// What the agent does to keep it running.
    #[serde(default)]
    pub restart: RestartStatus,
    /// Who asked it to end, since it was booted.
    #[serde(default)]
    pub asked: Option<Asked>,
    /// The boot of the host in which it came to rest.
    #[serde(default)]
    pub rested_in: Option<String>,
}

/// Who asked a VM to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Asked {
    /// A request.
    User,
    /// The agent, which was about to end itself.
    Agent,
}

impl Default for RunRecord {
    fn default() -> Self {
        Self {
            state: VmState::Defined,
            since: Timestamp::now(),
            cause: None,
            boots: 0,
            process: None,
            user: None,
            off: None,
            lost: BTreeMap::new(),
            booted: None,
            restart: RestartStatus::default(),
            asked: None,
            rested_in: None,
        }
    }
}

impl Record for RunRecord {
    const KIND: &'static str = "run";
}

/// A function that a VM holds. Stored under its PCI address, so that it has one owner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Claim {
    /// The VM.
    pub vm: Uuid,
    /// The VM's name, for messages.
    pub vm_name: String,
    /// Its place among the functions of the VM.
    pub slot: usize,
    /// The function.
    pub bdf: Bdf,
    /// Its IOMMU group; None for a simulated one.
    pub group: Option<u32>,
    /// What makes it a network adapter; None for a plain device.
    pub adapter: Option<ClaimedVf>,
    /// What it was before; None as long as nothing has been changed.
    pub before: Option<Before>,
}

impl Record for Claim {
    const KIND: &'static str = "claim";
}

/// A VF under policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClaimedVf {
    /// The adapter's id.
    pub id: Name,
    /// The PF.
    pub pf: Bdf,
    /// The PF's interface.
    pub pf_name: String,
    /// The VF's number on the PF.
    pub index: u16,
    /// The initial address.
    pub mac: UnicastMac,
}

/// What a function was before it was claimed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    /// Its driver.
    pub binding: PreviousBinding,
    /// What the PF had set for it.
    pub settings: Option<VfSettings>,
}

/// A PF as the agent knows it. Its id is made from its address.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PfRecord {
    /// When the agent first saw it.
    pub created: Timestamp,
    /// How many VFs it should have.
    pub vfs: u32,
}

impl Record for PfRecord {
    const KIND: &'static str = "pf";
}

/// The address of an adapter that was not given one: locally administered, and the same for ever.
#[must_use]
pub fn generated_mac(vm: Uuid, adapter: &Name) -> UnicastMac {
    // FNV-1a, 64 bits: spelled out here because the address must never change with a library.
    let hash = vm
        .as_bytes()
        .iter()
        .chain(adapter.as_str().as_bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let [a, b, c, d, e, f, _, _] = hash.to_le_bytes();
    // Never multicast, never zero: the second bit of the first byte is set, the first is not.
    UnicastMac::new([(a & 0xfc) | 2, b, c, d, e, f])
        .unwrap_or_else(|| unreachable!("the local bit is set and the group bit is not"))
}

/// The address of each adapter of a VM.
pub fn macs(vm: Uuid, spec: &VmSpec) -> impl Iterator<Item = (&Name, UnicastMac)> {
    spec.adapters
        .iter()
        .map(move |adapter| (&adapter.id, adapter.mac.unwrap_or_else(|| generated_mac(vm, &adapter.id))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_older_agents_are_read() {
        let vm: VmRecord = serde_json::from_value(serde_json::json!({
            "created": "2026-01-31T12:00:00.000Z",
            "spec": {
                "name": "web1", "cpus": 1, "memory": "2MiB", "hugepages": false, "boot": { "kernel": "k" },
                "adapters": [{ "id": "eth0" }], "devices": [],
            },
        }))
        .unwrap();
        assert_eq!((vm.author.as_ref(), vm.author()), (None, Caller::Token("unknown".into())));
        let run: RunRecord = serde_json::from_value(serde_json::json!({
            "state": "stopped", "since": "2026-01-31T12:00:00.000Z", "cause": null, "boots": 3, "process": null,
            "user": 900_000, "lost": {},
        }))
        .unwrap();
        let expect = RunRecord {
            state: VmState::Stopped,
            since: run.since,
            boots: 3,
            user: Some(900_000),
            ..RunRecord::default()
        };
        assert_eq!(run, expect);
    }

    #[test]
    fn generated_addresses_are_local_and_never_change() {
        let vm = Uuid::from_u128(0x6b1e_3f9e_7f1d_4a53_9d5e_0d6e_5a1c_2b3a);
        let mac = |name: &str| generated_mac(vm, &name.parse().unwrap());
        // Written down once: a release that makes another address breaks its users' networks.
        assert_eq!(mac("eth0").to_string(), "6e:13:49:af:18:9e");
        assert_ne!(mac("eth0"), mac("eth1"));
        for n in 0..1000_u128 {
            let first = generated_mac(Uuid::from_u128(n), &"eth0".parse().unwrap()).octets()[0];
            assert_eq!(first & 3, 2);
        }
    }
}
