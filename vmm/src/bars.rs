// SPDX-License-Identifier: Apache-2.0

//! The guest-physical addresses of BARs at power-on. The guest may move the BARs.

use std::ops::Range;

use devices::pci::{bar::BarLayout, bus::Windows};
use vm_allocator::{AddressAllocator, AllocPolicy};

/// Allocates addresses for BARs of all functions of one bus.
pub struct BarAllocator {
    low: Option<AddressAllocator>,
    high: Option<AddressAllocator>,
}

impl BarAllocator {
    /// All addresses of `windows` are free.
    #[must_use]
    pub fn new(windows: &Windows) -> Self {
        let allocator = |range: &Range<u64>| {
            AddressAllocator::new(range.start, range.end.saturating_sub(range.start)).ok()
        };
        Self { low: allocator(&windows.low), high: allocator(&windows.high) }
    }

    /// Takes addresses for a BAR: above 4 GiB if it can decode there. None if no window has room.
    pub fn take(&mut self, layout: BarLayout) -> Option<u64> {
        let from = |allocator: &mut Option<AddressAllocator>| {
            // Give a BAR that is smaller than a page its own page, so that no two share a window.
            let size = layout.size.max(4096);
            let range = allocator.as_mut()?.allocate(size, size, AllocPolicy::FirstMatch).ok()?;
            Some(range.start())
        };
        let high = if layout.is_64bit { from(&mut self.high) } else { None };
        high.or_else(|| from(&mut self.low))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_get_addresses_of_their_own_in_the_window_that_they_can_reach() {
        let windows = |high| Windows { ecam: 0, low: 0xc000_0000..0xe000_0000, high };
        let mut bars = BarAllocator::new(&windows(1 << 32..1 << 33));
        let bar = |size, is_64bit| BarLayout { size, is_64bit, prefetchable: false };
        assert_eq!(bars.take(bar(0x4000, true)), Some(1 << 32));
        assert_eq!(bars.take(bar(0x4000, true)), Some((1 << 32) + 0x4000));
        assert_eq!(bars.take(bar(0x10, false)), Some(0xc000_0000));
        assert_eq!(bars.take(bar(0x2000, false)), Some(0xc000_2000));
        assert_eq!(bars.take(bar(1 << 34, true)), None);
        let mut no_upper_window = BarAllocator::new(&windows(0..0));
        assert_eq!(no_upper_window.take(bar(0x4000, true)), Some(0xc000_0000));
    }
}
