// SPDX-License-Identifier: Apache-2.0

//! Overlays of ephemeral disks. Here their files have names, so that QEMU can read them.

use std::{fs::File, os::unix::fs::MetadataExt as _};

use super::{Lab, Random, read, read_all, write};
use crate::disk::{
    Disk as _, Format, SECTOR,
    qcow2::{Layer, OpenError, Qcow2Disk, Refusal},
};

/// A disk over files, the own one first. Names that end in `raw` are raw.
fn try_overlay(lab: &Lab, names: &[&str]) -> Result<Qcow2Disk, OpenError> {
    File::create(lab.path("overlay")).unwrap();
    let mut files = lab.chain(names);
    let base = files.remove(0);
    Qcow2Disk::overlay(lab.file("overlay"), base, files)
}

/// Asserts that QEMU finds no error in the overlay, over a base that it can find. Leaks of what was not flushed are none.
fn check(lab: &Lab, base: &str) {
    let format = if base.ends_with("raw") { "raw" } else { "qcow2" };
    lab.run(&format!("qemu-img rebase -u -f qcow2 -F {format} -b {base} overlay"));
    lab.check("overlay", true);
}

#[test]
fn an_overlay_has_the_contents_of_its_chain_and_all_changes() {
    for chain in [&["base.raw"][..], &["flat.qcow2"], &["top.qcow2", "base.raw"]] {
        let lab = Lab::new();
        let base = [Random(1).bytes(600 << 10), vec![0; 600 << 10], vec![7; 100]].concat();
        std::fs::write(lab.path("base.raw"), &base).unwrap();
        lab.create("top.qcow2", "-b base.raw -F raw", &(base.len() - 100).to_string());
        lab.run("qemu-img convert -f qcow2 -O qcow2 -c top.qcow2 flat.qcow2");
        let files =
            || ["base.raw", "top.qcow2", "flat.qcow2"].map(|name| std::fs::read(lab.path(name)).unwrap());
        let before = files();
        let mut disk = try_overlay(&lab, chain).unwrap();
        let mut expect = base[..base.len() - 100].to_vec();
        assert_eq!(disk.size(), expect.len() as u64, "without the incomplete sector");
        assert!(read_all(&mut disk) == expect, "{chain:?}");
        for (at, byte) in [(0, 1_u8), (200 << 10, 2), (599 << 10, 3), ((1200 << 10) - 4096, 4)] {
            write(&mut disk, at as u64, &[byte; 4096]).unwrap();
            expect[at..at + 4096].fill(byte);
        }
        disk.discard(128 << 10, 128 << 10).unwrap();
        expect[128 << 10..256 << 10].fill(0);
        assert!(read_all(&mut disk) == expect, "{chain:?}");
        disk.flush().unwrap();
        drop(disk);
        assert!(files() == before, "{chain:?}: files below are only read");
        check(&lab, chain[0]);
        lab.compare("overlay", &expect);
        drop(try_overlay(&lab, chain).unwrap());
        check(&lab, chain[0]);
        lab.compare("overlay", &base[..base.len() - 100]);
    }
}

#[test]
fn discarded_room_of_an_overlay_goes_back_to_the_host() {
    let lab = Lab::new();
    std::fs::write(lab.path("base.raw"), vec![9; 4 << 20]).unwrap();
    let mut disk = try_overlay(&lab, &["base.raw"]).unwrap();
    let blocks = || lab.file("overlay").metadata().unwrap().blocks();
    write(&mut disk, 0, &Random(6).bytes(3 << 20)).unwrap();
    disk.flush().unwrap();
    let full = blocks();
    disk.discard(0, 4 << 20).unwrap();
    disk.flush().unwrap();
    assert!(full - blocks() > 5000, "{full} sectors before, {} now", blocks());
    assert!(read_all(&mut disk) == vec![0; 4 << 20], "the base does not show");
}

/// Nothing reads the file again, so the end of a VM waits for no storage.
#[test]
fn an_overlay_is_dropped_without_a_flush() {
    let lab = Lab::new();
    std::fs::write(lab.path("base.raw"), vec![9; 1 << 20]).unwrap();
    let mut disk = try_overlay(&lab, &["base.raw"]).unwrap();
    write(&mut disk, 0, &[1; 512]).unwrap();
    disk.image.storage.journal = Some(Vec::new());
    disk.close().unwrap();
    assert!(disk.image.storage.journal.as_ref().unwrap().is_empty());
}

#[test]
fn the_largest_disk_has_an_overlay() {
    const MOST: u64 = 2 << 50;
    let lab = Lab::new();
    let base = File::create(lab.path("base.raw")).unwrap();
    let last = MOST - SECTOR;
    for size in [SECTOR, 600 << 30, MOST] {
        base.set_len(size).unwrap();
        let mut disk = try_overlay(&lab, &["base.raw"]).unwrap();
        write(&mut disk, size - SECTOR, &[7; 512]).unwrap();
        assert_eq!(read(&mut disk, size - SECTOR, 512), [7; 512]);
        drop(disk);
        check(&lab, "base.raw");
    }
    base.set_len(MOST + SECTOR).unwrap();
    let error = try_overlay(&lab, &["base.raw"]).unwrap_err();
    assert!(
        matches!(error.refusal, Refusal::OverlayTooLarge { size, largest: MOST } if size == last + 2 * SECTOR)
    );
    assert_eq!(error.layer, Layer::Overlay);
}

#[test]
fn wrong_files_of_an_overlay_are_named() {
    let lab = Lab::new();
    std::fs::write(lab.path("base.raw"), vec![9; 1 << 20]).unwrap();
    lab.create("top.qcow2", "-b base.raw -F raw", "1M");
    let refusal = |names: &[&str]| try_overlay(&lab, names).unwrap_err().to_string();
    assert!(refusal(&["top.qcow2"]).starts_with("The image has the backing file \"base.raw\""));
    assert!(refusal(&["base.raw", "base.raw"]).starts_with("The image has no backing file"));
    assert!(refusal(&["top.qcow2", "top.qcow2"]).starts_with("Backing file 1 has the backing file"));
    // A file with contents is not overwritten.
    let other = lab.file("base.raw");
    let error = Qcow2Disk::overlay(other, (Format::Raw, lab.read_only("base.raw")), Vec::new()).unwrap_err();
    assert!(matches!(error.refusal, Refusal::OverlayInUse), "{error}");
    assert!(std::fs::read(lab.path("base.raw")).unwrap() == vec![9; 1 << 20]);
}
