// SPDX-License-Identifier: Apache-2.0

//! Simulated adapters of this host: their records, and the process of each.
//!
//! ```text
//!                 agent starts or finds it
//!   not running ────────────────────────────▶ running ──▶ stopped, while no VM uses its VFs, by an
//!        ▲                                       │        agent that ends or is configured anew
//!        └─ crashed: started again when needed ──┘
//! ```
//!
//! The processes outlive the agent, as those of VMs do. Each PF has a number in the store, from
//! which the addresses of its functions follow. So claims stay right in whatever order the command
//! line names the PFs.

mod adapter;
mod link;
pub mod process;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::DirBuilder,
    io,
    os::{fd::OwnedFd, unix::fs::DirBuilderExt},
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
};

use api::types::Protection;
use netpolicy::SIMULATED;
use serde::{Deserialize, Serialize};
use services::vmm_process::Program;
use simnic::{MAX_PFS, MAX_VFS, SimPf, SimPfOption, SimVf};
use sriov::{Bdf, Interface, InventoryError, PciDevice, Pf, PfControl, PfError, Vf};
use store::{Expect, Record, StoreError, Stores, Table};
use text::chain;
use uuid::Uuid;

use self::{adapter::Adapter, link::Link};
use crate::vm::record::Claim;

/// PCI ids of an 82576, and its class.
const VENDOR: u16 = 0x8086;
const DEVICE: u16 = 0x10c9;
const ETHERNET: u32 = 0x02_0000;

/// A simulated PF as the store keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SimPfRecord {
    number: u16,
    vfs: u16,
    #[serde(default)]
    tap: Option<String>,
}

impl Record for SimPfRecord {
    const KIND: &'static str = "sim_pf";
}

/// Why simulated adapters are not available.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There are too many.
    #[error("A host has at most {MAX_PFS} simulated PFs, and {0:?} is one too many: remove a --sim-pf")]
    TooMany(String),
    /// Two have the same name.
    #[error("Two --sim-pf have the name {0:?}: give each a name of its own")]
    Twice(String),
    /// The process cannot be started.
    #[error("Cannot start the simulated PF {name}")]
    Start {
        /// Its name.
        name: String,
        /// Why.
        source: PfError,
    },
    /// A former agent started the process, and it cannot be used.
    #[error("The running process of the simulated PF {name} cannot be used")]
    Unusable {
        /// Its name.
        name: String,
        /// Why.
        source: PfError,
    },
    /// The PF was stopped for good.
    #[error("The simulated PF {name} is being stopped or gets another number of VFs: try again")]
    Retired {
        /// Its name.
        name: String,
    },
    /// Its uplink cannot be opened.
    #[error(
        "The tap device {tap} for the simulated PF {name} cannot be opened: create it for this user with `ip \
         tuntap add {tap} mode tap user USER`, or run the agent as root; no other process may have it open"
    )]
    Tap {
        /// The PF.
        name: String,
        /// The device.
        tap: String,
        /// Why.
        source: io::Error,
    },
    /// A directory or file cannot be prepared.
    #[error("{} cannot be prepared for simulated PFs (--run-dir)", path.display())]
    Directory {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The way to start processes of simulated PFs.
#[derive(Clone, Debug)]
pub struct Start {
    /// The program.
    pub program: Program,
    /// The directory of their sockets and logs.
    pub dir: PathBuf,
    /// The user of PF 0; the others follow. None for an agent that cannot change users.
    pub first_user: Option<u32>,
    /// The protections that they do without.
    pub off: Vec<Protection>,
}

impl Start {
    /// This very binary, below the agent's run directory.
    #[must_use]
    pub fn new(run_dir: &std::path::Path, first_user: Option<u32>, off: Vec<Protection>) -> Self {
        let program = Program { arguments: vec![process::SUBCOMMAND.into()], ..Program::default() };
        Self { program, dir: run_dir.join("sim"), first_user, off }
    }
}

/// The simulated adapters of a host. Methods that are not async may wait for a process, unless they
/// say otherwise.
pub struct Simulated {
    start: Start,
    /// By number. The lock is held for look-ups only.
    adapters: RwLock<BTreeMap<u16, Arc<Adapter>>>,
    records: Table<SimPfRecord>,
}

impl Simulated {
    /// Loads the PFs in `wanted`, and those of former agents that VMs still use. Starts no process;
    /// stops the processes of all other PFs.
    ///
    /// # Errors
    /// See [`SimError`].
    pub async fn load(stores: &Stores, wanted: &[SimPfOption], start: Start) -> Result<Arc<Self>, SimError> {
        let claims: Vec<Claim> =
            Table::<Claim>::new(stores).list().await?.into_iter().map(|e| e.value).collect();
        let records = Table::<SimPfRecord>::new(stores);
        let mut adapters: BTreeMap<u16, Arc<Adapter>> = BTreeMap::new();
        let mut known = records.list().await?;
        let dir = start.dir.clone();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|source| SimError::Directory { path: dir, source })?;
        let in_use = |number| in_use(&claims, number);
        // The numbers of PFs that are gone stay reserved: a VM that names a VF by its address must
        // not get a VF of another PF.
        let mut gone = BTreeSet::new();
        let mut unwanted = Vec::new();
        known.retain(|entry| {
            let keep = wanted.iter().any(|option| option.name == entry.name) || in_use(entry.value.number);
            if !keep {
                gone.insert(entry.value.number);
                unwanted.push(Adapter::new(&start, &entry.name, &entry.value));
            }
            keep
        });
        for adapter in unwanted {
            blocking(move || adapter.stop()).await;
        }
        for (n, option) in wanted.iter().enumerate() {
            if wanted.iter().take(n).any(|other| other.name == option.name) {
                return Err(SimError::Twice(option.name.clone()));
            }
            let record = match known.iter().find(|entry| entry.name == option.name) {
                Some(entry) => entry.value.clone(),
                None => {
                    let taken = |number: &u16| {
                        known.iter().any(|entry| entry.value.number == *number)
                            || adapters.contains_key(number)
                    };
                    let free = || (0..MAX_PFS).filter(|number| !taken(number));
                    // Once all numbers have had a PF, reuse the lowest number of a PF that is gone.
                    let number = free().find(|number| !gone.contains(number)).or_else(|| free().next());
                    let number = number.ok_or_else(|| SimError::TooMany(option.name.clone()))?;
                    SimPfRecord { number, vfs: option.vfs, tap: option.tap.clone() }
                }
            };
            let mut new = SimPfRecord { vfs: option.vfs, tap: option.tap.clone(), ..record };
            if new != record && in_use(record.number) {
                tracing::warn!(
                    pf = option.name,
                    "VMs use its VFs: it keeps {} VFs and its uplink until an agent starts while no VM uses \
                     them",
                    record.vfs
                );
                new = record.clone();
            }
            let adapter = Arc::new(Adapter::new(&start, &option.name, &new));
            if new != record {
                let old = Adapter::new(&start, &option.name, &record);
                blocking(move || old.stop()).await;
            }
            records.put(id_of(new.number), &option.name, &new, Expect::Any).await?;
            adapters.insert(new.number, adapter);
        }
        for entry in known {
            adapters.entry(entry.value.number).or_insert_with(|| {
                tracing::warn!(
                    pf = entry.name,
                    "no --sim-pf names it, but VMs use its VFs: it stays until they stop"
                );
                Arc::new(Adapter::new(&start, &entry.name, &entry.value))
            });
        }
        Ok(Arc::new(Self { start, adapters: RwLock::new(adapters), records }))
    }

    fn all(&self) -> Vec<Arc<Adapter>> {
        self.adapters.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn get(&self, number: u16) -> Option<Arc<Adapter>> {
        self.adapters.read().unwrap_or_else(PoisonError::into_inner).get(&number).cloned()
    }

    /// Starts all processes that do not run, so that an obstacle to a start is known at once.
    ///
    /// # Errors
    /// See [`SimError`].
    pub fn start_all(&self) -> Result<(), SimError> {
        for adapter in self.all() {
            match adapter.open() {
                Ok(_) => {}
                // Do not fail here: without an agent the VMs on this PF could not even be stopped.
                Err(error @ SimError::Unusable { .. }) => tracing::error!("{}", chain(&error)),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Opens control of a PF. Its process is started whenever it does not run.
    ///
    /// # Errors
    /// There is no such PF, or it cannot be started.
    pub fn open(self: &Arc<Self>, pf: Bdf) -> Result<Box<dyn PfControl>, PfError> {
        Ok(Box::new(Link::open(Arc::clone(self), pf)?))
    }

    fn connect(&self, pf: Bdf) -> Result<SimPf, PfError> {
        let adapter =
            simnic::numbers(pf).filter(|(_, vf)| vf.is_none()).and_then(|(number, _)| self.get(number));
        let adapter = adapter.ok_or(PfError::Inventory(InventoryError::NoDevice(pf)))?;
        adapter.open().map_err(|error| match error {
            SimError::Start { source, .. } | SimError::Unusable { source, .. } => source,
            other => PfError::Io { pf: adapter.name.clone(), source: io::Error::other(other) },
        })
    }

    /// Connects a VF for a vmm. A former user of the VF loses it.
    ///
    /// # Errors
    /// As [`Simulated::open`], and there is no such VF.
    pub fn attach(&self, vf: Bdf) -> Result<OwnedFd, PfError> {
        let (mut pf, index) = self.open_of(vf)?;
        pf.attach(index)
    }

    /// Opens a VF for its mailbox alone.
    ///
    /// # Errors
    /// As [`Simulated::attach`].
    pub fn mailbox(&self, vf: Bdf) -> Result<SimVf, PfError> {
        let connection = self.attach(vf)?;
        let failed = |source| PfError::Io { pf: vf.to_string(), source };
        SimVf::without_memory(connection).map_err(failed)
    }

    /// Resets a VF, and disconnects its user.
    ///
    /// # Errors
    /// As [`Simulated::attach`].
    pub fn reset(&self, vf: Bdf) -> Result<(), PfError> {
        let (mut pf, index) = self.open_of(vf)?;
        pf.detach(index)
    }

    fn open_of(&self, vf: Bdf) -> Result<(SimPf, u16), PfError> {
        let missing = || PfError::Inventory(InventoryError::NotVf(vf));
        let (number, index) = simnic::numbers(vf).ok_or_else(missing)?;
        let (pf, index) = (simnic::pf_bdf(number).ok_or_else(missing)?, index.ok_or_else(missing)?);
        Ok((self.connect(pf)?, index))
    }

    /// Changes the number of VFs of a PF, by a restart of its process. No VF may be in use, and
    /// none may be claimed meanwhile.
    ///
    /// # Errors
    /// See [`SimError`]. Unless the store failed, the number is changed, and the process starts
    /// when it is needed.
    pub async fn set_vfs(self: &Arc<Self>, pf: Bdf, vfs: u16) -> Result<(), SimError> {
        let Some(old) = simnic::numbers(pf).and_then(|(number, _)| self.get(number)) else { return Ok(()) };
        let record = SimPfRecord { vfs, ..old.record.clone() };
        self.records.put(id_of(record.number), &old.name, &record, Expect::Any).await?;
        let all = Arc::clone(self);
        let change = move || {
            old.stop();
            let new = Arc::new(Adapter::new(&all.start, &old.name, &record));
            let mut adapters = all.adapters.write().unwrap_or_else(PoisonError::into_inner);
            adapters.insert(record.number, Arc::clone(&new));
            drop(adapters);
            new.open().map(drop)
        };
        blocking(change).await.unwrap_or(Ok(()))
    }

    /// Ends the processes of PFs without a claimed VF. The others stay for the next agent.
    pub async fn leave(&self, claims: &[Claim]) {
        for adapter in self.all() {
            if !in_use(claims, adapter.record.number) {
                blocking(move || adapter.stop()).await;
            }
        }
    }

    // ---- inventory ----

    /// All PFs, by address.
    #[must_use]
    pub fn pfs(&self) -> Vec<Pf> {
        self.all().iter().filter_map(|adapter| adapter.describe()).collect()
    }

    /// The address and name of each PF, by address. Does not block.
    #[must_use]
    pub fn names(&self) -> Vec<(Bdf, String)> {
        let named =
            |adapter: &Arc<Adapter>| Some((simnic::pf_bdf(adapter.record.number)?, adapter.name.clone()));
        self.all().iter().filter_map(named).collect()
    }

    /// A PF by its name. Does not block.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<Bdf> {
        let adapter = self.all().into_iter().find(|adapter| adapter.name == name)?;
        simnic::pf_bdf(adapter.record.number)
    }

    /// Describes a PF.
    ///
    /// # Errors
    /// There is none with this address.
    pub fn pf(&self, bdf: Bdf) -> Result<Pf, InventoryError> {
        let missing = InventoryError::NoDevice(bdf);
        match simnic::numbers(bdf) {
            Some((number, None)) => self.get(number).and_then(|adapter| adapter.describe()).ok_or(missing),
            Some((_, Some(_))) if self.has(bdf) => Err(InventoryError::NotPf(bdf)),
            _ => Err(missing),
        }
    }

    /// The VFs of a PF, by number. Does not block.
    ///
    /// # Errors
    /// There is no PF with this address.
    pub fn vfs_of(&self, pf: Bdf) -> Result<Vec<Vf>, InventoryError> {
        let Some((number, None)) = simnic::numbers(pf) else { return Err(InventoryError::NotPf(pf)) };
        let vfs = self.get(number).ok_or(InventoryError::NoDevice(pf))?.record.vfs;
        let vf = |index| {
            Some(Vf { device: function(simnic::vf_bdf(number, index)?, simnic::vf::IDS.1), pf, index })
        };
        Ok((0..vfs).filter_map(vf).collect())
    }

    /// Describes a VF. Does not block.
    ///
    /// # Errors
    /// There is none with this address.
    pub fn vf(&self, bdf: Bdf) -> Result<Vf, InventoryError> {
        match simnic::numbers(bdf) {
            Some((number, Some(index))) if self.has(bdf) => {
                let pf = simnic::pf_bdf(number).ok_or(InventoryError::NoDevice(bdf))?;
                Ok(Vf { device: function(bdf, simnic::vf::IDS.1), pf, index })
            }
            Some((_, None)) if self.has(bdf) => Err(InventoryError::NotVf(bdf)),
            _ => Err(InventoryError::NoDevice(bdf)),
        }
    }

    /// Whether a process is connected to a VF. If no VM of this agent has claimed the VF, the
    /// process is a stranger's.
    ///
    /// # Errors
    /// The PF's process does not answer.
    pub fn is_attached(&self, vf: Bdf) -> Result<bool, PfError> {
        let (pf, index) = self.open_of(vf)?;
        Ok(pf.about().attached.contains(&index))
    }

    /// Whether a function with this address exists. Does not block.
    #[must_use]
    pub fn has(&self, bdf: Bdf) -> bool {
        let Some((number, vf)) = simnic::numbers(bdf) else { return false };
        self.get(number).is_some_and(|adapter| vf.is_none_or(|vf| vf < adapter.record.vfs))
    }
}

impl Adapter {
    fn describe(&self) -> Option<Pf> {
        let mut device = function(simnic::pf_bdf(self.record.number)?, DEVICE);
        device.driver = Some(SIMULATED.into());
        device.interfaces = vec![self.name.clone()];
        let carrier = SimPf::connect(&self.socket()).is_ok_and(|pf| pf.about().link_up);
        // The host has no such interface: the kernel gives none the index 0.
        let interface =
            Interface { name: self.name.clone(), index: 0, admin_up: true, carrier, mtu: 1500, mac: None };
        Some(Pf {
            device,
            interfaces: vec![interface],
            total_vfs: MAX_VFS,
            num_vfs: self.record.vfs,
            autoprobe: None,
        })
    }
}

fn in_use(claims: &[Claim], number: u16) -> bool {
    let uses = |claim: &Claim| claim.adapter.as_ref().is_some_and(|vf| Some(vf.pf) == simnic::pf_bdf(number));
    claims.iter().any(uses)
}

fn function(bdf: Bdf, device: u16) -> PciDevice {
    PciDevice {
        bdf,
        vendor: VENDOR,
        device,
        class: ETHERNET,
        driver: None,
        driver_override: None,
        iommu_group: None,
        interfaces: Vec::new(),
    }
}

/// The id of a PF's record: a UUID of version 8 that holds the PF's number.
fn id_of(number: u16) -> Uuid {
    let [high, low] = number.to_be_bytes();
    uuid::Builder::from_custom_bytes([0, 0, 0, 0, 0, 0, b's', b'i', b'm', 0, 0, 0, 0, 0, high, low])
        .into_uuid()
}

/// Runs `work` on a thread that may block; None if it panicked.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Some(result),
        Err(error) => {
            tracing::error!("work on a simulated PF failed: {error}");
            None
        }
    }
}
