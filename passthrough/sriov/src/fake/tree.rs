// SPDX-License-Identifier: Apache-2.0

//! A directory that looks and reacts like the kernel's sysfs.

use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{AttributeWriter, Bdf, Sysfs};

/// A fake sysfs below a directory that the test owns. It reacts like the kernel to writes through
/// [`sysfs`](Self::sysfs).
#[derive(Clone)]
pub struct FakeSysfs {
    kernel: Arc<Kernel>,
}

struct Kernel {
    root: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The driver that binds a device without an override.
    natives: BTreeMap<Bdf, String>,
    /// Device number and driver of the future VFs of a PF.
    vf_kinds: BTreeMap<Bdf, (u16, String)>,
    /// Answers to the next writes to attributes of these names.
    failures: VecDeque<(String, i32)>,
    /// The writes: the path below the root and the value.
    writes: Vec<(String, String)>,
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl FakeSysfs {
    /// An empty machine below `root`, which must exist, with vfio-pci loaded and interrupt remapping on.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        let kernel = Kernel { root: root.into(), state: Mutex::default() };
        fs::create_dir_all(kernel.path("bus/pci/devices")).unwrap();
        kernel.file("bus/pci/drivers_probe", "");
        let fake = Self { kernel: Arc::new(kernel) };
        fake.load_driver("vfio-pci");
        fake.set_interrupt_chip("IR-PCI-MSI-0000:00:1f.2");
        fake
    }

    /// The tree for the code under test.
    pub fn sysfs(&self) -> Sysfs {
        Sysfs::with_writer(self.kernel.root.clone(), self.kernel.clone())
    }

    /// Adds a driver.
    pub fn load_driver(&self, driver: &str) {
        self.kernel.file(&format!("bus/pci/drivers/{driver}/unbind"), "");
    }

    /// Removes a driver, as if its module were not loaded.
    pub fn unload_driver(&self, driver: &str) {
        fs::remove_dir_all(self.kernel.path(&format!("bus/pci/drivers/{driver}"))).unwrap();
    }

    /// Sets the name of the one interrupt's controller.
    pub fn set_interrupt_chip(&self, chip: &str) {
        self.kernel.file("kernel/irq/24/chip_name", &format!("{chip}\n"));
    }

    /// Adds a PCI function: (vendor, device), class, its IOMMU group, its driver. The driver is loaded and bound.
    pub fn add_device(&self, bdf: Bdf, id: (u16, u16), class: u32, group: Option<u32>, driver: Option<&str>) {
        if let Some(driver) = driver {
            self.load_driver(driver);
            self.kernel.state().natives.insert(bdf, driver.to_owned());
        }
        self.kernel.add_device(bdf, id, class, group);
        self.kernel.probe(bdf);
    }

    /// Adds an 82576 PF with igb, an interface that is up, and room for 7 igbvf VFs, alone in group 1.
    pub fn add_igb(&self, bdf: Bdf, interface: &str) {
        self.add_device(bdf, (0x8086, 0x10c9), 0x02_0000, Some(1), Some("igb"));
        self.load_driver("igbvf");
        let dir = format!("bus/pci/devices/{bdf}");
        for (name, value) in
            [("sriov_totalvfs", "7\n"), ("sriov_numvfs", "0\n"), ("sriov_drivers_autoprobe", "1\n")]
        {
            self.kernel.file(&format!("{dir}/{name}"), value);
        }
        for (name, value) in [
            ("ifindex", "2\n"),
            ("mtu", "1500\n"),
            ("flags", "0x1003\n"),
            ("carrier", "1\n"),
            ("address", "52:54:00:12:34:56\n"),
        ] {
            self.kernel.file(&format!("{dir}/net/{interface}/{name}"), value);
        }
        self.kernel.state().vf_kinds.insert(bdf, (0x10ca, "igbvf".to_owned()));
    }

    /// Takes the interface down or up.
    pub fn set_interface_up(&self, bdf: Bdf, interface: &str, up: bool) {
        let dir = format!("bus/pci/devices/{bdf}/net/{interface}");
        self.kernel.file(&format!("{dir}/flags"), if up { "0x1003\n" } else { "0x1002\n" });
        self.kernel.file(&format!("{dir}/carrier"), if up { "1\n" } else { "0\n" });
    }

    /// Sets the NUMA node of a function: -1 for none.
    pub fn set_numa_node(&self, bdf: Bdf, node: i32) {
        self.kernel.file(&format!("bus/pci/devices/{bdf}/numa_node"), &format!("{node}\n"));
    }

    /// Renames the interface of a function.
    pub fn rename_interface(&self, bdf: Bdf, from: &str, to: &str) {
        let net = self.kernel.device(bdf).join("net");
        fs::rename(net.join(from), net.join(to)).unwrap();
    }

    /// Moves the interfaces of a function to another network namespace: its driver stays, and they disappear.
    pub fn hide_interfaces(&self, bdf: Bdf) {
        let net = self.kernel.device(bdf).join("net");
        fs::remove_dir_all(&net).unwrap();
        fs::create_dir(net).unwrap();
    }

    /// Removes a device, as when a VF's PF loses its VFs.
    pub fn remove_device(&self, bdf: Bdf) {
        self.kernel.remove_device(bdf);
    }

    /// The next write to an attribute of this name fails with this error number.
    pub fn fail_next(&self, attribute: &str, number: i32) {
        self.kernel.state().failures.push_back((attribute.to_owned(), number));
    }

    /// The writes since the last call: paths below the root, and values.
    pub fn take_writes(&self) -> Vec<(String, String)> {
        std::mem::take(&mut self.kernel.state().writes)
    }
}

impl Kernel {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    fn device(&self, bdf: Bdf) -> PathBuf {
        self.path("bus/pci/devices").join(bdf.to_string())
    }

    fn file(&self, relative: &str, value: &str) {
        let path = self.path(relative);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, value).unwrap();
    }

    fn number(&self, path: &Path) -> u32 {
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }

    fn driver(&self, bdf: Bdf) -> Option<String> {
        Some(fs::read_link(self.device(bdf).join("driver")).ok()?.file_name()?.to_str()?.to_owned())
    }

    fn add_device(&self, bdf: Bdf, id: (u16, u16), class: u32, group: Option<u32>) {
        let dir = format!("bus/pci/devices/{bdf}");
        for (name, value) in [
            ("vendor", format!("{:#06x}\n", id.0)),
            ("device", format!("{:#06x}\n", id.1)),
            ("class", format!("{class:#08x}\n")),
            ("driver_override", "(null)\n".to_owned()),
            ("reset", String::new()),
        ] {
            self.file(&format!("{dir}/{name}"), &value);
        }
        if let Some(group) = group {
            let members = self.path(&format!("kernel/iommu_groups/{group}/devices"));
            fs::create_dir_all(&members).unwrap();
            symlink(self.device(bdf), members.join(bdf.to_string())).unwrap();
            symlink(members.parent().unwrap(), self.device(bdf).join("iommu_group")).unwrap();
        }
    }

    fn remove_device(&self, bdf: Bdf) {
        if let Ok(group) = fs::read_link(self.device(bdf).join("iommu_group")) {
            fs::remove_file(group.join("devices").join(bdf.to_string())).unwrap();
        }
        fs::remove_dir_all(self.device(bdf)).unwrap();
    }

    /// Finds a driver for a device without one, as the kernel does.
    fn probe(&self, bdf: Bdf) {
        if self.driver(bdf).is_some() {
            return;
        }
        let chosen = fs::read_to_string(self.device(bdf).join("driver_override")).unwrap();
        let driver = match chosen.trim() {
            "" | "(null)" => {
                let autoprobe = self.device(bdf).join("physfn/sriov_drivers_autoprobe");
                if autoprobe.exists() && self.number(&autoprobe) == 0 {
                    return;
                }
                self.state().natives.get(&bdf).cloned()
            }
            name => Some(name.to_owned()),
        };
        let Some(driver) = driver else { return };
        let dir = self.path(&format!("bus/pci/drivers/{driver}"));
        if !dir.exists() {
            return;
        }
        symlink(dir, self.device(bdf).join("driver")).unwrap();
        // A VF's own driver makes an interface, which is down at first.
        if self.device(bdf).join("physfn").exists() && self.state().natives.get(&bdf) == Some(&driver) {
            let net = format!("bus/pci/devices/{bdf}/net/vf{}-{}", bdf.device(), bdf.function());
            self.file(&format!("{net}/ifindex"), "9\n");
            self.file(&format!("{net}/flags"), "0x1002\n");
        }
    }

    fn set_num_vfs(&self, pf: Bdf, count: u32) -> io::Result<()> {
        let dir = self.device(pf);
        let (total, current) =
            (self.number(&dir.join("sriov_totalvfs")), self.number(&dir.join("sriov_numvfs")));
        if count > total {
            return Err(errno(libc::ERANGE));
        }
        if self.driver(pf).is_none() {
            return Err(errno(libc::ENOENT));
        }
        if count != 0 && current != 0 {
            return Err(errno(libc::EBUSY));
        }
        fs::write(dir.join("sriov_numvfs"), format!("{count}\n"))?;
        let (device, driver) = self.state().vf_kinds.get(&pf).cloned().unwrap();
        // Offset 0x80 and stride 2, as the 82576 has them.
        let vf = |index: u32| {
            let device = u8::try_from(0x10 + index / 4).unwrap();
            Bdf::new(pf.domain(), pf.bus(), device, u8::try_from(index % 4 * 2).unwrap()).unwrap()
        };
        for index in 0..current {
            fs::remove_file(dir.join(format!("virtfn{index}")))?;
            self.remove_device(vf(index));
        }
        for index in 0..count {
            self.add_device(vf(index), (0x8086, device), 0x02_0000, Some(20 + index));
            symlink(self.device(vf(index)), dir.join(format!("virtfn{index}")))?;
            symlink(&dir, self.device(vf(index)).join("physfn"))?;
            self.state().natives.insert(vf(index), driver.clone());
            self.probe(vf(index));
        }
        Ok(())
    }
}

impl AttributeWriter for Kernel {
    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        let relative = path.strip_prefix(&self.root).unwrap().to_str().unwrap().to_owned();
        let attribute = path.file_name().unwrap().to_str().unwrap().to_owned();
        let device = || {
            relative.split('/').nth(3).and_then(|name| name.parse::<Bdf>().ok()).ok_or(errno(libc::EINVAL))
        };
        if !path.exists() {
            return Err(errno(libc::ENOENT));
        }
        {
            let mut state = self.state();
            state.writes.push((relative.clone(), value.to_owned()));
            if let Some(at) = state.failures.iter().position(|(name, _)| *name == attribute) {
                return Err(errno(state.failures.remove(at).unwrap().1));
            }
        }
        let named = || value.trim().parse::<Bdf>().map_err(|_| errno(libc::ENODEV));
        match attribute.as_str() {
            "driver_override" => {
                fs::write(path, format!("{}\n", if value == "\n" { "(null)" } else { value.trim() }))
            }
            "unbind" => {
                let bdf = named()?;
                if path.parent().and_then(|dir| fs::canonicalize(dir).ok())
                    != fs::canonicalize(self.device(bdf).join("driver")).ok()
                {
                    return Err(errno(libc::ENODEV));
                }
                if self.device(bdf).join("physfn").exists() {
                    let _ = fs::remove_dir_all(self.device(bdf).join("net"));
                }
                fs::remove_file(self.device(bdf).join("driver"))
            }
            "drivers_probe" => {
                self.probe(named()?);
                Ok(())
            }
            "sriov_numvfs" => {
                self.set_num_vfs(device()?, value.trim().parse().map_err(|_| errno(libc::EINVAL))?)
            }
            _ => fs::write(path, value),
        }
    }
}
