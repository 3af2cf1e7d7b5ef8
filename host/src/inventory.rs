// SPDX-License-Identifier: Apache-2.0

//! The functions that VMs of this agent can have: those of the host in sysfs, and simulated ones.
//!
//! This is the one place that separates hardware from simulation, by address: code that claims, prepares and returns functions
//! need not distinguish them. Methods may block, unless they say otherwise.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use passthrough::{
    sim::is_simulated,
    sriov::{
        Bdf, BindError, InventoryError, PciDevice, Pf, PreviousBinding, Sysfs, Usage, Vf, VfCountError,
        ViabilityError,
    },
};

use crate::{assignable::AssignableList, sim::Simulated, vm::problem::chain};

/// The functions of the host, and simulated ones.
#[derive(Clone)]
pub struct Inventory {
    sysfs: Sysfs,
    simulated: Option<Arc<Simulated>>,
    hardware: bool,
    assignable: Arc<AssignableList>,
    /// The names by which ports know PFs, see [`keep_names`](Self::keep_names).
    kept_names: Arc<Mutex<BTreeMap<Bdf, String>>>,
}

impl From<Sysfs> for Inventory {
    /// The host's functions, and no simulated ones.
    fn from(sysfs: Sysfs) -> Self {
        Self {
            sysfs,
            simulated: None,
            hardware: true,
            assignable: Arc::default(),
            kept_names: Arc::default(),
        }
    }
}

impl Inventory {
    /// Adds simulated adapters to the host's.
    pub fn add_simulated(&mut self, simulated: Arc<Simulated>) {
        self.simulated = Some(simulated);
    }

    /// Leaves out the host's own functions: this agent may not use them.
    pub fn leave_out_hardware(&mut self) {
        self.hardware = false;
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

    /// Whether a function can be reset between tenants.
    #[must_use]
    pub fn can_reset(&self, bdf: Bdf) -> bool {
        self.simulates(bdf).is_some() || self.sysfs.can_reset(bdf)
    }

    /// Whether the host's own functions can be used.
    #[must_use]
    pub fn has_hardware(&self) -> bool {
        self.hardware
    }

    /// The simulated adapters.
    #[must_use]
    pub fn simulated(&self) -> Option<&Arc<Simulated>> {
        self.simulated.as_ref()
    }

    /// The simulated adapters if the address is one of theirs.
    fn simulates(&self, bdf: Bdf) -> Option<&Arc<Simulated>> {
        self.simulated.as_ref().filter(|_| is_simulated(bdf))
    }

    /// The host's sysfs.
    #[must_use]
    pub fn sysfs(&self) -> &Sysfs {
        &self.sysfs
    }

    /// The directory of a function of the host in sysfs; a simulated one has none.
    #[must_use]
    pub fn device_dir(&self, bdf: Bdf) -> PathBuf {
        self.sysfs.device_dir(bdf)
    }

    /// Whether the function exists. Does not block for long: it looks at sysfs at most.
    #[must_use]
    pub fn has_device(&self, bdf: Bdf) -> bool {
        match self.simulates(bdf) {
            Some(simulated) => simulated.has(bdf),
            None => self.sysfs.has_device(bdf),
        }
    }

    /// Describes one function.
    ///
    /// # Errors
    /// There is none, or sysfs is unreadable.
    pub fn device(&self, bdf: Bdf) -> Result<PciDevice, InventoryError> {
        match self.simulates(bdf) {
            Some(simulated) => match simulated.vf(bdf) {
                Err(InventoryError::NotVf(_)) => simulated.pf(bdf).map(|pf| pf.device),
                vf => vf.map(|vf| vf.device),
            },
            None => self.sysfs.device(bdf),
        }
    }

    /// All PFs that can be used, by address.
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn pfs(&self) -> Result<Vec<Pf>, InventoryError> {
        let mut pfs = if self.hardware { self.sysfs.pfs()? } else { Vec::new() };
        pfs.extend(self.simulated.iter().flat_map(|simulated| simulated.pfs()));
        Ok(pfs)
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
        let kept = self.kept_names();
        match kept.get(&pf.device.bdf) {
            Some(name) => name.clone(),
            None if kept.values().any(|name| *name == pf.name()) => pf.device.bdf.to_string(),
            None => pf.name(),
        }
    }

    /// The PF that ports know by this name.
    ///
    /// # Errors
    /// There is none, or sysfs is unreadable.
    pub fn pf_known_as(&self, name: &str) -> Result<Pf, InventoryError> {
        self.pf(self.address_known_as(name)?)
    }

    /// The address of the PF that ports know by this name. Asks no PF, and reads nothing for a name that is kept.
    ///
    /// # Errors
    /// There is none, or sysfs is unreadable.
    pub fn address_known_as(&self, name: &str) -> Result<Bdf, InventoryError> {
        let kept = self.kept_names().iter().find(|(_, kept)| *kept == name).map(|(bdf, _)| *bdf);
        if let Some(bdf) = kept.or_else(|| name.parse().ok()) {
            return Ok(bdf);
        }
        match self.simulated.as_ref().and_then(|simulated| simulated.by_name(name)) {
            Some(bdf) => Ok(bdf),
            None => Ok(self.sysfs.pf_by_name(name)?.device.bdf),
        }
    }

    /// The names by which ports know the PFs, or would, and whether the interface of each is set up. Waits for no PF.
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn pf_names(&self) -> Result<Vec<(String, bool)>, InventoryError> {
        let hardware = if self.hardware { self.sysfs.pfs()? } else { Vec::new() };
        let named =
            |pf: &Pf| (self.name_for_ports(pf), pf.interface().is_some_and(|interface| interface.admin_up));
        let mut names: Vec<(String, bool)> = hardware.iter().map(named).collect();
        // The interface of a simulated PF cannot be taken down.
        names.extend(self.simulated.iter().flat_map(|all| all.names()).map(|(_, name)| (name, true)));
        Ok(names)
    }

    /// Describes a PF.
    ///
    /// # Errors
    /// There is none with this address, or sysfs is unreadable.
    pub fn pf(&self, bdf: Bdf) -> Result<Pf, InventoryError> {
        match self.simulates(bdf) {
            Some(simulated) => simulated.pf(bdf),
            None => self.sysfs.pf(bdf),
        }
    }

    /// The PF that has an interface of this name, or that has this address.
    ///
    /// # Errors
    /// There is none, or sysfs is unreadable.
    pub fn pf_by_name(&self, name: &str) -> Result<Pf, InventoryError> {
        if let Ok(bdf) = name.parse() {
            return self.pf(bdf);
        }
        match self.simulated.as_ref().and_then(|simulated| simulated.by_name(name)) {
            Some(bdf) => self.pf(bdf),
            None => self.sysfs.pf_by_name(name),
        }
    }

    /// The VFs of a PF by their number.
    ///
    /// # Errors
    /// There is no such PF, or sysfs is unreadable.
    pub fn vfs_of(&self, pf: Bdf) -> Result<Vec<Vf>, InventoryError> {
        match self.simulates(pf) {
            Some(simulated) => simulated.vfs_of(pf),
            None => self.sysfs.vfs_of(pf),
        }
    }

    /// Describes a VF.
    ///
    /// # Errors
    /// There is none with this address, or sysfs is unreadable.
    pub fn vf(&self, bdf: Bdf) -> Result<Vf, InventoryError> {
        match self.simulates(bdf) {
            Some(simulated) => simulated.vf(bdf),
            None => self.sysfs.vf(bdf),
        }
    }

    /// The IOMMU group of a function that a VM may have together with these others; a simulated one has none.
    ///
    /// # Errors
    /// The obstacle, see [`ViabilityError`].
    pub fn check_viable(&self, bdf: Bdf, together: &[Bdf]) -> Result<Option<u32>, ViabilityError> {
        match self.simulates(bdf) {
            Some(simulated) => simulated.vf(bdf).map(|_| None).map_err(Into::into),
            None => self.sysfs.check_viable(bdf, together).map(|group| Some(group.number)),
        }
    }

    /// The user of a function that no VM of this agent has. Do not call this while a VM's process may open the function.
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn usage(&self, bdf: Bdf) -> Result<Option<Usage>, InventoryError> {
        match self.simulates(bdf) {
            // A PF that does not answer has no VF to give either.
            Some(simulated) => Ok(simulated.is_attached(bdf).unwrap_or(false).then_some(Usage::Simulated)),
            None => self.sysfs.usage(bdf),
        }
    }

    /// The binding of a function; a simulated one is bound to nothing.
    ///
    /// # Errors
    /// There is no such function, or sysfs is unreadable.
    pub fn current_binding(&self, bdf: Bdf) -> Result<PreviousBinding, BindError> {
        match self.simulates(bdf) {
            Some(simulated) if simulated.has(bdf) => Ok(PreviousBinding::default()),
            Some(_) => Err(BindError::NoDevice(bdf)),
            None => self.sysfs.current_binding(bdf),
        }
    }

    /// Takes a function for VFIO; a simulated one needs no step.
    ///
    /// # Errors
    /// As [`Sysfs::bind_vfio`].
    pub fn bind_vfio(&self, bdf: Bdf) -> Result<(), BindError> {
        match self.simulates(bdf) {
            Some(simulated) if simulated.has(bdf) => Ok(()),
            Some(_) => Err(BindError::NoDevice(bdf)),
            None => self.sysfs.bind_vfio(bdf).map(drop),
        }
    }

    /// Restores a function's binding.
    ///
    /// # Errors
    /// As [`Sysfs::restore`].
    pub fn restore(&self, bdf: Bdf, before: &PreviousBinding) -> Result<(), BindError> {
        match self.simulates(bdf) {
            Some(_) => Ok(()),
            None => self.sysfs.restore(bdf, before),
        }
    }

    /// Resets a function that is not in use.
    ///
    /// # Errors
    /// The reason that it was not reset, in words.
    pub fn reset(&self, bdf: Bdf) -> Result<(), String> {
        match self.simulates(bdf) {
            Some(simulated) => simulated.reset(bdf).map_err(|error| chain(&error)),
            None => self.sysfs.reset(bdf).map_err(|error| chain(&error)),
        }
    }

    /// Gives a PF of the host `count` VFs. Simulated ones: [`Simulated::set_vfs`].
    ///
    /// # Errors
    /// As [`Sysfs::set_num_vfs`].
    pub fn set_num_vfs(&self, bdf: Bdf, count: u16) -> Result<(), VfCountError> {
        self.sysfs.set_num_vfs(bdf, count, None)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use passthrough::sriov::fake::FakeSysfs;

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
        let inventory = Inventory::from(sysfs.sysfs());
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
