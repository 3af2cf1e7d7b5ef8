// SPDX-License-Identifier: Apache-2.0

//! Images for tests: ext4 by mke2fs, FAT by fatfs, partition tables by hand.

use std::{
    fs,
    io::{self, Cursor, Write as _},
    os::unix::fs::symlink,
    process::Command,
};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};

use crate::{Disk, Entry, FindError, find, volume::Budget};

/// Guest memory in bytes.
pub(crate) const MEMORY: u64 = 64 << 20;

impl Disk for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).unwrap();
        bytes.copy_from_slice(&self[from..from + bytes.len()]);
        Ok(())
    }
}

/// Finds the kernel of an image.
pub(crate) fn boot(image: &[u8]) -> Result<Entry, FindError> {
    find(Box::new(image.to_vec()), MEMORY, "")
}

/// A budget of bytes, without a clock.
pub(crate) fn budget(bytes: u64) -> Budget {
    Budget { bytes, is_late: Box::new(|| false) }
}

/// The error of an image without a kernel.
pub(crate) fn refusal(image: &[u8]) -> String {
    boot(image).map(|entry| entry.found).unwrap_err().to_string()
}

/// The kernel, the initramfs and the command line of an image.
pub(crate) fn booted(image: &[u8]) -> (String, Vec<String>, String) {
    let entry = boot(image).unwrap_or_else(|error| panic!("{error}"));
    let text = |mut part: crate::Part| io::read_to_string(&mut part).unwrap();
    let kernel = String::from_utf8(entry.kernel).unwrap();
    (kernel, entry.initramfs.into_iter().map(text).collect(), entry.cmdline)
}

/// A file, or with `-> ` at the beginning of its text a link.
pub(crate) type Files<'a> = &'a [(&'a str, &'a str)];

/// An ext4 file system of 4 MiB with these files.
pub(crate) fn ext4(files: Files<'_>) -> Vec<u8> {
    ext4_with(files, &["-t", "ext4"])
}

/// The same with other options of mke2fs.
pub(crate) fn ext4_with(files: Files<'_>, options: &[&str]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let (tree, image) = (directory.path().join("tree"), directory.path().join("image"));
    fs::create_dir(&tree).unwrap();
    for (path, text) in files {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match text.strip_prefix("-> ") {
            Some(target) => symlink(target, path).unwrap(),
            None => fs::write(path, text).unwrap(),
        }
    }
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-d"]).arg(&tree).args(options).arg(&image).arg("4M");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    fs::read(image).unwrap()
}

/// Runs requests of debugfs on an image.
pub(crate) fn debugfs(image: &[u8], requests: &[&str]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    fs::write(&path, image).unwrap();
    for request in requests {
        let output = Command::new("debugfs").args(["-w", "-R", request]).arg(&path).output().unwrap();
        assert!(output.status.success(), "{request}: {output:?}");
    }
    fs::read(path).unwrap()
}

/// A FAT file system of `size` bytes with these files.
pub(crate) fn fat(size: usize, files: Files<'_>) -> Vec<u8> {
    let mut image = Cursor::new(vec![0; size]);
    fatfs::format_volume(&mut image, FormatVolumeOptions::new()).unwrap();
    let volume = FileSystem::new(&mut image, FsOptions::new()).unwrap();
    for (path, text) in files {
        let mut directory = volume.root_dir();
        let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
        for parent in parents.split('/').filter(|parent| !parent.is_empty()) {
            directory = directory.create_dir(parent).unwrap();
        }
        directory.create_file(name).unwrap().write_all(text.as_bytes()).unwrap();
    }
    volume.unmount().unwrap();
    image.into_inner()
}

/// Types of partitions.
pub(crate) const ESP: u128 = 0x3bc9_3ec9_a000_4bba_11d2_f81f_c12a_7328;
pub(crate) const LINUX: u128 = 0xe47d_47d8_693d_798e_4772_8483_0fc6_3daf;

/// A disk with a GPT and these partitions.
pub(crate) fn gpt(partitions: &[(u128, &[u8])]) -> Vec<u8> {
    let mut disk = vec![0; 2048 * 512];
    disk[446 + 4] = 0xee;
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let mut header = [0; 512];
    header[..8].copy_from_slice(b"EFI PART");
    header[72..80].copy_from_slice(&2_u64.to_le_bytes());
    header[80..84].copy_from_slice(&128_u32.to_le_bytes());
    header[84..88].copy_from_slice(&128_u32.to_le_bytes());
    disk[512..1024].copy_from_slice(&header);
    for (number, (kind, bytes)) in partitions.iter().enumerate() {
        let (at, first) = (1024 + number * 128, disk.len() as u64 / 512);
        disk[at..at + 16].copy_from_slice(&kind.to_le_bytes());
        disk[at + 32..at + 40].copy_from_slice(&first.to_le_bytes());
        let last = first + bytes.len() as u64 / 512 - 1;
        disk[at + 40..at + 48].copy_from_slice(&last.to_le_bytes());
        disk.extend_from_slice(bytes);
    }
    disk.extend_from_slice(&[0; 512]);
    let last = disk.len() - 512;
    disk[last..].copy_from_slice(&header);
    disk
}
