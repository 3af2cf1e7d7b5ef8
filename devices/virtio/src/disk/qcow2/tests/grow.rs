// SPDX-License-Identifier: Apache-2.0

//! Larger disks. The random operations of `model` and `crash` grow images, too.

use super::{super::super::GrowError, crash::cut, *};

/// Enlarges a disk, in all steps.
fn grow(disk: &mut Qcow2Disk, size: u64) -> io::Result<()> {
    while !disk.grow(size)? {}
    Ok(())
}

/// A disk of 1 MiB less a sector, in an image with clusters of this option.
fn image(lab: &Lab, options: &str) {
    lab.create("a.qcow2", options, &((1 << 20) - 512).to_string());
}

#[test]
fn the_new_part_hides_the_backing_file_and_the_rest_of_the_last_cluster() {
    let lab = Lab::new();
    let base = Random(3).bytes(2 << 20);
    std::fs::write(lab.path("base.raw"), &base).unwrap();
    image(&lab, "-b base.raw -F raw");
    let mut disk = lab.open("a.qcow2", &["base.raw"]);
    // The last cluster has a copy of all that the backing file has there.
    write(&mut disk, 960 << 10, &[7; 512]).unwrap();
    let mut expected = base[..(1 << 20) - 512].to_vec();
    expected[960 << 10..(960 << 10) + 512].fill(7);
    for size in [1_u64 << 20, (1 << 20) + 4096, 1600 << 10, 3 << 20] {
        grow(&mut disk, size).unwrap();
        expected.resize(usize::try_from(size).unwrap(), 0);
        assert_eq!(disk.size(), size);
        assert!(read_all(&mut disk) == expected, "{size}");
        // No flush of the guest is needed.
        lab.check("a.qcow2", false);
        lab.compare("a.qcow2", &expected);
    }
    let end = expected.len() - 512;
    expected[end..].fill(9);
    write(&mut disk, end as u64, &[9; 512]).unwrap();
    drop(disk);
    lab.check("a.qcow2", false);
    lab.compare("a.qcow2", &expected);
}

#[test]
fn a_much_larger_disk_has_a_longer_table_elsewhere_and_the_old_one_is_free() {
    const SIZE: u64 = 256 << 30;
    for options in ["-o cluster_size=4k", "-o cluster_size=4k,refcount_bits=64", ""] {
        let lab = Lab::new();
        image(&lab, options);
        let mut disk = lab.open("a.qcow2", &[]);
        write(&mut disk, 4096, &[5; 8192]).unwrap();
        let before = disk.image.header.l1;
        // 256 clusters of L1 with clusters of 4 KiB.
        grow(&mut disk, SIZE).unwrap();
        assert_ne!(disk.image.header.l1, before);
        assert_eq!(read(&mut disk, 4096, 8192), [5; 8192]);
        let last = SIZE - 4096;
        assert_eq!(read(&mut disk, last, 4096), [0; 4096]);
        write(&mut disk, last, &[6; 4096]).unwrap();
        disk.flush().unwrap();
        drop(disk);
        lab.check("a.qcow2", false);
        let mut disk = lab.open("a.qcow2", &[]);
        assert_eq!(disk.size(), SIZE);
        assert_eq!(read(&mut disk, last, 4096), [6; 4096]);
    }
}

#[test]
fn a_size_that_the_format_or_the_host_cannot_have_changes_nothing() {
    let lab = Lab::new();
    image(&lab, "-o cluster_size=4k");
    let mut disk = lab.open("a.qcow2", &[]);
    let error = grow(&mut disk, 1 << 50).unwrap_err();
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<GrowError>()).expect("a cause");
    assert_eq!(*cause, GrowError::TooLarge { most: 8 << 40, wanted: 1 << 50 });
    disk.image.storage.most = Some(0);
    assert_eq!(grow(&mut disk, 1 << 40).unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert_eq!(disk.size(), (1 << 20) - 512);
    disk.image.storage.most = None;
    // The clusters of the failed attempt are free again.
    grow(&mut disk, 1 << 40).unwrap();
    drop(disk);
    lab.check("a.qcow2", false);
    let error = lab.try_open("a.qcow2", &[], false).unwrap().grow(1 << 41).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
}

#[test]
fn a_table_that_no_row_of_clusters_can_hold_is_refused() {
    let lab = Lab::new();
    // A refcount block is at each 512th cluster, and the table would take 1024.
    image(&lab, "-o cluster_size=4k,refcount_bits=64");
    let mut disk = lab.open("a.qcow2", &[]);
    write(&mut disk, 0, &[1; 4096]).unwrap();
    assert!(grow(&mut disk, 1 << 40).unwrap_err().to_string().contains("qemu-img resize"));
    grow(&mut disk, 2 << 20).unwrap();
    drop(disk);
    lab.check("a.qcow2", false);
}

/// The host's power may fail at any write, and between two flushes any sectors of it may be lost.
#[test]
fn a_power_cut_leaves_the_old_size_or_the_new_one() {
    let lab = Lab::new();
    let base = Random(5).bytes(2 << 20);
    std::fs::write(lab.path("base.raw"), &base).unwrap();
    image(&lab, "-o cluster_size=4k -b base.raw -F raw");
    let mut disk = lab.open("a.qcow2", &["base.raw"]);
    write(&mut disk, 8192, &[7; 8192]).unwrap();
    disk.flush().unwrap();
    let old = read_all(&mut disk);
    let start = std::fs::read(lab.path("a.qcow2")).unwrap();
    disk.image.storage.journal = Some(Vec::new());
    grow(&mut disk, 3 << 20).unwrap();
    let changes = disk.image.storage.journal.take().unwrap();
    drop(disk);
    let new = [old.clone(), vec![0; (3 << 20) - old.len()]].concat();
    let (mut random, mut sizes) = (Random(6), [0, 0]);
    for place in 0..=changes.len() {
        for _ in 0..8 {
            std::fs::write(lab.path("a.qcow2"), cut(&start, &changes[..place], &mut random)).unwrap();
            lab.check("a.qcow2", true);
            let mut disk = lab.open("a.qcow2", &["base.raw"]);
            let bytes = read_all(&mut disk);
            assert!(bytes == old || bytes == new, "{} bytes at {place}", bytes.len());
            sizes[usize::from(bytes == new)] += 1;
        }
    }
    assert!(sizes[0] > 8 && sizes[1] >= 8, "{sizes:?}");
}
