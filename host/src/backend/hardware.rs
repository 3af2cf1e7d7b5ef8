// SPDX-License-Identifier: Apache-2.0

//! The PCI functions of the host: sysfs describes them, VFIO gives them to VMs, and netlink controls
//! their PFs.

use std::sync::Arc;

use api::{Problem, ProblemCode};
use async_trait::async_trait;
use passthrough::vfio::Container;
use protocol::DeviceBackend;
use services::problem::ToProblem;
use sriov::{
    Bdf, BindError, InventoryError, NetlinkPf, PciDevice, Pf, PfControl, PfError, PreviousBinding, Sysfs,
    Usage, VFIO_PCI, Vf, ViabilityError,
};
use text::chain;
use tracing::Span;

use super::{Facts, FunctionBackend, MachineDevice, PfInterface, Scrub};

/// Opens the control of a PF. It may block.
pub type OpenPf = Arc<dyn Fn(Bdf) -> Result<Box<dyn PfControl>, PfError> + Send + Sync>;

/// The kernel counts PCI domains in a positive `int` (`pci_domain_nr`, linux/pci.h).
const LAST_DOMAIN: u32 = i32::MAX.cast_unsigned();

const FACTS: Facts = Facts {
    needs_root: true,
    needs_locked_memory: true,
    // A function can do DMA, and sends messages to its PF.
    needs_whole_sandbox: true,
    stores_vf_count: false,
    shown_as_simulated: false,
    no_plain_device: None,
    no_port_of_nic: Some("is hardware, and a NIC of a port group needs a VF of a simulated PF (`--sim-pf`)"),
    failure: "reported an unrecoverable error.",
};

/// The PCI functions of the host.
pub struct Hardware {
    sysfs: Sysfs,
    open_pf: OpenPf,
}

impl Hardware {
    /// The functions in `sysfs`. Their PFs are controlled by netlink.
    #[must_use]
    pub fn new(sysfs: Sysfs) -> Self {
        let paths = sysfs.clone();
        Self::with_control(sysfs, Arc::new(move |bdf| Ok(Box::new(NetlinkPf::open(&paths, bdf)?))))
    }

    /// The functions in `sysfs`. `open_pf` opens the control of their PFs.
    #[must_use]
    pub fn with_control(sysfs: Sysfs, open_pf: OpenPf) -> Self {
        Self { sysfs, open_pf }
    }
}

#[async_trait]
impl FunctionBackend for Hardware {
    fn facts(&self) -> &'static Facts {
        &FACTS
    }

    fn owns(&self, bdf: Bdf) -> bool {
        bdf.domain() <= LAST_DOMAIN
    }

    fn has(&self, bdf: Bdf) -> bool {
        self.sysfs.has_device(bdf)
    }

    fn device(&self, bdf: Bdf) -> Result<PciDevice, InventoryError> {
        self.sysfs.device(bdf)
    }

    fn pf(&self, bdf: Bdf) -> Result<Pf, InventoryError> {
        self.sysfs.pf(bdf)
    }

    fn vf(&self, bdf: Bdf) -> Result<Vf, InventoryError> {
        self.sysfs.vf(bdf)
    }

    fn vfs_of(&self, pf: Bdf) -> Result<Vec<Vf>, InventoryError> {
        self.sysfs.vfs_of(pf)
    }

    fn pfs(&self) -> Result<Vec<Pf>, InventoryError> {
        self.sysfs.pfs()
    }

    fn pf_interfaces(&self) -> Result<Vec<PfInterface>, InventoryError> {
        let interface = |pf: Pf| PfInterface {
            bdf: pf.device.bdf,
            name: pf.name(),
            admin_up: pf.interface().is_some_and(|interface| interface.admin_up),
        };
        Ok(self.sysfs.pfs()?.into_iter().map(interface).collect())
    }

    fn pf_by_interface(&self, name: &str) -> Result<Bdf, InventoryError> {
        Ok(self.sysfs.pf_by_name(name)?.device.bdf)
    }

    fn open_pf(&self, bdf: Bdf) -> Result<Box<dyn PfControl>, PfError> {
        (self.open_pf)(bdf)
    }

    async fn set_num_vfs(&self, pf: &Pf, count: u32) -> Result<(), Problem> {
        // No PF can have 65535 VFs, so sysfs refuses a number that does not fit.
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        let (sysfs, bdf, span) = (self.sysfs.clone(), pf.device.bdf, Span::current());
        tokio::task::spawn_blocking(move || span.in_scope(|| sysfs.set_num_vfs(bdf, count, None)))
            .await
            .map_err(|error| Problem::new(ProblemCode::Internal, chain(&error)))?
            .map_err(|error| error.problem())
    }

    fn check_viable(&self, bdf: Bdf, together: &[Bdf]) -> Result<Option<u32>, ViabilityError> {
        self.sysfs.check_viable(bdf, together).map(|group| Some(group.number))
    }

    fn usage(&self, bdf: Bdf) -> Result<Option<Usage>, InventoryError> {
        self.sysfs.usage(bdf)
    }

    fn can_reset(&self, bdf: Bdf) -> bool {
        self.sysfs.can_reset(bdf)
    }

    fn numa_node(&self, bdf: Bdf) -> Result<Option<u16>, InventoryError> {
        self.sysfs.numa_node(bdf)
    }

    fn binding(&self, bdf: Bdf) -> Result<PreviousBinding, BindError> {
        self.sysfs.current_binding(bdf)
    }

    fn bind(&self, bdf: Bdf) -> Result<(), BindError> {
        self.sysfs.bind_vfio(bdf).map(drop)
    }

    fn reset(&self, bdf: Bdf) -> Result<(), String> {
        self.sysfs.reset(bdf).map_err(|error| chain(&error))
    }

    fn machine_device(&self, bdf: Bdf, group: Option<u32>) -> Result<MachineDevice, Problem> {
        let Some(group) = group else {
            let detail = format!("The function {bdf} was claimed without its IOMMU group.");
            return Err(Problem::new(ProblemCode::Internal, detail));
        };
        Ok(MachineDevice { backend: DeviceBackend::Vfio { group }, as_port: None, connection: None })
    }

    fn take_for_scrub(&self, bdf: Bdf) -> Result<bool, BindError> {
        match self.sysfs.current_binding(bdf)?.driver {
            // A VF that the host took away while the guest ran has no driver.
            None => self.bind(bdf).map(|()| true),
            // Another driver than vfio-pci means that the host uses the VF.
            Some(driver) => Ok(driver == VFIO_PCI),
        }
    }

    fn scrub(&self, bdf: Bdf, work: Scrub<'_>) -> Result<(), String> {
        // The container must outlive the VF.
        let container = Container::new(None).map_err(|error| chain(&error))?;
        let vf = container.open(&self.sysfs.device_dir(bdf)).map_err(|error| chain(&error))?;
        work(Arc::new(vf))
    }

    fn restore(&self, bdf: Bdf, before: &PreviousBinding) -> Result<(), BindError> {
        self.sysfs.restore(bdf, before)
    }
}
