// SPDX-License-Identifier: Apache-2.0

//! The PCI function that a guest sees in place of assigned hardware.
//!
//! ```text
//!             request_reset (guest's FLR), reset_and_wait (reboot)
//!   Open ───────────────────────────────────────────────────────▶ Resetting
//!    ▲    a vCPU or the event loop closes the access; from now on    │ the function's thread: windows away, irqs and
//!    │    all reads are all-ones                                     │ DMA off, hardware.reset(), registers to their
//!    └───────────────────────────────────────────────────────────────┘ reset state, handlers called
//!    │ lose, shutdown (also out of Resetting)
//!    ▼
//!   Closed: all-ones for good, no windows, no irqs, the hardware released
//! ```
//!
//! `hardware_access` holds that state and is the only way to the hardware, for vCPUs and for the relay alike.
//! `config_space` is the guest's view of configuration space, `layout` decides which range of a BAR is mapped and which
//! trapped, `windows` keeps the guest's windows in line with the BARs, and `thread` does the work that may block.
//!
//! Lock order: hardware access (shared, for the duration of one access), then registers. The access is taken
//! exclusively only to change its state, never during a reset of the hardware.

mod assigned;
mod capabilities;
mod config_space;
mod counters;
#[cfg(any(test, feature = "test-support"))]
pub mod fuzz;
mod hardware_access;
mod layout;
mod registers;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "made-up data, and registers read at their own width")]
#[expect(clippy::single_range_in_vec_init, reason = "lists of ranges, some of one range")]
mod tests;
mod thread;
mod windows;

use std::{collections::BTreeMap, io, ops::Range, sync::Arc};

pub use assigned::AssignedFunction;
use devices::pci::bar::BarError;
pub use hardware_access::HardwareAccess;

/// Emulates a range of a BAR. Called on vCPU threads: it must not wait.
pub trait BarHandler: Send + Sync {
    /// Reads at `offset` from the start of the range. `data` is 1 to 8 bytes inside of it.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);

    /// Prepares for a reset of the hardware: the guest sees all-ones from now on. Called on the function's thread.
    fn before_reset(&self) {}

    /// Notes that the hardware was reset; the guest is about to see it again. Called on the function's thread.
    fn after_reset(&self) {}
}

/// A range of a BAR that is never mapped into the guest.
#[derive(Clone)]
pub struct TrappedRange {
    /// Index of the BAR.
    pub bar: usize,
    /// Bytes in the BAR. Every page that the range touches stays unmapped. The rest of such a page goes to the hardware
    /// register by register.
    pub range: Range<u64>,
    /// The handler of the guest's accesses.
    pub handler: Arc<dyn BarHandler>,
}

/// Counters of a function since its construction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FunctionStats {
    /// Exits by BAR and 4 KiB page, keyed `"bar:page"`; pages without an exit are absent. Pages of a BAR from 1024
    /// on are counted together, as the key `"bar:rest"`.
    pub bar_exits: BTreeMap<String, u64>,
    /// Configuration space accesses.
    pub config_exits: u64,
    /// Resets of the hardware, by the guest or the vmm.
    pub resets: u64,
}

/// The reason why a function cannot be assigned.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// The function is a bridge or of an unknown type.
    #[error("PCI function has header type {0:#x}: only endpoints (type 0) can be assigned")]
    NotEndpoint(u8),
    /// A BAR has an impossible size.
    #[error("PCI function has a BAR that cannot be emulated")]
    Bar(#[from] BarError),
    /// The function has neither MSI nor MSI-X.
    #[error("PCI function has neither MSI nor MSI-X: functions that only have INTx cannot be assigned")]
    NoInterrupts,
    /// The MSI-X table or its pending bits are outside of the memory BARs.
    #[error(
        "PCI function's MSI-X capability points outside of its BARs ({what} in BAR {bar}, offset {offset:#x})"
    )]
    MsixOutside {
        /// Table or pending bits.
        what: &'static str,
        /// Index of the BAR.
        bar: usize,
        /// Offset in it.
        offset: u64,
    },
    /// A trapped range is outside of its BAR or overlaps another.
    #[error(
        "Range {range:#x?} of BAR {bar} cannot be trapped: outside of the BAR, or overlapping another trapped range"
    )]
    BadTrap {
        /// Index of the BAR.
        bar: usize,
        /// The range.
        range: Range<u64>,
    },
    /// Eventfds for the vectors cannot be made.
    #[error(
        "Interrupt vectors of a PCI function cannot be made: raise the limit of open files (LimitNOFILE=)"
    )]
    Vectors(#[source] io::Error),
    /// A BAR cannot be mapped into this process.
    #[error("BAR {bar} of a PCI function cannot be mapped")]
    MapBar {
        /// Index of the BAR.
        bar: usize,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The function's thread cannot be started.
    #[error("Thread of a PCI function cannot be started")]
    Thread(#[source] io::Error),
}

/// The reason why a reset did not happen.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    /// The function was lost or shut down.
    #[error("PCI function is gone: it cannot be reset")]
    Gone,
    /// The reset takes longer than the caller waits; the function reads all-ones until it ends.
    #[error("PCI function's reset takes longer than {0:?}: the device or its driver on the host hangs")]
    Timeout(std::time::Duration),
    /// The hardware refused the reset. The function stays closed, because its state is unknown.
    #[error("PCI function cannot be reset: the guest must not reuse its memory")]
    Failed(#[source] io::Error),
}
