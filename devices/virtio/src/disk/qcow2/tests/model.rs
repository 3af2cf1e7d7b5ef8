// SPDX-License-Identifier: Apache-2.0

//! Any operations, against bytes in memory.

use super::*;

/// Bytes of the disk at first: the last cluster is cut.
const SIZE: usize = (3 << 20) + 1536;
/// The most bytes of the disk.
const MOST: usize = 8 << 20;

#[derive(Clone, Debug)]
enum Step {
    Read(usize, usize),
    Write(usize, usize, u8),
    Zeroes(usize, usize, bool),
    Discard(usize, usize),
    /// By this count of sectors.
    Grow(usize),
    Flush,
    Reopen,
    /// QEMU's opinion.
    Ask,
}

/// Sector and count of sectors. [`inside`] moves them into the disk.
fn range() -> impl Strategy<Value = (usize, usize)> {
    let len = prop_oneof![1..4_usize, 1..200_usize, Just(128_usize), Just(2048_usize)];
    (0..MOST / 512, len)
}

/// Moves a range into a disk of `size` bytes.
fn inside((sector, len): (usize, usize), size: usize) -> (usize, usize) {
    let sector = sector % (size / 512);
    (sector, len.min(size / 512 - sector))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => range().prop_map(|(at, len)| Step::Read(at, len)),
        8 => (range(), any::<u8>()).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        2 => (range(), any::<bool>()).prop_map(|((at, len), may)| Step::Zeroes(at, len, may)),
        2 => range().prop_map(|(at, len)| Step::Discard(at, len)),
        1 => prop_oneof![1..8_usize, 1..3000_usize].prop_map(Step::Grow),
        2 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => Just(Step::Ask),
    ]
}

fn run(steps: Vec<Step>, options: &str, backing: &[&str], cluster: usize) {
    run_in(&Lab::new(), steps, options, backing, cluster);
}

fn run_in(lab: &Lab, steps: Vec<Step>, options: &str, backing: &[&str], cluster: usize) {
    let base: Vec<u8> = Random(9).bytes(2 << 20);
    std::fs::write(lab.path("base.raw"), &base).unwrap();
    lab.create("middle.qcow2", "-b base.raw -F raw", "2M");
    lab.run("qemu-io -f qcow2 -c write~-z~64k~64k -c write~-P~9~1000k~90k middle.qcow2");
    let below = match backing {
        [first, ..] => format!(" -b {first} -F {}", if first.ends_with("raw") { "raw" } else { "qcow2" }),
        [] => String::new(),
    };
    lab.create("a.qcow2", format!("{options}{below}").trim(), &SIZE.to_string());
    let mut model = vec![0; SIZE];
    if !backing.is_empty() {
        model[..2 << 20].copy_from_slice(&base);
    }
    if backing.len() == 2 {
        model[64 << 10..128 << 10].fill(0);
        model[1000 << 10..1090 << 10].fill(9);
    }
    let no_holes = steps.len().is_multiple_of(2);
    let open = |lab: &Lab| {
        let mut disk = lab.open("a.qcow2", backing);
        disk.image.storage.no_holes = no_holes;
        disk
    };
    let mut disk = open(lab);
    for (number, step) in steps.into_iter().enumerate() {
        let size = model.len();
        match step {
            Step::Read(at, len) => {
                let (at, len) = inside((at, len), size);
                let bytes = read(&mut disk, at as u64 * SECTOR, len * 512);
                assert!(bytes == model[at * 512..(at + len) * 512], "step {number}");
            }
            Step::Write(at, len, byte) => {
                let (at, len) = inside((at, len), size);
                let mut bytes = vec![byte; len * 512];
                for (sector, chunk) in bytes.chunks_mut(512).enumerate() {
                    chunk[..8].copy_from_slice(&(number * 10000 + sector).to_le_bytes());
                }
                model[at * 512..(at + len) * 512].copy_from_slice(&bytes);
                // Buffers of odd sizes.
                let cut = bytes.len() / 3;
                let (a, b) = bytes.split_at_mut(cut);
                disk.write(at as u64 * SECTOR, &[a.into(), b.into()]).unwrap();
            }
            Step::Zeroes(at, len, may_discard) => {
                let (at, len) = inside((at, len), size);
                model[at * 512..(at + len) * 512].fill(0);
                disk.write_zeroes(at as u64 * SECTOR, len as u64 * SECTOR, may_discard).unwrap();
            }
            Step::Discard(at, len) => {
                let (at, len) = inside((at, len), size);
                let (from, end) = ((at * 512).next_multiple_of(cluster), (at + len) * 512);
                let to = if end == size { size } else { end / cluster * cluster };
                if from < to {
                    model[from..to].fill(0);
                }
                disk.discard(at as u64 * SECTOR, len as u64 * SECTOR).unwrap();
            }
            Step::Grow(sectors) => {
                model.resize(MOST.min(size + sectors * 512), 0);
                while !disk.grow(model.len() as u64).unwrap() {}
            }
            Step::Flush => disk.flush().unwrap(),
            Step::Reopen => {
                drop(disk);
                disk = open(lab);
            }
            Step::Ask => {
                drop(disk);
                lab.check("a.qcow2", false);
                lab.compare("a.qcow2", &model);
                disk = open(lab);
            }
        }
    }
    assert!(read_all(&mut disk) == model);
    disk.flush().unwrap();
    assert!(read_all(&mut lab.try_open("a.qcow2", backing, false).unwrap()) == model);
    drop(disk);
    lab.check("a.qcow2", false);
    lab.compare("a.qcow2", &model);
}

proptest! {
    #![proptest_config(config(10))]

    #[test]
    fn a_plain_image_is_what_its_writes_made_of_it(steps in prop::collection::vec(step(), 1..40)) {
        run(steps, "", &[], 64 << 10);
    }

    #[test]
    fn an_image_without_the_hosts_cache_is_what_its_writes_made_of_it(
        steps in prop::collection::vec(step(), 1..40),
    ) {
        run_in(&Lab::direct(), steps, "-o cluster_size=4k", &["base.raw"], 4096);
    }

    #[test]
    fn an_overlay_over_raw_is_what_its_writes_made_of_it(steps in prop::collection::vec(step(), 1..40)) {
        run(steps, "-o cluster_size=4k", &["base.raw"], 4096);
    }

    #[test]
    fn an_overlay_over_qcow2_is_what_its_writes_made_of_it(steps in prop::collection::vec(step(), 1..40)) {
        run(steps, "-o cluster_size=16k", &["middle.qcow2", "base.raw"], 16 << 10);
    }

    #[test]
    fn small_clusters_and_wide_refcounts_work(steps in prop::collection::vec(step(), 1..40)) {
        run(steps, "-o cluster_size=512,refcount_bits=64", &["base.raw"], 512);
    }

    #[test]
    fn refcounts_of_one_bit_work(steps in prop::collection::vec(step(), 1..40)) {
        run(steps, "-o cluster_size=1k,refcount_bits=1", &["middle.qcow2", "base.raw"], 1024);
    }
}
