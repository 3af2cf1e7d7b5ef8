// SPDX-License-Identifier: Apache-2.0

//! The base address registers of a function (PCI Local Bus 3.0, 6.2.5.1) and the ranges that they decode.

use std::{ops::Range, sync::Arc};

/// BARs of a type 0 header.
pub const BARS: usize = 6;

const TYPE_64BIT: u32 = 0b100;
const PREFETCHABLE: u32 = 0b1000;
/// The smallest memory BAR.
const MIN_SIZE: u64 = 16;
/// The largest BAR that a 32-bit register can describe.
const MAX_SIZE_32: u64 = 1 << 31;

/// The properties of one memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarLayout {
    /// Length in bytes: a power of two of at least 16.
    pub size: u64,
    /// Whether the BAR has 64 bits, and so takes the next register too.
    pub is_64bit: bool,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
}

/// The reason that a BAR or its address is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BarError {
    /// The size is no power of two, below 16, or above 2 GiB in a 32-bit register.
    #[error(
        "BAR {bar} cannot have {size:#x} bytes: a power of two from 16 (to 2 GiB in a 32-bit BAR) is needed"
    )]
    Size {
        /// Index of the BAR.
        bar: usize,
        /// Its size in bytes.
        size: u64,
    },
    /// The upper half of a 64-bit BAR is taken or does not exist.
    #[error("BAR {bar} has 64 bits but the register after it is not free")]
    NoUpperHalf {
        /// Index of the BAR.
        bar: usize,
    },
    /// The address is not aligned, too high for the register, or outside of the windows.
    #[error("BAR {bar} cannot be at {address:#x}: not aligned to its size, or outside of the PCI windows")]
    Address {
        /// Index of the BAR.
        bar: usize,
        /// The address.
        address: u64,
    },
    /// There is no such BAR.
    #[error("BAR {bar} does not exist")]
    Absent {
        /// Index of the BAR.
        bar: usize,
    },
}

/// The BAR registers of one function, and the guest-physical ranges that they decode.
///
/// A BAR decodes while memory is enabled and all of it lies in one of the windows given at construction. If a guest
/// moves it elsewhere (guest memory, the local APIC), it decodes nothing.
#[derive(Clone, Debug)]
pub struct Bars {
    layouts: [Option<BarLayout>; BARS],
    /// Address bits as the guest wrote them, aligned to the BAR's size. The index is that of the lower register.
    addresses: [u64; BARS],
    /// The assigned addresses, which a machine reset restores.
    power_on: [u64; BARS],
    windows: Arc<[Range<u64>]>,
    memory_enabled: bool,
}

impl Bars {
    /// Makes BARs at address 0, with memory disabled. `windows` are the guest-physical ranges where BARs may be.
    ///
    /// # Errors
    /// [`BarError`] for sizes that no BAR can have.
    pub fn new(layouts: [Option<BarLayout>; BARS], windows: Arc<[Range<u64>]>) -> Result<Self, BarError> {
        for (bar, layout) in layouts.iter().enumerate() {
            let Some(BarLayout { size, is_64bit, .. }) = *layout else { continue };
            if !size.is_power_of_two() || size < MIN_SIZE || (!is_64bit && size > MAX_SIZE_32) {
                return Err(BarError::Size { bar, size });
            }
            if is_64bit && !matches!(layouts.get(bar + 1), Some(None)) {
                return Err(BarError::NoUpperHalf { bar });
            }
        }
        Ok(Self { layouts, addresses: [0; BARS], power_on: [0; BARS], windows, memory_enabled: false })
    }

    /// The layout of BAR `bar`; None for an absent one and for an upper half.
    #[must_use]
    pub fn layout(&self, bar: usize) -> Option<BarLayout> {
        self.layouts.get(bar).copied().flatten()
    }

    /// Every BAR with its layout.
    pub fn layouts(&self) -> impl Iterator<Item = (usize, BarLayout)> + '_ {
        self.layouts.iter().enumerate().filter_map(|(bar, layout)| Some((bar, (*layout)?)))
    }

    /// Assigns an address, as firmware would. [`power_on`](Self::power_on) restores it.
    ///
    /// # Errors
    /// [`BarError`] for an address at which the BAR could not decode.
    pub fn assign(&mut self, bar: usize, address: u64) -> Result<(), BarError> {
        let layout = self.layout(bar).ok_or(BarError::Absent { bar })?;
        let fits = layout.is_64bit || u32::try_from(address).is_ok();
        let wrong = BarError::Address { bar, address };
        if !fits || !address.is_multiple_of(layout.size) || !self.inside(address, layout.size) {
            return Err(wrong);
        }
        for addresses in [&mut self.addresses, &mut self.power_on] {
            *addresses.get_mut(bar).ok_or(wrong)? = address;
        }
        Ok(())
    }

    /// Restores the state after a machine reset: assigned addresses, memory disabled.
    pub fn power_on(&mut self) {
        self.addresses = self.power_on;
        self.memory_enabled = false;
    }

    /// Restores the state after a function reset: all addresses 0, memory disabled.
    pub fn clear(&mut self) {
        self.addresses = [0; BARS];
        self.memory_enabled = false;
    }

    /// Follows the command register's memory enable bit.
    pub fn set_memory_enabled(&mut self, enabled: bool) {
        self.memory_enabled = enabled;
    }

    /// Reads registers at `offset` bytes after the first BAR's.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.register(at / 4).to_le_bytes().get(at % 4).copied().unwrap_or(0);
        }
    }

    /// Writes registers at `offset` bytes after the first BAR's (1, 2 or 4 bytes, naturally aligned).
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        let mut bytes = self.register(at / 4).to_le_bytes();
        for (to, from) in bytes.iter_mut().skip(at % 4).zip(data) {
            *to = *from;
        }
        self.set_register(at / 4, u32::from_le_bytes(bytes));
    }

    /// The range that BAR `bar` decodes now.
    #[must_use]
    pub fn decoded(&self, bar: usize) -> Option<Range<u64>> {
        let layout = self.layout(bar).filter(|_| self.memory_enabled)?;
        let address = *self.addresses.get(bar)?;
        self.inside(address, layout.size).then(|| address..address + layout.size)
    }

    /// The BAR that decodes all of `[gpa, gpa + len)`, and the offset in it. Where BARs overlap, the first one counts.
    #[must_use]
    pub fn decode(&self, gpa: u64, len: usize) -> Option<(usize, u64)> {
        let end = gpa.checked_add(u64::try_from(len).ok()?)?;
        (0..BARS).find_map(|bar| {
            let range = self.decoded(bar)?;
            (range.start <= gpa && end <= range.end).then(|| (bar, gpa - range.start))
        })
    }

    fn inside(&self, address: u64, size: u64) -> bool {
        let Some(end) = address.checked_add(size) else { return false };
        self.windows.iter().any(|window| window.start <= address && end <= window.end)
    }

    /// The BAR of register `index`, and whether the register is its upper half.
    fn owner(&self, index: usize) -> Option<(usize, BarLayout, bool)> {
        if let Some(layout) = self.layout(index) {
            return Some((index, layout, false));
        }
        let lower = index.checked_sub(1)?;
        self.layout(lower).filter(|layout| layout.is_64bit).map(|layout| (lower, layout, true))
    }

    #[expect(clippy::cast_possible_truncation, reason = "each half of the address on purpose")]
    fn register(&self, index: usize) -> u32 {
        let Some((bar, layout, upper)) = self.owner(index) else { return 0 };
        let address = self.addresses.get(bar).copied().unwrap_or(0);
        if upper {
            return (address >> 32) as u32;
        }
        let wide = if layout.is_64bit { TYPE_64BIT } else { 0 };
        let prefetchable = if layout.prefetchable { PREFETCHABLE } else { 0 };
        address as u32 | wide | prefetchable
    }

    fn set_register(&mut self, index: usize, value: u32) {
        let Some((bar, layout, upper)) = self.owner(index) else { return };
        let Some(address) = self.addresses.get_mut(bar) else { return };
        let merged = if upper {
            (u64::from(value) << 32) | (*address & 0xffff_ffff)
        } else {
            (*address & !0xffff_ffff) | u64::from(value)
        };
        *address = merged & !(layout.size - 1);
    }
}

#[cfg(test)]
mod tests;
