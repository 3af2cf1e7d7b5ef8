// SPDX-License-Identifier: Apache-2.0

//! The format of a new image over a chain, for writes that end with the process.
//!
//! The file is empty and has no name. No other process ever reads it, and after a crash it is gone. So its parts are written in
//! any order, and without a flush.

use super::{
    error::Refusal,
    header::{MAGIC, MOST_L1},
    storage::Storage,
};

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Bytes of the disk that an L1 entry covers.
const PER_ENTRY: u64 = CLUSTER * (CLUSTER / 8);
/// The largest disk in bytes.
const MOST: u64 = MOST_L1 / 8 * PER_ENTRY;
/// Refcounts of 16 bits: one block has those of the first 2 GiB of the file, and the longest L1 table ends before.
const REFCOUNT_ORDER: u32 = 4;
/// The first clusters of the file: the header, the refcount table, its block, the L1 table.
const REFCOUNT_TABLE: u64 = CLUSTER;
const REFCOUNT_BLOCK: u64 = 2 * CLUSTER;
const L1: u64 = 3 * CLUSTER;
/// Bytes of the header without a compression type, and of the end of its extensions.
const HEADER: u32 = 104;
const EXTENSIONS: u32 = 8;
/// The name of the backing file. The format has no backing file without a name, and nothing opens this one.
const NAME: &[u8] = b"base";

/// Writes an image for a disk of `size` bytes, whose clusters are all in its backing file.
pub(super) fn format(storage: &mut Storage, size: u64) -> Result<(), Refusal> {
    if storage.len() > 0 {
        return Err(Refusal::OverlayInUse);
    }
    if size > MOST {
        return Err(Refusal::OverlayTooLarge { size, largest: MOST });
    }
    let entries = size.div_ceil(PER_ENTRY);
    let l1 = (entries * 8).next_multiple_of(CLUSTER);
    // The zeroes have their room on the host: a flush needs none.
    storage.write_zeroes(0, L1 + l1)?;
    storage.write(0, &header(size, u32::try_from(entries).unwrap_or_default()))?;
    storage.write(REFCOUNT_TABLE, &REFCOUNT_BLOCK.to_be_bytes())?;
    let used = usize::try_from((L1 + l1) / CLUSTER).unwrap_or_default();
    storage.write(REFCOUNT_BLOCK, &1_u16.to_be_bytes().repeat(used))?;
    Ok(())
}

/// The header, in version 3, and the backing file's name.
fn header(size: u64, l1_entries: u32) -> Vec<u8> {
    let name_at = u64::from(HEADER + EXTENSIONS);
    let name_len = u32::try_from(NAME.len()).unwrap_or_default();
    let (word, long) = (|value: u32| value.to_be_bytes().to_vec(), |value: u64| value.to_be_bytes().to_vec());
    [
        [word(MAGIC), word(3), long(name_at), word(name_len)].concat(),
        // Without encryption.
        [word(CLUSTER_BITS), long(size), word(0)].concat(),
        [word(l1_entries), long(L1)].concat(),
        [long(REFCOUNT_TABLE), word(1)].concat(),
        // Without snapshots and features.
        [word(0), long(0), long(0), long(0), long(0)].concat(),
        [word(REFCOUNT_ORDER), word(HEADER)].concat(),
        long(0),
        NAME.to_vec(),
    ]
    .concat()
}
