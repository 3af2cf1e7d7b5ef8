// SPDX-License-Identifier: Apache-2.0

//! Bodies of fuzz targets, which take any bytes and assert laws. Property tests run them too.

use std::{fs::File, os::unix::fs::FileExt as _};

use rustix::fs::{MemfdFlags, memfd_create};

use super::Qcow2Disk;
use crate::disk::Disk as _;

/// Bytes of the script before the image.
pub const SCRIPT: usize = 64;
const SECTOR: usize = 512;
/// The most bytes by which a script may enlarge the file. 8 steps allocate 2 clusters and a refcount
/// block each, and one refcount table.
const MOST_GROWTH: u64 = 8 * 3 * (2 << 20) + (32 << 20);

/// Opens any bytes as an image and uses the disk. A script of [`SCRIPT`] bytes comes first, 8 for
/// each step. Laws: a sector that was written reads back, and the file does not grow without bound.
pub fn fuzz_image(data: &[u8]) {
    let Some((script, image)) = data.split_at_checked(SCRIPT) else { return };
    let Ok(file) = memfd_create("image", MemfdFlags::CLOEXEC).map(File::from) else { return };
    let Ok(copy) = file.try_clone() else { return };
    if copy.write_all_at(image, 0).is_err() {
        return;
    }
    let writable = script.first().is_some_and(|byte| byte & 0x80 == 0);
    let Ok(mut disk) = Qcow2Disk::open(file, Vec::new(), writable) else { return };
    let sectors = disk.size() / SECTOR as u64;
    for step in script.chunks_exact(8) {
        let &[kind, fill, a, b, c, d, e, shift] = step else { continue };
        if sectors == 0 {
            break;
        }
        // Small numbers and large ones.
        let number = u64::from_be_bytes([0, 0, 0, a, b, c, d, e]) >> (shift % 40);
        let sector = number % sectors;
        let offset = sector * SECTOR as u64;
        let len = (u64::from(fill) << 13).clamp(SECTOR as u64, disk.size() - offset);
        let mut bytes = [fill; SECTOR];
        match kind % 8 {
            0..4 => {
                let written = disk.write(offset, &[bytes.as_mut_slice().into()]);
                let mut back = [!fill; SECTOR];
                let read = disk.read(offset, &[back.as_mut_slice().into()]);
                if written.is_ok() && read.is_ok() {
                    assert_eq!(back, [fill; SECTOR], "sector {sector}");
                }
            }
            4 => drop(disk.discard(offset, len)),
            5 => drop(disk.write_zeroes(offset, len, fill & 1 == 0)),
            6 => drop(disk.flush()),
            _ => {
                let mut long = vec![0; usize::try_from(len).unwrap_or_default()];
                drop(disk.read(offset, &[long.as_mut_slice().into()]));
            }
        }
    }
    drop(disk);
    let len = copy.metadata().map(|metadata| metadata.len()).unwrap_or_default();
    assert!(len <= (image.len() as u64).saturating_add(MOST_GROWTH), "the file has {len} bytes");
}
