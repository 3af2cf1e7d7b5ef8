// SPDX-License-Identifier: Apache-2.0

//! The store's records of VMs, of the functions that they hold, and of PFs.

use std::collections::{BTreeMap, BTreeSet};

use api::{
    Caller, User,
    types::{
        Cause, Name, Protection, RestartStatus, Secret, Timestamp, UnicastMac, VmSpec, VmState, WantedPort,
    },
};
use serde::{Deserialize, Serialize};
use services::vmm_process::Identity;
use sriov::{Bdf, PreviousBinding, VfSettings};
use store::Record;
use uuid::Uuid;

use crate::placement::MemoryPlace;

/// A VM's specification and its authors. Their rights limit the files that its boot opens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmRecord {
    /// The time of its creation.
    pub created: Timestamp,
    /// The specification.
    pub spec: VmSpec,
    /// The author of the last write; None in a record of an older agent, which did not store it.
    #[serde(default)]
    pub author: Option<Author>,
    /// The author of each part of `boot`, of the disks, and of each text for cloud-init and credential, by the part's name. In a
    /// record of an older agent, `author` stands for all of them.
    #[serde(default)]
    pub boot_authors: BTreeMap<String, Author>,
}

/// The parts of `boot` that decide which contents of its files a guest can reveal.
const BOOT_PARTS: [&str; 3] = ["kernel", "initramfs", "cmdline"];
/// This part has an author only in the specification of a VM with disks. So a VM of an older agent, which knew no disks, boots
/// with the same rights as before.
const DISKS: &str = "disks";

/// The texts for cloud-init and the credentials, by the names of their parts. Each can run programs in the guest, and has an
/// author of its own: the author of another one may not even see it.
fn texts(spec: &VmSpec) -> BTreeMap<String, &Secret> {
    let seed = spec.cloud_init.as_ref();
    let seed = seed.map(|seed| [&seed.user_data, &seed.meta_data, &seed.network_config]);
    let names = ["user_data", "meta_data", "network_config"];
    let seed = names.into_iter().zip(seed.into_iter().flatten());
    let seed = seed.filter_map(|(name, text)| Some((format!("cloud_init.{name}"), text.as_ref()?)));
    let credentials = spec.credentials.iter();
    seed.chain(credentials.map(|(name, text)| (format!("credentials.{name}"), text))).collect()
}

/// The parts that have an author.
fn parts(spec: &VmSpec) -> BTreeSet<String> {
    let disks = (!spec.disks.is_empty()).then_some(DISKS);
    let fixed = BOOT_PARTS.into_iter().chain(disks).map(str::to_owned);
    fixed.chain(texts(spec).into_keys()).collect()
}

impl VmRecord {
    /// A new VM. The writer of the specification is the author of all its parts.
    #[must_use]
    pub fn new(created: Timestamp, spec: VmSpec, by: &Caller) -> Self {
        Self { created, spec, author: Some(Author::of(by)), boot_authors: BTreeMap::new() }.noted()
    }

    /// A copy, with `spec` made from this one. Its parts keep their authors.
    #[must_use]
    pub fn copied(&self, created: Timestamp, spec: VmSpec, by: &Caller) -> Self {
        Self { created, spec, author: Some(Author::of(by)), boot_authors: self.clone().noted().boot_authors }
    }

    /// The record with another specification. `by` becomes the author of the parts that the edit changes. An
    /// edit of anything else leaves the rights with which files are opened as they are.
    #[must_use]
    pub fn edited(&self, spec: VmSpec, by: &Caller) -> Self {
        let (old, new) = (&self.spec.boot, &spec.boot);
        let fixed = [
            // A disk, too, decides about the kernel that runs.
            ("kernel", old.kernel != new.kernel || old.disk != new.disk),
            ("initramfs", old.initramfs != new.initramfs),
            ("cmdline", old.cmdline != new.cmdline),
            (DISKS, !self.spec.same_disks(&spec)),
        ];
        let before = texts(&self.spec);
        let texts = texts(&spec).into_iter().filter(|(name, text)| before.get(name) != Some(text));
        let fixed = fixed.into_iter().filter(|(_, changed)| *changed).map(|(part, _)| part.to_owned());
        let mut boot_authors = self.clone().noted().boot_authors;
        for part in fixed.chain(texts.map(|(name, _)| name)) {
            boot_authors.insert(part, Author::of(by));
        }
        // A part that comes back later has another author.
        let parts = parts(&spec);
        boot_authors.retain(|part, _| parts.contains(part));
        Self { created: self.created, spec, author: Some(Author::of(by)), boot_authors }
    }

    /// The record with an author for each part.
    fn noted(mut self) -> Self {
        let author = self.author.clone().unwrap_or_else(|| Author::Token { name: "unknown".to_owned() });
        for part in parts(&self.spec) {
            self.boot_authors.entry(part).or_insert_with(|| author.clone());
        }
        self
    }

    /// The callers that must all be able to open each file of `boot` and each disk: the authors of these parts and, if a request leads
    /// to the boot, its `caller`. A guest can reveal its files to the author of its kernel, command line, texts for
    /// cloud-init or credentials. So no author of one part gets at a file that this author could not read. While the authors are unknown, only image
    /// directories are open.
    #[must_use]
    pub fn boot_rights(&self, caller: Option<Caller>) -> Vec<Caller> {
        let (mut authors, parts) = (self.clone().noted().boot_authors, parts(&self.spec));
        authors.retain(|part, _| parts.contains(part));
        let mut all: Vec<Caller> = Vec::new();
        for who in authors.values().map(Author::caller).chain(caller) {
            if !all.iter().any(|other| Author::of(other) == Author::of(&who)) {
                all.push(who);
            }
        }
        all
    }
}

/// The author of a specification, or of a part of it.
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
    /// A client with a token.
    Token {
        /// The token's name.
        name: String,
    },
}

impl Author {
    /// The author that a caller becomes.
    #[must_use]
    pub fn of(caller: &Caller) -> Self {
        match caller {
            Caller::User(user) => Author::User { uid: user.uid, gid: user.gid },
            Caller::Token(name) => Author::Token { name: name.to_string() },
        }
    }

    /// A caller with the author's rights.
    fn caller(&self) -> Caller {
        match self {
            Author::User { uid, gid } => Caller::User(User { uid: *uid, gid: *gid, pid: None }),
            Author::Token { name } => Caller::Token(name.as_str().into()),
        }
    }
}

impl Record for VmRecord {
    const KIND: &'static str = "vm";
}

/// The state of a VM. The record's id is the VM's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The state in the VM's life.
    pub state: VmState,
    /// The time since which it has this state.
    pub since: Timestamp,
    /// The cause of its end, or of the failure of its last boot.
    #[serde(default)]
    pub cause: Option<Cause>,
    /// The boots of the guest in its process.
    #[serde(default)]
    pub boots: u64,
    /// Its process, while it has one.
    #[serde(default)]
    pub process: Option<Identity>,
    /// The user id of its process; None without a process, and if the process keeps the agent's user.
    #[serde(default)]
    pub user: Option<u32>,
    /// The protections that are off for its process; None before the first boot, and in a record of an older agent.
    #[serde(default)]
    pub off: Option<Vec<Protection>>,
    /// The functions that the running guest lost, and the causes, by PCI address.
    #[serde(default)]
    pub lost: BTreeMap<String, Cause>,
    /// The time at which its guest was started; None if it was not.
    #[serde(default)]
    pub booted: Option<Timestamp>,
    /// The agent's attempts to keep it running.
    #[serde(default)]
    pub restart: RestartStatus,
    /// The origin of the last request since its boot to end it.
    #[serde(default)]
    pub asked: Option<Asked>,
    /// The boot id of the host in which it came to rest.
    #[serde(default)]
    pub rested_in: Option<String>,
    /// The disk for whose file there is no room: the VM is paused until there is some.
    #[serde(default)]
    pub full: Option<String>,
    /// A request has paused the VM: only another one lets it go on.
    #[serde(default)]
    pub pause_asked: bool,
    /// The VM lives by a lease: without a client the agent stops and deletes it.
    #[serde(default)]
    pub leased: bool,
    /// The client that the lease is for, if it is for one only. Means nothing without a lease.
    #[serde(default)]
    pub holder: Option<Uuid>,
    /// The place of guest memory; None for a VM that does not ask for one.
    #[serde(default)]
    pub memory_place: Option<MemoryPlace>,
}

/// The origin of a request to end a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Asked {
    /// A call of the API.
    User,
    /// The agent, before its own end.
    Agent,
}

impl RunRecord {
    /// The record of a VM that has none in the store yet: created at `since`, and not booted since.
    #[must_use]
    pub fn created(since: Timestamp) -> Self {
        Self { since, ..Self::default() }
    }
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
            full: None,
            pause_asked: false,
            leased: false,
            holder: None,
            memory_place: None,
        }
    }
}

impl Record for RunRecord {
    const KIND: &'static str = "run";
}

/// A function that a VM holds. It is stored under its PCI address, so that it has one owner.
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
    /// The VF under policy; None for a device.
    pub adapter: Option<ClaimedVf>,
    /// Its state before the claim; None as long as nothing has been changed.
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

/// The state of a function before its claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    /// Its driver.
    pub binding: PreviousBinding,
    /// The PF's settings for it; None for a device.
    pub settings: Option<VfSettings>,
}

/// A PF as the agent knows it. Its id is made from its address.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PfRecord {
    /// The time at which the agent first saw it.
    pub created: Timestamp,
    /// The number of VFs that it should have.
    pub vfs: u32,
}

impl Record for PfRecord {
    const KIND: &'static str = "pf";
}

/// The address of a thing of a VM without one in its specification: locally administered, and for ever the same.
#[must_use]
pub fn generated_mac(vm: Uuid, id: &str) -> UnicastMac {
    // FNV-1a, 64 bits: spelled out here because the address must never change with a library.
    let hash = vm.as_bytes().iter().chain(id.as_bytes()).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let [a, b, c, d, e, f, _, _] = hash.to_le_bytes();
    // Never multicast, never zero: the second bit of the first byte is set, the first is not.
    UnicastMac::new([(a & 0xfc) | 2, b, c, d, e, f])
        .unwrap_or_else(|| unreachable!("the local bit is set and the group bit is not"))
}

/// The address that the agent makes for the NIC of this id. The prefix gives it another one than an adapter with the same id.
#[must_use]
pub fn generated_nic_mac(vm: Uuid, id: &Name) -> UnicastMac {
    generated_mac(vm, &format!("nic.{id}"))
}

/// The address of a port without one in its specification.
#[must_use]
pub fn generated_port_mac(vm: Uuid, port: &WantedPort<'_>) -> UnicastMac {
    if port.is_nic { generated_nic_mac(vm, port.id) } else { generated_mac(vm, port.id.as_str()) }
}

/// The ports of a VM, each with its address.
pub fn ports(vm: Uuid, spec: &VmSpec) -> impl Iterator<Item = (WantedPort<'_>, UnicastMac)> {
    spec.ports().map(move |port| {
        let mac = port.mac.unwrap_or_else(|| generated_port_mac(vm, &port));
        (port, mac)
    })
}

#[cfg(test)]
mod tests {
    use api::types::BootSpec;

    use super::*;

    fn user(uid: u32) -> Caller {
        Caller::User(User { uid, gid: uid, pid: None })
    }

    /// A boot, a copy, or an edit of anything but `boot` does not lend the VM the rights of its caller.
    #[test]
    fn files_are_opened_with_the_rights_of_those_who_chose_them() {
        let spec: VmSpec = serde_json::from_value(serde_json::json!({
            "name": "web1", "memory": "2MiB", "boot": { "kernel": "k", "initramfs": "/root/secret" },
        }))
        .unwrap();
        let now = Timestamp::from_unix_ms(0);
        let vm = VmRecord::new(now, spec.clone(), &user(1000));
        assert_eq!(vm.boot_rights(None), [user(1000)]);
        assert_eq!(vm.boot_rights(Some(user(0))), [user(1000), user(0)]);
        assert_eq!(vm.boot_rights(Some(user(1000))), [user(1000)]);

        let autostart = VmSpec { autostart: true, cpus: 2, ..spec.clone() };
        let vm = vm.edited(autostart.clone(), &user(0));
        assert_eq!(vm.boot_rights(None), [user(1000)], "root has changed something else");
        let copy = vm.copied(now, vm.spec.cloned_as("web2".parse().unwrap()), &user(0));
        assert_eq!(copy.boot_rights(None), [user(1000)]);

        // The kernel of one author can reveal the initramfs of the other: both authors must be able to read both files.
        let mut spec = autostart;
        spec.boot.kernel = Some("other".into());
        let vm = vm.edited(spec.clone(), &user(2000));
        assert_eq!(vm.boot_rights(None), [user(1000), user(2000)]);
        spec.boot.initramfs = None;
        spec.boot.cmdline = "quiet".into();
        let vm = vm.edited(spec, &user(2000));
        assert_eq!(vm.boot_rights(None), [user(2000)], "nothing is left of the first one's choice");
        let stored: VmRecord = serde_json::from_value(serde_json::to_value(&vm).unwrap()).unwrap();
        assert_eq!(stored, vm);
    }

    /// A part of `boot` without an author would be opened with the rights of others.
    #[test]
    fn each_part_of_boot_has_an_author() {
        // All fields are listed, so that a new one does not compile here.
        let all = BootSpec {
            kernel: Some("k".into()),
            disk: None,
            initramfs: Some("i".into()),
            cmdline: "c".into(),
        };
        let fields: Vec<String> =
            serde_json::to_value(&all).unwrap().as_object().unwrap().keys().cloned().collect();
        let mut parts = BOOT_PARTS.map(str::to_owned).to_vec();
        parts.sort();
        assert_eq!(fields, parts);
    }

    /// A guest can reveal a disk to the author of its kernel, and the kernel to the author of its disks.
    #[test]
    fn disks_have_an_author_of_their_own() {
        let spec = |disks: serde_json::Value| -> VmSpec {
            serde_json::from_value(serde_json::json!({
                "name": "web1", "memory": "2MiB", "boot": { "kernel": "k" }, "disks": disks,
            }))
            .unwrap()
        };
        let disks = || serde_json::json!([{ "id": "root", "path": "/secret", "format": "raw" }]);
        let rights =
            |vm: &VmRecord| -> Vec<String> { vm.boot_rights(None).iter().map(ToString::to_string).collect() };
        let plain = VmRecord::new(Timestamp::from_unix_ms(0), spec(serde_json::json!([])), &user(1000));
        let with = plain.edited(spec(disks()), &user(0));
        assert_eq!(rights(&with).len(), 2, "{:?}", rights(&with));
        let other = with.edited(VmSpec { cpus: 2, ..spec(disks()) }, &user(2000));
        assert_eq!(rights(&other), rights(&with), "an edit of anything else");
        let mut limited = spec(disks());
        limited.disks[0].limits =
            serde_json::from_value(serde_json::json!({ "operations_per_second": 5 })).unwrap();
        assert_eq!(rights(&with.edited(limited, &user(2000))), rights(&with), "limits choose no file");
        let others = serde_json::json!([{ "id": "root", "path": "/other", "format": "raw" }]);
        let chosen = with.edited(spec(others), &user(2000));
        assert!(rights(&chosen).contains(&user(2000).to_string()), "who chose a path needs the right to it");
        let without = with.edited(spec(serde_json::json!([])), &user(2000));
        assert_eq!(rights(&without), rights(&plain), "no disks, no author of disks");
        // A record of an older agent, which knew no disks.
        let mut old = serde_json::to_value(
            plain.edited(VmSpec { cpus: 2, ..spec(serde_json::json!([])) }, &user(2000)),
        );
        let old: VmRecord = serde_json::from_value(old.as_mut().unwrap().take()).unwrap();
        assert_eq!(rights(&old), rights(&plain));
    }

    /// The texts for cloud-init, and credentials, run programs in the guest, which can reveal each file.
    #[test]
    fn texts_for_the_guest_have_an_author_of_their_own() {
        for part in ["cloud_init", "credentials"] {
            let spec = |text: Option<&str>| -> VmSpec {
                let mut spec =
                    serde_json::json!({ "name": "web1", "memory": "2MiB", "boot": { "kernel": "k" } });
                if let Some(text) = text {
                    spec[part] = serde_json::json!({ "user_data": text });
                }
                serde_json::from_value(spec).unwrap()
            };
            let rights = |vm: &VmRecord| {
                let mut rights = vm.boot_rights(None);
                rights.sort_by_key(|who| format!("{who:?}"));
                rights
            };
            let plain = VmRecord::new(Timestamp::from_unix_ms(0), spec(None), &user(1000));
            let with = plain.edited(spec(Some("a")), &user(0));
            assert_eq!(rights(&with), [user(0), user(1000)], "{part}");
            let same = with.edited(VmSpec { cpus: 2, ..with.spec.clone() }, &user(2000));
            assert_eq!(rights(&same), rights(&with), "{part}: an edit of anything else");
            let other = with.edited(spec(Some("b")), &user(2000));
            assert_eq!(rights(&other), [user(1000), user(2000)], "{part}");
            let without = other.edited(spec(None), &user(0));
            assert_eq!(rights(&without), [user(1000)], "{part}: no texts, no author");
        }
    }

    /// Answers hide a text, so its author must not go with an edit of another one.
    #[test]
    fn an_edit_of_one_text_leaves_the_authors_of_the_others() {
        for (part, names) in [("cloud_init", ["user_data", "meta_data"]), ("credentials", ["a", "b"])] {
            let spec = |texts: [&str; 2]| -> VmSpec {
                let [one, other] = texts;
                serde_json::from_value(serde_json::json!({
                    "name": "web1", "memory": "2MiB", "boot": { "kernel": "k" },
                    part: { names[0]: one, names[1]: other },
                }))
                .unwrap()
            };
            let first = VmRecord::new(Timestamp::from_unix_ms(0), spec(["x", "y"]), &user(0));
            let second = first.edited(spec(["alice", "y"]), &user(1000));
            let third = second.edited(spec(["alice", "z"]), &user(0));
            assert!(third.boot_rights(None).contains(&user(1000)), "{part}: {:?}", third.boot_authors);
            let last = third.edited(spec(["w", "z"]), &user(0));
            assert_eq!(last.boot_rights(None), [user(0)], "{part}");
        }
    }

    /// For each author of `boot`, later caller and verbs of that caller: a file is never opened without the rights of
    /// its author, nor with more than those if the agent boots by itself.
    #[test]
    fn no_verb_of_another_lends_rights_to_an_author() {
        let spec: VmSpec = serde_json::from_value(serde_json::json!({
            "name": "web1", "memory": "2MiB", "boot": { "kernel": "k", "initramfs": "/secret", "cmdline": "c" },
        }))
        .unwrap();
        let now = Timestamp::from_unix_ms(0);
        let everybody =
            [user(0), user(1000), user(2000), Caller::Token("a".into()), Caller::Token("b".into())];
        type Verb = fn(&VmRecord, &Caller) -> VmRecord;
        let verbs: [(&str, Verb); 6] = [
            ("boot", |vm, _| vm.clone()),
            ("autostart", |vm, by| vm.edited(VmSpec { autostart: true, ..vm.spec.clone() }, by)),
            ("another size", |vm, by| vm.edited(VmSpec { cpus: 3, ..vm.spec.clone() }, by)),
            ("another name", |vm, by| {
                vm.edited(VmSpec { name: "x".parse().unwrap(), ..vm.spec.clone() }, by)
            }),
            ("the same again", |vm, by| vm.edited(vm.spec.clone(), by)),
            ("copy", |vm, by| vm.copied(vm.created, vm.spec.cloned_as("y".parse().unwrap()), by)),
        ];
        for writer in &everybody {
            let written = VmRecord::new(now, spec.clone(), writer);
            for actor in &everybody {
                for (first, one) in &verbs {
                    for (second, other) in &verbs {
                        let vm = other(&one(&written, actor), actor);
                        let what = format!("{writer:?}, {actor:?}, {first}, {second}");
                        assert_eq!(vm.boot_rights(None), std::slice::from_ref(writer), "{what}");
                        let rights = vm.boot_rights(Some(actor.clone()));
                        assert!(rights.contains(writer) && rights.contains(actor), "{what}: {rights:?}");
                    }
                }
            }
        }
    }

    /// The author of one part could have the guest reveal the others: all authors must be able to read all files.
    #[test]
    fn a_change_of_one_part_adds_rights_that_are_needed() {
        let spec: VmSpec = serde_json::from_value(serde_json::json!({
            "name": "web1", "memory": "2MiB", "boot": { "kernel": "k", "initramfs": "/secret", "cmdline": "c" },
        }))
        .unwrap();
        let changes: [fn(&mut VmSpec); 5] = [
            |spec| spec.boot.kernel = Some("other".into()),
            |spec| spec.boot.disk = "other".parse().ok(),
            |spec| spec.boot.initramfs = Some("/other".into()),
            |spec| spec.boot.initramfs = None,
            |spec| spec.boot.cmdline = "dump".into(),
        ];
        for change in changes {
            let mut changed = spec.clone();
            change(&mut changed);
            let vm = VmRecord::new(Timestamp::from_unix_ms(0), spec.clone(), &user(0));
            let mut rights = vm.edited(changed, &user(1000)).boot_rights(None);
            rights.sort_by_key(|who| format!("{who:?}"));
            assert_eq!(rights, [user(0), user(1000)]);
        }
    }

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
        assert_eq!(vm.author, None);
        assert_eq!(vm.boot_rights(None), [Caller::Token("unknown".into())]);
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
        let mac = |name: &str| generated_mac(vm, name);
        // Written down once: a release that makes another address breaks its users' networks.
        assert_eq!(mac("eth0").to_string(), "6e:13:49:af:18:9e");
        assert_ne!(mac("eth0"), mac("eth1"));
        for n in 0..1000_u128 {
            let first = generated_mac(Uuid::from_u128(n), "eth0").octets()[0];
            assert_eq!(first & 3, 2);
        }
    }
}
