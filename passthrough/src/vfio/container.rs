// SPDX-License-Identifier: Apache-2.0

//! The container of a VM: the IOMMU domain that all of its devices share.

use std::{fs, io, path::Path, sync::Arc};

pub use vfio_ioctls::VfioDeviceFd as KvmVfioDevice;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{Error, VfioVf, device::Closing};

/// The VFIO container of a VM.
pub struct Container {
    container: Arc<VfioContainer>,
    closing: Closing,
}

impl Container {
    /// Opens `/dev/vfio/vfio`. With `kvm`, a KVM device of type VFIO, KVM learns of the groups, for instance for cache
    /// coherency. Only a vmm passes `kvm`: when its devices close, group and container stay until the process ends.
    ///
    /// # Errors
    /// [`Error::Container`], [`Error::NoIommuDriver`].
    pub fn new(kvm: Option<KvmVfioDevice>) -> Result<Self, Error> {
        let closing = if kvm.is_some() { Closing::DeviceOnly } else { Closing::Everything };
        let container = VfioContainer::new(kvm.map(Arc::new)).map_err(|error| match error {
            VfioError::OpenContainer(source) => Error::Container(source),
            other => Error::NoIommuDriver(other),
        })?;
        Ok(Self { container: Arc::new(container), closing })
    }

    /// Opens a device that is bound to vfio-pci. `path` is its sysfs directory, or any directory named like the
    /// device (`0000:01:10.0`) that holds its `iommu_group` link. Takes as long as a function reset (100 ms and
    /// more): the kernel resets a device when it is opened.
    ///
    /// # Errors
    /// All of [`Error`] but those about memory.
    pub fn open(&self, path: &Path) -> Result<VfioVf, Error> {
        let bdf = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let group = group_of(path).map_err(|source| Error::NoGroup { bdf: bdf.clone(), source })?;
        let device = VfioDevice::new(path, self.container.clone(), false)
            .map_err(|error| open_error(error, io::Error::last_os_error(), bdf.clone(), group))?;
        VfioVf::new(device, path, bdf, self.closing)
    }

    /// Maps all of the guest's memory for DMA at its guest-physical addresses. Call it once, after the first device is
    /// open (the container has no IOMMU before that) and before any vCPU runs. The mappings live as long as the
    /// container.
    ///
    /// # Errors
    /// [`Error::Memlock`], [`Error::Map`].
    pub fn map_memory(&self, memory: &GuestMemoryMmap) -> Result<(), Error> {
        let needed = memory.iter().map(GuestMemoryRegion::len).fold(0, u64::saturating_add);
        for region in memory.iter() {
            let (address, len) = (region.start_addr().0, region.len());
            let size = usize::try_from(len).unwrap_or(usize::MAX);
            // SAFETY: the region is a mapping of guest memory, which this process only reaches by volatile
            // accesses (vm-memory) and system calls. The kernel pins its pages: should it be unmapped here, DMA
            // still reaches these pages and no others.
            unsafe { self.container.vfio_dma_map(address, size, region.as_ptr()) }.map_err(|source| {
                match &source {
                    // The kernel reports ENOMEM both for the limit and for lack of memory; the limit is more likely.
                    VfioError::IommuDmaMap(errno) if errno.errno() == libc::ENOMEM => {
                        Error::Memlock { needed, limit: memlock_limit(), source }
                    }
                    _ => Error::Map { address, len, source },
                }
            })?;
        }
        Ok(())
    }
}

fn group_of(path: &Path) -> io::Result<u32> {
    let target = fs::read_link(path.join("iommu_group"))?;
    let name = target.file_name().and_then(|name| name.to_str());
    name.and_then(|name| name.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn memlock_limit() -> String {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock);
    limit.current.map_or_else(|| "unlimited".to_owned(), |bytes| format!("{bytes} bytes"))
}

/// `last` is the error of the last system call, which vfio-ioctls drops for some of its errors.
fn open_error(error: VfioError, last: io::Error, bdf: String, group: u32) -> Error {
    let remapping = |errno: i32| errno == libc::EPERM;
    match error {
        VfioError::OpenGroup(source, _) if source.raw_os_error() == Some(libc::EBUSY) => {
            Error::GroupBusy { bdf, group }
        }
        VfioError::OpenGroup(source, _) => Error::GroupOpen { bdf, group, source },
        VfioError::GroupViable => Error::GroupNotViable { bdf, group },
        // The first group attaches when the IOMMU driver is chosen, later ones when they join.
        VfioError::ContainerSetIOMMU(errno) if remapping(errno.errno()) => {
            Error::NoInterruptRemapping { bdf, group }
        }
        VfioError::GroupSetContainer if last.raw_os_error().is_some_and(remapping) => {
            Error::NoInterruptRemapping { bdf, group }
        }
        source @ (VfioError::ContainerSetIOMMU(_)
        | VfioError::GroupSetContainer
        | VfioError::SetDeviceAttr(_)) => Error::Attach { bdf, group, source },
        source => Error::Device { bdf, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errno(code: i32) -> vmm_sys_util::errno::Error {
        vmm_sys_util::errno::Error::new(code)
    }

    #[test]
    fn errors_name_the_cure() {
        let check = |error: VfioError, last: i32, expect: &str| {
            let last = io::Error::from_raw_os_error(last);
            let text = open_error(error, last, "0000:01:10.0".into(), 7).to_string();
            assert!(text.contains(expect) && text.contains("0000:01:10.0"), "{text:?} lacks {expect:?}");
        };
        let open = |code| VfioError::OpenGroup(io::Error::from_raw_os_error(code), "7".into());
        check(open(libc::EBUSY), 0, "another process");
        check(open(libc::ENOENT), 0, "bind the device to vfio-pci");
        check(open(libc::EACCES), 0, "permissions of /dev/vfio/7");
        check(VfioError::GroupViable, 0, "not viable");
        check(VfioError::ContainerSetIOMMU(errno(libc::EPERM)), 0, "interrupt remapping");
        check(
            VfioError::ContainerSetIOMMU(errno(libc::ENODEV)),
            libc::EPERM,
            "cannot be attached to the VM's",
        );
        check(VfioError::GroupSetContainer, libc::EPERM, "interrupt remapping");
        check(VfioError::GroupSetContainer, libc::EBUSY, "cannot be attached to the VM's");
        check(VfioError::GroupGetDeviceFD(errno(libc::ENODEV)), 0, "bound to vfio-pci");
    }

    #[test]
    fn the_group_comes_from_the_link() {
        let dir = tempfile::tempdir().unwrap();
        assert!(group_of(dir.path()).is_err());
        std::os::unix::fs::symlink("../../../kernel/iommu_groups/23", dir.path().join("iommu_group"))
            .unwrap();
        assert_eq!(group_of(dir.path()).unwrap(), 23);
    }

    #[test]
    fn a_missing_container_is_named() {
        if Path::new("/dev/vfio/vfio").exists() {
            return;
        }
        let error = Container::new(None).err().unwrap();
        assert!(matches!(error, Error::Container(_)), "{error:?}");
    }
}
