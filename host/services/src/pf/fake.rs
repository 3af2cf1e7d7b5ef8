// SPDX-License-Identifier: Apache-2.0

//! PFs in memory, shared with the test.

#![allow(clippy::unwrap_used)] // A broken fake must stop the test.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use netpolicy::{MacAddress, PfCapabilities};
use sriov::{Bdf, InventoryError, PfControl, PfError, VfChange, VfSettings, fake::FakePf};

use super::{PfName, Pfs};

/// The state that the test and the threads share.
#[derive(Default)]
pub struct World {
    /// The PFs by name.
    pub pfs: BTreeMap<String, FakePf>,
    /// The capabilities of every PF; None for those of an 82576.
    pub capabilities: Option<PfCapabilities>,
    /// The number of reads of settings.
    pub reads: u64,
    /// A gate for the test: changes wait while it is locked.
    pub gate: Arc<tokio::sync::Mutex<()>>,
    /// The name of a PF that does not answer while it is set.
    pub hangs: Option<String>,
}

/// PFs in memory.
#[derive(Clone, Default)]
pub struct FakePfs(Arc<Mutex<World>>);

impl FakePfs {
    /// PFs with these names and seven VFs each.
    #[must_use]
    pub fn new(names: &[&str]) -> Self {
        let fake = Self::default();
        for name in names {
            fake.world().pfs.insert((*name).to_owned(), FakePf::new(name, 7));
        }
        fake
    }

    /// The state, locked.
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The settings of a VF.
    #[must_use]
    pub fn vf(&self, pf: &str, vf: u16) -> VfSettings {
        self.world().pfs.get_mut(pf).unwrap().read(vf).unwrap()
    }

    /// Changes the adapter as another program would.
    pub fn foreign(&self, pf: &str, vf: u16, change: VfChange) {
        let mut world = self.world();
        let pf = world.pfs.get_mut(pf).unwrap();
        pf.set(vf, change).unwrap();
        pf.made.pop();
    }

    /// Changes the address of a VF as another program would.
    pub fn foreign_mac(&self, pf: &str, vf: u16, mac: MacAddress) {
        self.foreign(pf, vf, VfChange::Mac(Some(mac)));
    }

    /// The changes that were made since the last call.
    pub fn take_made(&self, pf: &str) -> Vec<(u16, VfChange)> {
        std::mem::take(&mut self.world().pfs.get_mut(pf).unwrap().made)
    }
}

impl Pfs for FakePfs {
    fn list(&self) -> Result<Vec<PfName>, PfError> {
        Ok(self.world().pfs.keys().map(|name| PfName { name: name.clone(), up: true }).collect())
    }

    fn address(&self, name: &str) -> Result<Bdf, PfError> {
        let number = self.world().pfs.keys().position(|pf| pf == name);
        let number = number.ok_or_else(|| InventoryError::NoSuchInterface(name.to_owned()))?;
        format!("0000:{:02x}:00.0", number + 1)
            .parse()
            .map_err(|_| PfError::NoInterface { pf: name.to_owned() })
    }

    fn open(&self, name: &str) -> Result<Box<dyn PfControl>, PfError> {
        if !self.world().pfs.contains_key(name) {
            return Err(InventoryError::NoSuchInterface(name.to_owned()).into());
        }
        Ok(Box::new(One { world: self.clone(), name: name.to_owned() }))
    }
}

struct One {
    world: FakePfs,
    name: String,
}

impl One {
    fn wait(&self) {
        while self.world.world().hangs.as_ref() == Some(&self.name) {
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut FakePf) -> Result<T, PfError>) -> Result<T, PfError> {
        self.wait();
        let mut world = self.world.world();
        let gone = PfError::NoInterface { pf: self.name.clone() };
        work(world.pfs.get_mut(&self.name).ok_or(gone)?)
    }
}

impl PfControl for One {
    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&mut self) -> Result<PfCapabilities, PfError> {
        self.wait();
        Ok(self.world.world().capabilities.clone().unwrap_or_else(PfCapabilities::igb_82576))
    }

    fn read_all(&mut self) -> Result<BTreeMap<u16, VfSettings>, PfError> {
        self.world.world().reads += 1;
        self.with(FakePf::read_all)
    }

    fn set(&mut self, vf: u16, change: VfChange) -> Result<(), PfError> {
        let gate = Arc::clone(&self.world.world().gate);
        let _open = gate.blocking_lock();
        self.with(|pf| pf.set(vf, change))
    }
}
