// SPDX-License-Identifier: Apache-2.0

//! The division of BARs into ranges that are mapped into the guest and ranges that are trapped.

use std::{ops::Range, sync::Arc};

use devices::pci::bar::BARS;

use super::{BarHandler, FunctionError, TrappedRange, capabilities::MsixLocation};
use crate::hardware::BarInfo;

const PAGE: u64 = 4096;

/// The target of an access to a range of a BAR that exits.
#[derive(Clone)]
pub(super) enum Target {
    /// The hardware's registers. If `mapped`, the guest reaches them without an exit while the BAR decodes.
    Hardware {
        mapped: bool,
    },
    MsixTable,
    MsixPending,
    Handler(Arc<dyn BarHandler>),
}

/// A range of a BAR.
#[derive(Clone)]
pub(super) struct BarRange {
    pub(super) range: Range<u64>,
    pub(super) target: Target,
}

/// Every BAR as an ordered list of ranges without gaps.
pub(super) struct Layout {
    bars: [Vec<BarRange>; BARS],
}

impl Layout {
    /// Maps mappable BARs page by page where nothing is trapped. All other accesses reach the hardware by
    /// exits.
    pub(super) fn new(
        bars: &[BarInfo; BARS],
        msix: Option<&MsixLocation>,
        traps: &[TrappedRange],
    ) -> Result<Self, FunctionError> {
        let mut trapped: [Vec<BarRange>; BARS] = Default::default();
        let mut trap = |bar: usize, range: Range<u64>, target: Target| {
            let bad = || FunctionError::BadTrap { bar, range: range.clone() };
            let size = bars.get(bar).map_or(0, |bar| bar.size);
            let list = trapped.get_mut(bar).ok_or_else(bad)?;
            let overlaps = |old: &BarRange| old.range.start < range.end && range.start < old.range.end;
            if range.is_empty() || range.end > size || list.iter().any(overlaps) {
                return Err(bad());
            }
            list.push(BarRange { range, target });
            Ok(())
        };
        if let Some(msix) = msix {
            trap(msix.table.0, msix.table_range(), Target::MsixTable)?;
            trap(msix.pending.0, msix.pending_range(), Target::MsixPending)?;
        }
        for TrappedRange { bar, range, handler } in traps {
            trap(*bar, range.clone(), Target::Handler(handler.clone()))?;
        }
        let mut layout = Self { bars: Default::default() };
        for ((info, mut traps), ranges) in bars.iter().zip(trapped).zip(&mut layout.bars) {
            traps.sort_by_key(|trap| trap.range.start);
            *ranges = split(info, traps);
        }
        Ok(layout)
    }

    /// The range that holds the whole access; None if the access crosses into the next range.
    pub(super) fn find(&self, bar: usize, offset: u64, len: usize) -> Option<&BarRange> {
        let ranges = self.bars.get(bar)?;
        let at = ranges.partition_point(|range| range.range.end <= offset);
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        ranges.get(at).filter(|found| found.range.start <= offset && end <= found.range.end)
    }

    /// The mapped ranges, in order.
    pub(super) fn mapped(&self) -> impl Iterator<Item = (usize, Range<u64>)> + '_ {
        self.select(|target| matches!(target, Target::Hardware { mapped: true }))
    }

    /// The ranges that must never be mapped.
    pub(super) fn trapped(&self) -> impl Iterator<Item = (usize, Range<u64>)> + '_ {
        self.select(|target| !matches!(target, Target::Hardware { .. }))
    }

    /// The handlers given at construction.
    pub(super) fn handlers(&self) -> impl Iterator<Item = &Arc<dyn BarHandler>> + '_ {
        self.bars.iter().flatten().filter_map(|range| match &range.target {
            Target::Handler(handler) => Some(handler),
            _ => None,
        })
    }

    fn select(&self, choose: fn(&Target) -> bool) -> impl Iterator<Item = (usize, Range<u64>)> + '_ {
        let ranges = self.bars.iter().enumerate();
        ranges.flat_map(move |(bar, ranges)| {
            ranges
                .iter()
                .filter(move |range| choose(&range.target))
                .map(move |range| (bar, range.range.clone()))
        })
    }
}

/// Fills the gaps between the traps of one BAR.
fn split(info: &BarInfo, traps: Vec<BarRange>) -> Vec<BarRange> {
    let mut ranges = Vec::new();
    let mut done = 0;
    for trap in traps {
        fill(&mut ranges, info.mappable, done..trap.range.start);
        done = trap.range.end;
        ranges.push(trap);
    }
    fill(&mut ranges, info.mappable, done..info.size);
    ranges
}

/// Maps only whole pages of a gap: the pages at its ends may hold a piece of a trap.
fn fill(ranges: &mut Vec<BarRange>, mappable: bool, gap: Range<u64>) {
    let mut push = |range: Range<u64>, mapped| {
        if !range.is_empty() {
            ranges.push(BarRange { range, target: Target::Hardware { mapped } });
        }
    };
    let first = gap.start.next_multiple_of(PAGE);
    let last = gap.end / PAGE * PAGE;
    if !mappable || first >= last {
        return push(gap, false);
    }
    push(gap.start..first, false);
    push(first..last, true);
    push(last..gap.end, false);
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of ranges, some of one range")]
mod tests {
    use super::*;

    struct Nothing;

    impl BarHandler for Nothing {
        fn read(&self, _offset: u64, _data: &mut [u8]) {}
        fn write(&self, _offset: u64, _data: &[u8]) {}
    }

    fn one_bar(size: u64, mappable: bool, traps: &[Range<u64>]) -> Result<Layout, FunctionError> {
        let mut bars = [BarInfo::default(); BARS];
        bars[0] = BarInfo { size, mappable, ..BarInfo::default() };
        let traps: Vec<_> = traps
            .iter()
            .map(|range| TrappedRange { bar: 0, range: range.clone(), handler: Arc::new(Nothing) })
            .collect();
        Layout::new(&bars, None, &traps)
    }

    #[test]
    fn only_whole_pages_without_traps_are_mapped() {
        let check = |size, mappable, traps: &[Range<u64>], mapped: &[Range<u64>]| {
            let layout = one_bar(size, mappable, traps).unwrap();
            let found: Vec<_> = layout.mapped().map(|(_, range)| range).collect();
            assert_eq!(found, mapped, "{size:#x} {traps:x?}");
            let mut end = 0;
            for range in &layout.bars[0] {
                assert_eq!(range.range.start, end, "no gaps");
                end = range.range.end;
            }
            assert_eq!(end, size);
        };
        check(0x4000, true, &[], &[0..0x4000]);
        check(0x4000, false, &[], &[]);
        check(0x800, true, &[], &[]);
        check(0x4000, true, &[0..0x1000], &[0x1000..0x4000]);
        check(0x4000, true, &[0x1ff0..0x2010], &[0..0x1000, 0x3000..0x4000]);
        check(0x4000, true, &[0x2800..0x2900, 0x2000..0x2100], &[0..0x2000, 0x3000..0x4000]);
        check(0x4000, true, &[0x3fff..0x4000], &[0..0x3000]);
    }

    #[test]
    fn traps_must_fit_and_not_overlap() {
        let check = |traps: &[Range<u64>], ok: bool| {
            assert_eq!(one_bar(0x4000, true, traps).is_ok(), ok, "{traps:x?}");
        };
        check(&[0x3000..0x4000], true);
        check(&[0x3000..0x4001], false);
        check(&[0x1000..0x1000], false);
        check(&[0..0x1000, 0xfff..0x1001], false);
        check(&[0..0x1000, 0x1000..0x1001], true);
    }

    #[test]
    fn an_access_belongs_to_the_range_that_holds_it_all() {
        let layout = one_bar(0x4000, true, &[0x1000..0x1010]).unwrap();
        let start = |offset, len| layout.find(0, offset, len).map(|range| range.range.start);
        assert_eq!(start(0xffc, 4), Some(0));
        assert_eq!(start(0xffe, 4), None);
        assert_eq!(start(0x1000, 8), Some(0x1000));
        assert_eq!(start(0x1010, 4), Some(0x1010));
        assert_eq!(start(0x3ffc, 8), None);
        assert_eq!(start(u64::MAX, 8), None);
    }
}
