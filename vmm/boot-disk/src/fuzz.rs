// SPDX-License-Identifier: Apache-2.0

//! The body of a fuzz target: it takes any bytes and asserts only laws. A property test runs it, too.
#![allow(clippy::panic, reason = "a broken law is to end the fuzzer")]

use std::{
    cell::Cell,
    collections::BTreeMap,
    io::{self, Read as _},
    rc::Rc,
};

use crate::{Disk, find_within, volume::Budget};

const SECTOR: usize = 512;
/// Sectors of the disk: 32 MiB.
const SECTORS: u64 = 1 << 16;
/// Guest memory in bytes.
const MEMORY: u64 = 8 << 20;
/// The budget, less than a disk has for users, so that each input is short.
const BUDGET: u64 = 4 << 20;

/// A disk of zeroes, but for some sectors.
struct Sparse {
    sectors: BTreeMap<u64, Vec<u8>>,
    read: Rc<Cell<u64>>,
}

impl Sparse {
    /// Takes records: the number of a sector in 2 bytes, and its contents. Returns the count of bytes that are read, too.
    fn new(data: &[u8]) -> (Self, Rc<Cell<u64>>) {
        let record = |record: &[u8]| {
            let (number, bytes) = record.split_at_checked(2)?;
            let number = u16::from_le_bytes(number.try_into().ok()?);
            Some((u64::from(number), bytes.to_vec()))
        };
        let read = Rc::<Cell<u64>>::default();
        let sectors = data.chunks(2 + SECTOR).filter_map(record).collect();
        (Self { sectors, read: Rc::clone(&read) }, read)
    }
}

impl Disk for Sparse {
    fn size(&self) -> u64 {
        SECTORS * SECTOR as u64
    }

    fn read(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        assert!(end.is_some_and(|end| end <= self.size()), "a read behind the end: {offset} {}", bytes.len());
        self.read.set(self.read.get().saturating_add(bytes.len() as u64));
        bytes.fill(0);
        let (first, last) = (offset / SECTOR as u64, end.unwrap_or(0).div_ceil(SECTOR as u64));
        for (number, sector) in self.sectors.range(first..last) {
            let at = number * SECTOR as u64;
            let to = usize::try_from(at.saturating_sub(offset)).unwrap_or(usize::MAX);
            let from = usize::try_from(offset.saturating_sub(at)).unwrap_or(usize::MAX);
            for (to, from) in bytes.iter_mut().skip(to).zip(sector.iter().skip(from)) {
                *to = *from;
            }
        }
        Ok(())
    }
}

/// Takes the sectors of a disk. A search must end within its budget, and its results must be within their bounds.
pub fn fuzz_disk(data: &[u8]) {
    boots(data);
}

/// The same. Returns whether the disk boots a kernel.
fn boots(data: &[u8]) -> bool {
    let (disk, read) = Sparse::new(data);
    let budget = Budget { bytes: BUDGET, is_late: Box::new(|| false) };
    let result = find_within(Box::new(disk), MEMORY, "", budget);
    let shown = |text: &str, most: usize| {
        assert!(text.len() <= most && !text.contains(char::is_control), "{text:?}");
    };
    let entry = match result {
        Ok(entry) => entry,
        Err(error) => {
            shown(&error.to_string(), 64 << 10);
            assert!(read.get() <= BUDGET, "{} bytes were read", read.get());
            return false;
        }
    };
    assert!(entry.kernel.len() as u64 <= MEMORY);
    shown(&entry.cmdline, 2047);
    for text in [&entry.found.volume, &entry.found.source, &entry.found.title, &entry.found.path] {
        shown(text, 4096);
    }
    shown(&entry.found.passed_over, 64 << 10);
    let mut size = 0_u64;
    for mut part in entry.initramfs {
        size = size.saturating_add(part.size());
        let (expected, mut bytes) = (part.size(), Vec::new());
        if part.read_to_end(&mut bytes).is_ok() {
            assert_eq!(bytes.len() as u64, expected);
        }
    }
    assert!(size <= MEMORY, "an initramfs of {size} bytes");
    assert!(read.get() <= BUDGET, "{} bytes were read", read.get());
    true
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use proptest::prelude::*;

    use super::*;
    use crate::testing::{ESP, LINUX, ext4_with, fat, gpt};

    fn directory() -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/boot_disk")
    }

    /// The sectors of an image that are not zero.
    fn records(image: &[u8]) -> Vec<u8> {
        let sectors =
            image.chunks(SECTOR).zip(0_u16..).filter(|(bytes, _)| bytes.iter().any(|byte| *byte != 0));
        sectors.flat_map(|(bytes, number)| [&number.to_le_bytes(), bytes].concat()).collect()
    }

    /// Images with a kernel, each found in another way.
    fn seeds() -> Vec<(String, Vec<u8>)> {
        let seed = |entry: io::Result<fs::DirEntry>| {
            let path = entry.unwrap().path();
            (path.display().to_string(), fs::read(path).unwrap())
        };
        fs::read_dir(directory()).unwrap().map(seed).collect()
    }

    /// Makes the seeds anew.
    fn bless() {
        let debian = [
            ("vmlinuz", "-> boot/vmlinuz-6.1"),
            ("boot/vmlinuz-6.1", "kernel"),
            ("initrd.img", "-> /boot/initrd"),
            ("boot/initrd", "initramfs"),
        ];
        let menu = "set default=\"0\"\nmenuentry 'Debian' --id a {\n linux /boot/k root=/dev/vda1\n initrd /boot/i\n}\n";
        let grub = [("boot/grub/grub.cfg", menu), ("boot/k", "kernel"), ("boot/i", "initramfs")];
        let entry = "title Linux\nversion 6.1\nsort-key a\nlinux /k\ninitrd /i\noptions quiet";
        let bls = [
            ("loader/loader.conf", "default a*"),
            ("loader/entries/a+3.conf", entry),
            ("k", "kernel"),
            ("i", "initramfs"),
        ];
        let small = ["-t", "ext4", "-b", "1024", "-N", "16", "-O", "^has_journal,^resize_inode"];
        let esp = fat(256 << 10, &bls);
        let images = [
            ("ext4", ext4_with(&debian, &small)),
            ("ext2-grub", ext4_with(&grub, &["-t", "ext2", "-b", "1024", "-N", "16"])),
            ("fat-entries", esp.clone()),
            ("gpt", gpt(&[(LINUX, &ext4_with(&debian, &small)), (ESP, &esp)])),
        ];
        fs::create_dir_all(directory()).unwrap();
        for (name, image) in images {
            fs::write(directory().join(name), records(&image)).unwrap();
        }
    }

    #[test]
    fn the_seeds_boot() {
        if std::env::var_os("BLESS").is_some() {
            bless();
        }
        let seeds = seeds();
        assert!(seeds.len() >= 4);
        for (name, seed) in seeds {
            assert!(boots(&seed), "{name}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_on_the_disk(
            pick: prop::sample::Index,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let seeds = seeds();
            let mut data = pick.get(&seeds).1.clone();
            for (at, byte) in changes {
                let at = at.index(data.len());
                data[at] = byte;
            }
            if let Some(cut) = cut {
                data.truncate(cut.index(data.len()));
            }
            fuzz_disk(&data);
        }

        /// Links and numbers are in few sectors, so that random places seldom hit them.
        #[test]
        fn numbers_of_any_size_in_the_first_sectors(
            pick: prop::sample::Index,
            changes in prop::collection::vec((0..6_usize, 0..128_usize, any::<u32>()), 1..6),
        ) {
            let seeds = seeds();
            let mut data = pick.get(&seeds).1.clone();
            for (record, word, value) in changes {
                let at = record * (2 + SECTOR) + 2 + word * 4;
                if let Some(bytes) = data.get_mut(at..at + 4) {
                    bytes.copy_from_slice(&value.to_le_bytes());
                }
            }
            fuzz_disk(&data);
        }
    }
}
