// SPDX-License-Identifier: Apache-2.0

//! The seam between an assigned function and what is behind it: real hardware through VFIO, or the simulated VF.

use std::{io, sync::Arc};

use devices::memory::HostMemory;
use vmm_sys_util::eventfd::EventFd;

/// What one BAR of the hardware is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BarInfo {
    /// Length in bytes: 0 if the BAR does not exist, else a power of two of at least 16.
    pub size: u64,
    /// Whether it is a 64-bit memory BAR (it then takes the next BAR's register too).
    pub is_64bit: bool,
    /// Whether it is prefetchable.
    pub prefetchable: bool,
    /// Whether it is an I/O port BAR. Those are never offered to a guest.
    pub io: bool,
    /// Whether page-aligned parts of it can be had from [`VfHardware::map_bar`].
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
/// Reads that fail yield all-ones, writes that fail are dropped, like on a bus; implementations count or log
/// (bounded) what they swallow. Offsets and lengths outside of a region fail, they do not panic. Calls may come from
/// several threads.
pub trait VfHardware: Send + Sync {
    /// Reads the hardware's configuration space (4096 bytes; 256 where there is no extended space).
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes the hardware's configuration space.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// What BAR `index` (0 to 5) is.
    fn bar(&self, index: usize) -> BarInfo;

    /// Reads a BAR's registers. May block while the function is being reset.
    fn bar_read(&self, index: usize, offset: u64, data: &mut [u8]);

    /// Writes a BAR's registers. May block while the function is being reset.
    fn bar_write(&self, index: usize, offset: u64, data: &[u8]);

    /// Maps `[offset, offset + len)` of a BAR (page aligned) into this process.
    ///
    /// # Errors
    /// `Unsupported` where the BAR is not mappable, `InvalidInput` outside of it, else those of `mmap`.
    fn map_bar(&self, index: usize, offset: u64, len: u64) -> io::Result<Arc<dyn HostMemory>>;

    /// Where BAR `index` starts in this process, if it is there as a whole (a simulated function's registers). Ranges
    /// that are to stay trapped are then forbidden by address. None where only mapped pieces have one.
    fn bar_address(&self, index: usize) -> Option<u64> {
        let _ = index;
        None
    }

    /// Vectors that the hardware has of this kind; 0 for none.
    fn irq_count(&self, kind: IrqKind) -> u32;

    /// From now on vector *n* of `kind` signals `triggers[n]`. At most [`irq_count`](Self::irq_count) triggers.
    ///
    /// # Errors
    /// Those of the kernel, `InvalidInput` for too many.
    fn enable_irqs(&self, kind: IrqKind, triggers: &[EventFd]) -> io::Result<()>;

    /// Stops the signals of `kind`. Harmless when they are not enabled.
    ///
    /// # Errors
    /// Those of the kernel.
    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()>;

    /// Resets the function (FLR), waits for its end (100 ms and more on hardware): never call it on a vCPU thread,
    /// and take the BARs' windows away first. Interrupts are disabled afterwards.
    ///
    /// # Errors
    /// Those of the kernel, `Unsupported` for a function that has no reset.
    fn reset(&self) -> io::Result<()>;
}
