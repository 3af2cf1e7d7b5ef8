// SPDX-License-Identifier: Apache-2.0

//! The functions that VMs of this agent can have, with the names by which ports know PFs.
//!
//! Most methods look up the [backend](FunctionBackend) of a function and ask it. They may block,
//! unless they say otherwise.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use options::assignable::AssignableList;
use sriov::{Bdf, InventoryError, PciDevice, Pf, PfControl, PfError, Vf};

use crate::backend::{Backends, FunctionBackend, Hardware};

/// The functions of all backends.
#[derive(Clone, Default)]
pub struct Inventory {
    backends: Backends,
    assignable: Arc<AssignableList>,
    /// The names by which ports know PFs, see [`keep_names`](Self::keep_names).
    kept_names: Arc<Mutex<BTreeMap<Bdf, String>>>,
}

impl From<Hardware> for Inventory {
    /// The functions of the host alone.
    fn from(hardware: Hardware) -> Self {
        let mut inventory = Self::default();
        inventory.add(hardware);
        inventory
    }
}

impl Inventory {
    /// Adds a backend. Lists have its functions after those of earlier backends.
    pub fn add(&mut self, backend: impl FunctionBackend) {
        self.backends.add(backend);
    }

    /// Leaves out the backends that need root: VMs of this agent get no function of them.
    pub fn leave_out_backends_of_root(&mut self) {
        self.backends.leave_out_those_of_root();
    }

    /// Sets the functions of the host that VMs may have.
    pub fn set_assignable(&mut self, list: AssignableList) {
        self.assignable = Arc::new(list);
    }

    /// The functions of the host that VMs may have.
    #[must_use]
    pub fn assignable(&self) -> &AssignableList {
        &self.assignable
    }

    /// The table of backends.
    #[must_use]
    pub fn backends(&self) -> &Backends {
        &self.backends
    }

    /// The backend of a function, which need not exist.
    ///
    /// # Errors
    /// No backend has such addresses.
    pub fn backend(&self, bdf: Bdf) -> Result<&Arc<dyn FunctionBackend>, InventoryError> {
        self.backends.of(bdf)
    }

    /// The backend of a function that exists; None for every other address. Does not block for long.
    #[must_use]
    pub fn backend_of_present(&self, bdf: Bdf) -> Option<&Arc<dyn FunctionBackend>> {
        self.backend(bdf).ok().filter(|backend| backend.has(bdf))
    }

    /// Whether the function exists. Does not block for long.
    #[must_use]
    pub fn has_device(&self, bdf: Bdf) -> bool {
        self.backend_of_present(bdf).is_some()
    }

    /// Describes one function.
    ///
    /// # Errors
    /// There is none, or it is unreadable.
    pub fn device(&self, bdf: Bdf) -> Result<PciDevice, InventoryError> {
        self.backend(bdf)?.device(bdf)
    }

    /// All PFs that can be used, by backend and address.
    ///
    /// # Errors
    /// Those of a backend are unreadable.
    pub fn pfs(&self) -> Result<Vec<Pf>, InventoryError> {
        let mut pfs = Vec::new();
        for backend in self.backends.usable() {
            pfs.extend(backend.pfs()?);
        }
        Ok(pfs)
    }

    /// Opens the control of a PF.
    ///
    /// # Errors
    /// There is no such PF, or it cannot be opened.
    pub fn open_pf(&self, bdf: Bdf) -> Result<Box<dyn PfControl>, PfError> {
        self.backend(bdf)?.open_pf(bdf)
    }

    /// Sets the names by which ports know PFs with a claimed VF. A PF is its PCI address. Its interface can be renamed, or
    /// moved to another network namespace, while a VM has a VF of it, and another PF can get its name. Switches and ports go on
    /// with the name that they know until no VF of the PF is claimed.
    pub fn keep_names(&self, names: impl IntoIterator<Item = (Bdf, String)>) {
        *self.kept_names() = names.into_iter().collect();
    }

    fn kept_names(&self) -> MutexGuard<'_, BTreeMap<Bdf, String>> {
        self.kept_names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name by which ports know a PF, or would: its interface, or its address if that is another PF's name.
    #[must_use]
    pub fn name_for_ports(&self, pf: &Pf) -> String {
        self.known_name(pf.device.bdf, pf.name())
    }

    /// The name by which ports know a PF that has the name `now`.
    fn known_name(&self, bdf: Bdf, now: String) -> String {
        let kept = self.kept_names();
        match kept.get(&bdf) {
            Some(name) => name.clone(),
            None if kept.values().any(|name| *name == now) => bdf.to_string(),
            None => now,
        }
    }

    /// The PF that ports know by this name.
    ///
    /// # Errors
    /// There is none, or the PFs are unreadable.
    pub fn pf_known_as(&self, name: &str) -> Result<Pf, InventoryError> {
        self.pf(self.address_known_as(name)?)
    }

    /// The address of the PF that ports know by this name. Asks no PF, and reads nothing for a name that is kept.
    ///
    /// # Errors
    /// There is none, or the PFs are unreadable.
    pub fn address_known_as(&self, name: &str) -> Result<Bdf, InventoryError> {
        let kept = self.kept_names().iter().find(|(_, kept)| *kept == name).map(|(bdf, _)| *bdf);
        match kept.or_else(|| name.parse().ok()) {
            Some(bdf) => Ok(bdf),
            None => self.backends.pf_by_interface(name),
        }
    }

    /// The names by which ports know the PFs, or would, and whether the interface of each is set up. Waits for no PF.
    ///
    /// # Errors
    /// The PFs of a backend are unreadable.
    pub fn pf_names(&self) -> Result<Vec<(String, bool)>, InventoryError> {
        let mut names = Vec::new();
        for backend in self.backends.usable() {
            let interfaces = backend.pf_interfaces()?;
            names.extend(interfaces.into_iter().map(|pf| (self.known_name(pf.bdf, pf.name), pf.admin_up)));
        }
        Ok(names)
    }

    /// Describes a PF.
    ///
    /// # Errors
    /// There is none with this address, or it is unreadable.
    pub fn pf(&self, bdf: Bdf) -> Result<Pf, InventoryError> {
        self.backend(bdf)?.pf(bdf)
    }

    /// The PF that has an interface of this name, or that has this address.
    ///
    /// # Errors
    /// There is none, or the PFs are unreadable.
    pub fn pf_by_name(&self, name: &str) -> Result<Pf, InventoryError> {
        match name.parse() {
            Ok(bdf) => self.pf(bdf),
            Err(_) => self.pf(self.backends.pf_by_interface(name)?),
        }
    }

    /// The VFs of a PF by their number.
    ///
    /// # Errors
    /// There is no such PF, or it is unreadable.
    pub fn vfs_of(&self, pf: Bdf) -> Result<Vec<Vf>, InventoryError> {
        self.backend(pf)?.vfs_of(pf)
    }

    /// Describes a VF.
    ///
    /// # Errors
    /// There is none with this address, or it is unreadable.
    pub fn vf(&self, bdf: Bdf) -> Result<Vf, InventoryError> {
        self.backend(bdf)?.vf(bdf)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use sriov::fake::FakeSysfs;

    use super::*;

    /// A host with two PFs, eth0 and eth1.
    pub(crate) fn two_pfs() -> (tempfile::TempDir, FakeSysfs, [Bdf; 2]) {
        let directory = tempfile::tempdir().unwrap();
        let sysfs = FakeSysfs::new(directory.path().join("sys"));
        let pfs: [Bdf; 2] = ["0000:01:00.0", "0000:02:00.0"].map(|bdf| bdf.parse().unwrap());
        sysfs.add_igb(pfs[0], "eth0");
        sysfs.add_igb(pfs[1], "eth1");
        (directory, sysfs, pfs)
    }

    #[test]
    fn ports_know_a_pf_by_its_first_name_whatever_its_interface_is_called() {
        let (_directory, sysfs, [first, second]) = two_pfs();
        let inventory = Inventory::from(Hardware::new(sysfs.sysfs()));
        let names = || inventory.pf_names().unwrap().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        let known = |name: &str| inventory.pf_known_as(name).map(|pf| pf.device.bdf).ok();
        inventory.keep_names([(first, "eth0".to_owned())]);

        // The interfaces have changed their names.
        sysfs.rename_interface(first, "eth0", "lan0");
        sysfs.rename_interface(second, "eth1", "eth0");
        assert_eq!(names(), ["eth0", "0000:02:00.0"]);
        assert_eq!(
            [known("eth0"), known("lan0"), known("0000:02:00.0")],
            [Some(first), Some(first), Some(second)]
        );
        // Requests by people use current interface names.
        assert_eq!(inventory.pf_by_name("eth0").unwrap().device.bdf, second);

        // In another network namespace the PF has no interface here, and is the same PF.
        sysfs.hide_interfaces(first);
        assert_eq!(known("eth0"), Some(first));

        inventory.keep_names([]);
        assert_eq!(names(), ["0000:01:00.0", "eth0"]);
        assert_eq!(known("eth0"), Some(second));
    }
}
