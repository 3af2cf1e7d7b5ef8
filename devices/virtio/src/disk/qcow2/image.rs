// SPDX-License-Identifier: Apache-2.0

//! An open image: mapping and reading.

use std::{fs::File, io, ops::Range};

use miniz_oxide::inflate::{
    TINFLStatus,
    core::{DecompressorOxide, decompress, inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF},
};
use vm_memory::VolatileSlice;

use super::{
    allocate::Writer,
    cache::{Cache, Kind},
    error::{Damage, Refusal},
    header::{AUTOCLEAR_AT, Header},
    overlay,
    storage::{Storage, clear},
};
use crate::{
    disk::SECTOR,
    queue::{length, part, write_bytes},
};

/// Bytes of the cache of a writable image.
const CACHE: u64 = 4 << 20;
/// Bytes of the cache of an image for reading, such as a backing file.
const READ_CACHE: u64 = 1 << 20;
/// The most L2 entries to search for data behind the end of the file: all of a disk of 16 TiB with
/// clusters of 64 KiB.
const MOST_SEARCHED: u64 = 1 << 28;

/// Bytes of refcounts to read at once.
const CHUNK: u64 = 64 << 10;

/// Bit of L1 and L2 entries: the cluster has one user, so it may be written.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Bit of L2 entries: the cluster reads as zeroes.
pub(super) const ZERO: u64 = 1;
/// Bits of entries: an offset in the file.
pub(super) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The place of a cluster of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// In the backing file, or zeroes without one.
    Unallocated,
    /// Zeroes. `host` is a cluster that is allocated for later writes.
    Zero { host: Option<u64>, own: bool },
    /// At this offset. `own`: no snapshot has it, too.
    Data { host: u64, own: bool },
    /// Compressed bytes of the file, up to the end of their last sector.
    Compressed { at: u64, len: u64 },
}

/// The place of contents to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Zeroes,
    Backing,
    File(u64),
    Compressed { at: u64, len: u64 },
}

/// The files below an image.
pub(super) enum Backing {
    Raw(Storage),
    Qcow2(Box<Image>),
}

impl Backing {
    /// The size in bytes: the last sector of a raw file may be cut.
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Raw(file) => file.len(),
            Self::Qcow2(image) => image.header.size,
        }
    }

    /// Reads any range. There are zeroes behind the end.
    fn read(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let len = length(buffers);
        let inside = self.size().saturating_sub(offset).min(len);
        clear(&part(buffers, inside, len - inside));
        let buffers = part(buffers, 0, inside);
        match self {
            Self::Raw(file) => file.read_buffers(offset, &buffers),
            Self::Qcow2(image) => image.read(offset, &buffers),
        }
    }
}

/// The smallest clusters of writable images, in bytes. Tests write smaller ones, whose tables grow sooner.
const LEAST_WRITABLE: u64 = if cfg!(any(test, feature = "test-support")) { 512 } else { 4096 };

pub(super) struct Image {
    pub(super) header: Header,
    pub(super) storage: Storage,
    pub(super) cache: Cache,
    pub(super) backing: Option<Backing>,
    /// None for reading only.
    pub(super) writer: Option<Writer>,
    /// The last compressed cluster that was read, by its offset. Nothing here writes such clusters.
    unpacked: Option<(u64, Vec<u8>)>,
    /// A growth has hidden all contents of the backing file between the end of the disk and here.
    pub(super) hidden: u64,
}

impl Image {
    pub(super) fn open(file: File, backing: Option<Backing>, writable: bool) -> Result<Self, Refusal> {
        Self::of_storage(Storage::new(file)?, backing, writable)
    }

    /// A new image in an empty file, with all of its contents in `backing`.
    pub(super) fn overlay(file: File, backing: Backing) -> Result<Self, Refusal> {
        let mut storage = Storage::new(file)?;
        overlay::format(&mut storage, backing.size() / SECTOR * SECTOR)?;
        Self::of_storage(storage, Some(backing), true)
    }

    fn of_storage(storage: Storage, backing: Option<Backing>, writable: bool) -> Result<Self, Refusal> {
        let header = Header::read(&storage)?;
        match (&header.backing, &backing) {
            (Some(name), None) => return Err(Refusal::BackingMissing(name.clone())),
            (None, Some(_)) => return Err(Refusal::BackingUnexpected),
            _ => {}
        }
        let cache = Cache::new(header.cluster(), if writable { CACHE } else { READ_CACHE });
        let mut image = Self { header, storage, cache, backing, writer: None, unpacked: None, hidden: 0 };
        image.check_end()?;
        if writable {
            image.prepare_writes()?;
        }
        Ok(image)
    }

    fn prepare_writes(&mut self) -> Result<(), Refusal> {
        if self.header.version < 3 {
            return Err(Refusal::WriteOld);
        }
        if self.cluster() < LEAST_WRITABLE {
            return Err(Refusal::WriteSmall(self.cluster()));
        }
        if self.header.snapshots > 0 {
            return Err(Refusal::WriteSnapshots);
        }
        if !self.storage.can_grow()? {
            return Err(Refusal::WriteDevice);
        }
        if self.header.autoclear != 0 {
            // Such a feature, for example a dirty bitmap, is inconsistent after a write.
            self.storage.write(AUTOCLEAR_AT, &[0; 8])?;
            self.storage.sync()?;
            self.header.autoclear = 0;
        }
        self.writer = Some(Writer::new(self.storage.len().div_ceil(self.cluster())));
        Ok(())
    }

    pub(super) fn cluster(&self) -> u64 {
        self.header.cluster()
    }

    /// Whether a part of the range is the header, the L1 table, the refcount table, or another table
    /// that is in the cache.
    pub(super) fn is_metadata(&self, range: &Range<u64>) -> bool {
        self.is_reserved(range) || self.cache.overlaps(range)
    }

    pub(super) fn is_reserved(&self, range: &Range<u64>) -> bool {
        self.header.reserved().iter().any(|part| range.start < part.end && part.start < range.end)
    }

    /// The first byte behind all clusters that may be in use. Those of a writable image behind it are for new ones.
    pub(super) fn used_end(&self) -> u64 {
        self.writer.as_ref().map_or(u64::MAX, |writer| writer.end() << self.header.cluster_bits)
    }

    /// Checks the place of an L2 table or of a refcount block.
    pub(super) fn check_table(&self, at: u64) -> Result<u64, Damage> {
        let cluster = self.cluster();
        let valid = at.is_multiple_of(cluster) && at < self.storage.len() && at < self.used_end();
        if valid && !self.is_reserved(&(at..at.saturating_add(cluster))) {
            Ok(at)
        } else {
            Err(Damage::Table { at })
        }
    }

    /// The file's offset of the L1 entry for a byte of the disk.
    pub(super) fn l1_entry_at(&self, at: u64) -> u64 {
        self.header.l1 + at / (self.cluster() * self.header.l2_entries()) * 8
    }

    /// The L1 entry for a byte of the disk.
    pub(super) fn l1_entry(&mut self, at: u64) -> io::Result<u64> {
        let entry_at = self.l1_entry_at(at);
        self.cache.read(&mut self.storage, Kind::Map, entry_at, 8)
    }

    /// The file's offset of the entry for a byte of the disk, in an L2 table.
    pub(super) fn l2_entry_at(&self, table: u64, at: u64) -> u64 {
        table + at / self.cluster() % self.header.l2_entries() * 8
    }

    /// The place of a byte of the disk.
    pub(super) fn lookup(&mut self, at: u64) -> io::Result<Mapping> {
        let table = self.l1_entry(at)? & OFFSET;
        if table == 0 {
            return Ok(Mapping::Unallocated);
        }
        let entry_at = self.l2_entry_at(self.check_table(table)?, at);
        let entry = self.cache.read(&mut self.storage, Kind::Map, entry_at, 8)?;
        if entry & COMPRESSED != 0 {
            // The descriptor has an offset in its low bits, and a count of further sectors.
            let bits = 62 - (self.header.cluster_bits - 8);
            let at = entry & ((1 << bits) - 1);
            let sectors = (entry & !(COPIED | COMPRESSED)) >> bits;
            return Ok(Mapping::Compressed { at, len: (sectors + 1) * 512 - at % 512 });
        }
        let (host, own) = (entry & OFFSET, entry & COPIED != 0);
        if !host.is_multiple_of(self.cluster()) {
            return Err(Damage::Data { at: host }.into());
        }
        // Version 2 has no zero clusters.
        Ok(if entry & ZERO != 0 && self.header.version >= 3 {
            Mapping::Zero { host: (host != 0).then_some(host), own }
        } else if host == 0 {
            Mapping::Unallocated
        } else {
            Mapping::Data { host, own }
        })
    }

    fn source(&mut self, at: u64) -> io::Result<Source> {
        let inside = at % self.cluster();
        Ok(match self.lookup(at)? {
            Mapping::Unallocated if self.has_backing(at) => Source::Backing,
            Mapping::Unallocated | Mapping::Zero { .. } => Source::Zeroes,
            Mapping::Data { host, .. } => Source::File(host + inside),
            Mapping::Compressed { at, len } => Source::Compressed { at, len },
        })
    }

    /// Whether an unallocated cluster at `at` may have other contents than zeroes.
    pub(super) fn has_backing(&self, at: u64) -> bool {
        self.backing.as_ref().is_some_and(|backing| at < backing.size())
    }

    /// Whether the cluster at `at` is known to read as zeroes.
    pub(super) fn is_zero(&mut self, at: u64) -> io::Result<bool> {
        Ok(self.source(at)? == Source::Zeroes)
    }

    /// Fills `buffers` with the disk's contents from `offset` on. The range may end behind the disk,
    /// inside of its last cluster.
    pub(super) fn read(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        let cluster = self.cluster();
        let len = length(buffers);
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let source = self.source(at)?;
            let mut span = (cluster - at % cluster).min(len - done);
            // Clusters that are together in the file take one call.
            while span < len - done {
                let next = self.source(at + span)?;
                let together = match source {
                    Source::File(host) => next == Source::File(host + span),
                    Source::Zeroes | Source::Backing => next == source,
                    Source::Compressed { .. } => false,
                };
                if !together {
                    break;
                }
                span += cluster.min(len - done - span);
            }
            let target = part(buffers, done, span);
            match (source, &mut self.backing) {
                (Source::Backing, Some(backing)) => backing.read(at, &target)?,
                (Source::Zeroes | Source::Backing, _) => clear(&target),
                (Source::File(host), _) => self.storage.read_buffers(host, &target)?,
                (Source::Compressed { at: packed, len }, _) => {
                    let bytes = self.unpack(packed, len)?;
                    let from = usize::try_from(at % cluster).unwrap_or_default();
                    write_bytes(&target, bytes.get(from..).unwrap_or_default());
                }
            }
            done += span;
        }
        Ok(())
    }

    /// The contents of a compressed cluster.
    fn unpack(&mut self, at: u64, len: u64) -> io::Result<&[u8]> {
        if self.unpacked.as_ref().is_none_or(|(last, _)| *last != at) {
            // The last sector may end behind the file.
            let have = len.min(self.storage.len().saturating_sub(at));
            let mut packed = vec![0; usize::try_from(have).unwrap_or_default()];
            self.storage.read(at, &mut packed)?;
            let size = usize::try_from(self.cluster()).unwrap_or_default();
            let mut bytes = vec![0; size];
            let flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
            let mut inflate = Box::<DecompressorOxide>::default();
            let (status, _, count) = decompress(&mut inflate, &packed, &mut bytes, 0, flags);
            let ended = matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput);
            if !ended || count != size {
                return Err(Damage::Compressed { at }.into());
            }
            self.unpacked = Some((at, bytes));
        }
        Ok(self.unpacked.as_ref().map(|(_, bytes)| bytes.as_slice()).unwrap_or_default())
    }

    /// Finds data behind the end of the file. Refcounts alone may be there after a power cut.
    fn check_end(&mut self) -> Result<(), Refusal> {
        let (cluster, len) = (self.cluster(), self.storage.len());
        if self.last_counted()?.is_some_and(|last| last < len / cluster) {
            return Ok(());
        }
        let mut searched = 0;
        for l1_index in 0..self.header.l1_entries {
            let from = l1_index * cluster * self.header.l2_entries();
            if from >= self.header.size {
                break;
            }
            let table = self.l1_entry(from)? & OFFSET;
            if table == 0 {
                continue;
            }
            if table >= len {
                return Err(Refusal::Truncated { offset: table, len });
            }
            searched += self.header.l2_entries();
            if searched > MOST_SEARCHED {
                break;
            }
            for index in 0..self.header.l2_entries() {
                let at = from + index * cluster;
                if at >= self.header.size {
                    break;
                }
                let visible = cluster.min(self.header.size - at);
                let (offset, end) = match self.lookup(at) {
                    Ok(Mapping::Data { host, .. }) => (host, host + visible),
                    Ok(Mapping::Compressed { at, .. }) => (at, at + 1),
                    // Other damage fails the requests that it concerns.
                    Ok(_) | Err(_) => continue,
                };
                if end > len {
                    return Err(Refusal::Truncated { offset, len });
                }
            }
        }
        Ok(())
    }

    /// The last cluster with a refcount. None if there is none, or its block is damaged.
    fn last_counted(&self) -> Result<Option<u64>, Refusal> {
        let (table, len) = (self.header.refcount_table, self.storage.len());
        let mut buffer = vec![0; usize::try_from(self.cluster().min(CHUNK)).unwrap_or_default()];
        let mut last = None;
        for from in (0..self.header.refcount_table_clusters * self.cluster()).step_by(buffer.len()) {
            self.storage.read(table + from, &mut buffer)?;
            for (index, entry) in (from / 8..).zip(buffer.chunks_exact(8)) {
                let block = entry.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
                if block >= len {
                    return Err(Refusal::Truncated { offset: block, len });
                }
                last = if block == 0 { last } else { Some((index, block)) };
            }
        }
        let Some((index, block)) = last else { return Ok(None) };
        if self.check_table(block).is_err() {
            return Ok(None);
        }
        let chunk = buffer.len() as u64;
        for from in (0..self.cluster() / chunk).rev().map(|number| number * chunk) {
            self.storage.read(block + from, &mut buffer)?;
            let nonzero = (from..).zip(&buffer).filter(|(_, byte)| **byte != 0).last();
            if let Some((at, byte)) = nonzero {
                let bit = at * 8 + u64::from(7 - byte.leading_zeros());
                return Ok(Some(index * self.counts_per_block() + (bit >> self.header.refcount_order)));
            }
        }
        Ok(None)
    }
}
