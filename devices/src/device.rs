// SPDX-License-Identifier: Apache-2.0

//! The duties of a device towards its machine.
//!
//! The machine keeps its devices in one list and treats all of them alike. It calls them from its
//! event loop's thread, never from a vCPU's:
//!
//! ```text
//!              resume              pause                    reset
//!   Paused ─────────────▶ Active ─────────▶ Paused ───────────────────▶ Paused, at power-on
//!     │                                       (vCPUs parked)
//!     └── shutdown ▶ Closed
//! ```
//!
//! A new device is paused. `resume` goes through the list forwards; `pause`, `reset` and `shutdown`
//! go backwards, so that a device's bus outlasts it.

use std::{error::Error, ops::Range, sync::Arc};

use crate::{bus::BusDevice, io_thread::IoThread};

/// A device of the machine. It is shared with the vCPUs' threads, which reach its registers through
/// [`Device::decodes`].
pub trait Device: Send + Sync {
    /// The registers that the device puts on the machine's buses. Called once, before the vCPUs
    /// run.
    fn decodes(self: Arc<Self>) -> Vec<Decoded> {
        Vec::new()
    }

    /// The device's part of the DSDT: AML at the root of the namespace (ACPI 6.5, chapter 20).
    /// Empty if a guest finds the device by other means, as it finds PCI functions.
    fn aml(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The threads that the device needs beside those of the vCPUs. Called once, before the vCPUs
    /// run: no thread starts later.
    fn io_threads(self: Arc<Self>) -> Vec<IoThread> {
        Vec::new()
    }

    /// Ends the device's activity, such as requests under way. The vCPUs are parked. The I/O
    /// threads still run, so that they can complete requests; they are parked next, and from then
    /// on nothing raises an interrupt or touches guest memory. Registers keep their values. Pausing
    /// a paused device does nothing. Must return within a second, even if an I/O thread hangs.
    fn pause(&self) {}

    /// Continues after a pause, or begins after a reset. The I/O threads run next, then the vCPUs.
    fn resume(&self) {}

    /// Goes back to the state at power-on, without any trace of the last boot. The device is
    /// paused. May block.
    ///
    /// # Errors
    /// [`ResetError`]: the device may still use guest memory, so the machine must not boot again.
    fn reset(&self) -> Result<(), ResetError>;

    /// Releases the device's resources of the host. The device is paused, its I/O threads have
    /// ended, and no call follows. May block.
    ///
    /// Not called if an I/O thread of the device does not end, because its host file or network
    /// hangs. The end of the process then releases all.
    fn shutdown(&self) {}
}

/// The address space of a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Ports, 0 to 0xffff.
    Ports,
    /// Guest-physical memory.
    Memory,
}

/// Registers at an address.
#[derive(Clone)]
pub struct Decoded {
    /// The bus.
    pub space: Space,
    /// The addresses on it.
    pub range: Range<u64>,
    /// The registers. Offsets count from the start of the range.
    pub registers: Arc<dyn BusDevice>,
}

impl Decoded {
    /// `count` ports from `first` on.
    #[must_use]
    pub fn ports(first: u16, count: u64, registers: Arc<dyn BusDevice>) -> Self {
        let first = u64::from(first);
        Self { space: Space::Ports, range: first..first.saturating_add(count), registers }
    }

    /// Guest-physical memory.
    #[must_use]
    pub fn memory(range: Range<u64>, registers: Arc<dyn BusDevice>) -> Self {
        Self { space: Space::Memory, range, registers }
    }
}

/// A device did not reset.
#[derive(Debug, thiserror::Error)]
#[error("Device {device} cannot be reset")]
pub struct ResetError {
    /// The device's name.
    pub device: String,
    /// The cause.
    pub source: Box<dyn Error + Send + Sync>,
}
