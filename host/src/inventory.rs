// SPDX-License-Identifier: Apache-2.0

//! The functions that VMs of this agent can have: those of the host in sysfs, and simulated ones.
//!
//! What differs between them is decided here, by address, so that those who claim, prepare and give back need not ask.
//! May block, but where it says otherwise.

use std::{path::PathBuf, sync::Arc};

use passthrough::{
    host::{
        Bdf, BindError, InventoryError, PciDevice, Pf, PreviousBinding, Sysfs, Usage, Vf, VfCountError,
        ViabilityError,
    },
    sim::is_simulated,
};

use crate::{sim::Simulated, vm::problem::chain};

/// The functions that there are.
#[derive(Clone)]
pub struct Inventory {
    sysfs: Sysfs,
    simulated: Option<Arc<Simulated>>,
    hardware: bool,
}

impl From<Sysfs> for Inventory {
    /// The host's functions, and no simulated ones.
    fn from(sysfs: Sysfs) -> Self {
        Self { sysfs, simulated: None, hardware: true }
    }
}

impl Inventory {
    /// With simulated adapters beside the host's.
    pub fn add_simulated(&mut self, simulated: Arc<Simulated>) {
        self.simulated = Some(simulated);
    }

    /// Without the host's own functions: this agent may not use them.
    pub fn leave_out_hardware(&mut self) {
        self.hardware = false;
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

    /// Where a function of the host lies in sysfs; a simulated one lies nowhere.
    #[must_use]
    pub fn device_dir(&self, bdf: Bdf) -> PathBuf {
        self.sysfs.device_dir(bdf)
    }

    /// Whether there is such a function. Does not block for long: it looks at sysfs at most.
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

    /// The names of all PFs that can be used, and whether the interface of each is set up. Waits for no PF.
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn pf_names(&self) -> Result<Vec<(String, bool)>, InventoryError> {
        let hardware = if self.hardware { self.sysfs.pfs()? } else { Vec::new() };
        let named = |pf: &Pf| (pf.name(), pf.interface().is_some_and(|interface| interface.admin_up));
        let mut names: Vec<(String, bool)> = hardware.iter().map(named).collect();
        // Nobody can take down the interface of a simulated one.
        names.extend(self.simulated.iter().flat_map(|all| all.names()).map(|name| (name, true)));
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

    /// The IOMMU group of a function that may be given to a VM together with others; a simulated one has none.
    ///
    /// # Errors
    /// What is in the way.
    pub fn check_viable(&self, bdf: Bdf, together: &[Bdf]) -> Result<Option<u32>, ViabilityError> {
        match self.simulates(bdf) {
            Some(simulated) => simulated.vf(bdf).map(|_| None).map_err(Into::into),
            None => self.sysfs.check_viable(bdf, together).map(|group| Some(group.number)),
        }
    }

    /// Who else uses a network function that no VM of this agent has; a simulated one is nobody's. Do not ask while a VM's process
    /// may open the function.
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn usage(&self, bdf: Bdf) -> Result<Option<Usage>, InventoryError> {
        match self.simulates(bdf) {
            Some(_) => Ok(None),
            None => self.sysfs.usage(bdf),
        }
    }

    /// How a function is bound; a simulated one is bound to nothing.
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

    /// Takes a function for VFIO; nothing is to be done for a simulated one.
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

    /// Puts a function's binding back.
    ///
    /// # Errors
    /// As [`Sysfs::restore`].
    pub fn restore(&self, bdf: Bdf, before: &PreviousBinding) -> Result<(), BindError> {
        match self.simulates(bdf) {
            Some(_) => Ok(()),
            None => self.sysfs.restore(bdf, before),
        }
    }

    /// Resets a function that nobody uses.
    ///
    /// # Errors
    /// Why it was not reset, in words.
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
