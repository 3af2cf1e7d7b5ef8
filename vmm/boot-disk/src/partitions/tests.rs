// SPDX-License-Identifier: Apache-2.0

use crate::testing::{ESP, LINUX, boot, booted, ext4, fat, gpt, refusal};

fn linux(kernel: &str) -> Vec<u8> {
    ext4(&[("boot/vmlinuz", kernel)])
}

fn esp(kernel: &str) -> Vec<u8> {
    fat(1 << 20, &[("k", kernel), ("loader/entries/a.conf", "title Linux\nlinux /k")])
}

/// The bytes of a printed GUID: its first three fields are little-endian (UEFI 2.10, appendix A).
fn guid(text: &str) -> Vec<u8> {
    let fields = text.split('-').zip([true, true, true, false, false]);
    let bytes = fields.map(|(field, swapped)| {
        let digits = (0..field.len()).step_by(2);
        let mut bytes: Vec<u8> =
            digits.map(|at| u8::from_str_radix(&field[at..at + 2], 16).unwrap()).collect();
        if swapped {
            bytes.reverse();
        }
        bytes
    });
    bytes.flatten().collect()
}

#[test]
fn types_are_those_of_the_specification() {
    assert_eq!(guid("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"), super::ESP);
    assert_eq!(guid("bc13c2ff-59e6-4262-a352-b275fd6f7172"), super::XBOOTLDR);
}

#[test]
fn partitions_of_a_gpt_are_looked_at_those_for_boot_loaders_first() {
    let entry = ("boot/loader/entries/a.conf", "linux /boot/vmlinuz");
    let (root, esp) = (ext4(&[("boot/vmlinuz", "of the root"), entry]), esp("of the ESP"));
    assert_eq!(booted(&gpt(&[(LINUX, &root)])).0, "of the root");
    let image = gpt(&[(LINUX, &root), (ESP, &esp)]);
    assert_eq!(booted(&image).0, "of the ESP");
    let found = boot(&image).unwrap_or_else(|error| panic!("{error}")).found;
    assert_eq!(found.volume, "partition 2 (for boot loaders), FAT");
    // The second table, at the disk's end.
    let mut cut = image;
    cut[512..520].fill(0);
    assert_eq!(booted(&cut).0, "of the ESP");
}

#[test]
fn the_places_without_a_kernel_are_named() {
    let mut xfs = vec![0; 1 << 20];
    xfs[..4].copy_from_slice(b"XFSB");
    let mut btrfs = vec![0; 1 << 20];
    btrfs[0x1_0040..0x1_0048].copy_from_slice(b"_BHRfS_M");
    let mut luks = vec![0; 1 << 20];
    luks[..6].copy_from_slice(b"LUKS\xba\xbe");
    let mut damaged = linux("k");
    damaged[1024 + 0x18] = 60;
    let error = refusal(&gpt(&[
        (LINUX, &xfs),
        (LINUX, &btrfs),
        (LINUX, &luks),
        (LINUX, &damaged),
        (LINUX, &[0; 4096]),
        (LINUX, &ext4(&[])),
    ]));
    for expect in [
        "partition 1: the file system XFS is not supported",
        "partition 2: the file system Btrfs is not supported",
        "partition 3: an encrypted volume (LUKS) is not supported",
        "partition 4: the file system is damaged (its superblock)",
        "partition 5: no file system that is known",
        "partition 6, ext4, GRUB's menu: there is no /boot/grub/grub.cfg",
        "partition 6, ext4, Debian's links: there is no /vmlinuz or /boot/vmlinuz",
    ] {
        assert!(error.contains(expect), "{expect}: {error}");
    }
    assert!(error.len() < 4096);
}

/// A disk with a master boot record. Each partition has a type, its first sector and its bytes.
fn mbr(partitions: &[(u8, u32, &[u8])], logical: &[u8]) -> Vec<u8> {
    let mut disk = vec![0; 20 << 20];
    let entry = |disk: &mut Vec<u8>, table: usize, slot: usize, kind: u8, first: u32, sectors: u32| {
        let at = table * 512 + 446 + slot * 16;
        disk[at + 4] = kind;
        disk[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
        disk[table * 512 + 510..table * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
    };
    for (slot, (kind, first, bytes)) in partitions.iter().enumerate() {
        let sectors = u32::try_from(bytes.len() / 512).unwrap();
        entry(&mut disk, 0, slot, *kind, *first, sectors.max(1));
        let at = *first as usize * 512;
        disk[at..at + bytes.len()].copy_from_slice(bytes);
    }
    // Two tables of logical partitions; the second one has a file system.
    if !logical.is_empty() {
        let sectors = u32::try_from(logical.len() / 512).unwrap();
        entry(&mut disk, 0, 3, 0x0f, 20_000, 15_000);
        entry(&mut disk, 20_000, 0, 0x83, 8, 8);
        entry(&mut disk, 20_000, 1, 0x05, 100, sectors + 8);
        entry(&mut disk, 20_100, 0, 0x83, 8, sectors);
        let at = 20_108 * 512;
        disk[at..at + logical.len()].copy_from_slice(logical);
    }
    disk
}

#[test]
fn primary_and_logical_partitions_of_a_master_boot_record_are_looked_at() {
    assert_eq!(booted(&mbr(&[(0x83, 2048, &linux("primary"))], &[])).0, "primary");
    let image = mbr(&[(0x82, 2048, &[0; 4096])], &linux("logical"));
    assert_eq!(booted(&image).0, "logical");
    assert_eq!(boot(&image).unwrap_or_else(|error| panic!("{error}")).found.volume, "partition 6, ext4");
    // A table that leads to itself.
    let mut circle = image;
    circle[20_100 * 512 + 446 + 16 + 4] = 5;
    circle[20_100 * 512 + 446 + 16 + 8] = 100;
    circle[20_108 * 512 + 1024 + 0x38] = 0;
    assert!(refusal(&circle).ends_with("; and 9 more places"), "{}", refusal(&circle));
}
