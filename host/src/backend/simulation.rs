// SPDX-License-Identifier: Apache-2.0

//! The functions of simulated adapters. No driver of the host binds them, and no IOMMU group has
//! them.

use std::sync::Arc;

use api::{Problem, ProblemCode};
use async_trait::async_trait;
use protocol::DeviceBackend;
use services::problem::ToProblem;
use simnic::is_simulated;
use sriov::{
    Bdf, BindError, InventoryError, PciDevice, Pf, PfControl, PfError, PreviousBinding, Usage, Vf,
    ViabilityError,
};
use text::chain;

use super::{Facts, FunctionBackend, MachineDevice, PfInterface, Scrub};
use crate::sim::Simulated;

const FACTS: Facts = Facts {
    needs_root: false,
    // The functions reach guest memory through the vmm, without an IOMMU.
    needs_locked_memory: false,
    needs_whole_sandbox: false,
    stores_vf_count: true,
    shown_as_simulated: true,
    no_plain_device: Some("is simulated: name its VFs as the \"vf\" of an adapter"),
    no_port_of_nic: None,
    failure: "is gone: the process of its simulated PF has ended. Stop the VM and boot it again.",
};

/// The functions of the simulated adapters of this host.
pub struct Simulation(Arc<Simulated>);

impl Simulation {
    /// The functions of `adapters`.
    #[must_use]
    pub fn new(adapters: Arc<Simulated>) -> Self {
        Self(adapters)
    }

    fn require(&self, bdf: Bdf) -> Result<(), BindError> {
        if self.0.has(bdf) { Ok(()) } else { Err(BindError::NoDevice(bdf)) }
    }
}

#[async_trait]
impl FunctionBackend for Simulation {
    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn owns(&self, bdf: Bdf) -> bool {
        is_simulated(bdf)
    }

    fn has(&self, bdf: Bdf) -> bool {
        self.0.has(bdf)
    }

    fn device(&self, bdf: Bdf) -> Result<PciDevice, InventoryError> {
        match self.0.vf(bdf) {
            Err(InventoryError::NotVf(_)) => self.0.pf(bdf).map(|pf| pf.device),
            vf => vf.map(|vf| vf.device),
        }
    }

    fn pf(&self, bdf: Bdf) -> Result<Pf, InventoryError> {
        self.0.pf(bdf)
    }

    fn vf(&self, bdf: Bdf) -> Result<Vf, InventoryError> {
        self.0.vf(bdf)
    }

    fn vfs_of(&self, pf: Bdf) -> Result<Vec<Vf>, InventoryError> {
        self.0.vfs_of(pf)
    }

    fn pfs(&self) -> Result<Vec<Pf>, InventoryError> {
        Ok(self.0.pfs())
    }

    fn pf_interfaces(&self) -> Result<Vec<PfInterface>, InventoryError> {
        // The interface of a simulated PF cannot be taken down.
        let interface = |(bdf, name)| PfInterface { bdf, name, admin_up: true };
        Ok(self.0.names().into_iter().map(interface).collect())
    }

    fn pf_by_interface(&self, name: &str) -> Result<Bdf, InventoryError> {
        let missing = || InventoryError::NoSuchInterface(name.chars().take(40).collect());
        self.0.by_name(name).ok_or_else(missing)
    }

    fn open_pf(&self, bdf: Bdf) -> Result<Box<dyn PfControl>, PfError> {
        self.0.open(bdf)
    }

    async fn set_num_vfs(&self, pf: &Pf, count: u32) -> Result<(), Problem> {
        // Like the kernel's `sriov_numvfs`, but without 0: a simulated PF has at least one VF.
        let Some(wanted) = u16::try_from(count).ok().filter(|count| (1..=pf.total_vfs).contains(count))
        else {
            let detail =
                format!("The simulated PF {} can have 1 to {} VFs, not {count}.", pf.name(), pf.total_vfs);
            return Err(Problem::new(ProblemCode::TooManyVfs, detail));
        };
        if wanted == pf.num_vfs {
            return Ok(());
        }
        self.0.set_vfs(pf.device.bdf, wanted).await.map_err(|error| error.problem())
    }

    fn check_viable(&self, bdf: Bdf, _together: &[Bdf]) -> Result<Option<u32>, ViabilityError> {
        self.0.vf(bdf)?;
        Ok(None)
    }

    fn usage(&self, bdf: Bdf) -> Result<Option<Usage>, InventoryError> {
        // The VFs of a PF that does not answer count as free, but cannot be attached.
        Ok(self.0.is_attached(bdf).unwrap_or(false).then_some(Usage::Simulated))
    }

    fn numa_node(&self, _bdf: Bdf) -> Result<Option<u16>, InventoryError> {
        Ok(None)
    }

    fn can_reset(&self, _bdf: Bdf) -> bool {
        true
    }

    fn binding(&self, bdf: Bdf) -> Result<PreviousBinding, BindError> {
        self.require(bdf).map(|()| PreviousBinding::default())
    }

    fn bind(&self, bdf: Bdf) -> Result<(), BindError> {
        self.require(bdf)
    }

    fn reset(&self, bdf: Bdf) -> Result<(), String> {
        self.0.reset(bdf).map_err(|error| chain(&error))
    }

    fn machine_device(&self, bdf: Bdf, _group: Option<u32>) -> Result<MachineDevice, Problem> {
        let connection = self.0.attach(bdf).map_err(|error| error.problem())?;
        let (backend, as_port) = (DeviceBackend::Simulated, Some(DeviceBackend::SimulatedPort));
        Ok(MachineDevice { backend, as_port, connection: Some(connection) })
    }

    fn take_for_scrub(&self, bdf: Bdf) -> Result<bool, BindError> {
        self.require(bdf).map(|()| true)
    }

    fn scrub(&self, bdf: Bdf, work: Scrub<'_>) -> Result<(), String> {
        let vf = self.0.mailbox(bdf).map_err(|error| chain(&error))?;
        work(Arc::new(vf))
    }

    fn restore(&self, _bdf: Bdf, _before: &PreviousBinding) -> Result<(), BindError> {
        Ok(())
    }
}
