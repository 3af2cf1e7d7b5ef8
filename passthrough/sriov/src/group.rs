// SPDX-License-Identifier: Apache-2.0

//! IOMMU groups: whether a group can be given to a guest, and otherwise the members that prevent it.

use std::{collections::BTreeSet, fmt};

use thiserror::Error;

use super::{
    Bdf, InventoryError, Sysfs,
    sysfs::{SysfsError, malformed},
};

/// Drivers that do no DMA on behalf of the host (`driver_managed_dma` in the kernel). User space can own a group if
/// each of its other members has one of these, or none. VFIO's variant drivers have "vfio" in their names.
const DRIVERS_WITHOUT_DMA: [&str; 2] = ["pcieport", "pci-stub"];

/// One device of an IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupMember {
    /// Its name in sysfs: a PCI address, or something else for devices that are not on PCI.
    pub name: String,
    /// The driver that it is bound to.
    pub driver: Option<String>,
}

impl GroupMember {
    /// Its PCI address.
    pub fn bdf(&self) -> Option<Bdf> {
        self.name.parse().ok()
    }

    /// Whether the kernel lets user space own the group with this member in its present state.
    pub fn is_harmless(&self) -> bool {
        self.driver
            .as_deref()
            .is_none_or(|driver| driver.contains("vfio") || DRIVERS_WITHOUT_DMA.contains(&driver))
    }
}

impl fmt::Display for GroupMember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.driver {
            Some(driver) => write!(f, "{} ({driver})", self.name),
            None => write!(f, "{} (no driver)", self.name),
        }
    }
}

/// Devices that the IOMMU cannot distinguish: they can only be assigned together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IommuGroup {
    /// Its number, as in `/dev/vfio/NUMBER`.
    pub number: u32,
    /// Its members, by name.
    pub members: Vec<GroupMember>,
}

/// Whether the IOMMU checks interrupts of devices. Without the check, a device in a guest can raise any interrupt of
/// the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptRemapping {
    /// In use.
    On,
    /// Not in use.
    Off,
    /// The kernel does not show it.
    Unknown,
}

/// The reason why a device cannot be given to a guest.
#[derive(Debug, Error)]
pub enum ViabilityError {
    /// No IOMMU stands between the device and memory.
    #[error(
        "{0} is in no IOMMU group, so the IOMMU is off: enable it in the firmware (VT-d, AMD-Vi) and, on Intel, boot the \
         host with intel_iommu=on"
    )]
    NoIommu(Bdf),
    /// The host uses other members of the group.
    #[error(
        "IOMMU group {group} of {bdf} is not viable: {} used by the host; its members are {}. Bind the used \
         ones to vfio-pci or to no driver, or put the adapter into a slot that has a group of its own",
        in_the_way(blocking),
        list(members)
    )]
    NotViable {
        /// The requested device.
        bdf: Bdf,
        /// The number of its group.
        group: u32,
        /// All members of the group.
        members: Vec<GroupMember>,
        /// The members with drivers that prevent it.
        blocking: Vec<GroupMember>,
    },
    /// The host's interrupts are not protected.
    #[error(
        "Interrupt remapping is off, so VFIO refuses {0}: enable it in the firmware, or, where all guests are trusted, \
         allow it with `echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts`"
    )]
    InterruptRemappingOff(Bdf),
    /// The device is not there.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// sysfs cannot be read.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
}

fn list(members: &[GroupMember]) -> String {
    members.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn in_the_way(blocking: &[GroupMember]) -> String {
    format!("{} {}", list(blocking), if blocking.len() == 1 { "is" } else { "are" })
}

impl Sysfs {
    /// The IOMMU group of a device with all its members; `None` where there is no IOMMU.
    ///
    /// # Errors
    /// The device does not exist, or sysfs is unreadable.
    pub fn iommu_group(&self, bdf: Bdf) -> Result<Option<IommuGroup>, InventoryError> {
        if !self.has_device(bdf) {
            return Err(InventoryError::NoDevice(bdf));
        }
        let link = self.device_dir(bdf).join("iommu_group");
        let Some(name) = self.link_name(&link)? else { return Ok(None) };
        let number = name.parse().map_err(|_| malformed(&link, &name, "a link to a numbered group"))?;
        let devices = link.join("devices");
        let mut members = Vec::new();
        for name in self.names(&devices)? {
            let driver = self.link_name(&devices.join(&name).join("driver"))?;
            members.push(GroupMember { name, driver });
        }
        Ok(Some(IommuGroup { number, members }))
    }

    /// Checks, before any change, that VFIO will hand out the device: it has an IOMMU group, and no driver of the host
    /// uses another member. `together` are all devices of the same VM, which will be bound to vfio-pci as well (the
    /// device itself need not be among them).
    ///
    /// The rule is the kernel's (`iommu_group_claim_dma_owner`): a driver in the group that may do DMA for the host
    /// prevents it.
    ///
    /// # Errors
    /// The reason, with the cure.
    pub fn check_viable(&self, bdf: Bdf, together: &[Bdf]) -> Result<IommuGroup, ViabilityError> {
        let group = self.iommu_group(bdf)?.ok_or(ViabilityError::NoIommu(bdf))?;
        let given: BTreeSet<Bdf> = together.iter().copied().chain([bdf]).collect();
        let blocking: Vec<_> = group
            .members
            .iter()
            .filter(|member| !member.is_harmless() && member.bdf().is_none_or(|b| !given.contains(&b)))
            .cloned()
            .collect();
        if !blocking.is_empty() {
            return Err(ViabilityError::NotViable {
                bdf,
                group: group.number,
                members: group.members,
                blocking,
            });
        }
        if self.interrupt_remapping()? == InterruptRemapping::Off && !self.unsafe_interrupts_allowed()? {
            return Err(ViabilityError::InterruptRemappingOff(bdf));
        }
        Ok(group)
    }

    /// Whether interrupt remapping is in use, as far as sysfs shows it: the names of x86 interrupt controllers then
    /// begin with "IR-". Without message-signalled interrupts in use, or on other architectures, it is unknown, and
    /// VFIO decides.
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn interrupt_remapping(&self) -> Result<InterruptRemapping, SysfsError> {
        let irqs = self.path("kernel/irq");
        let mut plain = false;
        for irq in self.names(&irqs)? {
            match self.text(&irqs.join(irq).join("chip_name"))? {
                Some(chip) if chip.starts_with("IR-") => return Ok(InterruptRemapping::On),
                Some(chip) if chip.starts_with("PCI-MSI") => plain = true,
                _ => {}
            }
        }
        Ok(if plain { InterruptRemapping::Off } else { InterruptRemapping::Unknown })
    }

    /// Whether the administrator has allowed devices without interrupt remapping.
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn unsafe_interrupts_allowed(&self) -> Result<bool, SysfsError> {
        let parameters = self.path("module/vfio_iommu_type1/parameters");
        Ok(self.flag(&parameters.join("allow_unsafe_interrupts"))?.unwrap_or(false))
    }
}
