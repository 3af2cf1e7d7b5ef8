// SPDX-License-Identifier: Apache-2.0

//! The host's PCI functions, PFs with their interfaces, and VFs.

use std::path::Path;

use thiserror::Error;

use super::{
    Bdf, Sysfs,
    sysfs::{SysfsError, malformed},
};

/// The reason why a function cannot be found or described.
#[derive(Debug, Error)]
pub enum InventoryError {
    /// There is no such PCI function.
    #[error("There is no PCI device {0}: `portcullis vf list` shows the VFs, `lspci -D` all devices")]
    NoDevice(Bdf),
    /// The function is no PF.
    #[error(
        "{0} is not an SR-IOV physical function: it has no sriov_totalvfs (`portcullis pf list` shows all)"
    )]
    NotPf(Bdf),
    /// The function is no VF.
    #[error("{0} is not a virtual function: it has no physfn")]
    NotVf(Bdf),
    /// No PF has an interface of this name.
    #[error("No SR-IOV physical function has an interface \"{0}\": `portcullis pf list` shows them")]
    NoSuchInterface(String),
    /// The PF of a VF does not list it.
    #[error("{pf} does not list {vf} among its VFs: they are being created or removed, try again")]
    Orphan {
        /// The VF.
        vf: Bdf,
        /// The PF named by the VF.
        pf: Bdf,
    },
    /// sysfs cannot be read.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
}

/// A PCI function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciDevice {
    /// Its address.
    pub bdf: Bdf,
    /// Vendor number.
    pub vendor: u16,
    /// Device number.
    pub device: u16,
    /// Class code: class, subclass, programming interface from the high byte of 24 bits down.
    pub class: u32,
    /// The driver that it is bound to.
    pub driver: Option<String>,
    /// The only driver that may bind it, if one is set.
    pub driver_override: Option<String>,
    /// The number of its IOMMU group; `None` where no IOMMU is in use.
    pub iommu_group: Option<u32>,
    /// The names of its network interfaces, sorted.
    pub interfaces: Vec<String>,
}

impl PciDevice {
    /// Whether it is a network controller (class 02).
    pub fn is_network(&self) -> bool {
        self.class >> 16 == 0x02
    }
}

/// A network interface of a PF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its index in netlink. It changes when the driver is bound again.
    pub index: u32,
    /// Whether it is administratively up (`ip link set … up`).
    pub admin_up: bool,
    /// Whether it has a carrier. False while it is down.
    pub carrier: bool,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its MAC address in the kernel's notation; `None` where the kernel shows none.
    pub mac: Option<String>,
}

/// A physical function: an SR-IOV adapter's function that can make VFs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pf {
    /// The PCI function.
    pub device: PciDevice,
    /// Its network interfaces, sorted by name; none without a driver. Most adapters have one interface per PF.
    pub interfaces: Vec<Interface>,
    /// The most VFs that it can have.
    pub total_vfs: u16,
    /// The number of its VFs.
    pub num_vfs: u16,
    /// Whether the host's drivers bind new VFs automatically; `None` on kernels that do not show it.
    pub autoprobe: Option<bool>,
}

impl Pf {
    /// The interface through which VFs are configured: the first one.
    pub fn interface(&self) -> Option<&Interface> {
        self.interfaces.first()
    }

    /// Its name for users: the name of its interface, or its address if it has none.
    pub fn name(&self) -> String {
        self.interface().map_or_else(|| self.device.bdf.to_string(), |i| i.name.clone())
    }

    /// Whether the interface is up and has a carrier.
    pub fn is_up(&self) -> bool {
        self.interface().is_some_and(|i| i.admin_up && i.carrier)
    }
}

/// A virtual function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vf {
    /// The PCI function.
    pub device: PciDevice,
    /// Its PF.
    pub pf: Bdf,
    /// Its number, from the PF's own links, as netlink uses it.
    pub index: u16,
}

impl Sysfs {
    /// Describes one PCI function.
    ///
    /// # Errors
    /// [`InventoryError::NoDevice`], or sysfs is unreadable.
    pub fn device(&self, bdf: Bdf) -> Result<PciDevice, InventoryError> {
        let dir = self.device_dir(bdf);
        let id = |name: &str| match self.number(&dir.join(name))? {
            Some(number) => u16::try_from(number)
                .map_err(|_| malformed(&dir.join(name), &number.to_string(), "a 16-bit number").into()),
            None => Err(InventoryError::NoDevice(bdf)),
        };
        let group = dir.join("iommu_group");
        let iommu_group = match self.link_name(&group)? {
            Some(name) => {
                Some(name.parse().map_err(|_| malformed(&group, &name, "a link to a numbered group"))?)
            }
            None => None,
        };
        Ok(PciDevice {
            bdf,
            vendor: id("vendor")?,
            device: id("device")?,
            class: self.number(&dir.join("class"))?.ok_or(InventoryError::NoDevice(bdf))?,
            driver: self.link_name(&dir.join("driver"))?,
            driver_override: self.driver_override(bdf)?,
            iommu_group,
            interfaces: self.names(&dir.join("net"))?,
        })
    }

    /// The NUMA node of a function. None if it has none, or the kernel does not know it (-1).
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn numa_node(&self, bdf: Bdf) -> Result<Option<u16>, InventoryError> {
        let path = self.device_dir(bdf).join("numa_node");
        match self.text(&path)?.as_deref() {
            None | Some("-1") => Ok(None),
            Some(node) => {
                node.parse().map(Some).map_err(|_| malformed(&path, node, "a node's number").into())
            }
        }
    }

    /// The name in `driver_override`. The kernel prints "(null)" for none.
    pub(crate) fn driver_override(&self, bdf: Bdf) -> Result<Option<String>, SysfsError> {
        let text = self.text(&self.device_dir(bdf).join("driver_override"))?;
        Ok(text.filter(|name| !name.is_empty() && name != "(null)"))
    }

    /// All PCI functions of the host, by address.
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn devices(&self) -> Result<Vec<PciDevice>, InventoryError> {
        self.all(Self::device)
    }

    /// All PFs of the host, by address.
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn pfs(&self) -> Result<Vec<Pf>, InventoryError> {
        self.all(Self::pf)
    }

    /// All VFs of the host, by address.
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn vfs(&self) -> Result<Vec<Vf>, InventoryError> {
        self.all(Self::vf)
    }

    /// Describes all functions that `describe` accepts. Other functions, and devices that vanish meanwhile, are left
    /// out.
    fn all<T>(
        &self,
        describe: fn(&Self, Bdf) -> Result<T, InventoryError>,
    ) -> Result<Vec<T>, InventoryError> {
        let mut bdfs: Vec<Bdf> =
            self.names(&self.path("bus/pci/devices"))?.iter().filter_map(|name| name.parse().ok()).collect();
        bdfs.sort_unstable();
        let mut found = Vec::new();
        for bdf in bdfs {
            match describe(self, bdf) {
                Ok(thing) => found.push(thing),
                Err(
                    InventoryError::NoDevice(_)
                    | InventoryError::NotPf(_)
                    | InventoryError::NotVf(_)
                    | InventoryError::Orphan { .. },
                ) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(found)
    }

    /// Describes a PF.
    ///
    /// # Errors
    /// [`InventoryError::NotPf`], [`InventoryError::NoDevice`], or sysfs is unreadable.
    pub fn pf(&self, bdf: Bdf) -> Result<Pf, InventoryError> {
        let dir = self.device_dir(bdf);
        let count = |name: &str| match self.number(&dir.join(name))? {
            Some(number) => u16::try_from(number)
                .map_err(|_| malformed(&dir.join(name), &number.to_string(), "a number of VFs").into()),
            None if self.has_device(bdf) => Err(InventoryError::NotPf(bdf)),
            None => Err(InventoryError::NoDevice(bdf)),
        };
        let total_vfs = count("sriov_totalvfs")?;
        let num_vfs = count("sriov_numvfs")?;
        let device = self.device(bdf)?;
        let mut interfaces = Vec::new();
        for name in &device.interfaces {
            interfaces.extend(self.interface(bdf, name)?);
        }
        let autoprobe = self.flag(&dir.join("sriov_drivers_autoprobe"))?;
        Ok(Pf { device, interfaces, total_vfs, num_vfs, autoprobe })
    }

    /// `None` if the interface vanished meanwhile, or belongs to a VF.
    fn interface(&self, bdf: Bdf, name: &str) -> Result<Option<Interface>, SysfsError> {
        const IFF_UP: u32 = 1;
        let dir = self.device_dir(bdf).join("net").join(name);
        let (Some(index), Some(flags)) =
            (self.number(&dir.join("ifindex"))?, self.number(&dir.join("flags"))?)
        else {
            return Ok(None);
        };
        if self.is_representor(&dir) {
            return Ok(None);
        }
        // Reading the carrier of an interface that is down fails with EINVAL.
        let carrier = matches!(self.flag(&dir.join("carrier")), Ok(Some(true)));
        Ok(Some(Interface {
            name: name.to_owned(),
            index,
            admin_up: flags & IFF_UP != 0,
            carrier,
            mtu: self.number(&dir.join("mtu"))?.unwrap_or(0),
            // Nothing depends on it, so an unreadable address is no error.
            mac: self.text(&dir.join("address")).ok().flatten().map(|text| text.trim().to_owned()),
        }))
    }

    /// The name and index of the interface through which the PF's VFs are configured. Reads nothing else.
    pub(crate) fn first_interface(&self, bdf: Bdf) -> Result<Option<(String, u32)>, SysfsError> {
        let net = self.device_dir(bdf).join("net");
        for name in self.names(&net)? {
            if !self.is_representor(&net.join(&name))
                && let Some(index) = self.number(&net.join(&name).join("ifindex"))?
            {
                return Ok(Some((name, index)));
            }
        }
        Ok(None)
    }

    /// Switchdev adapters have their VFs' representors ("pf0vf1") below the PF too. Most drivers have no such name, and
    /// reading it fails.
    fn is_representor(&self, interface: &Path) -> bool {
        let port = self.text(&interface.join("phys_port_name")).ok().flatten().unwrap_or_default();
        port.contains("vf") || port.contains("sf")
    }

    /// The PF with an interface of this name, or with this address.
    ///
    /// # Errors
    /// [`InventoryError::NoSuchInterface`], [`InventoryError::NotPf`], or sysfs is unreadable.
    pub fn pf_by_name(&self, name: &str) -> Result<Pf, InventoryError> {
        if let Ok(bdf) = name.parse() {
            return self.pf(bdf);
        }
        self.pfs()?
            .into_iter()
            .find(|pf| pf.device.interfaces.iter().any(|interface| interface == name))
            .ok_or_else(|| InventoryError::NoSuchInterface(name.chars().take(40).collect()))
    }

    /// Describes a VF. Its number comes only from the links of its PF: a wrong number would mean configuring another
    /// tenant's VF.
    ///
    /// # Errors
    /// [`InventoryError::NotVf`], [`InventoryError::NoDevice`], [`InventoryError::Orphan`], or sysfs is unreadable.
    pub fn vf(&self, bdf: Bdf) -> Result<Vf, InventoryError> {
        let physfn = self.device_dir(bdf).join("physfn");
        let Some(name) = self.link_name(&physfn)? else {
            return Err(match self.has_device(bdf) {
                true => InventoryError::NotVf(bdf),
                false => InventoryError::NoDevice(bdf),
            });
        };
        let pf: Bdf = name.parse().map_err(|_| malformed(&physfn, &name, "a link to a PCI device"))?;
        let index = self
            .vf_links(pf)?
            .into_iter()
            .find_map(|(index, vf)| (vf == bdf).then_some(index))
            .ok_or(InventoryError::Orphan { vf: bdf, pf })?;
        Ok(Vf { device: self.device(bdf)?, pf, index })
    }

    /// The VFs of a PF by their number.
    ///
    /// # Errors
    /// [`InventoryError::NotPf`], [`InventoryError::NoDevice`], or sysfs is unreadable.
    pub fn vfs_of(&self, pf: Bdf) -> Result<Vec<Vf>, InventoryError> {
        self.pf(pf)?;
        let mut vfs = Vec::new();
        for (index, vf) in self.vf_links(pf)? {
            match self.device(vf) {
                Ok(device) => vfs.push(Vf { device, pf, index }),
                Err(InventoryError::NoDevice(_)) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(vfs)
    }

    /// The PF's `virtfnN` links: number and target, sorted.
    fn vf_links(&self, pf: Bdf) -> Result<Vec<(u16, Bdf)>, SysfsError> {
        let dir = self.device_dir(pf);
        let mut links = Vec::new();
        for name in self.names(&dir)? {
            let Some(index) = name.strip_prefix("virtfn").and_then(|digits| digits.parse().ok()) else {
                continue;
            };
            let path = dir.join(&name);
            let Some(target) = self.link_name(&path)? else { continue };
            let vf = target.parse().map_err(|_| malformed(&path, &target, "a link to a PCI device"))?;
            links.push((index, vf));
        }
        links.sort_unstable();
        Ok(links)
    }
}
