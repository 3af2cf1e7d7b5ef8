// SPDX-License-Identifier: Apache-2.0

//! Room on the host's file system.

use super::{Lab, write};
use crate::disk::Disk as _;

/// Mappings are written to places that have their room already.
#[test]
fn a_flush_needs_no_room() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "4G");
    let mut disk = lab.open("a.qcow2", &[]);
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&lab.file("a.qcow2").metadata().unwrap());
    for at in 0..8 {
        write(&mut disk, at << 29, &[1; 512]).unwrap();
    }
    let before = blocks();
    disk.flush().unwrap();
    assert_eq!(blocks(), before);
}

#[test]
fn a_full_file_system_is_flushed_before_a_write_fails() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "8M");
    let mut disk = lab.open("a.qcow2", &[]);
    write(&mut disk, 0, &vec![1; 4 << 20]).unwrap();
    disk.flush().unwrap();
    disk.image.storage.most = Some(disk.image.storage.len());
    let room = usize::try_from(disk.image.storage.len()).unwrap();
    disk.discard(0, 4 << 20).unwrap();
    // No mapping was flushed: the clusters are free for the file system only afterwards.
    write(&mut disk, 4 << 20, &vec![2; 3 << 20]).unwrap();
    assert!(write(&mut disk, 0, &vec![3; room]).is_err(), "more than there is");
    disk.image.storage.most = None;
    drop(disk);
    lab.check("a.qcow2", false);
}
