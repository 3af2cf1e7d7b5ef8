// SPDX-License-Identifier: Apache-2.0

//! The backends of PCI functions: the host's hardware, and the simulated adapter.
//!
//! A [`FunctionBackend`] describes its functions, prepares them for a VM, and releases them.
//! [`Backends`] is the table that maps an address to its backend, and the only place that does.
//! Other code asks the backend of a function for the property that it needs, see [`Facts`].

mod hardware;
mod simulation;

use std::{os::fd::OwnedFd, sync::Arc};

use api::Problem;
use async_trait::async_trait;
use passthrough::hardware::VfHardware;
use protocol::DeviceBackend;
use sriov::{
    Bdf, BindError, InventoryError, PciDevice, Pf, PfControl, PfError, PreviousBinding, Usage, Vf,
    ViabilityError,
};

pub use self::{
    hardware::{Hardware, OpenPf},
    simulation::Simulation,
};

/// Facts that hold for all functions of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Whether only an agent that is root can use the functions.
    pub needs_root: bool,
    /// Whether the functions do DMA through an IOMMU: all memory of the guest is then locked.
    pub needs_locked_memory: bool,
    /// Whether a VM with such a function needs each layer of the vmm's sandbox.
    pub needs_whole_sandbox: bool,
    /// Whether the backend stores the number of VFs that each PF should have. Otherwise the agent
    /// stores it.
    pub stores_vf_count: bool,
    /// The field `simulated` of PFs and VFs in the API. Do not branch on it: every rule has a fact
    /// of its own.
    pub shown_as_simulated: bool,
    /// The reason that `devices` of a VM cannot list such a function, as the rest of a sentence
    /// after the function's address; None if it can.
    pub no_plain_device: Option<&'static str>,
    /// The reason that a VF cannot be the port of a NIC, as the rest of a sentence after the name of its PF; None if it can.
    pub no_port_of_nic: Option<&'static str>,
    /// The failure of a function under a running VM, as the rest of a sentence after the function's
    /// name.
    pub failure: &'static str,
}

/// The network interface of a PF, as lists show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PfInterface {
    /// The PF.
    pub bdf: Bdf,
    /// The name of the interface, or the PF's address if it has none.
    pub name: String,
    /// Whether the interface is administratively up.
    pub admin_up: bool,
}

/// A function, as a vmm receives it.
#[derive(Debug)]
pub struct MachineDevice {
    /// The way in which the vmm opens the function.
    pub backend: DeviceBackend,
    /// The way in which the vmm opens it as the port of a NIC. None for a function that cannot be one.
    pub as_port: Option<DeviceBackend>,
    /// A descriptor that goes to the vmm beside the machine's specification.
    pub connection: Option<OwnedFd>,
}

/// Work on an open VF between two tenants. Its error is a text for people.
pub type Scrub<'a> = &'a mut dyn FnMut(Arc<dyn VfHardware>) -> Result<(), String>;

/// One kind of PCI functions: PFs, their VFs and other functions, with one way to find, prepare and
/// release them.
///
/// A VF and its PF have the same backend. Each method on a function gets an address that the backend
/// [owns](Self::owns); the function need not exist. Methods may block, unless they say otherwise.
#[async_trait]
pub trait FunctionBackend: Send + Sync + 'static {
    /// The facts that hold for all functions.
    fn facts(&self) -> &'static Facts;

    /// Whether the address is one that only this backend can have. Looks at the number alone.
    fn owns(&self, bdf: Bdf) -> bool;

    // ---- Descriptions ----

    /// Whether the function exists. Does not block for long: it looks at sysfs at most.
    fn has(&self, bdf: Bdf) -> bool;

    /// Describes a function.
    ///
    /// # Errors
    /// There is none, or it is unreadable.
    fn device(&self, bdf: Bdf) -> Result<PciDevice, InventoryError>;

    /// Describes a PF.
    ///
    /// # Errors
    /// There is none with this address, or it is unreadable.
    fn pf(&self, bdf: Bdf) -> Result<Pf, InventoryError>;

    /// Describes a VF.
    ///
    /// # Errors
    /// There is none with this address, or it is unreadable.
    fn vf(&self, bdf: Bdf) -> Result<Vf, InventoryError>;

    /// The VFs of a PF, by number.
    ///
    /// # Errors
    /// There is no such PF, or it is unreadable.
    fn vfs_of(&self, pf: Bdf) -> Result<Vec<Vf>, InventoryError>;

    /// All PFs, by address.
    ///
    /// # Errors
    /// They are unreadable.
    fn pfs(&self) -> Result<Vec<Pf>, InventoryError>;

    /// The interfaces of all PFs, by address. Waits for no PF.
    ///
    /// # Errors
    /// They are unreadable.
    fn pf_interfaces(&self) -> Result<Vec<PfInterface>, InventoryError>;

    /// The PF that has an interface of this name. Waits for no PF.
    ///
    /// # Errors
    /// There is none, or the PFs are unreadable.
    fn pf_by_interface(&self, name: &str) -> Result<Bdf, InventoryError>;

    // ---- PFs ----

    /// Opens the control of a PF.
    ///
    /// # Errors
    /// There is no such PF, or it cannot be opened.
    fn open_pf(&self, bdf: Bdf) -> Result<Box<dyn PfControl>, PfError>;

    /// Gives a PF `count` VFs: 0 to its total for hardware, 1 to its total for a simulated PF. No
    /// VF of it may be in use, and none may be claimed meanwhile.
    ///
    /// # Errors
    /// `count` is out of range, or the PF does not accept it.
    async fn set_num_vfs(&self, pf: &Pf, count: u32) -> Result<(), Problem>;

    // ---- The choice of a function ----

    /// Checks that a VM may have a function `together` with these others. Returns the function's
    /// IOMMU group; None if the backend has no groups.
    ///
    /// # Errors
    /// The obstacle, see [`ViabilityError`].
    fn check_viable(&self, bdf: Bdf, together: &[Bdf]) -> Result<Option<u32>, ViabilityError>;

    /// The user of a function that no VM of this agent has; None if it is free. Do not call this
    /// while a VM's process may open the function.
    ///
    /// # Errors
    /// The function is unreadable.
    fn usage(&self, bdf: Bdf) -> Result<Option<Usage>, InventoryError>;

    /// Whether the function can be reset between tenants.
    fn can_reset(&self, bdf: Bdf) -> bool;

    /// The NUMA node to which the function belongs; None if it has none, or the host does not know it.
    ///
    /// # Errors
    /// The function is unreadable.
    fn numa_node(&self, bdf: Bdf) -> Result<Option<u16>, InventoryError>;

    // ---- The life of a claim ----

    /// The binding to store before [`bind`](Self::bind), for [`restore`](Self::restore).
    ///
    /// # Errors
    /// There is no such function, or it is unreadable.
    fn binding(&self, bdf: Bdf) -> Result<PreviousBinding, BindError>;

    /// Takes a function from the host's driver for a VM. May be repeated.
    ///
    /// # Errors
    /// See [`BindError`]. The function may be left without a driver: restore it.
    fn bind(&self, bdf: Bdf) -> Result<(), BindError>;

    /// Resets a function that is not in use.
    ///
    /// # Errors
    /// The reason that it was not reset, as a text for people.
    fn reset(&self, bdf: Bdf) -> Result<(), String>;

    /// Prepares a bound function for a vmm. `group` is the result of
    /// [`check_viable`](Self::check_viable).
    ///
    /// # Errors
    /// The function cannot be opened.
    fn machine_device(&self, bdf: Bdf, group: Option<u32>) -> Result<MachineDevice, Problem>;

    /// Takes a VF for [`scrub`](Self::scrub) after its tenant's process has ended. False if the host
    /// has given the VF to another driver meanwhile: it must then not be scrubbed.
    ///
    /// # Errors
    /// See [`BindError`].
    fn take_for_scrub(&self, bdf: Bdf) -> Result<bool, BindError>;

    /// Opens a VF in the place of its last tenant's process, and does `work` on it.
    ///
    /// # Errors
    /// The VF cannot be opened, or those of `work`, as a text for people.
    fn scrub(&self, bdf: Bdf, work: Scrub<'_>) -> Result<(), String>;

    /// Restores the binding of a function. May be repeated. The process of its last tenant must have
    /// ended.
    ///
    /// # Errors
    /// See [`BindError`]. [`BindError::NoDevice`] means that there is nothing left to restore.
    fn restore(&self, bdf: Bdf, before: &PreviousBinding) -> Result<(), BindError>;
}

/// The backends of an agent: maps the address of a function to its backend.
#[derive(Clone, Default)]
pub struct Backends(Vec<Row>);

#[derive(Clone)]
struct Row {
    backend: Arc<dyn FunctionBackend>,
    left_out: bool,
}

impl Backends {
    /// Adds a backend. Lists have its functions after those of earlier backends.
    pub fn add(&mut self, backend: impl FunctionBackend) {
        self.0.push(Row { backend: Arc::new(backend), left_out: false });
    }

    /// Leaves out the backends that need root: VMs of this agent get no function of them.
    pub fn leave_out_those_of_root(&mut self) {
        for row in &mut self.0 {
            row.left_out |= row.backend.facts().needs_root;
        }
    }

    /// Whether VMs of this agent get functions of all backends.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.0.iter().all(|row| !row.left_out)
    }

    /// Whether the function belongs to a backend that is left out.
    #[must_use]
    pub fn leaves_out(&self, bdf: Bdf) -> bool {
        self.row(bdf).is_some_and(|row| row.left_out)
    }

    /// The backend of a function. The function need not exist, and the backend may be left out:
    /// claims of a former agent are released all the same.
    ///
    /// # Errors
    /// [`InventoryError::NoDevice`]: no backend has such addresses.
    pub fn of(&self, bdf: Bdf) -> Result<&Arc<dyn FunctionBackend>, InventoryError> {
        self.row(bdf).map(|row| &row.backend).ok_or(InventoryError::NoDevice(bdf))
    }

    /// The backends with functions for VMs of this agent, the first added first.
    pub fn usable(&self) -> impl Iterator<Item = &Arc<dyn FunctionBackend>> {
        self.0.iter().filter(|row| !row.left_out).map(|row| &row.backend)
    }

    /// The PF that has an interface of this name. If several backends have one, the last backend
    /// wins: an operator chooses the names of simulated PFs, and an interface of the host may get
    /// such a name later.
    ///
    /// # Errors
    /// There is none, or the PFs of the first backend are unreadable.
    pub fn pf_by_interface(&self, name: &str) -> Result<Bdf, InventoryError> {
        let mut found = Err(InventoryError::NoSuchInterface(name.chars().take(40).collect()));
        for row in self.0.iter().rev() {
            found = row.backend.pf_by_interface(name);
            if found.is_ok() {
                break;
            }
        }
        found
    }

    fn row(&self, bdf: Bdf) -> Option<&Row> {
        self.0.iter().find(|row| row.backend.owns(bdf))
    }
}

#[cfg(test)]
mod tests;
