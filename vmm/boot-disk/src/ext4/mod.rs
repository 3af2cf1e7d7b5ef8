// SPDX-License-Identifier: Apache-2.0

//! ext2, ext3 and ext4, for reading only (Documentation/filesystems/ext4).
//!
//! Code of its own, since readers that exist trust the numbers of a file system: they reserve memory for as many groups as
//! the superblock has, or visit an extent tree whose nodes point to each other, for hours. Here each step reads from the
//! volume, and so takes from its budget.
//!
//! * `blocks`: the blocks of a file, by extents or by the block map of ext2.
//! * `directory`: names.
//! * `journal`: the changes that are only in the journal, as after a guest that was not shut down. They are applied while
//!   reading: nothing is written.

mod blocks;
mod directory;
mod journal;

use std::{cell::Cell, rc::Rc};

use crate::{
    error::Fault,
    filesystem::{Contents, FileSystem, MOST_NAMES, MOST_PATH},
    volume::{Volume, field, u16_at, u32_at},
};

use self::{blocks::Run, journal::Journal};

const SUPERBLOCK: u64 = 1024;
const MAGIC: u16 = 0xef53;
const ROOT: u32 = 2;
const JOURNAL: u32 = 8;
/// Links on one path (ELOOP of Linux is at 40).
const MOST_LINKS: usize = 16;
/// Directories on one path.
const MOST_DEPTH: usize = 64;
/// The most entries of paths and links that one path leads to.
const MOST_STEPS: usize = 256;

/// Features that change where things are (`s_feature_incompat`).
const RECOVER: u32 = 0x4;
const WIDE: u32 = 0x80;
const KNOWN: u32 =
    0x2 | RECOVER | 0x40 | WIDE | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x1_0000 | 0x2_0000;
/// `EXT4_INLINE_DATA_FL`, `EXT4_ENCRYPT_FL`, `EXT4_EXTENTS_FL` and `EXT2_COMPR_FL` of an inode.
const INLINE_DATA: u32 = 0x1000_0000;
const ENCRYPTED: u32 = 0x800;
const EXTENTS: u32 = 0x8_0000;
const COMPRESSED: u32 = 0x4;

/// A file system.
pub(crate) struct Ext4(Rc<Shared>);

struct Shared {
    volume: Volume,
    /// Bytes of a block: 1 KiB to 64 KiB.
    block: u64,
    blocks: u64,
    first_block: u64,
    inodes: u32,
    inodes_per_group: u32,
    inode_size: u16,
    descriptor: u64,
    wide: bool,
    journal: Journal,
}

/// An inode, as far as it is of use.
#[derive(Clone)]
pub(super) struct Inode {
    mode: u16,
    size: u64,
    flags: u32,
    /// `i_block`: extents, a block map, or a short link.
    map: [u8; 60],
}

impl Inode {
    fn is(&self, kind: u16) -> bool {
        self.mode & 0xf000 == kind
    }

    fn is_directory(&self) -> bool {
        self.is(0x4000)
    }

    fn check(&self) -> Result<(), Fault> {
        match self.flags {
            flags if flags & ENCRYPTED != 0 => Err(Fault::Unsupported("an encrypted file".to_owned())),
            flags if flags & COMPRESSED != 0 => Err(Fault::Unsupported("a compressed file".to_owned())),
            flags if flags & INLINE_DATA != 0 => {
                Err(Fault::Unsupported("a file with its data in its inode (inline_data)".to_owned()))
            }
            _ => Ok(()),
        }
    }
}

impl Ext4 {
    /// Opens the file system of a volume. None if it has no such one.
    pub(crate) fn open(volume: &Volume) -> Result<Option<Self>, Fault> {
        if volume.size() < SUPERBLOCK + 1024 {
            return Ok(None);
        }
        let superblock: [u8; 1024] = volume.array(SUPERBLOCK)?;
        if u16_at(&superblock, 0x38) != MAGIC {
            return Ok(None);
        }
        let features = u32_at(&superblock, 0x60);
        if features & !KNOWN != 0 {
            let unknown = format!("ext4 with the features {:#x}", features & !KNOWN);
            return Err(Fault::Unsupported(unknown));
        }
        let damaged = || Fault::Damaged("its superblock");
        let (shift, wide) = (u32_at(&superblock, 0x18), features & WIDE != 0);
        if shift > 6 {
            return Err(damaged());
        }
        let block = 1024 << shift;
        let high = if wide { u64::from(u32_at(&superblock, 0x150)) << 32 } else { 0 };
        let blocks = high | u64::from(u32_at(&superblock, 0x4));
        let first = u32_at(&superblock, 0x4c) == 0;
        let inode_size = if first { 128 } else { u16_at(&superblock, 0x58) };
        let descriptor = if wide { u16_at(&superblock, 0xfe) } else { 32 };
        let inodes_per_group = u32_at(&superblock, 0x28);
        let valid = inode_size.is_power_of_two()
            && (128..=block).contains(&u64::from(inode_size))
            && descriptor.is_power_of_two()
            && (32..=1024).contains(&descriptor)
            && inodes_per_group > 0;
        if !valid {
            return Err(damaged());
        }
        let mut shared = Shared {
            volume: volume.clone(),
            block,
            blocks: blocks.min(volume.size() / block),
            first_block: u64::from(u32_at(&superblock, 0x14)),
            inodes: u32_at(&superblock, 0),
            inodes_per_group,
            inode_size,
            descriptor: u64::from(descriptor),
            wide,
            journal: Journal::default(),
        };
        // Elsewhere than in inode 8 it is on another device, which is not there.
        if features & RECOVER != 0 && u32_at(&superblock, 0xe0) == JOURNAL {
            shared.journal = Journal::read(&shared)?;
        }
        Ok(Some(Self(Rc::new(shared))))
    }

    /// Follows a path, and the links on it.
    fn resolve(&self, path: &str) -> Result<Inode, Fault> {
        let absent = || Fault::Absent(path.to_owned());
        if path.len() > MOST_PATH {
            return Err(absent());
        }
        let mut names: Vec<String> = path.rsplit('/').map(str::to_owned).collect();
        let (mut way, mut links, mut steps) = (vec![self.0.inode(ROOT)?], 0, 0);
        while let Some(name) = names.pop() {
            steps += 1;
            if steps > MOST_STEPS || way.len() > MOST_DEPTH {
                return Err(Fault::Damaged("a path without end"));
            }
            match name.as_str() {
                "" | "." => continue,
                ".." if way.len() > 1 => {
                    way.pop();
                    continue;
                }
                ".." => continue,
                _ => {}
            }
            let directory = way.last().filter(|inode| inode.is_directory()).ok_or_else(absent)?;
            let number = directory::find(&self.0, directory, &name)?.ok_or_else(absent)?;
            let inode = self.0.inode(number)?;
            if inode.is(0xa000) {
                links += 1;
                if links > MOST_LINKS {
                    return Err(Fault::Damaged("too many links on a path"));
                }
                let target = self.0.link(&inode)?;
                if target.starts_with('/') {
                    way.truncate(1);
                }
                names.extend(target.rsplit('/').map(str::to_owned));
            } else {
                way.push(inode);
            }
        }
        way.pop().ok_or_else(absent)
    }
}

impl FileSystem for Ext4 {
    fn kind(&self) -> &'static str {
        "ext4"
    }

    fn list(&self, path: &str) -> Result<Vec<String>, Fault> {
        let inode = self.resolve(path)?;
        if !inode.is_directory() {
            return Err(Fault::Absent(path.to_owned()));
        }
        let mut names = Vec::new();
        directory::visit(&self.0, &inode, |name, _| {
            if let Ok(name) = str::from_utf8(name) {
                names.push(name.to_owned());
            }
            names.len() < MOST_NAMES
        })?;
        Ok(names)
    }

    fn charge(&self, bytes: u64) -> Result<(), Fault> {
        self.0.volume.charge(bytes)
    }

    fn open(&self, path: &str) -> Result<Rc<dyn Contents>, Fault> {
        let inode = self.resolve(path)?;
        if !inode.is(0x8000) {
            return Err(Fault::Absent(path.to_owned()));
        }
        inode.check()?;
        Ok(Rc::new(File { shared: Rc::clone(&self.0), inode, run: Cell::new(Run::default()) }))
    }
}

impl Shared {
    /// Reads bytes of a block, as the journal has it.
    fn read(&self, block: u64, offset: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        if block == 0 || block >= self.blocks {
            return Err(Fault::Damaged("a block behind its end"));
        }
        let (at, escaped) = self.journal.place(block);
        self.volume.read(at.saturating_mul(self.block).saturating_add(offset), bytes)?;
        if escaped && offset == 0 {
            for (to, from) in bytes.iter_mut().zip(journal::MAGIC.to_be_bytes()) {
                *to = from;
            }
        }
        Ok(())
    }

    /// All bytes of a block.
    fn whole(&self, block: u64) -> Result<Vec<u8>, Fault> {
        let mut bytes = vec![0; usize::try_from(self.block).unwrap_or_default()];
        self.read(block, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn inode(&self, number: u32) -> Result<Inode, Fault> {
        let index = number.checked_sub(1).filter(|_| number <= self.inodes);
        let index = index.ok_or(Fault::Damaged("the number of an inode"))?;
        let (group, index) = (index / self.inodes_per_group, index % self.inodes_per_group);
        // The descriptors begin in the block behind the superblock's.
        let at = u64::from(group).saturating_mul(self.descriptor);
        let mut descriptor = [0; 64];
        let len = usize::try_from(self.descriptor.min(64)).unwrap_or_default();
        let first = self.first_block.saturating_add(1);
        let bytes = descriptor.get_mut(..len).unwrap_or_default();
        self.read(first.saturating_add(at / self.block), at % self.block, bytes)?;
        let high = if self.wide { u64::from(u32_at(&descriptor, 0x28)) << 32 } else { 0 };
        let table = high | u64::from(u32_at(&descriptor, 0x8));
        let at = u64::from(index).saturating_mul(u64::from(self.inode_size));
        let mut inode = [0; 128];
        self.read(table.saturating_add(at / self.block), at % self.block, &mut inode)?;
        let size = u64::from(u32_at(&inode, 0x6c)) << 32 | u64::from(u32_at(&inode, 0x4));
        let mode = u16_at(&inode, 0);
        Ok(Inode { mode, size, flags: u32_at(&inode, 0x20), map: field(&inode, 0x28) })
    }

    /// The target of a link.
    fn link(&self, inode: &Inode) -> Result<String, Fault> {
        let damaged = || Fault::Damaged("a link");
        let size = usize::try_from(inode.size).ok().filter(|size| (1..=MOST_PATH).contains(size));
        let size = size.ok_or_else(damaged)?;
        let bytes = if size < inode.map.len() && inode.flags & EXTENTS == 0 {
            inode.map.get(..size).unwrap_or_default().to_vec()
        } else {
            inode.check()?;
            let mut bytes = vec![0; size];
            self.contents(inode, &Cell::default(), 0, &mut bytes)?;
            bytes
        };
        String::from_utf8(bytes).map_err(|_| damaged())
    }

    /// Reads a file's bytes. `known` has the last run of blocks.
    fn contents(&self, inode: &Inode, known: &Cell<Run>, offset: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset.saturating_add(done as u64);
            let (number, inside) = (at / self.block, at % self.block);
            let run = match known.get().after(number) {
                Some(run) => run,
                None => {
                    let run = blocks::run(self, inode, number)?;
                    known.set(run);
                    run.after(number).ok_or(Fault::Damaged("the blocks of a file"))?
                }
            };
            let most = run.count.saturating_mul(self.block).saturating_sub(inside);
            let count = usize::try_from(most).unwrap_or(usize::MAX).min(rest.len());
            let part = rest.get_mut(..count).unwrap_or_default();
            done += match run.place {
                Some(block) => self.read_run(block, inside, part)?,
                None => {
                    self.volume.charge(count as u64)?;
                    part.fill(0);
                    count
                }
            };
        }
        Ok(())
    }

    /// Reads bytes of blocks that follow each other, up to the first one that the journal has elsewhere. Returns their count.
    fn read_run(&self, block: u64, inside: u64, bytes: &mut [u8]) -> Result<usize, Fault> {
        let blocks = inside.saturating_add(bytes.len() as u64).div_ceil(self.block);
        let end = block.saturating_add(blocks);
        let together = match self.journal.first(block, end) {
            Some(first) if first == block => 1,
            first => first.unwrap_or(end) - block,
        };
        if block == 0 || end > self.blocks {
            return Err(Fault::Damaged("a block behind its end"));
        }
        let most = together.saturating_mul(self.block).saturating_sub(inside);
        let count = usize::try_from(most).unwrap_or(usize::MAX).min(bytes.len());
        let bytes = bytes.get_mut(..count).unwrap_or_default();
        if together == 1 {
            self.read(block, inside, bytes)?;
        } else {
            self.volume.read(block.saturating_mul(self.block).saturating_add(inside), bytes)?;
        }
        Ok(count)
    }
}

/// An open file.
struct File {
    shared: Rc<Shared>,
    inode: Inode,
    run: Cell<Run>,
}

impl Contents for File {
    fn size(&self) -> u64 {
        self.inode.size
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        self.shared.contents(&self.inode, &self.run, offset, bytes)
    }
}

#[cfg(test)]
mod tests;
