// SPDX-License-Identifier: Apache-2.0

use std::{cell::Cell, io, ops::Range, rc::Rc};

use super::*;
use crate::testing::{LINUX, MEMORY, boot, booted, ext4, ext4_with, fat, gpt, refusal};

/// A disk that counts its reads, and cannot read a range.
#[derive(Default)]
struct Medium {
    bytes: Vec<u8>,
    defect: Range<u64>,
    reads: Rc<Cell<u64>>,
    read: Rc<Cell<u64>>,
}

impl Disk for Medium {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.reads.set(self.reads.get() + 1);
        self.read.set(self.read.get() + bytes.len() as u64);
        if offset < self.defect.end && self.defect.start < offset + bytes.len() as u64 {
            return Err(io::Error::other("a bad sector"));
        }
        Disk::read(&mut self.bytes, offset, bytes)
    }
}

/// Reads of an image, and their bytes.
fn reads(image: Vec<u8>) -> (u64, u64) {
    let medium = Medium { bytes: image, ..Medium::default() };
    let (reads, read) = (Rc::clone(&medium.reads), Rc::clone(&medium.read));
    drop(find(Box::new(medium), MEMORY, ""));
    (reads.get(), read.get())
}

#[test]
fn a_search_ends_with_its_time() {
    let image = ext4(&[("vmlinuz", "kernel")]);
    let looks = Rc::new(Cell::new(0));
    let limited = |most: u32| {
        let looks = Rc::clone(&looks);
        looks.set(0);
        let is_late = Box::new(move || looks.replace(looks.get() + 1) >= most);
        find_within(Box::new(image.clone()), MEMORY, "", Budget { bytes: 1 << 30, is_late }).map(drop)
    };
    assert!(limited(u32::MAX).is_ok());
    for most in 0..looks.get() {
        let error = limited(most).unwrap_err();
        assert!(matches!(error, FindError::Late(_)), "{most}: {error}");
    }
    // A long read has several looks at the clock.
    let volume = Volume::whole(
        Box::new(vec![0; 8 << 20]),
        Budget {
            bytes: 1 << 30,
            is_late: {
                let looks = Cell::new(0);
                Box::new(move || looks.replace(looks.get() + 1) >= 5)
            },
        },
    );
    assert!(matches!(volume.bytes(0, 8 << 20), Err(Fault::Late)));
    assert!(!(Budget::new(0, TIME).is_late)() && (Budget::new(0, Duration::ZERO).is_late)());
}

#[test]
fn a_kernel_that_cannot_be_booted_is_not_read_whole() {
    let kernel = format!("MZ\0\0zimg{}", "x".repeat(2 << 20));
    let (_, bytes) = reads(ext4(&[("vmlinuz", &kernel)]));
    assert!(bytes < 1 << 20, "{bytes}");
    assert!(refusal(&ext4(&[("vmlinuz", &kernel)])).contains("is a compressed image"));
    assert!(refusal(&ext4(&[("vmlinuz", "")])).contains("/vmlinuz is empty"));
}

#[test]
fn the_table_of_a_fat_is_read_in_windows() {
    // About 900 clusters.
    let image = fat(2 << 20, &[("k", &"kernel".repeat(150_000)), ("loader/entries/a.conf", "linux /k")]);
    let (reads, _) = reads(image);
    assert!(reads < 100, "{reads}");
}

#[test]
fn links_behind_a_fault_need_a_root() {
    let menu = "menuentry 'x' {\n linux /boot/other root=$root\n}\n";
    let image = ext4(&[("vmlinuz", "kernel"), ("boot/grub/grub.cfg", menu)]);
    let error = refusal(&image);
    for words in ["GRUB's menu: the entry \"x\" of /boot/grub/grub.cfg cannot", "give root= in boot.cmdline"]
    {
        assert!(error.contains(words), "{words}: {error}");
    }
    let find = |cmdline| find(Box::new(image.clone()), MEMORY, cmdline);
    assert!(find("quiet noroot=/dev/vda1").is_err());
    let entry = find("quiet root=/dev/vda1").unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(entry.kernel, b"kernel");
    assert!(entry.found.passed_over.contains("its line \"linux /boot/other root=$root\" has a variable"));
    // Places without anything are no faults.
    let entry = boot(&ext4(&[("vmlinuz", "kernel")])).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((entry.found.path.as_str(), entry.found.passed_over.as_str()), ("/vmlinuz", ""));
}

#[test]
fn a_part_that_cannot_be_read_is_passed_over() {
    let (first, second) = (ext4(&[]), ext4(&[("vmlinuz", "kernel")]));
    let image = gpt(&[(LINUX, &first), (LINUX, &second)]);
    let disk = |bytes: &[u8], defect: Range<u64>| {
        Box::new(Medium { bytes: bytes.to_vec(), defect, ..Medium::default() })
    };
    let start = 1 << 20;
    let found = find(disk(&image, start..start + 4096), MEMORY, "root=/dev/vda2");
    let entry = found.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(entry.found.passed_over, "partition 1: the disk cannot be read (a bad sector)");
    // It is the only reason.
    let empty = gpt(&[(LINUX, &first), (LINUX, &first)]);
    let error = find(disk(&empty, start..start + 4096), MEMORY, "").map(drop).unwrap_err();
    assert!(matches!(error, FindError::Read(_)), "{error}");
    // Another reason stands beside it.
    let mut other = empty;
    other[5 << 20..(5 << 20) + 4].copy_from_slice(b"XFSB");
    let error = find(disk(&other, start..start + 4096), MEMORY, "").map(drop).unwrap_err();
    for words in ["partition 1: the disk cannot be read", "partition 2: the file system XFS"] {
        assert!(matches!(error, FindError::Nothing(_)) && error.to_string().contains(words), "{error}");
    }
}

#[test]
fn an_entry_that_cannot_be_read_is_skipped() {
    let long = "x".repeat(70_000);
    let image = ext4_with(
        &[
            ("loader/entries/c.conf/file", ""),
            ("loader/entries/b.conf", &long),
            ("loader/entries/a.conf", "linux /k"),
            ("k", "kernel"),
        ],
        &["-t", "ext4"],
    );
    let entry = boot(&image).unwrap_or_else(|error| panic!("{error}"));
    let notes = entry.found.passed_over;
    for words in ["/loader/entries/c.conf is skipped", "/loader/entries/b.conf is skipped"] {
        assert!(notes.contains(words), "{words}: {notes}");
    }
    // The newest entries are those that are read.
    let mut files = vec![("k".to_owned(), "kernel".to_owned())];
    for number in 0..300 {
        let text = if number == 299 { "linux /k" } else { "linux /absent" };
        files.push((format!("loader/entries/os-{number}.conf"), text.to_owned()));
    }
    let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
    // Its directories have the order in which the files were made.
    assert_eq!(booted(&fat(4 << 20, &files)).0, "kernel");
}
