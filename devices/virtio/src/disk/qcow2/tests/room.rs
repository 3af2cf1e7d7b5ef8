// SPDX-License-Identifier: Apache-2.0

//! Room on the host's file system.

use vm_memory::VolatileSlice;

use super::{
    super::cache::{Cache, Kind},
    Lab, read, write,
};
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

/// The machine reads a boot disk on a thread whose filter has no calls that write.
#[test]
fn a_read_without_writes_leaves_the_file_as_it_is() {
    let lab = Lab::new();
    lab.create("a.qcow2", "-o cluster_size=512", "2M");
    lab.run("qemu-io -f qcow2 -c write~-P~7~0~2M a.qcow2");
    let mut disk = lab.open("a.qcow2", &[]);
    let image = &mut disk.image;
    // The smallest cache, full of changed refcounts.
    image.cache = Cache::new(512, 0);
    let mut table = [0; 8 * 8];
    image.storage.read(image.header.refcount_table, &mut table).unwrap();
    for block in table.chunks_exact(8) {
        let block = u64::from_be_bytes(block.try_into().unwrap());
        assert_ne!(block, 0);
        let count = image.cache.read(&mut image.storage, Kind::Refcounts, block, 2).unwrap();
        image.cache.write(&mut image.storage, Kind::Refcounts, block, 2, count).unwrap();
    }
    image.storage.journal = Some(Vec::new());
    let mut bytes = vec![0; 2 << 20];
    disk.read_without_writes(0, &[VolatileSlice::from(bytes.as_mut_slice())]).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 7));
    let changes = |disk: &super::Qcow2Disk| disk.image.storage.journal.as_ref().unwrap().len();
    assert_eq!(changes(&disk), 0);
    assert!(disk.image.cache.bytes() <= (8 + 17) * 512, "{} bytes", disk.image.cache.bytes());
    // Another read makes room in this cache: the test would see a write.
    read(&mut disk, 1 << 20, 512);
    assert!(changes(&disk) > 0);
    drop(disk);
    lab.check("a.qcow2", false);
}
