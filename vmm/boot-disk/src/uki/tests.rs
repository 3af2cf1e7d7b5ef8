// SPDX-License-Identifier: Apache-2.0

use crate::testing::{booted, fat, refusal};

/// A PE file with these sections. Each takes whole blocks of 512 bytes in the file.
fn image(sections: &[(&str, &str)]) -> String {
    let mut bytes = vec![0; 64];
    bytes[..2].copy_from_slice(b"MZ");
    bytes[60] = 64;
    bytes.extend_from_slice(b"PE\0\0\x64\x06");
    // ASCII only: the files of these images are texts.
    bytes.extend_from_slice(&u16::try_from(sections.len()).unwrap().to_le_bytes());
    bytes.extend_from_slice(&[0; 12]);
    bytes.extend_from_slice(&[16, 0, 0, 0]);
    bytes.extend_from_slice(&[0; 16]);
    let mut at = 1024_u32;
    for (name, text) in sections {
        let size = u32::try_from(text.len()).unwrap();
        let padded = size.next_multiple_of(512);
        let mut header = [0; 40];
        header[..name.len()].copy_from_slice(name.as_bytes());
        for (place, value) in [(8, size), (16, padded), (20, at)] {
            header[place..place + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes.extend_from_slice(&header);
        at += padded;
    }
    bytes.resize(1024, 0);
    for (_, text) in sections {
        bytes.extend_from_slice(text.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    String::from_utf8(bytes).unwrap()
}

/// The machine's number 0x8664 is no UTF-8: the image has it after this.
fn disk(file: &str) -> Vec<u8> {
    let mut disk = fat(1 << 20, &[("EFI/Linux/os-1.efi", file)]);
    let mut at = 0;
    while let Some(found) = disk[at..].windows(6).position(|bytes| bytes == b"PE\0\0\x64\x06") {
        at += found + 6;
        disk[at - 1] = 0x86;
    }
    disk
}

#[test]
fn the_sections_are_kernel_initramfs_and_command_line() {
    let file = image(&[
        (".osrel", "ID=os"),
        (".cmdline", "root=/dev/vda2 quiet\n\0"),
        (".linux", "kernel"),
        (".initrd", "initramfs"),
    ]);
    let expect = ("kernel".to_owned(), vec!["initramfs".to_owned()], "root=/dev/vda2 quiet".to_owned());
    assert_eq!(booted(&disk(&file)), expect);
    assert_eq!(booted(&disk(&image(&[(".linux", "k")]))), ("k".to_owned(), vec![], String::new()));
}

#[test]
fn files_without_a_kernel_are_refused() {
    let long = image(&[(".linux", &"k".repeat(0x750))]);
    for (file, expect) in [
        (image(&[(".initrd", "i")]), "has no section .linux"),
        ("MZ".to_owned(), "no PE file"),
        ("x".repeat(2000), "no PE file"),
        (long[..2048].to_owned(), "ends behind the file"),
        (image(&[(".linux", "MZ\0\0zimg")]), "is a compressed image"),
    ] {
        let error = refusal(&disk(&file));
        assert!(error.contains(expect), "{expect}: {error}");
    }
}
