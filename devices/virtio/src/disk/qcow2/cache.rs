// SPDX-License-Identifier: Apache-2.0

//! A bounded cache of the image's tables, in slices of up to 4 KiB.
//!
//! Changed refcounts may reach the file at any time: too early, they are a leak at most. Changed
//! mappings stay here until a flush has made data and refcounts durable.

use std::{collections::BTreeMap, io, ops::Range};

use super::{error::Damage, storage::Storage};

/// The most bytes of a slice.
const SLICE: u64 = 4096;
/// Unchanged slices that stay in a cache that writes nothing.
const SPARE: usize = 16;

/// The tables, by the rule for their changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// L1 and L2 tables.
    Map,
    /// The refcount table and its blocks.
    Refcounts,
}

struct Slice {
    bytes: Box<[u8]>,
    kind: Kind,
    changed: bool,
    used: u64,
}

pub(super) struct Cache {
    /// By their offsets in the file.
    slices: BTreeMap<u64, Slice>,
    slice: u64,
    most: usize,
    clock: u64,
    /// Changed slices of mappings. They cannot leave.
    changed_map: usize,
    /// Changed slices stay, so that reads of the disk write nothing. The cache has up to `SPARE` slices more meanwhile.
    pub(super) writes_nothing: bool,
}

impl Cache {
    /// A cache of `bytes` bytes for an image with clusters of `cluster` bytes.
    pub(super) fn new(cluster: u64, bytes: u64) -> Self {
        let slice = SLICE.min(cluster);
        let most = usize::try_from(bytes / slice).unwrap_or(usize::MAX).max(8);
        Self { slices: BTreeMap::new(), slice, most, clock: 0, changed_map: 0, writes_nothing: false }
    }

    /// Whether the changed mappings take half of the cache: time for a flush.
    pub(super) fn is_pressed(&self) -> bool {
        self.changed_map >= self.most / 2
    }

    pub(super) fn has_changed_mappings(&self) -> bool {
        self.changed_map > 0
    }

    pub(super) fn has_changes(&self) -> bool {
        self.slices.values().any(|slice| slice.changed)
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.slices.values().map(|slice| slice.bytes.len()).sum()
    }

    /// Whether a part of the range is a table that is in use.
    pub(super) fn overlaps(&self, range: &Range<u64>) -> bool {
        let from = range.start.saturating_sub(self.slice - 1);
        range.start < range.end && self.slices.range(from..range.end).next().is_some()
    }

    /// Drops the slices of a range: it is a table no more.
    pub(super) fn forget(&mut self, range: &Range<u64>) {
        self.slices.retain(|at, slice| slice.kind == Kind::Map || !range.contains(at));
    }

    /// Drops all unchanged parts of a range of the file.
    pub(super) fn forget_all(&mut self, range: &Range<u64>) {
        self.slices.retain(|at, slice| slice.changed || !range.contains(at));
    }

    /// Reads a number of up to 8 bytes.
    pub(super) fn read(&mut self, storage: &mut Storage, kind: Kind, at: u64, len: usize) -> io::Result<u64> {
        let from = self.position(at);
        let slice = self.load(storage, kind, at)?;
        let bytes = slice.bytes.get(from..from + len).unwrap_or_default();
        Ok(bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    /// Changes a number of up to 8 bytes. The file gets it later.
    pub(super) fn write(
        &mut self,
        storage: &mut Storage,
        kind: Kind,
        at: u64,
        len: usize,
        value: u64,
    ) -> io::Result<()> {
        let from = self.position(at);
        let slice = self.load(storage, kind, at)?;
        let bytes = slice.bytes.get_mut(from..from + len).unwrap_or_default();
        bytes.copy_from_slice(value.to_be_bytes().get(8 - bytes.len()..).unwrap_or_default());
        let news = !slice.changed;
        slice.changed = true;
        self.changed_map += usize::from(news && kind == Kind::Map);
        Ok(())
    }

    /// Changes an entry of the refcount table, here and in the file.
    pub(super) fn write_through(&mut self, storage: &mut Storage, at: u64, value: u64) -> io::Result<()> {
        storage.write(at, &value.to_be_bytes())?;
        let from = self.position(at);
        let slice = self.load(storage, Kind::Refcounts, at)?;
        for (to, byte) in slice.bytes.iter_mut().skip(from).zip(value.to_be_bytes()) {
            *to = byte;
        }
        Ok(())
    }

    /// Writes the changed slices of a kind to the file.
    pub(super) fn write_changed(&mut self, storage: &mut Storage, kind: Kind) -> io::Result<()> {
        for (at, slice) in &mut self.slices {
            if slice.kind == kind && slice.changed {
                storage.write(*at, &slice.bytes)?;
                slice.changed = false;
                self.changed_map -= usize::from(kind == Kind::Map);
            }
        }
        Ok(())
    }

    fn position(&self, at: u64) -> usize {
        usize::try_from(at % self.slice).unwrap_or_default()
    }

    fn load(&mut self, storage: &mut Storage, kind: Kind, at: u64) -> io::Result<&mut Slice> {
        let start = at - at % self.slice;
        self.clock += 1;
        if !self.slices.contains_key(&start) {
            self.make_room(storage)?;
            let mut bytes = vec![0; usize::try_from(self.slice).unwrap_or_default()].into_boxed_slice();
            storage.read(start, &mut bytes)?;
            self.slices.insert(start, Slice { bytes, kind, changed: false, used: 0 });
        }
        let slice = self.slices.get_mut(&start).filter(|slice| slice.kind == kind);
        // A mapping table that is a refcount block, too.
        let slice = slice.ok_or(Damage::TwoTables { at: start })?;
        slice.used = self.clock;
        Ok(slice)
    }

    /// Drops the oldest quarter of a full cache.
    fn make_room(&mut self, storage: &mut Storage) -> io::Result<()> {
        if self.slices.len() < self.most {
            return Ok(());
        }
        let keeps = self.writes_nothing;
        let may_leave = |slice: &Slice| !slice.changed || slice.kind == Kind::Refcounts && !keeps;
        let mut ages: Vec<u64> = self.slices.values().filter(|s| may_leave(s)).map(|s| s.used).collect();
        if ages.is_empty() || keeps && ages.len() < SPARE {
            return Ok(());
        }
        let middle = ages.len() / 4;
        let (_, bound, _) = ages.select_nth_unstable(middle);
        let bound = *bound;
        for (at, slice) in &mut self.slices {
            if may_leave(slice) && slice.used <= bound && slice.changed {
                storage.write(*at, &slice.bytes)?;
                slice.changed = false;
            }
        }
        self.slices.retain(|_, slice| !(may_leave(slice) && slice.used <= bound));
        Ok(())
    }
}
