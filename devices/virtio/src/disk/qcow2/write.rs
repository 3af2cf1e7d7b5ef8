// SPDX-License-Identifier: Apache-2.0

//! Writes, zeroes, discards and the flush.
//!
//! A write to an allocated cluster goes to its place. Any other write takes new clusters: data and
//! refcounts come first, and the mapping changes in the cache only. The flush puts both in order
//! onto stable storage:
//!
//! 1. Refcounts are written, then all is synced: new clusters are counted and full.
//! 2. Mappings are written, then all is synced: the disk has its new contents.
//! 3. Clusters without a mapping now get free, in the cache. A later flush writes that.
//!
//! So the file has a consistent image at any moment, and between two calls of `fdatasync` with any
//! part of the writes since the first one.

use std::io;

use vm_memory::VolatileSlice;

use super::{
    allocate::Run,
    cache::Kind,
    error::Damage,
    image::{COPIED, Image, Mapping, OFFSET, ZERO},
};
use crate::queue::{length, part};

/// The most clusters that a write allocates at once.
const MOST_CLUSTERS: usize = 1024;
/// The most runs of clusters to free, until a flush does it.
const MOST_UNMAPPED: usize = 1 << 16;

impl Image {
    pub(super) fn write(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let len = length(buffers);
        let mut done = 0;
        while done < len {
            self.begin()?;
            let rest = part(buffers, done, len - done);
            done += match self.write_some(offset + done, &rest) {
                // Clusters without a mapping get free by a flush.
                Err(error) if is_full(&error) && !self.writer()?.unmapped.is_empty() => {
                    self.flush()?;
                    self.writer()?.search_freed();
                    self.write_some(offset + done, &rest)?
                }
                result => result?,
            };
        }
        Ok(())
    }

    /// Makes room in the cache for the changes of a step.
    fn begin(&mut self) -> io::Result<()> {
        let writer = self.writer()?;
        if writer.lost {
            return Err(Damage::LostWrites.into());
        }
        if writer.unmapped.len() >= MOST_UNMAPPED || self.cache.is_pressed() {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes the first bytes of `buffers`. Returns their count.
    fn write_some(&mut self, at: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<u64> {
        let (cluster, left) = (self.cluster(), length(buffers));
        let head = at % cluster;
        let first = self.lookup(at)?;
        let mut span = (cluster - head).min(left);
        if let Mapping::Data { host, own: true } = first {
            while span < left
                && self.lookup(at + span)? == (Mapping::Data { host: host + head + span, own: true })
            {
                span += cluster.min(left - span);
            }
            self.check_data(host, head + span)?;
            self.storage.write_buffers(host + head, &part(buffers, 0, span))?;
            return Ok(span);
        }
        let table = self.own_table(at)?;
        let mut old = vec![first];
        let reused = reusable(first);
        let table_end = self.table_end(at);
        while span < left && reused.is_none() && old.len() < MOST_CLUSTERS && at + span < table_end {
            let next = self.lookup(at + span)?;
            if reusable(next).is_some() || matches!(next, Mapping::Data { own: true, .. }) {
                break;
            }
            old.push(next);
            span += cluster.min(left - span);
        }
        let run = if let Some(host) = reused {
            self.check_data(host, cluster)?;
            Run { first: host / cluster, count: 1, fresh: false }
        } else {
            self.allocate(old.len() as u64)?
        };
        span = span.min(run.count * cluster - head);
        let mut mapped = 0;
        let result = self.fill(at, span, run, buffers).and_then(|()| {
            for (number, old) in (0..run.count).zip(old) {
                let entry = ((run.first + number) * cluster) | COPIED;
                self.map(table, at + number * cluster, entry, old)?;
                mapped += 1;
            }
            Ok(())
        });
        if let Err(error) = result {
            if reused.is_none() {
                self.release(Run { first: run.first + mapped, count: run.count - mapped, fresh: false });
            }
            return Err(error);
        }
        Ok(span)
    }

    /// Writes data to new clusters, and around it the contents of the old ones.
    fn fill(&mut self, at: u64, span: u64, run: Run, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let cluster = self.cluster();
        let (head, host) = (at % cluster, run.first * cluster);
        let end = head + span;
        self.copy(at - head, host, head, run.fresh)?;
        self.copy(at + span, host + end, end.next_multiple_of(cluster) - end, run.fresh)?;
        self.storage.write_buffers(host + head, &part(buffers, 0, span))
    }

    /// Copies contents of one cluster of the disk to the file. `fresh`: zeroes are there.
    fn copy(&mut self, at: u64, to: u64, len: u64, fresh: bool) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        if self.is_zero(at)? {
            return if fresh { Ok(()) } else { self.storage.write_zeroes(to, len) };
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        self.read(at, &[bytes.as_mut_slice().into()])?;
        self.storage.write(to, &bytes)
    }

    /// Checks the place of data that is to be overwritten.
    fn check_data(&self, host: u64, len: u64) -> Result<(), Damage> {
        let valid = host < self.storage.len()
            && host.saturating_add(len) <= self.used_end()
            && !self.is_metadata(&(host..host + len));
        if valid { Ok(()) } else { Err(Damage::Data { at: host }) }
    }

    /// The first byte of the disk behind the L2 table for `at`.
    fn table_end(&self, at: u64) -> u64 {
        let covered = self.cluster() * self.header.l2_entries();
        at - at % covered + covered
    }

    /// The L2 table for a byte of the disk, to be changed. It is made if there is none.
    fn own_table(&mut self, at: u64) -> io::Result<u64> {
        let entry = self.l1_entry(at)?;
        let table = entry & OFFSET;
        if table != 0 {
            self.check_table(table)?;
            // A table that is shared with a snapshot has no such bit.
            return if entry & COPIED != 0 {
                Ok(table)
            } else {
                Err(Damage::SharedTable { at: table }.into())
            };
        }
        let run = self.allocate(1)?;
        let table = run.first * self.cluster();
        let entry_at = self.l1_entry_at(at);
        // The first step of the flush makes the zeroes durable, before L1 has the table. They are written also where zeroes are
        // read: so the table has its room on the host, and a flush needs none.
        let zeroed = self.storage.write_zeroes(table, self.cluster());
        let result =
            zeroed.and_then(|()| self.cache.write(&mut self.storage, Kind::Map, entry_at, 8, table | COPIED));
        if let Err(error) = result {
            self.release(run);
            return Err(error);
        }
        Ok(table)
    }

    /// Changes a mapping. The old cluster gets free at the next flush.
    fn map(&mut self, table: u64, at: u64, entry: u64, old: Mapping) -> io::Result<()> {
        let entry_at = self.l2_entry_at(table, at);
        self.cache.write(&mut self.storage, Kind::Map, entry_at, 8, entry)?;
        let cluster = self.cluster();
        let unmapped = match old {
            Mapping::Data { host, .. } | Mapping::Zero { host: Some(host), .. } if host == entry & OFFSET => {
                None
            }
            Mapping::Data { host, .. } | Mapping::Zero { host: Some(host), .. } => Some((host / cluster, 1)),
            Mapping::Compressed { at, len } => {
                let first = at / cluster;
                Some((first, (at + len - 1) / cluster - first + 1))
            }
            Mapping::Zero { host: None, .. } | Mapping::Unallocated => None,
        };
        self.writer()?.unmapped.extend(unmapped);
        Ok(())
    }

    /// Lets whole clusters read as zeroes. `keep`: allocated ones stay so.
    fn zero_clusters(&mut self, from: u64, to: u64, keep: bool) -> io::Result<()> {
        let mut at = from;
        while at < to {
            self.begin()?;
            let visible = self.has_backing(at);
            if !visible && self.l1_entry(at)? & OFFSET == 0 {
                at = self.table_end(at);
                continue;
            }
            let old = self.lookup(at)?;
            let entry = match old {
                Mapping::Unallocated if !visible => None,
                Mapping::Zero { host: None, .. } => None,
                Mapping::Zero { host: Some(_), own: true } if keep => None,
                Mapping::Data { host, own: true } if keep => Some(host | COPIED | ZERO),
                _ => Some(if visible { ZERO } else { 0 }),
            };
            if let Some(entry) = entry {
                let table = self.own_table(at)?;
                self.map(table, at, entry, old)?;
            }
            at += self.cluster();
        }
        Ok(())
    }

    /// The whole clusters of a range. The last cluster of the disk may be cut.
    fn whole_clusters(&self, offset: u64, len: u64) -> (u64, u64) {
        let cluster = self.cluster();
        let end = offset + len;
        let to = if end == self.header.size { end.next_multiple_of(cluster) } else { end - end % cluster };
        (offset.next_multiple_of(cluster), to)
    }

    pub(super) fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let (from, to) = self.whole_clusters(offset, len);
        self.zero_clusters(from, to, false)
    }

    pub(super) fn write_zeroes(&mut self, offset: u64, len: u64, may_discard: bool) -> io::Result<()> {
        let (from, to) = self.whole_clusters(offset, len);
        let end = offset + len;
        self.zero_part(offset, from.min(end))?;
        self.zero_clusters(from, to, !may_discard)?;
        self.zero_part(to.max(from), end)
    }

    /// Fills a part of a cluster with zeroes.
    fn zero_part(&mut self, from: u64, to: u64) -> io::Result<()> {
        if from >= to || self.is_zero(from)? {
            return Ok(());
        }
        let mut zeroes = vec![0; usize::try_from(to - from).unwrap_or_default()];
        self.write(from, &[zeroes.as_mut_slice().into()])
    }

    /// Makes all completed changes durable.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.writer()?.lost {
            return Err(Damage::LostWrites.into());
        }
        self.cache.write_changed(&mut self.storage, Kind::Refcounts)?;
        self.sync()?;
        if self.cache.has_changed_mappings() {
            self.cache.write_changed(&mut self.storage, Kind::Map)?;
            self.sync()?;
        }
        if self.writer()?.unmapped.is_empty() { Ok(()) } else { self.free_unmapped() }
    }
}

/// Whether the host has no room for the file.
fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    // The format's own limit has no room to find.
    let of_host = error.get_ref().is_none();
    of_host && matches!(error.kind(), FileTooLarge | QuotaExceeded | StorageFull)
}

/// The cluster of the file that a zero cluster has for later writes.
fn reusable(mapping: Mapping) -> Option<u64> {
    match mapping {
        Mapping::Zero { host, own: true } => host,
        _ => None,
    }
}
