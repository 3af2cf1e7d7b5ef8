// SPDX-License-Identifier: Apache-2.0

//! Detection of other users of a host's function, without touching the function.

use std::{fmt, fs, os::unix::fs::OpenOptionsExt, path::Path};

use super::{
    Bdf, InventoryError, Sysfs, VFIO_PCI,
    sysfs::{SysfsError, malformed},
};

/// Drivers of a function that is not in use.
const IDLE_DRIVERS: [&str; 2] = [VFIO_PCI, "pci-stub"];

/// A use of a function by anything but a VM of this agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Usage {
    /// An interface of the host that is up.
    Interface(String),
    /// An interface of the host that is a port of a bridge, bond or other interface.
    Enslaved {
        /// The interface.
        interface: String,
        /// The interface that has it.
        master: String,
    },
    /// A block device with a file system, swap space or volume in use.
    Disk(String),
    /// A driver without a visible interface: the interface is in another network namespace (a container's), or the
    /// driver serves a program of user space (DPDK).
    Driver(String),
    /// A process has the function's IOMMU group open through VFIO: QEMU, another agent, a VM that this agent has forgotten.
    Vfio {
        /// The number of the group.
        group: u32,
    },
    /// A process has the simulated VF: the process of a VM that is missing in the agent's database.
    Simulated,
}

impl Usage {
    /// The way to end the use, for an error.
    #[must_use]
    pub fn cure(&self) -> &'static str {
        match self {
            Self::Interface(_) => "take the interface down",
            Self::Enslaved { .. } => "remove the interface from that one",
            Self::Disk(_) => "unmount it, and stop the swap space or volume on it",
            Self::Driver(_) => "end the container or program that has it",
            Self::Vfio { .. } => "end that process",
            Self::Simulated => "end that process; the agent named it in its log at its start",
        }
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interface(name) => write!(f, "the host's interface {name}, which is up"),
            Self::Enslaved { interface, master } => {
                write!(f, "the host's interface {interface}, which belongs to {master}")
            }
            Self::Disk(name) => {
                write!(f, "the host's block device {name}, which is mounted or otherwise in use")
            }
            Self::Driver(driver) => {
                write!(
                    f,
                    "the driver {driver}, whose interface is in another network namespace or in a program"
                )
            }
            Self::Simulated => f.write_str("the process of a VM that the agent does not know"),
            Self::Vfio { group } => write!(f, "another process, through VFIO group {group}"),
        }
    }
}

impl Sysfs {
    /// The user of a function; None if there is none. A VM of this agent counts as well: call this only for functions
    /// that none of them has, and while none of them is about to open its own.
    ///
    /// # Errors
    /// sysfs is unreadable.
    pub fn usage(&self, bdf: Bdf) -> Result<Option<Usage>, InventoryError> {
        const IFF_UP: u64 = 1;
        let device = self.device(bdf)?;
        let Some(driver) = device.driver.clone() else { return Ok(None) };
        if driver.contains("vfio") {
            return Ok(self.group_in_use(bdf)?.map(|group| Usage::Vfio { group }));
        }
        let net = self.device_dir(bdf).join("net");
        for interface in &device.interfaces {
            // An interface that vanishes meanwhile is moving to another namespace.
            let flags = self.number(&net.join(interface).join("flags"))?;
            if flags.is_none_or(|flags| u64::from(flags) & IFF_UP != 0) {
                return Ok(Some(Usage::Interface(interface.clone())));
            }
            if let Some(master) = self.link_name(&net.join(interface).join("master"))? {
                return Ok(Some(Usage::Enslaved { interface: interface.clone(), master }));
            }
        }
        if let Some(disk) = self.disk_in_use(bdf, is_claimed)? {
            return Ok(Some(Usage::Disk(disk)));
        }
        let is_idle = !device.is_network() || IDLE_DRIVERS.contains(&driver.as_str());
        let unseen = device.interfaces.is_empty() && !is_idle;
        Ok(unseen.then_some(Usage::Driver(driver)))
    }

    /// A block device behind a function, at any distance, that the kernel or a program uses. `is_claimed` checks a
    /// device node.
    fn disk_in_use(
        &self,
        bdf: Bdf,
        is_claimed: impl Fn(&Path) -> bool,
    ) -> Result<Option<String>, SysfsError> {
        let (class, function) = (self.path("class/block"), bdf.to_string());
        for name in self.names(&class)? {
            // A device that vanishes meanwhile is not in use.
            let Ok(place) = fs::canonicalize(class.join(&name)) else { continue };
            if !place.components().any(|part| part.as_os_str() == function.as_str()) {
                continue;
            }
            let holders = self.names(&place.join("holders"))?;
            let node = self.node(&multipath(&name).unwrap_or_else(|| name.clone()));
            if !holders.is_empty() || is_claimed(&node) {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// The group of a function if a process has a function of it open through VFIO.
    ///
    /// VFIO enables a function while it is open (`vfio_pci_core_enable`), which sysfs shows. The group itself can be open only
    /// once, so an attempt to open it would fail another VMM that opens it at that moment. Only if a function is enabled does
    /// the attempt tell a user from a former driver that has left the function enabled.
    fn group_in_use(&self, bdf: Bdf) -> Result<Option<u32>, SysfsError> {
        let link = self.device_dir(bdf).join("iommu_group");
        let Some(name) = self.link_name(&link)? else { return Ok(None) };
        let mut is_enabled = false;
        for member in self.names(&link.join("devices"))? {
            let member = self.path("bus/pci/devices").join(member);
            let has_vfio =
                self.link_name(&member.join("driver"))?.is_some_and(|driver| driver.contains("vfio"));
            is_enabled |= has_vfio && self.number(&member.join("enable"))?.is_some_and(|count| count > 0);
        }
        if !is_enabled {
            return Ok(None);
        }
        let opened = fs::OpenOptions::new().read(true).write(true).open(self.group_node(&name));
        if !opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)) {
            return Ok(None);
        }
        name.parse().map(Some).map_err(|_| malformed(&link, &name, "a link to a numbered group"))
    }
}

/// Whether a block device is in use: mounted in any namespace, swap space, or part of a volume. An exclusive open
/// conflicts with all of them, and with a use of a partition (`O_EXCL`, open(2)).
fn is_claimed(node: &Path) -> bool {
    let flags = libc::O_EXCL | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let opened = fs::OpenOptions::new().read(true).custom_flags(flags).open(node);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

/// The disk behind a path name: NVMe shows `nvme0c1n2` behind a function when several paths may lead to `nvme0n2`.
fn multipath(name: &str) -> Option<String> {
    let (subsystem, rest) = name.strip_prefix("nvme")?.split_once('c')?;
    let (controller, namespace) = rest.split_once('n')?;
    let numbers = [subsystem, controller].iter().all(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    numbers.then(|| format!("nvme{subsystem}n{namespace}"))
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, os::unix::fs::symlink};

    use super::*;
    use crate::fake::FakeSysfs;

    const NVME: Bdf = Bdf::new(0, 3, 0, 0).unwrap();

    /// Makes a block device behind the function.
    fn add_disk(root: &Path, bdf: Bdf, name: &str, holders: &[&str]) {
        let place = root.join(format!("bus/pci/devices/{bdf}/nvme/nvme0/{name}"));
        fs::create_dir_all(place.join("holders")).unwrap();
        for holder in holders {
            fs::create_dir(place.join("holders").join(holder)).unwrap();
        }
        fs::create_dir_all(root.join("class/block")).unwrap();
        symlink(place, root.join("class/block").join(name)).unwrap();
    }

    #[test]
    fn a_disk_that_the_kernel_claims_is_in_use() {
        let root = tempfile::tempdir().unwrap();
        let fake = FakeSysfs::new(root.path());
        let other = Bdf::new(0, 4, 0, 0).unwrap();
        for bdf in [NVME, other] {
            fake.add_device(bdf, (0x1b36, 0x0010), 0x01_0802, Some(7), Some("nvme"));
        }
        add_disk(root.path(), NVME, "nvme0n1", &[]);
        add_disk(root.path(), NVME, "nvme0c3n2", &[]);
        let seen = RefCell::new(Vec::new());
        let look = |claimed: &'static str| {
            let is_claimed = |node: &Path| {
                let name = node.file_name().unwrap().to_str().unwrap().to_owned();
                seen.borrow_mut().push(name.clone());
                name == claimed
            };
            fake.sysfs().disk_in_use(NVME, is_claimed).unwrap()
        };
        assert_eq!(look("none"), None);
        assert_eq!(*seen.borrow(), ["nvme0n2", "nvme0n1"], "the head of a multipath disk has the claims");
        assert_eq!(look("nvme0n1").as_deref(), Some("nvme0n1"));
        assert_eq!(look("nvme0n2").as_deref(), Some("nvme0c3n2"));
        assert_eq!(fake.sysfs().usage(NVME).unwrap(), None);
        // A volume of device-mapper, on a partition.
        add_disk(root.path(), NVME, "nvme0n1p2", &["dm-0"]);
        assert_eq!(fake.sysfs().usage(NVME).unwrap(), Some(Usage::Disk("nvme0n1p2".into())));
        assert_eq!(fake.sysfs().usage(other).unwrap(), None, "it is behind another function");
    }

    /// Another VMM that opens the group of an idle function at the same moment would fail.
    #[test]
    fn the_group_of_an_idle_function_is_not_opened() {
        use rustix::fs::inotify;

        let root = tempfile::tempdir().unwrap();
        let fake = FakeSysfs::new(root.path());
        fake.add_device(NVME, (0x1b36, 0x0010), 0x01_0802, Some(7), Some("vfio-pci"));
        let sysfs = fake.sysfs();
        let node = sysfs.group_node("7");
        fs::create_dir_all(node.parent().unwrap()).unwrap();
        fs::write(&node, "").unwrap();
        let watched = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&watched, &node, inotify::WatchFlags::OPEN).unwrap();
        let was_opened = || rustix::io::read(&watched, &mut [0; 64]).is_ok();
        let enable = sysfs.device_dir(NVME).join("enable");
        for (count, opened) in [("0", false), ("1", true)] {
            fs::write(&enable, count).unwrap();
            // No device of VFIO, so an attempt never finds it busy.
            assert_eq!(sysfs.usage(NVME).unwrap(), None);
            assert_eq!(was_opened(), opened, "enabled {count} times");
        }
    }

    #[test]
    fn an_interface_that_is_up_or_has_a_master_is_in_use() {
        let root = tempfile::tempdir().unwrap();
        let fake = FakeSysfs::new(root.path());
        let nic = Bdf::new(0, 1, 0, 0).unwrap();
        fake.add_igb(nic, "eth0");
        let usage = || fake.sysfs().usage(nic).unwrap();
        assert_eq!(usage(), Some(Usage::Interface("eth0".into())));
        fake.set_interface_up(nic, "eth0", false);
        assert_eq!(usage(), None);
        let bond = root.path().join("class/net/bond0");
        fs::create_dir_all(&bond).unwrap();
        symlink(bond, root.path().join(format!("bus/pci/devices/{nic}/net/eth0/master"))).unwrap();
        let enslaved = Usage::Enslaved { interface: "eth0".into(), master: "bond0".into() };
        assert_eq!(usage(), Some(enslaved));
    }
}
