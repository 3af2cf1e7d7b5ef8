// SPDX-License-Identifier: Apache-2.0

//! Enlarges an image. Each write leaves a consistent image of the old size, until the last one has the new size.

use std::io;

use super::{
    allocate::Run,
    cache::Kind,
    error::Damage,
    header::{L1_SIZE_AT, MOST_L1, SIZE_AT},
    image::{Backing, Image},
};
use crate::disk::GrowError;

/// The most allocations to find clusters in a row. Only a refcount block, at each 2048th cluster or more rarely,
/// interrupts a row behind the end of the file.
const ATTEMPTS: u32 = 16;
/// The most clusters to hide in one step. Tests have smaller disks.
const MOST_HIDDEN: u64 = if cfg!(test) { 16 } else { 1 << 14 };

impl Image {
    /// Takes a step to enlarge the disk to `size` bytes, whole sectors. Returns whether it was the last one. The new part reads
    /// as zeroes.
    pub(super) fn grow(&mut self, size: u64) -> io::Result<bool> {
        let old = self.header.size;
        if size <= old {
            return Ok(true);
        }
        let per_entry = self.cluster() * self.header.l2_entries();
        let entries = size.div_ceil(per_entry);
        if entries > MOST_L1 / 8 {
            return Err(GrowError::TooLarge { most: MOST_L1 / 8 * per_entry, wanted: size }.into());
        }
        self.flush()?;
        if entries > self.header.l1_entries {
            self.enlarge_l1(entries)?;
        }
        // Without this a longer backing file would appear behind the old end, and so would the last cluster's remainder.
        let backing = self.backing.as_ref().map_or(0, Backing::size);
        let visible = size.min(backing.max(old.next_multiple_of(self.cluster())));
        let from = self.hidden.max(old);
        let to =
            visible.min(from.saturating_add(MOST_HIDDEN * self.cluster()) / self.cluster() * self.cluster());
        self.write_zeroes(from, to.saturating_sub(from), true)?;
        self.hidden = to;
        if to < visible {
            return Ok(false);
        }
        self.flush()?;
        self.storage.write(SIZE_AT, &size.to_be_bytes())?;
        self.sync()?;
        self.header.size = size;
        Ok(true)
    }

    /// Replaces the L1 table by one with room for `entries`. All changes have been flushed before.
    fn enlarge_l1(&mut self, entries: u64) -> io::Result<()> {
        let (cluster, old) = (self.cluster(), self.header.clone());
        let clusters = (entries * 8).div_ceil(cluster);
        let run = self.allocate_row(clusters)?;
        if let Err(error) = self.prepare_l1(run) {
            self.release(run);
            return Err(error);
        }
        // From here on the file may have the new table, so after an error its clusters stay counted.
        self.use_l1(run, entries).inspect_err(|_| {
            if let Some(writer) = &mut self.writer {
                writer.lost = true;
            }
        })?;
        // The table may end within a cluster.
        let [_, l1, _] = old.reserved();
        let (first, end) = (l1.start / cluster, l1.end.div_ceil(cluster));
        self.cache.forget_all(&(l1.start..end * cluster));
        self.uncount(first, end - first)
    }

    /// Copies the L1 table to new clusters.
    fn prepare_l1(&mut self, run: Run) -> io::Result<()> {
        let cluster = self.cluster();
        let mut table = vec![0; usize::try_from(run.count * cluster).unwrap_or_default()];
        let old_bytes = usize::try_from(self.header.l1_entries * 8).unwrap_or_default();
        self.storage.read(self.header.l1, table.get_mut(..old_bytes).unwrap_or_default())?;
        self.storage.write(run.first * cluster, &table)?;
        // The table and its refcounts are durable before the header has it.
        self.cache.write_changed(&mut self.storage, Kind::Refcounts)?;
        self.sync()
    }

    /// Writes the place of the L1 table to the header.
    fn use_l1(&mut self, run: Run, entries: u64) -> io::Result<()> {
        let at = run.first * self.cluster();
        let count = u32::try_from(entries).unwrap_or_default();
        // Both fields are in one sector, so no crash separates them.
        self.storage.write(L1_SIZE_AT, &[&count.to_be_bytes()[..], &at.to_be_bytes()].concat())?;
        self.sync()?;
        (self.header.l1, self.header.l1_entries) = (at, entries);
        Ok(())
    }

    /// Allocates `count` clusters in a row, behind the end of the file.
    fn allocate_row(&mut self, count: u64) -> io::Result<Run> {
        let mut before = self.writer()?.skip_inside();
        let (mut row, mut broken): (Option<Run>, Vec<Run>) = (None, Vec::new());
        let mut result = Err(Damage::Scattered.into());
        for _ in 0..ATTEMPTS {
            let have = row.map_or(0, |run| run.count);
            // An enlarged refcount table frees the clusters of the old one.
            let (_, freed) = self.writer()?.skip_inside();
            before.1 = before.1.min(freed);
            let next = match self.allocate(count - have) {
                Ok(run) => run,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            };
            match &mut row {
                Some(run) if run.first + run.count == next.first => run.count += next.count,
                _ => broken.extend(row.replace(next)),
            }
            if let Some(run) = row.take_if(|run| run.count == count) {
                result = Ok(run);
                break;
            }
        }
        for run in broken.into_iter().chain(row) {
            self.release(run);
        }
        self.writer()?.search_inside_again(before);
        result
    }
}
