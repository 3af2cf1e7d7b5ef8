// SPDX-License-Identifier: Apache-2.0

//! FAT12, FAT16 and FAT32 with long names, for reading only (Microsoft's "FAT File System Specification", 1.03). Names are
//! compared without regard to the case of ASCII letters.
//!
//! Code of its own: the crate `fatfs`, which makes disks elsewhere, wants to write, and computes with the numbers of a boot
//! sector before it has checked them.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use crate::{
    error::Fault,
    filesystem::{Contents, FileSystem, MOST_NAMES, MOST_PATH},
    volume::{Volume, field, u16_at, u32_at},
};

/// Bytes of a directory entry.
const ENTRY: usize = 32;
/// Bytes of the table that are read at once.
const WINDOW: u64 = 4 << 10;
/// The most entries of a directory (the specification's limit is 65536).
const MOST_ENTRIES: u64 = 65_536;
/// Attributes: the volume's label, a directory; all four low bits mark a part of a long name.
const LABEL: u8 = 0x08;
const DIRECTORY: u8 = 0x10;
const LONG: u8 = 0x0f;
/// Characters of one part of a long name, and the most parts.
const PART: usize = 13;
const PARTS: usize = 20;

/// A file system.
pub(crate) struct Fat(Rc<Shared>);

#[derive(Clone, Copy, PartialEq)]
enum Width {
    Twelve,
    Sixteen,
    ThirtyTwo,
}

struct Shared {
    volume: Volume,
    width: Width,
    /// Bytes of a cluster.
    cluster: u64,
    clusters: u64,
    table: u64,
    /// The last part of the table that was read: its offset in the volume, and its bytes.
    window: RefCell<(u64, Vec<u8>)>,
    data: u64,
    root: Start,
}

/// The beginning of a file or directory.
#[derive(Clone, Copy)]
enum Start {
    /// The root directory of FAT12 and FAT16: its offset and length.
    Fixed(u64, u64),
    Cluster(u32),
}

struct Entry {
    name: String,
    is_directory: bool,
    cluster: u32,
    size: u32,
}

impl Fat {
    /// Opens the file system of a volume. None if it has no such one.
    pub(crate) fn open(volume: &Volume) -> Result<Option<Self>, Fault> {
        if volume.size() < 512 {
            return Ok(None);
        }
        let sector: [u8; 512] = volume.array(0)?;
        let byte = |at: usize| u64::from(sector.get(at).copied().unwrap_or(0));
        let word = |at: usize| u64::from(u16_at(&sector, at));
        let long = |at: usize| u64::from(u32_at(&sector, at));
        let (bytes, per_cluster, reserved, tables) = (word(11), byte(13), word(14), byte(16));
        let is_fat = u16_at(&sector, 510) == 0xaa55
            && matches!(byte(0), 0xeb | 0xe9)
            && matches!(bytes, 512 | 1024 | 2048 | 4096)
            && per_cluster.is_power_of_two()
            && reserved > 0
            && (1..=2).contains(&tables);
        if !is_fat {
            return Ok(None);
        }
        let damaged = || Fault::Damaged("its boot sector");
        let or = |short: u64, other: u64| if short != 0 { short } else { other };
        // All of these are below 2^41: no sum or product overflows.
        let (sectors, table) = (or(word(19), long(32)), or(word(22), long(36)));
        let root = (word(17) * ENTRY as u64).div_ceil(bytes);
        let first = reserved + tables * table + root;
        let clusters = sectors.checked_sub(first).ok_or_else(damaged)? / per_cluster;
        // Tools make FAT32 with fewer clusters than the specification has for it. Linux knows it by this field, too.
        let width = match clusters {
            0 => return Err(damaged()),
            _ if word(22) == 0 => Width::ThirtyTwo,
            1..4085 => Width::Twelve,
            _ => Width::Sixteen,
        };
        let start = match width {
            Width::ThirtyTwo => Start::Cluster(u32_at(&sector, 44)),
            _ => Start::Fixed((reserved + tables * table) * bytes, word(17) * ENTRY as u64),
        };
        Ok(Some(Self(Rc::new(Shared {
            volume: volume.clone(),
            width,
            cluster: bytes * per_cluster,
            clusters,
            table: reserved * bytes,
            window: RefCell::default(),
            data: first * bytes,
            root: start,
        }))))
    }

    fn resolve(&self, path: &str) -> Result<Option<Entry>, Fault> {
        let absent = || Fault::Absent(path.to_owned());
        if path.len() > MOST_PATH {
            return Err(absent());
        }
        let mut found: Option<Entry> = None;
        for name in path.split(['/', '\\']).filter(|name| !name.is_empty() && *name != ".") {
            let directory = self.0.start(found.as_ref()).ok_or_else(absent)?;
            let mut next = None;
            self.0.visit(directory, |entry| {
                // The way up is not followed: no path leaves its file system.
                if name != ".." && entry.name.eq_ignore_ascii_case(name) {
                    next = Some(entry);
                }
                next.is_none()
            })?;
            found = Some(next.ok_or_else(absent)?);
        }
        Ok(found)
    }
}

impl FileSystem for Fat {
    fn kind(&self) -> &'static str {
        "FAT"
    }

    fn list(&self, path: &str) -> Result<Vec<String>, Fault> {
        let found = self.resolve(path)?;
        let directory = self.0.start(found.as_ref()).ok_or_else(|| Fault::Absent(path.to_owned()))?;
        let mut names = Vec::new();
        self.0.visit(directory, |entry| {
            names.push(entry.name);
            names.len() < MOST_NAMES
        })?;
        Ok(names)
    }

    fn charge(&self, bytes: u64) -> Result<(), Fault> {
        self.0.volume.charge(bytes)
    }

    fn open(&self, path: &str) -> Result<Rc<dyn Contents>, Fault> {
        let entry = self.resolve(path)?.filter(|entry| !entry.is_directory);
        let entry = entry.ok_or_else(|| Fault::Absent(path.to_owned()))?;
        let place = Cell::new((0, entry.cluster));
        Ok(Rc::new(File { shared: Rc::clone(&self.0), first: entry.cluster, size: entry.size.into(), place }))
    }
}

impl Shared {
    /// The beginning of a directory; of the root without an entry. None for a file.
    fn start(&self, entry: Option<&Entry>) -> Option<Start> {
        match entry {
            None => Some(self.root),
            Some(entry) => entry.is_directory.then_some(Start::Cluster(entry.cluster)),
        }
    }

    /// The place of a cluster.
    fn place(&self, cluster: u32) -> Result<u64, Fault> {
        let index = u64::from(cluster).checked_sub(2).filter(|index| *index < self.clusters);
        let index = index.ok_or(Fault::Damaged("a chain of clusters"))?;
        Ok(self.data.saturating_add(index.saturating_mul(self.cluster)))
    }

    /// The cluster behind another one. None at the end of a chain.
    fn next(&self, cluster: u32) -> Result<Option<u32>, Fault> {
        self.place(cluster)?;
        let number = u64::from(cluster);
        let (next, end) = match self.width {
            Width::Twelve => {
                let pair = u32::from(u16::from_le_bytes(self.entry(number + number / 2)?));
                (if number.is_multiple_of(2) { pair & 0xfff } else { pair >> 4 }, 0xff8)
            }
            Width::Sixteen => (u32::from(u16::from_le_bytes(self.entry(number * 2)?)), 0xfff8),
            Width::ThirtyTwo => (u32::from_le_bytes(self.entry(number * 4)?) & 0x0fff_ffff, 0x0fff_fff8),
        };
        Ok((next < end).then_some(next))
    }

    /// Bytes of the table from an offset on.
    fn entry<const N: usize>(&self, offset: u64) -> Result<[u8; N], Fault> {
        // A chain is followed for each step's cost, whether it reads or not.
        self.volume.charge(0)?;
        let at = self.table + offset;
        let mut window = self.window.borrow_mut();
        let is_inside = |(start, bytes): &(u64, Vec<u8>)| {
            at.checked_sub(*start).is_some_and(|from| from + N as u64 <= bytes.len() as u64)
        };
        if !is_inside(&window) {
            // At least the entry: behind the end of the volume, the read fails.
            let len = WINDOW.min(self.volume.size().saturating_sub(at)).max(N as u64);
            window.1.clear();
            *window = (at, self.volume.bytes(at, usize::try_from(len).unwrap_or_default())?);
        }
        let from = usize::try_from(at - window.0).unwrap_or(usize::MAX);
        Ok(field(&window.1, from))
    }

    /// Calls `take(entry)` for each file and directory until it returns false.
    fn visit(&self, start: Start, mut take: impl FnMut(Entry) -> bool) -> Result<(), Fault> {
        let size = usize::try_from(self.cluster).unwrap_or_default();
        let mut long = LongName::default();
        let mut left = MOST_ENTRIES;
        let mut block = |bytes: &[u8]| {
            for entry in bytes.chunks_exact(ENTRY) {
                let Some(rest) = left.checked_sub(1) else { return false };
                left = rest;
                match entry.first() {
                    None | Some(0) => return false,
                    Some(0xe5) => long = LongName::default(),
                    Some(_) => {
                        if let Some(entry) = long.take(entry)
                            && !take(entry)
                        {
                            return false;
                        }
                    }
                }
            }
            true
        };
        match start {
            Start::Fixed(at, len) => {
                let bytes = self.volume.bytes(at, usize::try_from(len).unwrap_or_default())?;
                block(&bytes);
            }
            Start::Cluster(first) => {
                let mut cluster = Some(first);
                while let Some(number) = cluster {
                    if !block(&self.volume.bytes(self.place(number)?, size)?) {
                        break;
                    }
                    cluster = self.next(number)?;
                }
            }
        }
        Ok(())
    }
}

/// The long name that comes in parts before its entry, the last part first.
#[derive(Default)]
struct LongName {
    units: Vec<u16>,
    checksum: u8,
}

impl LongName {
    /// Takes an entry of a directory. Returns a file or directory when it is complete.
    fn take(&mut self, entry: &[u8]) -> Option<Entry> {
        let byte = |at: usize| entry.get(at).copied().unwrap_or(0);
        let attributes = byte(11);
        if attributes & 0x3f == LONG {
            if byte(0) & 0x40 != 0 || byte(13) != self.checksum {
                self.units.clear();
                self.checksum = byte(13);
            }
            let places = [(1, 5), (14, 6), (28, 2)].into_iter();
            let part = places.flat_map(|(at, count)| (0..count).map(move |n| u16_at(entry, at + 2 * n)));
            let mut part: Vec<u16> = part.collect();
            part.append(&mut self.units);
            part.truncate(PART * PARTS);
            self.units = part;
            return None;
        }
        let long = std::mem::take(self);
        if attributes & LABEL != 0 {
            return None;
        }
        let short = entry.get(..11).unwrap_or_default();
        let sum = short.iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        let units: Vec<u16> = long.units.into_iter().take_while(|unit| *unit != 0).collect();
        let name = if !units.is_empty() && long.checksum == sum {
            String::from_utf16_lossy(&units)
        } else {
            let part = |from: usize, to: usize| {
                let bytes = short.get(from..to).unwrap_or_default();
                String::from_utf8_lossy(bytes).trim_end().to_owned()
            };
            let (base, extension) = (part(0, 8), part(8, 11));
            if extension.is_empty() { base } else { format!("{base}.{extension}") }
        };
        let cluster = u32::from(u16_at(entry, 20)) << 16 | u32::from(u16_at(entry, 26));
        let entry =
            Entry { name, is_directory: attributes & DIRECTORY != 0, cluster, size: u32_at(entry, 28) };
        (entry.name != "." && entry.name != "..").then_some(entry)
    }
}

/// An open file.
struct File {
    shared: Rc<Shared>,
    first: u32,
    size: u64,
    /// The last cluster that was read: its place in the file, and its number.
    place: Cell<(u64, u32)>,
}

impl File {
    /// The cluster at a place of the chain.
    fn cluster(&self, index: u64) -> Result<u32, Fault> {
        let (mut at, mut cluster) = self.place.get();
        if at > index {
            (at, cluster) = (0, self.first);
        }
        while at < index {
            cluster = self.shared.next(cluster)?.ok_or(Fault::Damaged("a chain of clusters"))?;
            at += 1;
        }
        self.place.set((at, cluster));
        Ok(cluster)
    }
}

impl Contents for File {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let size = self.shared.cluster;
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(done as u64);
            let inside = at % size;
            let first = self.cluster(at / size)?;
            // Clusters that follow each other are read together.
            let (mut last, mut span) = (first, size - inside);
            while span < rest.len() as u64 {
                match self.shared.next(last)? {
                    Some(next) if next == last + 1 => (last, span) = (next, span + size),
                    _ => break,
                }
            }
            let index = at / size + u64::from(last - first);
            let count = usize::try_from(span).unwrap_or(usize::MAX).min(rest.len());
            let place = self.shared.place(first)?.saturating_add(inside);
            self.shared.place(last)?;
            self.shared.volume.read(place, rest.get_mut(..count).unwrap_or_default())?;
            self.place.set((index, last));
            done += count;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
