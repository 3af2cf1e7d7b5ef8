// SPDX-License-Identifier: Apache-2.0

//! Who else uses a function of the host, found out without touching it.

use std::{fmt, fs};

use super::{
    Bdf, InventoryError, Sysfs, VFIO_PCI,
    sysfs::{SysfsError, malformed},
};

/// Drivers that a function may have without being used by anybody.
const IDLE_DRIVERS: [&str; 2] = [VFIO_PCI, "pci-stub"];

/// A use of a function that is not a VM's of this agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Usage {
    /// An interface of the host that is up.
    Interface(String),
    /// A driver without an interface in sight: the interface is in another network namespace (a container's), or the driver
    /// serves a program of user space (DPDK).
    Driver(String),
    /// A process has the function's IOMMU group open through VFIO: QEMU, another agent, a VM that this agent has forgotten.
    Vfio {
        /// The number of the group.
        group: u32,
    },
}

impl Usage {
    /// Whether the host's administrator sees the use, and can mean to end it by naming the function.
    #[must_use]
    pub fn is_visible(&self) -> bool {
        matches!(self, Self::Interface(_))
    }

    /// How the use is ended, for an error.
    #[must_use]
    pub fn cure(&self) -> &'static str {
        match self {
            Self::Interface(_) => "take the interface down",
            Self::Driver(_) => "end the container or program that has it",
            Self::Vfio { .. } => "end that process",
        }
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interface(name) => write!(f, "the host's interface {name}, which is up"),
            Self::Driver(driver) => {
                write!(
                    f,
                    "the driver {driver}, whose interface is in another network namespace or in a program"
                )
            }
            Self::Vfio { group } => write!(f, "another process, through VFIO group {group}"),
        }
    }
}

impl Sysfs {
    /// Who uses a network function; None if nobody does. A VM of this agent counts as well: ask only for functions that none of
    /// them has, and while none of them is about to open its own. The group is opened for a moment.
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn usage(&self, bdf: Bdf) -> Result<Option<Usage>, InventoryError> {
        const IFF_UP: u64 = 1;
        let device = self.device(bdf)?;
        let Some(driver) = device.driver else { return Ok(None) };
        if driver.contains("vfio") {
            return Ok(self.open_group(bdf)?.map(|group| Usage::Vfio { group }));
        }
        let net = self.device_dir(bdf).join("net");
        for interface in &device.interfaces {
            // An interface that vanishes meanwhile is on its way to somewhere else.
            let flags = self.number(&net.join(interface).join("flags"))?;
            if flags.is_none_or(|flags| u64::from(flags) & IFF_UP != 0) {
                return Ok(Some(Usage::Interface(interface.clone())));
            }
        }
        let unseen = device.interfaces.is_empty() && !IDLE_DRIVERS.contains(&driver.as_str());
        Ok(unseen.then_some(Usage::Driver(driver)))
    }

    /// The group of a function if a process has it open. A group can be open once.
    fn open_group(&self, bdf: Bdf) -> Result<Option<u32>, SysfsError> {
        let link = self.device_dir(bdf).join("iommu_group");
        let Some(name) = self.link_name(&link)? else { return Ok(None) };
        let opened = fs::OpenOptions::new().read(true).write(true).open(self.group_node(&name));
        if !opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)) {
            return Ok(None);
        }
        name.parse().map(Some).map_err(|_| malformed(&link, &name, "a link to a numbered group"))
    }
}
