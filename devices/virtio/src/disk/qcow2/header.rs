// SPDX-License-Identifier: Apache-2.0

//! The header of an image. Each field is checked here, against the others and the file's length.

use std::ops::Range;

use super::{error::Refusal, storage::Storage};
use crate::disk::SECTOR;

/// The most bytes of the L1 table, as in QEMU: 2 PiB of disk with clusters of 64 KiB.
pub(super) const MOST_L1: u64 = 32 << 20;
/// The most bytes of the refcount table, as in QEMU.
pub(super) const MOST_REFCOUNT_TABLE: u64 = 8 << 20;
/// Bytes of the longest header with known fields.
const LONGEST: usize = 112;
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// The most bytes of a backing file's name.
const MOST_NAME: u64 = 1023;
/// The offset of the field `size`.
pub(super) const SIZE_AT: u64 = 24;
/// The offset of the fields `l1_size` and `l1_table_offset`.
pub(super) const L1_SIZE_AT: u64 = 36;
/// The offset of the fields `refcount_table_offset` and `refcount_table_clusters`.
pub(super) const REFCOUNT_TABLE_AT: u64 = 48;
/// The offset of the field `autoclear_features`.
pub(super) const AUTOCLEAR_AT: u64 = 88;

/// The facts of a header.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    /// Bytes of the disk, without a last incomplete sector.
    pub(super) size: u64,
    pub(super) l1: u64,
    pub(super) l1_entries: u64,
    pub(super) refcount_table: u64,
    pub(super) refcount_table_clusters: u64,
    /// The logarithm of the bits of a refcount.
    pub(super) refcount_order: u32,
    pub(super) snapshots: u32,
    pub(super) autoclear: u64,
    /// The name in the header. Nothing opens it.
    pub(super) backing: Option<String>,
}

impl Header {
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster() / 8
    }

    /// The header's cluster, the L1 table and the refcount table, in bytes of the file.
    pub(super) fn reserved(&self) -> [Range<u64>; 3] {
        let refcounts = self.refcount_table_clusters << self.cluster_bits;
        [
            0..self.cluster(),
            self.l1..self.l1.saturating_add(self.l1_entries * 8),
            self.refcount_table..self.refcount_table.saturating_add(refcounts),
        ]
    }

    pub(super) fn read(storage: &Storage) -> Result<Self, Refusal> {
        let mut bytes = [0; LONGEST];
        storage.read(0, &mut bytes)?;
        let word = |at: usize| {
            bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes)
        };
        let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
        let len = storage.len();
        if word(0) != MAGIC {
            return Err(Refusal::NotQcow2);
        }
        let version = word(4);
        if len < 72 || version == 3 && len < 104 {
            return Err(Refusal::HeaderCut);
        }
        if !(2..=3).contains(&version) {
            return Err(Refusal::Version(version));
        }
        let cluster_bits = word(20);
        check("cluster_bits", cluster_bits.into(), (9..=21).contains(&cluster_bits))?;
        let cluster = 1_u64 << cluster_bits;

        let header_length = if version == 3 { u64::from(word(100)) } else { 72 };
        let fits = header_length >= if version == 3 { 104 } else { 72 } && header_length <= cluster;
        check("header_length", header_length, fits && header_length.is_multiple_of(8))?;
        if version == 3 {
            let compression = bytes.get(104).filter(|_| header_length > 104).copied().unwrap_or_default();
            features(long(72), compression)?;
        }
        if word(32) != 0 {
            return Err(Refusal::Encrypted(word(32)));
        }
        let refcount_order = if version == 3 { word(96) } else { 4 };
        check("refcount_order", refcount_order.into(), refcount_order <= 6)?;

        let header = Self {
            version,
            cluster_bits,
            size: long(24) / SECTOR * SECTOR,
            l1: long(40),
            l1_entries: word(36).into(),
            refcount_table: long(48),
            refcount_table_clusters: word(56).into(),
            refcount_order,
            snapshots: word(60),
            autoclear: if version == 3 { long(88) } else { 0 },
            backing: name(storage, long(8), word(16).into(), header_length..cluster)?,
        };
        header.check_tables(long(24), len)?;
        Ok(header)
    }

    fn check_tables(&self, size: u64, len: u64) -> Result<(), Refusal> {
        let cluster = self.cluster();
        let per_entry = cluster * self.l2_entries();
        let needed = size.div_ceil(per_entry);
        if needed > MOST_L1 / 8 {
            return Err(Refusal::TooLarge { size, largest: MOST_L1 / 8 * per_entry });
        }
        let entries = self.l1_entries;
        check("l1_size", entries, entries >= needed && entries <= MOST_L1 / 8)?;
        let inside = |at: u64, bytes: u64| {
            at.is_multiple_of(cluster) && at.checked_add(bytes).is_some_and(|end| end <= len)
        };
        check("l1_table_offset", self.l1, inside(self.l1, entries * 8))?;
        let bytes = self.refcount_table_clusters * cluster;
        let clusters = self.refcount_table_clusters;
        check("refcount_table_clusters", clusters, clusters > 0 && bytes <= MOST_REFCOUNT_TABLE)?;
        check("refcount_table_offset", self.refcount_table, inside(self.refcount_table, bytes))?;
        let [header, l1, refcounts] = self.reserved();
        let apart = |a: &Range<u64>, b: &Range<u64>| a.is_empty() || a.end <= b.start || b.end <= a.start;
        check("l1_table_offset", self.l1, apart(&l1, &header) && apart(&l1, &refcounts))?;
        check("refcount_table_offset", self.refcount_table, apart(&refcounts, &header))
    }
}

fn check(field: &'static str, value: u64, valid: bool) -> Result<(), Refusal> {
    if valid { Ok(()) } else { Err(Refusal::Header { field, value }) }
}

fn features(incompatible: u64, compression: u8) -> Result<(), Refusal> {
    const DIRTY: u64 = 1;
    const CORRUPT: u64 = 2;
    const EXTERNAL_DATA: u64 = 4;
    const COMPRESSION: u64 = 8;
    const EXTENDED_L2: u64 = 16;
    let has = |feature| incompatible & feature != 0;
    if incompatible & !(DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2) != 0 {
        Err(Refusal::Features(incompatible))
    } else if has(CORRUPT) {
        Err(Refusal::Corrupt)
    } else if has(DIRTY) {
        Err(Refusal::Dirty)
    } else if has(EXTERNAL_DATA) {
        Err(Refusal::ExternalData)
    } else if has(EXTENDED_L2) {
        Err(Refusal::ExtendedL2)
    } else if has(COMPRESSION) || compression != 0 {
        Err(Refusal::Compression(compression))
    } else {
        Ok(())
    }
}

/// The name of the backing file, which is in the rest of the header's cluster.
fn name(storage: &Storage, at: u64, len: u64, room: Range<u64>) -> Result<Option<String>, Refusal> {
    if at == 0 || len == 0 {
        return Ok(None);
    }
    check("backing_file_size", len, len <= MOST_NAME)?;
    let inside =
        at >= room.start && at.checked_add(len).is_some_and(|end| end <= room.end.min(storage.len()));
    check("backing_file_offset", at, inside)?;
    let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
    storage.read(at, &mut bytes)?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}
