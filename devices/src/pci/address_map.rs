// SPDX-License-Identifier: Apache-2.0

//! The functions of a bus by the guest-physical addresses that their BARs decode.
//!
//! The map says where to ask first, and the function's own check decides: a function may stop
//! decoding at any time (a reset of its own, a loss). It begins to decode only in a write of its
//! configuration space, which comes through the bus. So an address that is not in the map belongs
//! to no function.

use std::collections::BTreeMap;

use super::DecodedBars;

/// The decoded ranges of all functions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct AddressMap {
    /// The decoded BARs of each slot that has any.
    slots: BTreeMap<u8, DecodedBars>,
    /// Disjoint ranges: the end (exclusive) and the slot, by the start. Where BARs overlap, the
    /// lowest slot counts.
    ranges: BTreeMap<u64, (u64, u8)>,
}

impl AddressMap {
    /// The slot whose function to ask for `gpa`. None: no function decodes it.
    pub(super) fn find(&self, gpa: u64) -> Option<u8> {
        let (_, &(end, slot)) = self.ranges.range(..=gpa).next_back()?;
        (gpa < end).then_some(slot)
    }

    /// The decoded BARs of a slot.
    pub(super) fn of(&self, slot: u8) -> DecodedBars {
        self.slots.get(&slot).cloned().unwrap_or_default()
    }

    /// Sets the decoded BARs of a slot.
    pub(super) fn set(&mut self, slot: u8, decoded: DecodedBars) {
        if decoded == DecodedBars::default() {
            self.slots.remove(&slot);
        } else {
            self.slots.insert(slot, decoded);
        }
        self.ranges.clear();
        for (&slot, bars) in &self.slots {
            for bar in bars.iter().flatten() {
                let mut start = bar.start;
                while start < bar.end {
                    let before = self.ranges.range(..=start).next_back();
                    if let Some((_, &(end, _))) = before.filter(|(_, (end, _))| *end > start) {
                        start = end;
                        continue;
                    }
                    let free = self.ranges.range(start..bar.end).next().map_or(bar.end, |(next, _)| *next);
                    self.ranges.insert(start, (free, slot));
                    start = free;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_slot_counts_where_bars_overlap() {
        let mut map = AddressMap::default();
        map.set(2, [Some(0x1000..0x4000), None, Some(0x8000..0x9000), None, None, None]);
        map.set(1, [Some(0x2000..0x3000), None, None, None, None, None]);
        map.set(3, [Some(0..0xa000), None, None, None, None, None]);
        let found = |map: &AddressMap| {
            [0, 0xfff, 0x1000, 0x1fff, 0x2000, 0x2fff, 0x3000, 0x4000, 0x8000, 0x9fff, 0xa000]
                .map(|gpa| map.find(gpa).unwrap_or(0))
        };
        assert_eq!(found(&map), [3, 3, 2, 2, 1, 1, 2, 3, 2, 3, 0]);
        map.set(3, DecodedBars::default());
        assert_eq!(found(&map), [0, 0, 2, 2, 1, 1, 2, 0, 2, 0, 0]);
        map.set(1, DecodedBars::default());
        map.set(2, DecodedBars::default());
        assert_eq!(map, AddressMap::default());
    }
}
