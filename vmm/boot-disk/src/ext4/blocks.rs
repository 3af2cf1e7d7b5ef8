// SPDX-License-Identifier: Apache-2.0

//! The blocks of a file: an extent tree, or the block map of ext2. Each search goes down the tree once.

use super::{EXTENTS, Inode, Shared};
use crate::{
    error::Fault,
    volume::{u16_at, u32_at},
};

const EXTENT_MAGIC: u16 = 0xf30a;
/// The deepest tree (`EXT4_MAX_EXTENT_DEPTH`).
const DEPTH: u16 = 5;
/// The longest extent that is written; longer ones are reserved only, and read as zeroes.
const WRITTEN: u16 = 0x8000;
const ENTRY: usize = 12;

/// Blocks of a file that follow each other.
#[derive(Clone, Copy, Default)]
pub(super) struct Run {
    first: u64,
    /// How many.
    pub(super) count: u64,
    /// The first one's place on the disk. None for a hole.
    pub(super) place: Option<u64>,
}

impl Run {
    /// The part of the run from block `number` of the file on. None if that one is not in it.
    pub(super) fn after(self, number: u64) -> Option<Self> {
        let skipped = number.checked_sub(self.first).filter(|skipped| *skipped < self.count)?;
        let place = self.place.map(|place| place.saturating_add(skipped));
        Some(Self { first: number, count: self.count - skipped, place })
    }
}

/// The run that begins with block `number` of a file, or has it.
pub(super) fn run(shared: &Shared, inode: &Inode, number: u64) -> Result<Run, Fault> {
    let number = u32::try_from(number).map_err(|_| Fault::Damaged("the size of a file"))?;
    if inode.flags & EXTENTS == 0 {
        let place = mapped(shared, inode, number)?;
        return Ok(Run { first: number.into(), count: 1, place });
    }
    let mut node = inode.map.to_vec();
    let mut expected = None;
    loop {
        let (entries, depth) = (u16_at(&node, 2), u16_at(&node, 6));
        let size = (usize::from(entries) + 1) * ENTRY;
        if u16_at(&node, 0) != EXTENT_MAGIC
            || depth > DEPTH
            || expected.is_some_and(|expected| expected != depth)
            || size > node.len()
        {
            return Err(Fault::Damaged("an extent tree"));
        }
        let used = node.get(ENTRY..size).unwrap_or_default();
        // Entries are in the order of their blocks.
        let (before, behind): (Vec<&[u8]>, Vec<&[u8]>) =
            used.chunks_exact(ENTRY).partition(|entry| u32_at(entry, 0) <= number);
        let next = behind.first().map(|entry| u32_at(entry, 0));
        let Some(entry) = before.last() else { return Ok(hole(number, next)) };
        let Some(below) = depth.checked_sub(1) else {
            let (first, len) = (u32_at(entry, 0), u16_at(entry, 4));
            let place = u64::from(u16_at(entry, 6)) << 32 | u64::from(u32_at(entry, 8));
            let (len, written) = if len > WRITTEN { (len - WRITTEN, false) } else { (len, true) };
            let run = Run { first: first.into(), count: len.into(), place: written.then_some(place) };
            return Ok(if run.after(number.into()).is_some() { run } else { hole(number, next) });
        };
        expected = Some(below);
        let child = u64::from(u16_at(entry, 8)) << 32 | u64::from(u32_at(entry, 4));
        node = shared.whole(child)?;
    }
}

/// Blocks without a place, up to the next entry of the same node.
fn hole(number: u32, next: Option<u32>) -> Run {
    let count = next.map_or(1, |next| u64::from(next.saturating_sub(number)).max(1));
    Run { first: number.into(), count, place: None }
}

/// The place of a block by the block map: 12 blocks, then one, two and three levels of blocks with numbers of blocks.
fn mapped(shared: &Shared, inode: &Inode, number: u32) -> Result<Option<u64>, Fault> {
    const DIRECT: u64 = 12;
    let per_block = shared.block / 4;
    let number = u64::from(number);
    let slot = |index: u64| usize::try_from(index.saturating_mul(4)).unwrap_or(usize::MAX);
    let Some(mut rest) = number.checked_sub(DIRECT) else {
        return Ok(place(u32_at(&inode.map, slot(number))));
    };
    let mut reach = per_block;
    for level in 0..3_u64 {
        if rest >= reach {
            rest -= reach;
            reach = reach.saturating_mul(per_block);
            continue;
        }
        let Some(mut block) = place(u32_at(&inode.map, slot(DIRECT + level))) else { return Ok(None) };
        for _ in 0..=level {
            reach /= per_block;
            let index = rest / reach.max(1);
            rest %= reach.max(1);
            let mut entry = [0; 4];
            shared.read(block, index.saturating_mul(4), &mut entry)?;
            let Some(next) = place(u32::from_le_bytes(entry)) else { return Ok(None) };
            block = next;
        }
        return Ok(Some(block));
    }
    Err(Fault::Damaged("the size of a file"))
}

fn place(block: u32) -> Option<u64> {
    (block != 0).then_some(block.into())
}
