// SPDX-License-Identifier: Apache-2.0

//! A PCI function behind VFIO.

use std::{
    fs::File,
    io,
    mem::ManuallyDrop,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use devices::{memory::HostMemory, pci::config};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE, VFIO_TYPE, vfio_region_info,
};
use vfio_ioctls::VfioDevice;
use vmm_sys_util::{
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
    ioctl::{ioctl, ioctl_with_mut_ref},
    ioctl_io_nr,
};

use super::{Error, window::Window};
use crate::hardware::{BarInfo, IrqKind, VfHardware};

ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO_TYPE as u32, VFIO_BASE + 8);
ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE as u32, VFIO_BASE + 11);

const PAGE: u64 = 4096;
const BARS: usize = 6;
/// The most failed accesses to log; the rest is only counted. A guest can cause them.
const LOGGED_FAILURES: u64 = 8;

const BAR_IO: u32 = 1;
const BAR_TYPE_MASK: u32 = 0b110;
const BAR_TYPE_64: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;

/// One region of the device's file.
#[derive(Clone, Copy, Debug, Default)]
struct Region {
    flags: u32,
    size: u64,
    offset: u64,
}

impl Region {
    /// The place of `[offset, offset + len)` in the file; None if it is not all inside the region.
    fn place(&self, offset: u64, len: usize) -> Option<u64> {
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= self.size).then(|| self.offset.checked_add(offset)).flatten()
    }
}

/// A PCI function opened through VFIO.
///
/// vfio-ioctls opens it and sets its interrupts. Region accesses and the reset bypass that crate, which swallows their
/// errors and shifts its region numbers when a region cannot be read.
pub struct VfioVf {
    bdf: String,
    /// A second descriptor of the same open device. It is closed before `device`: the group leaves its container only
    /// when no descriptor of its device is open.
    file: File,
    device: OpenDevice,
    config: Region,
    regions: [Region; BARS],
    bars: [BarInfo; BARS],
    failures: AtomicU64,
}

impl VfioVf {
    pub(super) fn new(device: VfioDevice, path: &Path, bdf: String, closing: Closing) -> Result<Self, Error> {
        let device = OpenDevice { inner: ManuallyDrop::new(device), path: path.to_owned(), closing };
        let call = |what: &'static str| {
            let bdf = bdf.clone();
            move |source| Error::DeviceCall { bdf, what, source }
        };
        // SAFETY: the descriptor is open as long as `device` is.
        let fd = unsafe { BorrowedFd::borrow_raw(device.inner.as_raw_fd()) };
        let file = File::from(fd.try_clone_to_owned().map_err(call("Duplicating its descriptor"))?);
        let region = |index: u32| region_info(&file, index).map_err(call("Reading its regions"));
        let config = region(VFIO_PCI_CONFIG_REGION_INDEX)?;
        if config.size < 256 {
            return Err(Error::Unusable { bdf, what: "its configuration space is too small" });
        }
        let mut regions = [Region::default(); BARS];
        for (index, place) in (0..).zip(&mut regions) {
            *place = region(index)?;
        }
        let mut this = Self {
            bdf,
            file,
            device,
            config,
            regions,
            bars: Default::default(),
            failures: AtomicU64::new(0),
        };
        this.bars = std::array::from_fn(|index| this.bar_info(index));
        this.touch_bars()?;
        Ok(this)
    }

    /// Touches each BAR once on this thread. The kernel claims a BAR for vfio-pci at its first use, without a lock
    /// (`vfio_pci_core_mmap`, `vfio_pci_core_setup_barmap`, Linux 6.12): of two threads that come first together, one
    /// gets EBUSY.
    fn touch_bars(&self) -> Result<(), Error> {
        for (index, _) in self.bars.iter().enumerate().filter(|(_, bar)| bar.mappable) {
            let touched = self.map_bar(index, 0, PAGE);
            touched.map_err(|source| Error::DeviceCall {
                bdf: self.bdf.clone(),
                what: "Mapping a BAR",
                source,
            })?;
        }
        Ok(())
    }

    /// The host's PCI address.
    #[must_use]
    pub fn bdf(&self) -> &str {
        &self.bdf
    }

    /// Accesses that failed so far.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// An eventfd that is signalled when the host wants the device back (its driver is being unbound, or the VF
    /// removed; repeated until the device is closed). None if the kernel does not support it.
    ///
    /// # Errors
    /// [`Error::DeviceCall`].
    pub fn request_event(&self) -> Result<Option<EventFd>, Error> {
        self.event(VFIO_PCI_REQ_IRQ_INDEX, "Enabling its request event")
    }

    /// An eventfd that is signalled when the device reports an unrecoverable error. None if the kernel or the device
    /// does not support it (it takes PCI Express error reporting).
    ///
    /// # Errors
    /// [`Error::DeviceCall`].
    pub fn error_event(&self) -> Result<Option<EventFd>, Error> {
        self.event(VFIO_PCI_ERR_IRQ_INDEX, "Enabling its error event")
    }

    fn event(&self, index: u32, what: &'static str) -> Result<Option<EventFd>, Error> {
        if self.device.inner.get_irq_info(index).is_none_or(|irq| irq.count == 0) {
            return Ok(None);
        }
        let failed = |source| Error::DeviceCall { bdf: self.bdf.clone(), what, source };
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?;
        self.device.inner.enable_irq(index, vec![&event]).map_err(|error| failed(io::Error::other(error)))?;
        Ok(Some(event))
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let readable = region.flags & VFIO_REGION_INFO_FLAG_READ != 0;
        let Some(at) = region.place(offset, data.len()).filter(|_| readable) else {
            return self.failed("read", offset, &io::ErrorKind::InvalidInput.into());
        };
        if let Err(error) = self.file.read_exact_at(data, at) {
            data.fill(0xff);
            self.failed("read", offset, &error);
        }
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) {
        let writable = region.flags & VFIO_REGION_INFO_FLAG_WRITE != 0;
        let Some(at) = region.place(offset, data.len()).filter(|_| writable) else {
            return self.failed("write", offset, &io::ErrorKind::InvalidInput.into());
        };
        if let Err(error) = self.file.write_all_at(data, at) {
            self.failed("write", offset, &error);
        }
    }

    fn failed(&self, what: &str, offset: u64, error: &io::Error) {
        if self.failures.fetch_add(1, Ordering::Relaxed) < LOGGED_FAILURES {
            tracing::warn!(device = self.bdf, what, offset, %error, "Access to a VFIO device failed");
        }
    }

    fn region(&self, index: usize) -> Region {
        self.regions.get(index).copied().unwrap_or_default()
    }

    fn bar_info(&self, index: usize) -> BarInfo {
        let region = self.region(index);
        if region.size == 0 {
            return BarInfo::default();
        }
        let mut register = [0; 4];
        let offset = u64::from(config::BAR0) + index as u64 * 4;
        self.read(self.config, offset, &mut register);
        let register = u32::from_le_bytes(register);
        let io = register & BAR_IO != 0;
        BarInfo {
            size: region.size,
            is_64bit: !io && register & BAR_TYPE_MASK == BAR_TYPE_64,
            prefetchable: !io && register & BAR_PREFETCHABLE != 0,
            io,
            mappable: !io && region.flags & VFIO_REGION_INFO_FLAG_MMAP != 0 && region.size >= PAGE,
        }
    }
}

impl VfHardware for VfioVf {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.read(self.config, offset.into(), data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.write(self.config, offset.into(), data);
    }

    fn bar(&self, index: usize) -> BarInfo {
        self.bars.get(index).copied().unwrap_or_default()
    }

    fn bar_read(&self, index: usize, offset: u64, data: &mut [u8]) {
        self.read(self.region(index), offset, data);
    }

    fn bar_write(&self, index: usize, offset: u64, data: &[u8]) {
        self.write(self.region(index), offset, data);
    }

    fn map_bar(&self, index: usize, offset: u64, len: u64) -> io::Result<Arc<dyn HostMemory>> {
        let region = self.region(index);
        if !self.bar(index).mappable {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let size = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let aligned = len > 0 && offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
        let at = region.place(offset, size).filter(|_| aligned).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Arc::new(Window::new(self.file.as_fd(), at, size)?))
    }

    fn irq_count(&self, kind: IrqKind) -> u32 {
        self.device.inner.get_irq_info(irq_index(kind)).map_or(0, |irq| irq.count)
    }

    fn enable_irqs(&self, kind: IrqKind, triggers: &[EventFd]) -> io::Result<()> {
        let count = usize::try_from(self.irq_count(kind)).unwrap_or(0);
        if triggers.is_empty() || triggers.len() > count {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // vfio-ioctls drops the error number, which is still the thread's last one.
        self.device
            .inner
            .enable_irq(irq_index(kind), triggers.iter().collect())
            .map_err(|_| io::Error::last_os_error())
    }

    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        if self.irq_count(kind) == 0 {
            return Ok(());
        }
        self.device.inner.disable_irq(irq_index(kind)).map_err(|_| io::Error::last_os_error())
    }

    fn reset(&self) -> io::Result<()> {
        // SAFETY: the descriptor is an open VFIO device, and the request takes no argument.
        if unsafe { ioctl(&self.file, VFIO_DEVICE_RESET()) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // The kernel's answer for a function without a reset of its own.
        let none = error.raw_os_error() == Some(libc::EINVAL);
        Err(if none { io::ErrorKind::Unsupported.into() } else { error })
    }
}

/// An open device whose `Drop` in vfio-ioctls must not run in a vmm: it looks the device up in sysfs and panics if it
/// is missing, as in the sandbox, where the thread may not even make the lookup.
struct OpenDevice {
    inner: ManuallyDrop<VfioDevice>,
    path: PathBuf,
    closing: Closing,
}

/// The resources to release when a device is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closing {
    /// Group and container too, because this process lives on.
    Everything,
    /// The device only: group and container stay until this process ends.
    DeviceOnly,
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        if self.closing == Closing::Everything && self.path.join("iommu_group").read_link().is_ok() {
            // This is the agent, which opens a VF to scrub it and lives on.
            // SAFETY: nothing uses the device after this; vfio-ioctls finds the group link that it looks up.
            unsafe { ManuallyDrop::drop(&mut self.inner) };
            return;
        }
        // SAFETY: the descriptor is the one that the inner device owns, open until here; that device is never used or
        // dropped afterwards. (A few hundred bytes leak with it, and the container and the group until the process
        // ends. The kernel returns the device to its host once its last descriptor and mapping are gone.)
        drop(unsafe { OwnedFd::from_raw_fd(self.inner.as_raw_fd()) });
    }
}

fn region_info(file: &File, index: u32) -> io::Result<Region> {
    let argsz = u32::try_from(size_of::<vfio_region_info>()).unwrap_or(0);
    let mut info = vfio_region_info { argsz, index, ..Default::default() };
    // SAFETY: the descriptor is an open VFIO device, and the structure matches the request and states its own size.
    if unsafe { ioctl_with_mut_ref(file, VFIO_DEVICE_GET_REGION_INFO(), &mut info) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Region { flags: info.flags, size: info.size, offset: info.offset })
}

fn irq_index(kind: IrqKind) -> u32 {
    match kind {
        IrqKind::Msi => VFIO_PCI_MSI_IRQ_INDEX,
        IrqKind::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_stay_inside_of_their_region() {
        let region = Region { flags: 0, size: 0x4000, offset: 7 << 40 };
        let check = |offset, len, expect: Option<u64>| {
            assert_eq!(region.place(offset, len), expect.map(|at| at + (7 << 40)), "{len} at {offset:#x}");
        };
        check(0, 4, Some(0));
        check(0x3ffc, 4, Some(0x3ffc));
        check(0x3ffd, 4, None);
        check(0x4000, 1, None);
        check(u64::MAX, 8, None);
        assert_eq!(Region::default().place(0, 1), None, "a region that does not exist");
    }
}
