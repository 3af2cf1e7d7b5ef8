// SPDX-License-Identifier: Apache-2.0

//! The things that all VMs of an agent share: the store, the host's devices, directories, the vmm's program.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
    time::Duration,
};

use api::types::{EventKind, Protection};
use services::{
    metrics::Metrics,
    vmm_process::{MEMLOCK_SLACK, Program},
};
use sriov::Sysfs;
use store::{Expect, GOOD_FOR, Scope, StoreError, Stores, Table, WriteProbe};
use switch::Policy;
use uuid::Uuid;

use crate::{
    backend::Hardware,
    inventory::Inventory,
    placement::Topology,
    vm::record::{Claim, PfRecord, RunRecord, VmRecord},
};

/// The wait for the client of a VM's lease, as the API's document says it.
const LEASE_GRACE: Duration = Duration::from_secs(60);

/// The things that all VMs of an agent share. `P` is its policy: `()` until the switch has started.
pub struct Environment<P = Policy> {
    /// The stores of the tables below, for transactions.
    pub stores: Stores,
    /// The specifications of VMs.
    pub vms: Table<VmRecord>,
    /// The states of VMs.
    pub runs: Table<RunRecord>,
    /// Functions that VMs hold.
    pub claims: Table<Claim>,
    /// PFs, and the numbers of VFs that they should have.
    pub pfs: Table<PfRecord>,
    /// The check whether the store can be written.
    pub probe: WriteProbe,
    /// The functions that VMs can have.
    pub inventory: Inventory,
    /// The directory of sockets, console rings and logs.
    pub run_dir: PathBuf,
    /// The directories with files that every caller may boot.
    pub image_dirs: Vec<PathBuf>,
    /// The directories with disks that every caller may use.
    pub disk_dirs: Vec<PathBuf>,
    /// The directory with the unnamed files of ephemeral disks. It is made when the first one boots.
    pub ephemeral_dir: PathBuf,
    /// The interfaces of the host that VMs' NICs may use.
    pub interfaces: Vec<String>,
    /// The program of a vmm.
    pub program: Program,
    /// The memory that a vmm with functions of the host may lock beyond guest memory, in bytes.
    pub memlock_slack: u64,
    /// `/dev/kvm`.
    pub kvm: PathBuf,
    /// Protections that are off though this agent could set them up, for processes without functions of the host.
    pub sandbox_off: BTreeSet<Protection>,
    /// The parent of the control groups of VMs' processes.
    pub cgroup_parent: PathBuf,
    /// The CPUs, NUMA nodes and huge pages of the host.
    pub topology: Topology,
    /// Whether the log has said that this host sets no default limits.
    pub told_unlimited: AtomicBool,
    /// Whether the log has said that this host sets no limit of huge pages.
    pub told_unlimited_huge_pages: AtomicBool,
    /// The times between the ends of VMs and their next boots by the restart policy.
    pub backoff: Backoff,
    /// The wait for the client of a VM that lives by a lease: after the VM's creation, after the agent's start, and between two
    /// attempts to delete the VM.
    pub lease_grace: Duration,
    /// The agent is about to end: if it closes a connection, the client may still be there.
    pub ending: AtomicBool,
    /// The agent listens: clients can reach it.
    pub serving: tokio::sync::watch::Sender<bool>,
    /// The boot id of the host. Processes of another boot have ended with that boot.
    pub boot_id: String,
    /// Users for vmm processes; None for an agent that cannot change users.
    pub users: Option<Users>,
    /// The switch that decides for adapters, with its decisions and events.
    pub policy: P,
    /// The agent's metrics.
    pub metrics: Metrics,
    /// Held while functions are chosen and claimed, or the number of VFs changes.
    pub claiming: tokio::sync::Mutex<()>,
    /// Held while a VM takes huge pages, from the check of the pool until it has them, or until its process has returned
    /// them: of two VMs, one gets all of its pages.
    pub filling: Arc<tokio::sync::Mutex<()>>,
}

impl Environment<()> {
    /// The environment of a real host, with defaults for the settings that differ between hosts.
    #[must_use]
    pub fn new(stores: &Stores, run_dir: PathBuf) -> Self {
        Self {
            stores: stores.clone(),
            vms: Table::new(stores),
            runs: Table::new(stores),
            claims: Table::new(stores),
            pfs: Table::new(stores),
            probe: WriteProbe::new(stores, GOOD_FOR),
            inventory: Hardware::new(Sysfs::default()).into(),
            run_dir,
            image_dirs: Vec::new(),
            disk_dirs: Vec::new(),
            ephemeral_dir: "/var/lib/portcullis/ephemeral".into(),
            interfaces: Vec::new(),
            program: Program::default(),
            memlock_slack: MEMLOCK_SLACK,
            kvm: "/dev/kvm".into(),
            sandbox_off: BTreeSet::new(),
            cgroup_parent: "/sys/fs/cgroup/portcullis".into(),
            topology: Topology::default(),
            told_unlimited: AtomicBool::new(false),
            told_unlimited_huge_pages: AtomicBool::new(false),
            backoff: Backoff::default(),
            lease_grace: LEASE_GRACE,
            ending: AtomicBool::new(false),
            serving: tokio::sync::watch::Sender::new(true),
            boot_id: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
                .map(|id| id.trim().to_owned())
                .unwrap_or_default(),
            users: None,
            policy: (),
            metrics: Metrics::default(),
            claiming: tokio::sync::Mutex::new(()),
            filling: Arc::default(),
        }
    }

    /// The environment with its switch.
    #[must_use]
    pub fn with_policy(self, policy: Policy) -> Environment {
        Environment {
            stores: self.stores,
            vms: self.vms,
            runs: self.runs,
            claims: self.claims,
            pfs: self.pfs,
            probe: self.probe,
            inventory: self.inventory,
            run_dir: self.run_dir,
            image_dirs: self.image_dirs,
            disk_dirs: self.disk_dirs,
            ephemeral_dir: self.ephemeral_dir,
            interfaces: self.interfaces,
            program: self.program,
            memlock_slack: self.memlock_slack,
            kvm: self.kvm,
            sandbox_off: self.sandbox_off,
            cgroup_parent: self.cgroup_parent,
            topology: self.topology,
            told_unlimited: self.told_unlimited,
            told_unlimited_huge_pages: self.told_unlimited_huge_pages,
            backoff: self.backoff,
            lease_grace: self.lease_grace,
            ending: self.ending,
            serving: self.serving,
            boot_id: self.boot_id,
            users: self.users,
            policy,
            metrics: self.metrics,
            claiming: self.claiming,
            filling: self.filling,
        }
    }
}

impl<P> Environment<P> {
    /// The protections that are off for a process that is started now: those of `sandbox_off` and, if the agent is not
    /// root, those that need root.
    #[must_use]
    pub fn protections_off(&self) -> Vec<Protection> {
        let missing = if self.users.is_some() { &[][..] } else { &Protection::OF_ROOT };
        let off = |part: &Protection| self.sandbox_off.contains(part) || missing.contains(part);
        Protection::ALL.into_iter().filter(off).collect()
    }
}

impl Environment {
    /// Stores a new VM with the record of its run, and returns the VM's revision.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn store_vm(
        &self,
        id: Uuid,
        name: &str,
        vm: &VmRecord,
        run: &RunRecord,
    ) -> Result<u64, StoreError> {
        let both = self.stores.transaction(Scope::Local).put(id, name, vm, Expect::Absent)?;
        let revisions = both.put(id, name, run, Expect::Any)?.commit().await?;
        Ok(revisions.first().copied().unwrap_or_default())
    }

    /// Deletes a VM with the record of its run. A run without its VM would have no owner, and a VM without its run no
    /// mark of its lease.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn forget_vm(&self, id: Uuid) -> Result<(), StoreError> {
        let both = self.stores.transaction(Scope::Local).remove::<VmRecord>(id)?.remove::<RunRecord>(id)?;
        both.commit().await.map(drop)
    }

    /// Publishes an event.
    pub fn tell(&self, what: EventKind) {
        self.policy.events.publish(what);
    }
}

/// The time between attempts to keep a VM running: it doubles with each.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// The time before the first attempt.
    pub first: Duration,
    /// The longest time.
    pub most: Duration,
    /// After a run of this length, the next attempt counts as the first again.
    pub reset: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            first: Duration::from_secs(1),
            most: Duration::from_secs(300),
            reset: Duration::from_secs(600),
        }
    }
}

/// User ids for vmm processes, one for each that runs: a guest that takes over its vmm cannot touch another's.
#[derive(Debug)]
pub struct Users {
    base: u32,
    count: u32,
    used: Mutex<BTreeSet<u32>>,
}

impl Users {
    /// The ids from `base` on, `count` of them.
    #[must_use]
    pub fn new(base: u32, count: u32) -> Self {
        Self { base, count, used: Mutex::default() }
    }

    /// A free id; None if all are used.
    #[must_use]
    pub fn take(&self) -> Option<u32> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let free = (self.base..self.base.saturating_add(self.count)).find(|id| !used.contains(id))?;
        used.insert(free);
        Some(free)
    }

    /// Marks an id as used, because a process of a former agent has it.
    pub fn keep(&self, id: u32) {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
    }

    /// Releases an id.
    pub fn give_back(&self, id: u32) {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }
}
