// SPDX-License-Identifier: Apache-2.0

use crate::testing::{boot, booted, fat, refusal};

const ENTRY: &str = "linux /EFI/a long name of a kernel\ninitrd /initrd\noptions quiet";

#[test]
fn each_width_of_the_table_is_read_with_long_names() {
    let kernel: String = (0..20_000).map(|number| format!("{number:07}\n")).collect();
    // FAT12, FAT16 and FAT32.
    for (size, is_wide) in [(1 << 20, false), (16 << 20, false), (600 << 20, true)] {
        let image = fat(
            size,
            &[
                ("EFI/a long name of a kernel", &kernel),
                ("initrd", "initramfs"),
                ("loader/entries/a long name of an entry.conf", ENTRY),
            ],
        );
        assert_eq!(image[22..24] == [0, 0], is_wide, "{size}");
        let (found, parts, cmdline) = booted(&image);
        assert!(found == kernel, "{size}");
        assert_eq!((parts, cmdline.as_str()), (vec!["initramfs".to_owned()], "quiet"));
    }
}

/// As `mkfs.vfat -F 32` makes it on a small partition.
#[test]
fn fat32_with_few_clusters_has_32_bit_entries() {
    let mut image = fat(600 << 20, &[("k", &"kernel".repeat(900)), ("loader/entries/a.conf", "linux /k")]);
    // With clusters of one sector, the file systems of this size are FAT32, and others are not.
    assert_eq!(image[22..24], [0, 0], "FAT32");
    image[32..36].copy_from_slice(&40_000_u32.to_le_bytes());
    image.truncate(40_000 * 512);
    assert_eq!(booted(&image).0, "kernel".repeat(900));
}

/// Firmware and boot loaders compare names of FAT in this way.
#[test]
fn the_case_of_a_name_does_not_matter() {
    let image = fat(1 << 20, &[("VMLINUZ", "kernel"), ("loader/entries/a.conf", "linux /vmlinuz")]);
    assert_eq!(booted(&image).0, "kernel");
}

#[test]
fn chains_in_circles_and_out_of_the_volume_end() {
    let image = fat(1 << 20, &[("loader/entries/a.conf", "linux /k"), ("k", &"k".repeat(9000))]);
    let cluster = usize::from(image[13]) * 512;
    // The table of FAT12 lies behind one sector; clusters 2 and 3 are the directories.
    let chain = image[512..].to_vec();
    assert_eq!(chain[0], 0xf8);
    for entry_of_chain in [0x001_u16, 0x002, 0x003, 0x005, 0xff7, 0xfff] {
        let mut damaged = image.clone();
        // Each entry of the chain leads to one cluster.
        for number in 2..40_usize {
            let at = 512 + number * 3 / 2;
            let pair = u16::from_le_bytes([damaged[at], damaged[at + 1]]);
            let pair = if number % 2 == 0 {
                pair & 0xf000 | entry_of_chain
            } else {
                pair & 0xf | entry_of_chain << 4
            };
            damaged[at..at + 2].copy_from_slice(&pair.to_le_bytes());
        }
        // Clusters that repeat are read as often as the file is long, and no more.
        match boot(&damaged) {
            Ok(entry) => {
                assert_eq!(entry.kernel.len(), 9000);
                assert!(![0x001, 0xff7, 0xfff].contains(&entry_of_chain), "the chain ends");
            }
            Err(error) => {
                assert!(error.to_string().contains("damaged") || error.to_string().contains("no "), "{error}")
            }
        }
    }
    assert!(cluster >= 512);
}

#[test]
fn a_boot_sector_whose_parts_do_not_fit_is_damaged() {
    let image = fat(1 << 20, &[]);
    for (at, bytes) in [(22, [0xff, 0xff]), (14, [0xff, 0xff]), (19, [1, 0])] {
        let mut damaged = image.clone();
        damaged[at..at + 2].copy_from_slice(&bytes);
        assert!(refusal(&damaged).contains("damaged (its boot sector)"), "{at}");
    }
}
