// SPDX-License-Identifier: Apache-2.0

use crate::{
    find,
    testing::{MEMORY, boot, booted, debugfs, ext4, ext4_with, refusal},
};

/// Debian's links, as in its images.
const DEBIAN: &[(&str, &str)] = &[
    ("vmlinuz", "-> boot/vmlinuz-6.1"),
    ("initrd.img", "-> boot/newest"),
    ("boot/newest", "-> /boot/initrd.img-6.1"),
    ("boot/vmlinuz-6.1", "kernel"),
    ("boot/initrd.img-6.1", "initramfs"),
];

fn debian() -> (String, Vec<String>, String) {
    ("kernel".into(), vec!["initramfs".into()], String::new())
}

#[test]
fn files_are_found_behind_relative_and_absolute_links() {
    let image = ext4(DEBIAN);
    assert_eq!(booted(&image), debian());
    let found = boot(&image).unwrap_or_else(|error| panic!("{error}")).found;
    assert_eq!(found.volume, "the whole disk, ext4");
    assert_eq!((found.source.as_str(), found.title.as_str()), ("Debian's links", "/vmlinuz"));
}

#[test]
fn older_kinds_and_sizes_of_blocks_are_read() {
    for options in [
        &["-t", "ext2"][..],
        &["-t", "ext3"],
        &["-t", "ext4", "-b", "4096"],
        &["-t", "ext4", "-O", "^64bit,^metadata_csum"],
        &["-t", "ext4", "-O", "^has_journal,^flex_bg", "-I", "128"],
        // The files' inodes are not in the first group.
        &["-t", "ext2", "-b", "1024", "-g", "512", "-N", "64", "-O", "^64bit"],
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-g",
            "512",
            "-N",
            "64",
            "-O",
            "64bit,^has_journal,^flex_bg,^resize_inode",
        ],
    ] {
        assert_eq!(booted(&ext4_with(DEBIAN, options)), debian(), "{options:?}");
    }
}

/// With blocks of 1 KiB the block map has three levels, and the extents several nodes.
#[test]
fn long_files_with_holes_are_whole() {
    let mut kernel: String = (0..90_000).map(|number| format!("{number:07}\n")).collect();
    let hole = "\0".repeat(100_000);
    kernel.replace_range(200_000..300_000, &hole);
    for options in
        [&["-t", "ext2", "-b", "1024"][..], &["-t", "ext4", "-b", "1024"], &["-t", "ext4", "-b", "4096"]]
    {
        let image = ext4_with(&[("vmlinuz", &kernel)], options);
        assert!(booted(&image).0 == kernel, "{options:?}");
    }
}

#[test]
fn a_large_directory_with_an_index_is_searched() {
    let names: Vec<String> = (0..700).map(|number| format!("boot/{number:0>60}")).collect();
    let files: Vec<(&str, &str)> =
        names.iter().map(|name| (name.as_str(), "")).chain(DEBIAN.iter().copied()).collect();
    let image = ext4_with(&files, &["-t", "ext4", "-b", "1024"]);
    assert_eq!(booted(&image), debian());
}

#[test]
fn links_in_circles_and_out_of_the_disk_end() {
    for (link, expect) in [
        ("-> vmlinuz", "too many links"),
        ("-> /../../../../etc/passwd", "no /vmlinuz or"),
        ("-> absent", "no /vmlinuz or"),
        ("-> boot", "no /vmlinuz or"),
    ] {
        let error = refusal(&ext4(&[("vmlinuz", link), ("boot/file", "")]));
        assert!(error.contains(expect), "{link}: {error}");
    }
    // The way up ends at the root, as it does for a process.
    assert_eq!(booted(&ext4(&[("vmlinuz", "-> ../../k"), ("k", "kernel")])).0, "kernel");
}

/// The file is there in the journal only, as after a guest that was killed before its kernel wrote it to its place.
#[test]
fn changes_in_the_journal_are_seen() {
    let image = ext4_with(DEBIAN, &["-t", "ext4", "-b", "1024"]);
    // The block of the root directory as it is with another link.
    let other = debugfs(&image, &["rm /vmlinuz", "ln /boot/initrd.img-6.1 /vmlinuz"]);
    assert_eq!(booted(&other).0, "initramfs");
    for (features, tag, flag) in [(0, 8, 6), (2, 12, 6), (8, 10, 6), (0x12, 16, 4)] {
        for (committed, revoked) in [(true, false), (false, false), (true, true)] {
            let image = with_journal(&image, &other, features, tag, flag, committed, revoked);
            let expect = if committed && !revoked { "initramfs" } else { "kernel" };
            assert_eq!(booted(&image).0, expect, "{features:#x} {committed} {revoked}");
        }
    }
}

/// Puts the blocks that differ between two images of 1 KiB blocks into the journal of the first one, which wraps.
fn with_journal(
    image: &[u8],
    other: &[u8],
    features: u32,
    tag: usize,
    flag: usize,
    committed: bool,
    revoked: bool,
) -> Vec<u8> {
    const BLOCK: usize = 1024;
    let mut image = image.to_vec();
    let volume = crate::volume::Volume::whole(Box::new(image.clone()), crate::testing::budget(MEMORY));
    let files = super::Ext4::open(&volume).unwrap().unwrap().0;
    let inode = files.inode(super::JOURNAL).unwrap();
    let place = |number: usize| {
        let run = super::blocks::run(&files, &inode, number as u64).unwrap();
        usize::try_from(run.after(number as u64).unwrap().place.unwrap()).unwrap()
    };
    let journal = place(0);
    let length = u32::from_be_bytes(image[journal * BLOCK + 0x10..][..4].try_into().unwrap()) as usize;
    // Not the superblocks: their counts of free blocks are of no use here.
    let changed: Vec<usize> = (3..image.len() / BLOCK)
        .filter(|n| image[n * BLOCK..][..BLOCK] != other[n * BLOCK..][..BLOCK])
        .collect();
    assert!((1..40).contains(&changed.len()), "{changed:?}");
    let put = |image: &mut Vec<u8>, at: usize, value: u32| {
        image[at..at + 4].copy_from_slice(&value.to_be_bytes());
    };
    let start = length - 2;
    for (at, value) in [(0x18, 7), (0x1c, u32::try_from(start).unwrap()), (0x28, features)] {
        put(&mut image, journal * BLOCK + at, value);
    }
    // The superblock's feature "recover".
    image[1024 + 0x60] |= 4;
    let mut number = start;
    let mut next = |image: &mut Vec<u8>, kind: Option<u32>, sequence: u32| {
        let at = place(number) * BLOCK;
        number = if number + 1 == length { 1 } else { number + 1 };
        image[at..at + BLOCK].fill(0);
        if let Some(kind) = kind {
            for (word, value) in [0xc03b_3998, kind, sequence].into_iter().enumerate() {
                put(image, at + 4 * word, value);
            }
        }
        at
    };
    let descriptor = next(&mut image, Some(1), 7);
    let mut at = descriptor + 12;
    for (index, block) in changed.iter().enumerate() {
        put(&mut image, at, u32::try_from(*block).unwrap());
        // The first tag has a UUID behind it; then the same one.
        let flags = u8::from(index > 0) * 2 + u8::from(index + 1 == changed.len()) * 8;
        image[at + flag + if flag == 4 { 3 } else { 1 }] = flags;
        at += tag + if index == 0 { 16 } else { 0 };
        let to = next(&mut image, None, 7);
        image[to..to + BLOCK].copy_from_slice(&other[block * BLOCK..][..BLOCK]);
    }
    if committed {
        next(&mut image, Some(2), 7);
    }
    if revoked {
        let revoke = next(&mut image, Some(5), 8);
        let size = if features & 2 != 0 { 8 } else { 4 };
        put(&mut image, revoke + 12, u32::try_from(16 + size * changed.len()).unwrap());
        for (index, block) in changed.iter().enumerate() {
            put(&mut image, revoke + 16 + size * index + size - 4, u32::try_from(*block).unwrap());
        }
        next(&mut image, Some(2), 8);
    }
    image
}

/// A large journal that is written to its places is no fault, and one with many revocations is bounded.
#[test]
fn a_journal_is_bounded_by_its_changes() {
    const BLOCK: usize = 1024;
    let image = ext4_with(DEBIAN, &["-t", "ext4", "-b", "1024"]);
    let volume = crate::volume::Volume::whole(Box::new(image.clone()), crate::testing::budget(MEMORY));
    let files = super::Ext4::open(&volume).unwrap().unwrap().0;
    let inode = files.inode(super::JOURNAL).unwrap();
    let place = |number: u64| {
        let run = super::blocks::run(&files, &inode, number).unwrap();
        usize::try_from(run.after(number).unwrap().place.unwrap()).unwrap() * BLOCK
    };
    let put = |image: &mut Vec<u8>, at: usize, words: &[u32]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        image[at..at + bytes.len()].copy_from_slice(&bytes);
    };
    let mut dirty = image.clone();
    dirty[1024 + 0x60] |= 4;
    let mut large = dirty.clone();
    put(&mut large, place(0) + 0x10, &[1 << 20]);
    put(&mut large, place(0) + 0x28, &[0x8000]);
    assert_eq!(booted(&large), debian());
    put(&mut dirty, place(0) + 0x18, &[7, 1]);
    put(&mut dirty, place(0) + 0x28, &[0]);
    // 250 revocations in each block.
    for number in 1..=420 {
        let at = place(number);
        dirty[at..at + BLOCK].fill(0);
        put(&mut dirty, at, &[0xc03b_3998, 5, 7, 16 + 1000]);
        if number == 390 {
            let mut few = dirty.clone();
            few[place(391)..place(391) + BLOCK].fill(0);
            assert_eq!(booted(&few), debian());
        }
    }
    let error = refusal(&dirty);
    assert!(error.contains("a journal with more than 100000 revocations is not supported"), "{error}");
}

#[test]
fn files_in_forms_that_are_not_supported_are_named() {
    let image = ext4(DEBIAN);
    let with = |field: &str, value: &str| {
        debugfs(&image, &[&format!("set_inode_field /boot/vmlinuz-6.1 {field} {value}")])
    };
    assert!(refusal(&with("flags", "0x80800")).contains("an encrypted file is not supported"));
    assert!(refusal(&with("flags", "0x10080000")).contains("inline_data"), "inline");
    assert!(
        refusal(&with("size", "134217729")).contains("/vmlinuz has 134217729 bytes, and at most 67108864")
    );
    let mut unknown = image.clone();
    unknown[1024 + 0x60] |= 1;
    assert!(refusal(&unknown).contains("ext4 with the features 0x1 is not supported"));
}

/// An extent tree whose nodes point to each other costs hours in a walk over all of it.
#[test]
fn a_tree_that_points_to_itself_is_damaged() {
    let mut image = ext4_with(DEBIAN, &["-t", "ext4", "-b", "1024"]);
    // A node of level 1 with one entry, which leads to the last block; and there the same node.
    let last = u32::try_from(image.len() / 1024 - 1).unwrap();
    let node =
        [&[0x0a, 0xf3, 1, 0, 4, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], &last.to_le_bytes(), &[0; 4]].concat();
    let at = last as usize * 1024;
    image[at..at + node.len()].copy_from_slice(&node);
    let volume = crate::volume::Volume::whole(Box::new(image), crate::testing::budget(MEMORY));
    let files = super::Ext4::open(&volume).unwrap().unwrap().0;
    let map = crate::volume::field(&node, 0);
    let inode = super::Inode { mode: 0x8000, size: 5000, flags: super::EXTENTS, map };
    let fault = super::blocks::run(&files, &inode, 0).err().unwrap();
    assert!(matches!(fault, crate::error::Fault::Damaged("an extent tree")), "{fault}");
}

#[test]
fn a_search_ends_with_its_budget() {
    struct Slow(Vec<u8>);
    impl crate::Disk for Slow {
        fn size(&self) -> u64 {
            1 << 40
        }
        fn read(&mut self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
            bytes.fill(0);
            for (to, from) in bytes.iter_mut().zip(self.0.iter().skip(usize::try_from(offset).unwrap())) {
                *to = *from;
            }
            Ok(())
        }
    }
    let image = ext4(DEBIAN);
    assert!(find(Box::new(Slow(image.clone())), MEMORY, "").is_ok());
    let whole = crate::volume::Volume::whole(Box::new(Slow(image)), crate::testing::budget(8192));
    let fault = (0..).find_map(|_| crate::ext4::Ext4::open(&whole).err()).unwrap();
    assert!(matches!(fault, crate::error::Fault::Budget(8192)));
}
