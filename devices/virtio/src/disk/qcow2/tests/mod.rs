// SPDX-License-Identifier: Apache-2.0

//! QEMU's tools make the images, and are the second opinion on each image that is written here.

mod crash;
mod grow;
mod model;
mod overlay;
mod refusals;
mod room;

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    process::{Command, Output},
};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::disk::SECTOR;

/// A directory with images.
pub(super) struct Lab {
    directory: TempDir,
    /// The image is open without the host's cache.
    direct: bool,
}

impl Lab {
    pub(super) fn new() -> Self {
        // A file system in memory: QEMU syncs a lot.
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        Self { directory, direct: false }
    }

    /// A directory on a medium that can bypass the host's cache: kernels before 6.6 have no such file system in memory.
    pub(super) fn direct() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), direct: true }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs a program of QEMU in the directory.
    pub(super) fn try_run(&self, line: &str) -> Output {
        let mut words = line.split(' ');
        let mut command = Command::new(words.next().unwrap());
        // A tilde is a space inside of a word.
        command.args(words.map(|word| word.replace('~', " "))).current_dir(self.directory.path());
        command.output().expect("the tests need qemu-img and qemu-io (Debian: qemu-utils)")
    }

    pub(super) fn run(&self, line: &str) {
        let output = self.try_run(line);
        assert!(output.status.success(), "{line}: {output:?}");
    }

    /// Makes an image: options of `qemu-img create`, and its size.
    pub(super) fn create(&self, name: &str, options: &str, size: &str) {
        let options = if options.is_empty() { String::new() } else { format!("{options} ") };
        self.run(&format!("qemu-img create -q -f qcow2 {options}{name} {size}"));
    }

    pub(super) fn file(&self, name: &str) -> File {
        let flags = if self.direct { libc::O_DIRECT } else { 0 };
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(self.path(name)).unwrap()
    }

    pub(super) fn read_only(&self, name: &str) -> File {
        File::open(self.path(name)).unwrap()
    }

    /// The file of a chain. Names that end in `raw` are raw.
    pub(super) fn chain(&self, names: &[&str]) -> Vec<(Format, File)> {
        let format = |name: &str| if name.ends_with("raw") { Format::Raw } else { Format::Qcow2 };
        names.iter().map(|name| (format(name), self.read_only(name))).collect()
    }

    pub(super) fn try_open(
        &self,
        name: &str,
        backing: &[&str],
        writable: bool,
    ) -> Result<Qcow2Disk, OpenError> {
        Qcow2Disk::open(self.file(name), self.chain(backing), writable)
    }

    pub(super) fn open(&self, name: &str, backing: &[&str]) -> Qcow2Disk {
        self.try_open(name, backing, true).unwrap()
    }

    /// Asserts that QEMU finds neither an error nor, unless `leaks`, a leak.
    pub(super) fn check(&self, name: &str, leaks: bool) {
        let output = self.try_run(&format!("qemu-img check -f qcow2 {name}"));
        let good = output.status.code() == Some(0) || leaks && output.status.code() == Some(3);
        assert!(
            good,
            "{name}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Asserts that QEMU reads `bytes`.
    pub(super) fn compare(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path("expected.raw"), bytes).unwrap();
        self.run(&format!("qemu-img compare -f qcow2 -F raw {name} expected.raw"));
    }
}

/// A count of cases, unless PROPTEST_CASES has another one.
pub(super) fn config(cases: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").map_or(cases, |cases| cases.parse().unwrap());
    ProptestConfig { cases, ..ProptestConfig::default() }
}

/// Numbers that look random.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        // splitmix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }
}

pub(super) fn read(disk: &mut Qcow2Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0x55; len];
    disk.read(offset, &[bytes.as_mut_slice().into()]).unwrap();
    bytes
}

pub(super) fn write(disk: &mut Qcow2Disk, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut bytes = bytes.to_vec();
    disk.write(offset, &[bytes.as_mut_slice().into()])
}

pub(super) fn read_all(disk: &mut Qcow2Disk) -> Vec<u8> {
    let size = usize::try_from(disk.size()).unwrap();
    read(disk, 0, size)
}

#[test]
fn an_image_that_qemu_wrote_reads_the_same() {
    for options in [
        "",
        "-o cluster_size=4k",
        "-o cluster_size=2M",
        "-o compat=0.10",
        "-o cluster_size=512,refcount_bits=1",
    ] {
        let lab = Lab::new();
        let bytes = [Random(1).bytes(300 << 10), vec![0; 1 << 20], Random(2).bytes(100 << 10)].concat();
        std::fs::write(lab.path("source.raw"), &bytes).unwrap();
        lab.run(&format!("qemu-img convert -f raw -O qcow2 {options} source.raw a.qcow2").replace("  ", " "));
        let mut disk = lab.try_open("a.qcow2", &[], false).unwrap();
        assert_eq!(disk.size(), bytes.len() as u64);
        assert!(read_all(&mut disk) == bytes, "{options}");
        assert!(read(&mut disk, 299 << 10, 2048) == bytes[299 << 10..301 << 10], "{options}");
        assert!(write(&mut disk, 0, &[0; 512]).is_err(), "the disk is read-only");
        disk.flush().unwrap();
    }
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    for cluster in ["4k", "64k", "2M"] {
        let lab = Lab::new();
        let mut bytes: Vec<u8> = Random(3).bytes(5 << 20).iter().map(|byte| byte % 7).collect();
        std::fs::write(lab.path("source.raw"), &bytes).unwrap();
        lab.run(&format!("qemu-img convert -c -f raw -O qcow2 -o cluster_size={cluster} source.raw a.qcow2"));
        let mut disk = lab.open("a.qcow2", &[]);
        assert!(matches!(disk.image.lookup(0).unwrap(), image::Mapping::Compressed { .. }));
        assert!(read_all(&mut disk) == bytes, "{cluster}");
        for offset in [0, 70 << 10, (2 << 20) - 512, (5 << 20) - 1024] {
            let new = Random(offset as u64).bytes(1024);
            write(&mut disk, offset as u64, &new).unwrap();
            bytes[offset..offset + 1024].copy_from_slice(&new);
        }
        assert!(read_all(&mut disk) == bytes, "{cluster}");
        drop(disk);
        lab.check("a.qcow2", false);
        lab.compare("a.qcow2", &bytes);
    }
}

#[test]
fn qemu_reads_the_same_from_an_image_that_was_written_here() {
    for options in ["", "-o cluster_size=4k", "-o cluster_size=2M", "-o cluster_size=512,refcount_bits=64"] {
        let lab = Lab::new();
        lab.create("a.qcow2", options, "6M");
        let bytes = [vec![0; 1 << 20], Random(4).bytes(4 << 20), vec![0; 1 << 20]].concat();
        let mut disk = lab.open("a.qcow2", &[]);
        for (at, part) in (1 << 20_u64..).step_by(100 << 10).zip(bytes[1 << 20..5 << 20].chunks(100 << 10)) {
            write(&mut disk, at, part).unwrap();
        }
        disk.flush().unwrap();
        drop(disk);
        lab.check("a.qcow2", false);
        lab.compare("a.qcow2", &bytes);
        assert!(read_all(&mut lab.open("a.qcow2", &[])) == bytes, "{options}");
    }
}

/// QEMU and this code write to the same overlay in turns.
#[test]
fn an_overlay_takes_turns_with_qemu() {
    let lab = Lab::new();
    let mut bytes = Random(5).bytes(1 << 20);
    std::fs::write(lab.path("base.raw"), &bytes).unwrap();
    lab.create("middle.qcow2", "-b base.raw -F raw", "2M");
    lab.run("qemu-io -f qcow2 -c write~-P~7~600k~600k middle.qcow2");
    lab.create("top.qcow2", "-b middle.qcow2 -F qcow2", "3M");
    bytes.resize(3 << 20, 0);
    bytes[600 << 10..1200 << 10].fill(7);
    let backing = ["middle.qcow2", "base.raw"];
    for (at, byte) in [(0, 1_u8), (600 << 10, 2), (1000 << 10, 3), (2 << 20, 4), ((3 << 20) - 4096, 5)] {
        let mut disk = lab.open("top.qcow2", &backing);
        assert!(read_all(&mut disk) == bytes, "before {at}");
        write(&mut disk, at, &[byte; 3584]).unwrap();
        bytes[usize::try_from(at).unwrap()..][..3584].fill(byte);
        drop(disk);
        lab.check("top.qcow2", false);
        lab.compare("top.qcow2", &bytes);
        let then = at + 3584;
        lab.run(&format!("qemu-io -f qcow2 -c write~-P~{}~{then}~512 top.qcow2", byte + 100));
        bytes[usize::try_from(then).unwrap()..][..512].fill(byte + 100);
    }
    assert!(read_all(&mut lab.open("top.qcow2", &backing)) == bytes);
}

/// The rest of a small one reads as zeroes, also within its last sector.
#[test]
fn backing_files_may_have_other_sizes() {
    let lab = Lab::new();
    for len in [1000, (64 << 10) + 1, (1 << 20) - 1, 3 << 20] {
        let base = Random(10).bytes(len);
        std::fs::write(lab.path("base.raw"), &base).unwrap();
        lab.create("middle.qcow2", "-b base.raw -F raw", "4M");
        for (name, chain) in
            [("base.raw", &["base.raw"][..]), ("middle.qcow2", &["middle.qcow2", "base.raw"])]
        {
            let format = if name == "base.raw" { "raw" } else { "qcow2" };
            lab.create("a.qcow2", &format!("-b {name} -F {format}"), "1M");
            let mut expect = base.clone();
            expect.resize(1 << 20, 0);
            let mut disk = lab.open("a.qcow2", chain);
            assert!(read_all(&mut disk) == expect, "{len} bytes of {name}");
            // A copy of the cluster in which the backing file ends.
            let at = (len / 512 * 512).min((1 << 20) - 512);
            write(&mut disk, at as u64 ^ 1024, &[7; 512]).unwrap();
            expect[at ^ 1024..][..512].fill(7);
            assert!(read_all(&mut disk) == expect, "{len} bytes of {name}");
            drop(disk);
            lab.check("a.qcow2", false);
            lab.compare("a.qcow2", &expect);
        }
    }
}

/// A discard never shows the backing file again, and gives the host's room back.
#[test]
fn discarded_clusters_read_as_zeroes_and_are_used_again() {
    for backing in [&[][..], &["base.raw"]] {
        let lab = Lab::new();
        std::fs::write(lab.path("base.raw"), vec![9; 4 << 20]).unwrap();
        lab.create("a.qcow2", if backing.is_empty() { "" } else { "-b base.raw -F raw" }, "4M");
        let mut disk = lab.open("a.qcow2", backing);
        write(&mut disk, 0, &Random(6).bytes(2 << 20)).unwrap();
        disk.flush().unwrap();
        let blocks =
            |lab: &Lab| std::os::unix::fs::MetadataExt::blocks(&lab.file("a.qcow2").metadata().unwrap());
        let full = blocks(&lab);
        disk.discard(0, 4 << 20).unwrap();
        assert!(read_all(&mut disk) == vec![0; 4 << 20]);
        disk.flush().unwrap();
        assert!(full - blocks(&lab) > 3000, "{full} sectors before, {} now", blocks(&lab));
        let len = lab.file("a.qcow2").metadata().unwrap().len();
        // The discarded clusters are used again, and what was in them does not come back.
        write(&mut disk, 1 << 20, &[1; 512]).unwrap();
        write(&mut disk, (2 << 20) - 512, &[2; 1024]).unwrap();
        let mut expect = vec![0; 4 << 20];
        expect[1 << 20..][..512].fill(1);
        expect[(2 << 20) - 512..][..1024].fill(2);
        assert!(read_all(&mut disk) == expect);
        drop(disk);
        assert_eq!(lab.file("a.qcow2").metadata().unwrap().len(), len, "no new clusters");
        lab.check("a.qcow2", false);
        lab.compare("a.qcow2", &expect);
    }
}

#[test]
fn zeroes_that_keep_the_room_are_written_in_place() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    let mut disk = lab.open("a.qcow2", &[]);
    write(&mut disk, 0, &[7; 256 << 10]).unwrap();
    disk.write_zeroes(1024, 250 << 10, false).unwrap();
    disk.flush().unwrap();
    lab.check("a.qcow2", false);
    let mut expect =
        [vec![7; 1024], vec![0; 250 << 10], vec![7; (6 << 10) - 1024], vec![0; 768 << 10]].concat();
    assert!(read_all(&mut disk) == expect);
    let len = lab.file("a.qcow2").metadata().unwrap().len();
    write(&mut disk, 66 << 10, &[8; 1024]).unwrap();
    expect[66 << 10..][..1024].fill(8);
    assert!(read_all(&mut disk) == expect);
    drop(disk);
    assert_eq!(lab.file("a.qcow2").metadata().unwrap().len(), len);
    lab.check("a.qcow2", false);
    lab.compare("a.qcow2", &expect);
}

/// Another reader of the file sees no change before the flush, and all after it.
#[test]
fn mappings_reach_the_file_at_the_flush() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    let mut disk = lab.open("a.qcow2", &[]);
    write(&mut disk, 4096, &[7; 512]).unwrap();
    assert_eq!(read(&mut lab.try_open("a.qcow2", &[], false).unwrap(), 4096, 512), [0; 512]);
    disk.flush().unwrap();
    assert_eq!(read(&mut lab.try_open("a.qcow2", &[], false).unwrap(), 4096, 512), [7; 512]);
    drop(disk);
}

/// 4 MiB of tables at most, for a disk whose tables have 64 MiB.
#[test]
fn the_cache_is_bounded() {
    let lab = Lab::new();
    lab.create("a.qcow2", "-o cluster_size=4k", "32G");
    let mut disk = lab.open("a.qcow2", &[]);
    let mut random = Random(7);
    let mut written = Vec::new();
    for _ in 0..6000 {
        let offset = random.below(32 << 30) / 4096 * 4096;
        write(&mut disk, offset, &offset.to_le_bytes().repeat(512)).unwrap();
        written.push(offset);
    }
    assert!(disk.image.cache.bytes() <= 4 << 20, "{} bytes", disk.image.cache.bytes());
    for offset in written {
        assert_eq!(read(&mut disk, offset, 8), offset.to_le_bytes());
    }
    assert!(disk.image.cache.bytes() <= 4 << 20);
    drop(disk);
    lab.check("a.qcow2", false);
}

/// The host's file system is full: a file size limit stands for it.
#[test]
fn a_failed_allocation_leaves_a_good_image() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1G");
    let mut disk = lab.open("a.qcow2", &[]);
    write(&mut disk, 0, &[7; 4096]).unwrap();
    disk.image.storage.most = Some(disk.image.storage.len() + (512 << 10));
    let errors = (0..64).filter(|at| write(&mut disk, at << 20, &[8; 64 << 10]).is_err()).count();
    assert!((1..64).contains(&errors), "{errors}");
    disk.flush().unwrap();
    lab.check("a.qcow2", true);
    disk.image.storage.most = None;
    write(&mut disk, 100 << 20, &[9; 512]).unwrap();
    assert_eq!(read(&mut disk, 0, 512), [8; 512]);
    drop(disk);
    lab.check("a.qcow2", false);
}

/// The kernel reports lost data once, and forgets it.
#[test]
fn nothing_is_mapped_after_a_failed_sync() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    let mut disk = lab.open("a.qcow2", &[]);
    write(&mut disk, 0, &[7; 512]).unwrap();
    disk.image.storage.fail_sync = true;
    assert!(disk.flush().is_err());
    disk.image.storage.fail_sync = false;
    let error = disk.flush().unwrap_err();
    assert!(error.to_string().contains("stop the VM"), "{error}");
    assert!(write(&mut disk, 0, &[7; 512]).is_err());
    drop(disk);
    lab.check("a.qcow2", true);
    assert_eq!(read(&mut lab.open("a.qcow2", &[]), 0, 512), [0; 512]);
}

#[test]
fn a_dirty_bitmap_is_invalid_after_a_write() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    lab.run("qemu-img bitmap --add a.qcow2 b");
    assert_eq!(std::fs::read(lab.path("a.qcow2")).unwrap()[95], 1);
    drop(lab.try_open("a.qcow2", &[], false).unwrap());
    assert_eq!(std::fs::read(lab.path("a.qcow2")).unwrap()[95], 1);
    write(&mut lab.open("a.qcow2", &[]), 0, &[1; 512]).unwrap();
    assert_eq!(std::fs::read(lab.path("a.qcow2")).unwrap()[95], 0);
    lab.check("a.qcow2", true);
}

/// Sets bytes of an image.
pub(super) fn patch(lab: &Lab, name: &str, at: u64, bytes: &[u8]) {
    std::os::unix::fs::FileExt::write_all_at(&lab.file(name), bytes, at).unwrap();
}

/// A mapping to any metadata is not written through.
#[test]
fn metadata_is_not_overwritten_by_data() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    write(&mut lab.open("a.qcow2", &[]), 0, &[7; 512]).unwrap();
    let disk = lab.open("a.qcow2", &[]);
    let header = disk.image.header.clone();
    drop(disk);
    let bytes = std::fs::read(lab.path("a.qcow2")).unwrap();
    let word = |at: u64| u64::from_be_bytes(bytes[usize::try_from(at).unwrap()..][..8].try_into().unwrap());
    let l2 = word(header.l1) & image::OFFSET;
    for (name, at) in
        [("header", 0), ("L1", header.l1), ("refcount table", header.refcount_table), ("L2", l2)]
    {
        for (flag, entry) in [("data", at | image::COPIED), ("zeroes", at | image::COPIED | image::ZERO)] {
            // An offset of 0 is no place.
            if at == 0 {
                continue;
            }
            std::fs::write(lab.path("a.qcow2"), &bytes).unwrap();
            patch(&lab, "a.qcow2", l2 + 8, &entry.to_be_bytes());
            let mut disk = lab.open("a.qcow2", &[]);
            let error = write(&mut disk, 64 << 10, &[1; 512]).unwrap_err();
            assert!(error.to_string().contains("qemu-img check"), "{name} {flag}: {error}");
            disk.discard(64 << 10, 64 << 10).unwrap();
            disk.flush().unwrap();
            drop(disk);
            let after = std::fs::read(lab.path("a.qcow2")).unwrap();
            let at = usize::try_from(at).unwrap();
            if name != "L2" {
                assert!(after[at..at + 4096] == bytes[at..at + 4096], "{name} {flag}");
            }
        }
    }
    // Tables over tables.
    for at in [header.l1, header.refcount_table, word(header.refcount_table), 1 << 40, 512] {
        std::fs::write(lab.path("a.qcow2"), &bytes).unwrap();
        patch(&lab, "a.qcow2", header.l1, &(at | image::COPIED).to_be_bytes());
        let Ok(mut disk) = lab.try_open("a.qcow2", &[], true) else { continue };
        let text = write(&mut disk, 64 << 10, &[1; 512]).unwrap_err().to_string();
        assert!(text.contains("table") && text.contains("qemu-img check"), "{at:#x}: {text}");
    }
    // A refcount of 0 for the cluster of each table: none is allocated again.
    std::fs::write(lab.path("a.qcow2"), &bytes).unwrap();
    let block = word(header.refcount_table);
    patch(&lab, "a.qcow2", block, &[0; 64]);
    let mut disk = lab.open("a.qcow2", &[]);
    for cluster in 1..8 {
        write(&mut disk, cluster * (64 << 10), &[1; 64 << 10]).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    let mut disk = lab.open("a.qcow2", &[]);
    assert_eq!(read(&mut disk, 7 * (64 << 10), 512), [1; 512]);
}

proptest! {
    #![proptest_config(config(400))]
    /// A real image with a few changed bytes, or cut.
    #[test]
    fn no_image_causes_a_panic(
        cluster in 0..3_usize,
        changes in prop::collection::vec((0..600_u64, any::<u8>(), any::<u64>()), 0..8),
        in_tables in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>()), 0..12),
        cut in prop::option::of(any::<prop::sample::Index>()),
        mut script in prop::collection::vec(any::<u8>(), fuzz::SCRIPT),
    ) {
        static IMAGES: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
        let images = IMAGES.get_or_init(|| {
            ["512,refcount_bits=64", "4k", "4k,refcount_bits=1"].map(|options| {
                let lab = Lab::new();
                std::fs::write(lab.path("source.raw"), Random(8).bytes(40 << 10).iter().map(|b| b % 3).collect::<Vec<_>>()).unwrap();
                lab.run(&format!("qemu-img convert -c -f raw -O qcow2 -o cluster_size={options} source.raw a.qcow2"));
                lab.run("qemu-img resize -q -f qcow2 a.qcow2 200k");
                lab.run("qemu-io -f qcow2 -c write~-P~7~64k~10k -c write~-z~90k~10k a.qcow2");
                std::fs::read(lab.path("a.qcow2")).unwrap()
            }).to_vec()
        });
        let mut image = images[cluster].clone();
        for (at, byte, _) in &changes {
            // Two in three changes hit the fields of the header.
            let at = usize::try_from(if at % 3 == 0 { *at } else { 4 + at % 108 }).unwrap();
            image[at] = *byte;
        }
        for (at, value) in &in_tables {
            // A whole entry: small offsets with and without flags.
            let at = at.index(image.len() / 8) * 8;
            let value = match value % 4 { 0 => *value, 1 => value >> 40 & !0x1ff | 1 << 63, 2 => value >> 40 & !0xfff | 1 << 63, _ => value >> 40 & !0xfff | 1 << 63 | 1 };
            image[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        if let Some(cut) = cut {
            let len = cut.index(image.len());
            image.truncate(len);
        }
        // Most offsets inside of the small disk.
        script.chunks_exact_mut(8).for_each(|step| step[7] |= 31);
        fuzz::fuzz_image(&[script, image].concat());
    }
}

/// The entries of the first cluster of the disk: offset in the file, and value, of L1 and L2.
fn entries(lab: &Lab) -> [(u64, u64); 2] {
    let bytes = std::fs::read(lab.path("a.qcow2")).unwrap();
    let word = |at: u64| u64::from_be_bytes(bytes[usize::try_from(at).unwrap()..][..8].try_into().unwrap());
    let l1 = word(40);
    let l2 = word(l1) & image::OFFSET;
    [(l1, word(l1)), (l2, word(l2))]
}

/// A cluster without the bit COPIED may belong to a snapshot.
#[test]
fn shared_clusters_are_copied() {
    let lab = Lab::new();
    lab.create("a.qcow2", "", "1M");
    write(&mut lab.open("a.qcow2", &[]), 0, &[7; 64 << 10]).unwrap();
    let [(l1, table), (l2, data)] = entries(&lab);
    patch(&lab, "a.qcow2", l2, &(data & !image::COPIED).to_be_bytes());
    let mut disk = lab.open("a.qcow2", &[]);
    disk.image.storage.no_holes = true;
    write(&mut disk, 512, &[8; 512]).unwrap();
    assert_eq!(read(&mut disk, 0, 1536), [[7; 512], [8; 512], [7; 512]].concat());
    drop(disk);
    let bytes = std::fs::read(lab.path("a.qcow2")).unwrap();
    let old = usize::try_from(data & image::OFFSET).unwrap();
    assert!(bytes[old..old + (64 << 10)] == [7; 64 << 10], "the shared cluster is as before");
    lab.check("a.qcow2", false);
    patch(&lab, "a.qcow2", l1, &(table & !image::COPIED).to_be_bytes());
    let mut disk = lab.open("a.qcow2", &[]);
    assert_eq!(read(&mut disk, 512, 512), [8; 512]);
    let error = write(&mut disk, 128 << 10, &[1; 512]).unwrap_err();
    assert!(error.to_string().contains("is not its own"), "{error}");
}

#[test]
fn invalid_compressed_clusters_are_errors() {
    let lab = Lab::new();
    std::fs::write(lab.path("source.raw"), vec![7; 1 << 20]).unwrap();
    lab.run("qemu-img convert -c -f raw -O qcow2 source.raw a.qcow2");
    let [_, (_, entry)] = entries(&lab);
    // Reserved, a stored block of one byte, and one that is cut.
    for stream in [&[7, 7, 7][..], &[1, 1, 0, 0xfe, 0xff, 0x41], &[0, 0xff, 0xff, 0, 0]] {
        patch(&lab, "a.qcow2", entry & 0x3f_ffff, stream);
        let mut disk = lab.open("a.qcow2", &[]);
        let error = disk.read(0, &[[0; 512].as_mut_slice().into()]).unwrap_err();
        assert!(error.to_string().contains("A compressed cluster"), "{error}");
        assert!(write(&mut disk, 0, &[1; 512]).is_err());
        // The next one is intact.
        assert_eq!(read(&mut disk, 64 << 10, 512), [7; 512]);
    }
}

#[test]
fn a_failed_copy_frees_its_cluster() {
    let lab = Lab::new();
    std::fs::write(lab.path("base.raw"), vec![7; 1 << 20]).unwrap();
    lab.create("a.qcow2", "-b base.raw -F raw", "1M");
    let mut disk = lab.open("a.qcow2", &["base.raw"]);
    write(&mut disk, 0, &[1; 512]).unwrap();
    lab.file("base.raw").set_len(4096).unwrap();
    assert!(write(&mut disk, 512 << 10, &[1; 512]).is_err());
    drop(disk);
    lab.check("a.qcow2", false);
}
