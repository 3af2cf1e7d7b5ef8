// SPDX-License-Identifier: Apache-2.0

//! The seam between an assigned function and its hardware: a device behind VFIO, or the simulated VF.

use std::{io, sync::Arc};

use devices::memory::HostMemory;
use vmm_sys_util::eventfd::EventFd;

/// The properties of one BAR of the hardware.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BarInfo {
    /// Length in bytes: 0 if the BAR does not exist, otherwise a power of two of at least 16.
    pub size: u64,
    /// Whether it is a 64-bit memory BAR (it then takes the next BAR's register too).
    pub is_64bit: bool,
    /// Whether it is prefetchable.
    pub prefetchable: bool,
    /// Whether it is an I/O port BAR. Those are hidden from the guest.
    pub io: bool,
    /// Whether [`VfHardware::map_bar`] can map page-aligned parts of it.
    pub mappable: bool,
}

/// The kinds of message-signalled interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IrqKind {
    /// PCI Local Bus 3.0, 6.8.1.
    Msi,
    /// PCI Local Bus 3.0, 6.8.2.
    Msix,
}

/// A PCI function that can be assigned to a guest. `VfioVf` is a function behind VFIO, `SimVf` a simulated one.
///
/// As on a bus, failed reads yield all-ones and failed writes are dropped. Implementations count or log (bounded)
/// these failures. Offsets and lengths outside of a region fail without a panic. Calls may come from several threads.
pub trait VfHardware: Send + Sync {
    /// Reads the hardware's configuration space (4096 bytes; 256 without extended space).
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes the hardware's configuration space.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// The properties of BAR `index` (0 to 5).
    fn bar(&self, index: usize) -> BarInfo;

    /// Reads a BAR's registers. May block while the function is being reset.
    fn bar_read(&self, index: usize, offset: u64, data: &mut [u8]);

    /// Writes a BAR's registers. May block while the function is being reset.
    fn bar_write(&self, index: usize, offset: u64, data: &[u8]);

    /// Maps `[offset, offset + len)` of a BAR (page aligned) into this process.
    ///
    /// # Errors
    /// `Unsupported` if the BAR is not mappable, `InvalidInput` outside of it, otherwise those of `mmap`.
    fn map_bar(&self, index: usize, offset: u64, len: u64) -> io::Result<Arc<dyn HostMemory>>;

    /// The start of BAR `index` in this process, if it is mapped as a whole (a simulated function's registers). The
    /// trapped ranges are then forbidden by address. None if only mapped pieces have an address.
    fn bar_address(&self, index: usize) -> Option<u64> {
        let _ = index;
        None
    }

    /// Number of vectors of this kind in hardware; 0 for none.
    fn irq_count(&self, kind: IrqKind) -> u32;

    /// Makes vector *n* of `kind` signal `triggers[n]` from now on. At most [`irq_count`](Self::irq_count) triggers.
    ///
    /// # Errors
    /// Those of the kernel, `InvalidInput` for too many.
    fn enable_irqs(&self, kind: IrqKind, triggers: &[EventFd]) -> io::Result<()>;

    /// Stops the signals of `kind`. Harmless if they are not enabled.
    ///
    /// # Errors
    /// Those of the kernel.
    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()>;

    /// Resets the function (FLR) and waits for its end (100 ms and more on hardware). Never call it on a vCPU thread,
    /// and remove the BARs' windows first. Interrupts are disabled afterwards.
    ///
    /// # Errors
    /// Those of the kernel, `Unsupported` for a function that has no reset.
    fn reset(&self) -> io::Result<()>;
}
