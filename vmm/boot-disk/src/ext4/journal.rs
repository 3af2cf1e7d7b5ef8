// SPDX-License-Identifier: Apache-2.0

//! The journal (jbd2, Documentation/filesystems/ext4/journal.rst), in big-endian numbers.
//!
//! Transactions that were committed, and not written to their places yet, are looked up while reading. Checksums are not
//! compared: a transaction without its commit block is left out, as is all behind it. Fast commits are left out, too: the
//! guest's own kernel applies them later.

use std::{cell::Cell, collections::BTreeMap};

use super::{JOURNAL, Shared};
use crate::{error::Fault, volume::field};

/// The first bytes of each block of the journal.
pub(super) const MAGIC: u32 = 0xc03b_3998;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOKE: u32 = 5;
/// Features of the journal (`s_feature_incompat`).
const WIDE: u32 = 0x2;
const CHECKSUM_2: u32 = 0x8;
const CHECKSUM_3: u32 = 0x10;
const FAST_COMMITS: u32 = 0x20;
const KNOWN: u32 = 0x1 | WIDE | 0x4 | CHECKSUM_2 | CHECKSUM_3 | FAST_COMMITS;
/// Flags of a tag: the block began with the magic number; its UUID is that of the tag before; it is the last one.
const ESCAPED: u32 = 1;
const SAME_UUID: u32 = 2;
const LAST: u32 = 8;
/// The most blocks of a journal that are not written to their places yet: 1 GiB in blocks of 4 KiB.
const MOST: u32 = 1 << 18;
/// The most revocations.
const MOST_REVOKED: usize = 100_000;

/// The blocks that the journal has newer contents of.
#[derive(Default)]
pub(super) struct Journal {
    /// By their places: the block of the journal, and whether its first bytes were replaced.
    blocks: BTreeMap<u64, (u64, bool)>,
}

impl Journal {
    /// The place of a block's newest contents, and whether its first bytes are missing.
    pub(super) fn place(&self, block: u64) -> (u64, bool) {
        self.blocks.get(&block).copied().unwrap_or((block, false))
    }

    /// The first block of a range that the journal has.
    pub(super) fn first(&self, from: u64, end: u64) -> Option<u64> {
        self.blocks.range(from..end.max(from)).next().map(|(block, _)| *block)
    }

    /// Reads the journal of a file system.
    pub(super) fn read(shared: &Shared) -> Result<Self, Fault> {
        let damaged = || Fault::Damaged("its journal");
        let inode = shared.inode(JOURNAL)?;
        let known = Cell::default();
        let block_of = |number: u32| {
            let mut bytes = vec![0; usize::try_from(shared.block).unwrap_or_default()];
            let offset = u64::from(number).saturating_mul(shared.block);
            shared.contents(&inode, &known, offset, &mut bytes)?;
            let place = known.get().after(number.into()).and_then(|run| run.place);
            Ok::<_, Fault>((bytes, place.ok_or_else(damaged)?))
        };
        let (superblock, _) = block_of(0)?;
        let word = |at: usize| u32::from_be_bytes(field(&superblock, at));
        let (most, first, start) = (word(0x10), word(0x14), word(0x1c));
        let features = if word(4) == 4 { word(0x28) } else { 0 };
        let fast = match features & FAST_COMMITS != 0 {
            true if word(0x54) == 0 => 256,
            true => word(0x54),
            false => 0,
        };
        let end = most.checked_sub(fast).filter(|end| first < *end);
        let Some(end) = end.filter(|_| word(0) == MAGIC && u64::from(word(0xc)) == shared.block) else {
            return Err(damaged());
        };
        let mut journal = Self::default();
        if start == 0 {
            return Ok(journal);
        }
        if features & !KNOWN != 0 {
            return Err(Fault::Unsupported(format!("a journal with the features {:#x}", features & !KNOWN)));
        }
        let layout = Layout { features };
        let (mut at, mut sequence) = (start, word(0x18));
        // Blocks of all transactions in their order, and the last transaction that revokes a block.
        let mut tags: Vec<(u64, u64, bool, u32)> = Vec::new();
        let mut revoked: BTreeMap<u64, u32> = BTreeMap::new();
        let (mut new_tags, mut new_revoked) = (Vec::new(), Vec::new());
        let next = |at: u32| if at + 1 >= end { first } else { at + 1 };
        let mut left = end.min(MOST);
        let too_long = || match end > MOST {
            true => Fault::Unsupported("a journal with more than 1 GiB of changes".to_owned()),
            false => damaged(),
        };
        while let Some(rest) = left.checked_sub(1).filter(|_| at < end) {
            left = rest;
            let (block, _) = block_of(at)?;
            let head = |at: usize| u32::from_be_bytes(field(&block, at));
            if head(0) != MAGIC || head(8) != sequence {
                break;
            }
            at = next(at);
            match head(4) {
                DESCRIPTOR => {
                    for (place, escaped) in layout.tags(&block) {
                        let Some(rest) = left.checked_sub(1) else { return Err(too_long()) };
                        left = rest;
                        let run = known.get().after(at.into());
                        let from = match run.and_then(|run| run.place) {
                            Some(from) => from,
                            None => block_of(at)?.1,
                        };
                        new_tags.push((place, from, escaped, sequence));
                        at = next(at);
                    }
                }
                REVOKE => {
                    new_revoked.extend(layout.revoked(&block));
                    if new_revoked.len() + revoked.len() > MOST_REVOKED {
                        let text = format!("a journal with more than {MOST_REVOKED} revocations");
                        return Err(Fault::Unsupported(text));
                    }
                }
                COMMIT => {
                    tags.append(&mut new_tags);
                    revoked.extend(new_revoked.drain(..).map(|block| (block, sequence)));
                    sequence = sequence.wrapping_add(1);
                }
                _ => break,
            }
        }
        if left == 0 && end > MOST {
            return Err(too_long());
        }
        for (place, from, escaped, of) in tags {
            // A block that a later transaction revokes has other contents at its place.
            let is_revoked = revoked.get(&place).is_some_and(|by| by.wrapping_sub(of) < 1 << 31);
            if is_revoked {
                journal.blocks.remove(&place);
            } else {
                journal.blocks.insert(place, (from, escaped));
            }
        }
        Ok(journal)
    }
}

/// The layout of descriptors, which depends on features.
struct Layout {
    features: u32,
}

impl Layout {
    fn has(&self, feature: u32) -> bool {
        self.features & feature != 0
    }

    /// The end of a block's tags or numbers: a checksum may follow.
    fn end(&self, block: &[u8]) -> usize {
        block.len().saturating_sub(if self.has(CHECKSUM_2 | CHECKSUM_3) { 4 } else { 0 })
    }

    /// The places of the blocks behind a descriptor, and whether their first bytes were replaced.
    fn tags(&self, block: &[u8]) -> Vec<(u64, bool)> {
        let word = |at: usize| u32::from_be_bytes(field(block, at));
        let (mut at, mut tags) = (12, Vec::new());
        // `journal_tag_bytes` of the kernel.
        let size = match self.has(CHECKSUM_3) {
            true => 16,
            false => 8 + if self.has(WIDE) { 4 } else { 0 } + if self.has(CHECKSUM_2) { 2 } else { 0 },
        };
        while at + size <= self.end(block) {
            let flags = if self.has(CHECKSUM_3) {
                word(at + 4)
            } else {
                u32::from(u16::from_be_bytes(field(block, at + 6)))
            };
            let high = if self.has(WIDE) { u64::from(word(at + 8)) << 32 } else { 0 };
            tags.push((high | u64::from(word(at)), flags & ESCAPED != 0));
            at += size + if flags & SAME_UUID == 0 { 16 } else { 0 };
            if flags & LAST != 0 {
                break;
            }
        }
        tags
    }

    /// The blocks that a revocation names.
    fn revoked(&self, block: &[u8]) -> Vec<u64> {
        let used = u32::from_be_bytes(field(block, 12));
        let end = usize::try_from(used).unwrap_or(usize::MAX).min(self.end(block));
        let numbers = block.get(16..end).unwrap_or_default();
        if self.has(WIDE) {
            numbers.chunks_exact(8).map(|bytes| u64::from_be_bytes(field(bytes, 0))).collect()
        } else {
            numbers.chunks_exact(4).map(|bytes| u32::from_be_bytes(field(bytes, 0)).into()).collect()
        }
    }
}
