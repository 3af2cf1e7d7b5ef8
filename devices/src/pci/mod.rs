// SPDX-License-Identifier: Apache-2.0

//! PCI: functions, their BARs and configuration space, MSI and MSI-X, and the host bridge that reaches them.

mod address_map;
pub mod bar;
pub mod bus;
pub mod config;
pub mod host_bridge;
pub mod msi;
pub mod msix;
pub mod vectors;

use std::ops::Range;

/// The guest-physical ranges that a function's BARs decode, by BAR.
pub type DecodedBars = [Option<Range<u64>>; bar::BARS];

/// The bus's view of a PCI function. Every call comes from a vCPU thread and must not wait: no reset, no
/// hardware that may block, no other process.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space. `data` is 1, 2 or 4 bytes, naturally aligned, inside of 4096 bytes.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space; same rules.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// The ranges that the BARs decode at this moment. The bus finds the function by them and asks anew after each
    /// [`config_write`](Self::config_write): only there may a function begin to decode a range. It may stop at any time.
    fn decoded(&self) -> DecodedBars;

    /// Reads guest-physical memory at `gpa` if one of this function's BARs decodes it; otherwise returns false
    /// and leaves `data` untouched. `data` is 1 to 8 bytes.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool;

    /// Writes guest-physical memory at `gpa` if one of this function's BARs decodes it; false if none does.
    fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool;
}
