// SPDX-License-Identifier: Apache-2.0

//! Refcounts, and the allocation of clusters.
//!
//! A cluster is in one of these states. Each step needs the one before it on stable storage, which
//! the flush sees to (`write.rs`):
//!
//! ```text
//! free (refcount 0) ─▶ counted, data written ─▶ mapped
//!        ▲                                        │
//!        └──────── mapping removed ◀──────────────┘
//! ```
//!
//! A crash between two steps leaves a counted cluster without a mapping: a leak, which `qemu-img
//! check -r leaks` finds.

use std::io;

use super::{
    cache::Kind,
    error::Damage,
    header::{MOST_REFCOUNT_TABLE, REFCOUNT_TABLE_AT},
    image::{Image, OFFSET},
};

/// The most refcounts to look at for a free cluster inside of the file. The next allocation goes on.
const MOST_INSIDE: u64 = 4096;
/// The most refcounts to skip behind the end of the file.
const MOST_BEHIND: u64 = 1 << 16;
/// The file grows by this many bytes at least.
const GROWTH: u64 = 1 << 20;

/// Clusters in a row, which have refcounts and no mapping yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) count: u64,
    /// Nothing was ever written there: they read as zeroes.
    pub(super) fresh: bool,
}

/// The state of a writable image.
pub(super) struct Writer {
    /// The next cluster to look at for a free one. It moves forward, and from the end to `freed`: a
    /// search that began anew at each cluster that gets free would never see those at the end.
    next: u64,
    /// The lowest cluster that got free since `next` was there.
    freed: u64,
    /// The clusters from here on were never used.
    end: u64,
    /// Clusters whose mappings are removed, but perhaps not in the file: first and count.
    pub(super) unmapped: Vec<(u64, u64)>,
    /// A flush has failed, and the host may have dropped data.
    pub(super) lost: bool,
}

impl Writer {
    pub(super) fn new(end: u64) -> Self {
        Self { next: 0, freed: u64::MAX, end, unmapped: Vec::new(), lost: false }
    }
}

impl Writer {
    /// Lets the next search begin with clusters that got free: those at the end need room.
    pub(super) fn search_freed(&mut self) {
        self.next = self.next.min(self.freed);
    }

    /// Lets the next searches begin behind the end of the file. Returns the state for [`Self::search_inside_again`].
    pub(super) fn skip_inside(&mut self) -> (u64, u64) {
        (std::mem::replace(&mut self.next, self.end), std::mem::replace(&mut self.freed, u64::MAX))
    }

    /// Ends the effect of [`Self::skip_inside`].
    pub(super) fn search_inside_again(&mut self, (next, freed): (u64, u64)) {
        (self.next, self.freed) = (next, self.freed.min(freed));
    }

    /// The first cluster that was never used.
    pub(super) fn end(&self) -> u64 {
        self.end
    }
}

impl Image {
    pub(super) fn writer(&mut self) -> io::Result<&mut Writer> {
        self.writer.as_mut().ok_or_else(|| io::ErrorKind::ReadOnlyFilesystem.into())
    }

    /// Refcounts in a block.
    pub(super) fn counts_per_block(&self) -> u64 {
        (self.cluster() * 8) >> self.header.refcount_order
    }

    /// The block with the refcount of a cluster.
    fn block(&mut self, cluster: u64) -> io::Result<Option<u64>> {
        let index = cluster / self.counts_per_block();
        if index >= self.header.refcount_table_clusters * self.cluster() / 8 {
            return Ok(None);
        }
        let at = self.header.refcount_table + index * 8;
        let block = self.cache.read(&mut self.storage, Kind::Refcounts, at, 8)? & (OFFSET | 0xff << 56);
        if block == 0 { Ok(None) } else { Ok(Some(self.check_table(block)?)) }
    }

    /// The place of a refcount: offset and bytes in the file, and its first bit.
    fn place(&self, block: u64, cluster: u64) -> (u64, usize, u32) {
        let order = self.header.refcount_order;
        let bit = (cluster % self.counts_per_block()) << order;
        // Refcounts of less than 8 bits begin with the lowest bits of a byte.
        (block + bit / 8, 1 << order.saturating_sub(3), u32::try_from(bit % 8).unwrap_or_default())
    }

    /// The refcount of a cluster. None if no block has it.
    pub(super) fn refcount(&mut self, cluster: u64) -> io::Result<Option<u64>> {
        let Some(block) = self.block(cluster)? else { return Ok(None) };
        let (at, len, shift) = self.place(block, cluster);
        let bytes = self.cache.read(&mut self.storage, Kind::Refcounts, at, len)?;
        Ok(Some(bytes >> shift & self.mask()))
    }

    fn mask(&self) -> u64 {
        u64::MAX >> (64 - (1_u32 << self.header.refcount_order))
    }

    /// Sets the refcount of a cluster that has a block.
    fn set_refcount(&mut self, cluster: u64, count: u64) -> io::Result<()> {
        let block = self.block(cluster)?.ok_or(Damage::Refcounts)?;
        let (at, len, shift) = self.place(block, cluster);
        let mut value = count;
        if self.header.refcount_order < 3 {
            let byte = self.cache.read(&mut self.storage, Kind::Refcounts, at, len)?;
            value = byte & !(self.mask() << shift) | count << shift;
        }
        self.cache.write(&mut self.storage, Kind::Refcounts, at, len, value)
    }

    /// Allocates up to `most` clusters in a row, one at least. The file reaches behind them.
    pub(super) fn allocate(&mut self, most: u64) -> io::Result<Run> {
        let first = self.find_free()?;
        let end = self.writer()?.end;
        let fresh = first >= end;
        // While clusters inside of the file are not all looked at, it grows as little as possible.
        let most = if fresh && self.writer()?.next < end { 1 } else { most };
        let mut count = 1;
        while count < most && self.refcount(first + count)? == Some(0) {
            // A run inside of the file does not go on behind its end.
            let cluster = first + count;
            if (cluster >= end) != fresh || self.is_metadata(&self.bytes(cluster, 1)) {
                break;
            }
            count += 1;
        }
        let run = Run { first, count, fresh };
        if let Err(error) = self.count(run) {
            self.release(run);
            return Err(error);
        }
        let writer = self.writer()?;
        writer.end = end.max(first + count);
        if writer.next == first {
            writer.next = first + count;
        }
        Ok(run)
    }

    fn count(&mut self, run: Run) -> io::Result<()> {
        for cluster in run.first..run.first + run.count {
            self.set_refcount(cluster, 1)?;
        }
        let end = self.bytes(run.first, run.count).end;
        if end & !OFFSET & !0x1ff != 0 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if end > self.storage.len() {
            let len = end.next_multiple_of(GROWTH.max(self.cluster()));
            self.storage.write(len - 1, &[0])?;
        }
        Ok(())
    }

    fn bytes(&self, first: u64, count: u64) -> std::ops::Range<u64> {
        let bits = self.header.cluster_bits;
        first << bits..(first + count) << bits
    }

    /// Finds a cluster with a refcount of 0 and a block.
    fn find_free(&mut self) -> io::Result<u64> {
        let Writer { mut next, mut end, .. } = *self.writer()?;
        for _ in 0..MOST_INSIDE {
            if next >= end {
                let writer = self.writer()?;
                next = std::mem::replace(&mut writer.freed, u64::MAX);
                if next >= end {
                    break;
                }
            }
            match self.refcount(next)? {
                Some(0) if !self.is_metadata(&self.bytes(next, 1)) => {
                    self.writer()?.next = next;
                    return Ok(next);
                }
                Some(_) => next += 1,
                // Without a block, anything may be there.
                None => next = (next / self.counts_per_block() + 1) * self.counts_per_block(),
            }
        }
        self.writer()?.next = next.min(end);
        for _ in 0..MOST_BEHIND {
            match self.refcount(end)? {
                Some(0) => return Ok(end),
                Some(_) => end += 1,
                None => end = self.add_block(end)?,
            }
            self.writer()?.end = end;
        }
        Err(Damage::Refcounts.into())
    }

    /// Makes the block for the refcount of `cluster`, which is the first one behind the end, and puts
    /// it there. Returns the next cluster.
    fn add_block(&mut self, cluster: u64) -> io::Result<u64> {
        let index = cluster / self.counts_per_block();
        if index >= self.header.refcount_table_clusters * self.cluster() / 8 {
            return self.enlarge_table(cluster);
        }
        self.write_block(cluster, cluster..cluster + 1)?;
        // The block is durable before the table has it.
        self.sync()?;
        let at = self.header.refcount_table + index * 8;
        self.cache.write_through(&mut self.storage, at, cluster << self.header.cluster_bits)?;
        Ok(cluster + 1)
    }

    /// Writes the block at cluster `at`, with refcounts of 1 for those of `used` that it has.
    fn write_block(&mut self, at: u64, used: std::ops::Range<u64>) -> io::Result<()> {
        let mut bytes = vec![0; usize::try_from(self.cluster()).unwrap_or_default()];
        for cluster in used {
            let (position, len, shift) = self.place(0, cluster);
            let last = usize::try_from(position).unwrap_or(usize::MAX).saturating_add(len - 1);
            if let Some(byte) = bytes.get_mut(last) {
                *byte |= 1 << shift;
            }
        }
        self.storage.write(at << self.header.cluster_bits, &bytes)
    }

    /// Makes a larger refcount table at cluster `first`, which is the first one behind the end, after
    /// the blocks for its own refcounts. Returns the next cluster.
    fn enlarge_table(&mut self, first: u64) -> io::Result<u64> {
        let (cluster, per_block) = (self.cluster(), self.counts_per_block());
        let old = self.header.clone();
        let first_block = first / per_block;
        let entries_per_cluster = cluster / 8;
        let grown = old.refcount_table_clusters + old.refcount_table_clusters / 2 + 1;
        let table_clusters = grown.max(first_block / entries_per_cluster + 2);
        if table_clusters * cluster > MOST_REFCOUNT_TABLE {
            return Err(Damage::Full.into());
        }
        let mut blocks = 1;
        while (first + blocks + table_clusters - 1) / per_block - first_block + 1 > blocks {
            blocks += 1;
        }
        if (first_block + blocks) > table_clusters * entries_per_cluster {
            return Err(Damage::Full.into());
        }
        let end = first + blocks + table_clusters;
        for block in first_block..first_block + blocks {
            let covered = block * per_block..(block + 1) * per_block;
            let used = first.max(covered.start)..end.min(covered.end);
            self.write_block(first + block - first_block, used)?;
        }
        let mut table = vec![0; usize::try_from(table_clusters * cluster).unwrap_or_default()];
        let old_bytes = usize::try_from(old.refcount_table_clusters * cluster).unwrap_or_default();
        self.storage.read(old.refcount_table, table.get_mut(..old_bytes).unwrap_or_default())?;
        for block in 0..blocks {
            let at = usize::try_from((first_block + block) * 8).unwrap_or(usize::MAX);
            let entry = (first + block) << old.cluster_bits;
            for (to, byte) in table.iter_mut().skip(at).zip(entry.to_be_bytes()) {
                *to = byte;
            }
        }
        let table_at = (first + blocks) << old.cluster_bits;
        self.storage.write(table_at, &table)?;
        // Blocks and table are durable before the header has them.
        self.sync()?;
        let count = u32::try_from(table_clusters).unwrap_or_default();
        let fields = [&table_at.to_be_bytes()[..], &count.to_be_bytes()].concat();
        self.storage.write(REFCOUNT_TABLE_AT, &fields)?;
        self.sync()?;
        let [.., old_range] = old.reserved();
        self.cache.forget(&old_range);
        self.header.refcount_table = table_at;
        self.header.refcount_table_clusters = table_clusters;
        self.writer()?.end = end;
        self.uncount(old.refcount_table >> old.cluster_bits, old.refcount_table_clusters)?;
        Ok(end)
    }

    /// Frees clusters that never had a mapping.
    pub(super) fn release(&mut self, run: Run) {
        for cluster in run.first..run.first + run.count {
            if self.set_refcount(cluster, 0).is_err() {
                // A leak.
                break;
            }
        }
        if let Some(writer) = &mut self.writer {
            writer.end = writer.end.max(run.first + run.count);
            writer.freed = writer.freed.min(run.first);
        }
    }

    /// Lowers the refcounts of clusters without a mapping in the file, and gives the host's room of
    /// free ones back.
    pub(super) fn uncount(&mut self, first: u64, count: u64) -> io::Result<()> {
        let mut free: Option<u64> = None;
        for cluster in first..first + count {
            let now_free = match self.refcount(cluster)? {
                Some(old @ 1..) if !self.is_metadata(&self.bytes(cluster, 1)) => {
                    self.set_refcount(cluster, old - 1)?;
                    old == 1
                }
                _ => false,
            };
            match (now_free, free) {
                (true, None) => free = Some(cluster),
                (false, Some(from)) => {
                    self.punch(from, cluster)?;
                    free = None;
                }
                _ => {}
            }
        }
        free.map_or(Ok(()), |from| self.punch(from, first + count))
    }

    fn punch(&mut self, from: u64, to: u64) -> io::Result<()> {
        let range = self.bytes(from, to - from);
        self.storage.punch(range.start, range.end - range.start)?;
        let writer = self.writer()?;
        writer.freed = writer.freed.min(from);
        Ok(())
    }

    /// Frees the clusters whose mappings are removed. The file has no mapping of them any more.
    pub(super) fn free_unmapped(&mut self) -> io::Result<()> {
        let mut unmapped = std::mem::take(&mut self.writer()?.unmapped);
        unmapped.sort_unstable();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (first, count) in unmapped {
            match runs.last_mut() {
                Some((start, len)) if *start + *len == first => *len += count,
                _ => runs.push((first, count)),
            }
        }
        for (first, count) in runs {
            self.uncount(first, count)?;
        }
        Ok(())
    }

    /// Makes the file's data durable. After a failure nothing more is promised.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        let result = self.storage.sync();
        if result.is_err() {
            self.writer()?.lost = true;
        }
        result
    }
}
