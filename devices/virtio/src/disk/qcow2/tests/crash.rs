// SPDX-License-Identifier: Apache-2.0

//! The death of the process, and of the host, at any moment.
//!
//! Each write has a number, which is in all of its sectors. After a crash a sector has the number of
//! the last write that was flushed, or of a later one.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use super::{super::storage::Change, *};

/// An image to crash: its options, chain, cluster and size.
struct Victim {
    options: &'static str,
    backing: &'static [&'static str],
    cluster: u64,
    size: u64,
}

/// The third one soon has more data than its refcount table covers.
const VICTIMS: [Victim; 4] = [
    Victim { options: "-o cluster_size=4k", backing: &[], cluster: 4096, size: 8 << 20 },
    Victim { options: "", backing: &["middle.qcow2", "base.raw"], cluster: 64 << 10, size: 8 << 20 },
    Victim {
        options: "-o cluster_size=512,refcount_bits=64",
        backing: &["base.raw"],
        cluster: 512,
        size: 5 << 20,
    },
    Victim { options: "-o cluster_size=1k,refcount_bits=2", backing: &[], cluster: 1024, size: 4 << 20 },
];
/// The most bytes of a disk that grows.
const MOST: u64 = 12 << 20;
/// Bytes of the backing file.
const BASE: u64 = 3 << 20;
/// The number in the backing file.
const IN_BASE: u32 = 1;

#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64, u64),
    Zeroes(u64, u64, bool),
    /// Whole clusters.
    Discard(u64, u64),
    /// By this count of sectors. No other step touches the new part.
    Grow(u64),
    Flush,
}

impl Victim {
    fn make(&self, lab: &Lab, name: &str) {
        fs::write(lab.path("base.raw"), sectors(IN_BASE, BASE / SECTOR)).unwrap();
        lab.create("middle.qcow2", "-b base.raw -F raw", "3M");
        let below = match self.backing {
            [first, ..] => format!(" -b {first} -F {}", if first.ends_with("raw") { "raw" } else { "qcow2" }),
            [] => String::new(),
        };
        lab.create(name, format!("{}{below}", self.options).trim(), &self.size.to_string());
    }

    /// The numbers of a new disk's sectors.
    fn numbers(&self) -> Vec<u32> {
        let mut numbers = vec![0; usize::try_from(self.size / SECTOR).unwrap()];
        if !self.backing.is_empty() {
            numbers[..usize::try_from(BASE / SECTOR).unwrap()].fill(IN_BASE);
        }
        numbers
    }

    fn step(&self, random: &mut Random) -> Step {
        let total = self.size / SECTOR;
        let kind = random.below(17);
        let most = if random.below(4) == 0 { 300 } else { 24 };
        let at = random.below(total);
        let len = (1 + random.below(most)).min(total - at);
        match kind {
            0..10 => Step::Write(at, len),
            10..12 => Step::Zeroes(at, len, kind == 10),
            12 => {
                let cluster = self.cluster / SECTOR;
                let at = at / cluster * cluster;
                Step::Discard(at, (1 + random.below(16) * cluster).next_multiple_of(cluster).min(total - at))
            }
            13 => {
                let most = [8, 1000][usize::try_from(random.below(2)).unwrap()];
                Step::Grow(1 + random.below(most))
            }
            _ => Step::Flush,
        }
    }
}

fn sectors(number: u32, count: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(128 * usize::try_from(count).unwrap())
}

fn run(disk: &mut Qcow2Disk, step: Step, number: u32) -> io::Result<()> {
    match step {
        Step::Write(at, len) => write(disk, at * SECTOR, &sectors(number, len)),
        Step::Zeroes(at, len, may_discard) => disk.write_zeroes(at * SECTOR, len * SECTOR, may_discard),
        Step::Discard(at, len) => disk.discard(at * SECTOR, len * SECTOR),
        // A bound for the test's own time.
        Step::Grow(sectors) => {
            let size = (disk.size() + sectors * SECTOR).min(MOST.max(disk.size()));
            while !disk.grow(size)? {}
            Ok(())
        }
        Step::Flush => disk.flush(),
    }
}

/// The numbers that sectors may have after a crash.
struct Expected {
    flushed: Vec<u32>,
    /// By sector, from the steps that were not flushed.
    later: Vec<Vec<u32>>,
    /// The sectors with such numbers.
    touched: Vec<usize>,
}

impl Expected {
    fn new(flushed: Vec<u32>) -> Self {
        Self { later: vec![Vec::new(); flushed.len()], flushed, touched: Vec::new() }
    }

    /// A step that may have happened.
    fn begin(&mut self, step: Step, number: u32) {
        let (at, len, number) = match step {
            Step::Write(at, len) => (at, len, number),
            Step::Zeroes(at, len, _) | Step::Discard(at, len) => (at, len, 0),
            Step::Flush | Step::Grow(_) => return,
        };
        for sector in at..at + len {
            let sector = usize::try_from(sector).unwrap();
            self.later[sector].push(number);
            self.touched.push(sector);
        }
    }

    fn flushed(&mut self) {
        for sector in self.touched.drain(..) {
            if let Some(last) = self.later[sector].pop() {
                self.flushed[sector] = last;
            }
            self.later[sector].clear();
        }
    }

    /// Takes the contents after a crash.
    fn check(self, bytes: &[u8], name: &str) -> Vec<u32> {
        let mut found = Vec::new();
        for (sector, chunk) in bytes.chunks(512).enumerate() {
            let number = u32::from_le_bytes(chunk[..4].try_into().unwrap());
            assert!(chunk[..508] == chunk[4..], "{name}: sector {sector} is torn");
            if sector >= self.flushed.len() {
                assert_eq!(number, 0, "{name}: sector {sector} of the part by which the disk has grown");
                continue;
            }
            let flushed = self.flushed[sector];
            let later = &self.later[sector];
            assert!(
                number == flushed || later.contains(&number),
                "{name}: sector {sector} has {number}; flushed {flushed}, later {later:?}"
            );
            found.push(number);
        }
        assert_eq!(found.len(), self.flushed.len());
        found
    }
}

// --- The process

/// The child's job: a directory, the number of a victim, and a seed.
const CHILD: &str = "PORTCULLIS_QCOW2_CHILD_FOR_TESTS";
/// Seconds of the test.
const SECONDS: &str = "PORTCULLIS_QCOW2_KILL_SECONDS";
/// Numbers of a round.
const ROUND: u32 = 1 << 17;

/// Changes the image until it is killed. The log has a line at each step's begin, and at the end of
/// each flush.
fn child(job: &str) -> ! {
    let [directory, victim, seed]: [&str; 3] = job.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let directory = Path::new(directory);
    let victim = &VICTIMS[victim.parse::<usize>().unwrap()];
    let seed: u32 = seed.parse().unwrap();
    let backing = victim.backing.iter().map(|name| {
        let format = if name.ends_with("raw") { Format::Raw } else { Format::Qcow2 };
        (format, File::open(directory.join(name)).unwrap())
    });
    let image = OpenOptions::new().read(true).write(true).open(directory.join("a.qcow2")).unwrap();
    let mut disk = Qcow2Disk::open(image, backing.collect(), true).unwrap();
    let mut log = OpenOptions::new().append(true).open(directory.join("log")).unwrap();
    let mut random = Random(seed.into());
    for number in 1..ROUND {
        let step = victim.step(&mut random);
        log.write_all(b"b").unwrap();
        run(&mut disk, step, seed * ROUND + number).unwrap();
        if matches!(step, Step::Flush) {
            log.write_all(b"f").unwrap();
        }
    }
    std::process::abort();
}

/// Hundreds of rounds on the same images. Each round goes on with the image of the last one.
#[test]
fn a_killed_process_leaves_a_good_image_with_all_that_was_flushed() {
    if let Ok(job) = std::env::var(CHILD) {
        child(&job);
    }
    let seconds = std::env::var(SECONDS).map_or(10, |seconds| seconds.parse().unwrap());
    let end = Instant::now() + Duration::from_secs(seconds);
    let labs: Vec<(Lab, &Victim)> = VICTIMS.iter().map(|victim| (Lab::new(), victim)).collect();
    let mut contents = Vec::new();
    for (lab, victim) in &labs {
        victim.make(lab, "a.qcow2");
        contents.push(victim.numbers());
    }
    let mut random = Random(u64::from(std::process::id()));
    let (mut seed, mut steps, mut flushes, mut leaks) = (0_u32, 0_usize, 0_usize, 0_u32);
    while Instant::now() < end || seed < 20 {
        seed += 1;
        let index = seed as usize % labs.len();
        let (lab, victim) = &labs[index];
        fs::write(lab.path("log"), "").unwrap();
        let name = std::thread::current().name().unwrap().to_owned();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--nocapture", "--test-threads=1"])
            .env(CHILD, format!("{} {index} {seed}", lab.path("").display()))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while fs::metadata(lab.path("log")).unwrap().len() == 0 {
            assert!(child.try_wait().unwrap().is_none(), "round {seed}: {:?}", child.wait_with_output());
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_micros(random.below(40_000)));
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.stderr.is_empty(), "round {seed}: {}", String::from_utf8_lossy(&output.stderr));

        let mut expected = Expected::new(contents[index].clone());
        let mut steps_of_child = Random(seed.into());
        let mut number = 0;
        for event in fs::read(lab.path("log")).unwrap() {
            if event == b'f' {
                expected.flushed();
                flushes += 1;
            } else {
                number += 1;
                steps += 1;
                expected.begin(victim.step(&mut steps_of_child), seed * ROUND + number);
            }
        }
        lab.check("a.qcow2", true);
        if random.below(8) == 0 {
            leaks += u32::from(!lab.try_run("qemu-img check -f qcow2 a.qcow2").status.success());
            lab.run("qemu-img check -q -f qcow2 -r leaks a.qcow2");
            lab.check("a.qcow2", false);
        }
        let bytes = read_all(&mut lab.try_open("a.qcow2", victim.backing, false).unwrap());
        if random.below(8) == 0 {
            lab.compare("a.qcow2", &bytes);
        }
        contents[index] = expected.check(&bytes, &format!("round {seed}"));
    }
    println!("{seed} rounds, {steps} steps, {flushes} flushes, {leaks} repairs of leaks");
    assert!(flushes > 20, "{flushes} flushes");
}

// --- The host

/// Writes a part of the changes to a file, as a power cut leaves it: all up to the last sync, and
/// any sectors of those after it.
pub(super) fn cut(start: &[u8], changes: &[Change], random: &mut Random) -> Vec<u8> {
    let synced = changes.iter().rposition(|change| matches!(change, Change::Sync)).map_or(0, |last| last + 1);
    let mut file = start.to_vec();
    // All, nothing, or something between.
    let chance = [0, 1, 3, 4][usize::try_from(random.below(4)).unwrap()];
    for (index, change) in changes.iter().enumerate() {
        let mut survives = || index < synced || random.below(4) < chance;
        match change {
            Change::Write(offset, bytes) => {
                let mut at = usize::try_from(*offset).unwrap();
                let mut rest = bytes.as_slice();
                while !rest.is_empty() {
                    let count = (512 - at % 512).min(rest.len());
                    if survives() {
                        file.resize(file.len().max(at + count), 0);
                        file[at..at + count].copy_from_slice(&rest[..count]);
                    }
                    (at, rest) = (at + count, &rest[count..]);
                }
            }
            Change::Punch(offset, len) if survives() => {
                let from = usize::try_from(*offset).unwrap().min(file.len());
                let to = usize::try_from(offset + len).unwrap().min(file.len());
                file[from..to].fill(0);
            }
            Change::Punch(..) | Change::Sync => {}
        }
    }
    file
}

fn power_cuts(victim: &Victim, seed: u64) {
    let lab = Lab::new();
    victim.make(&lab, "a.qcow2");
    let mut random = Random(seed);
    let start = fs::read(lab.path("a.qcow2")).unwrap();
    let mut disk = lab.open("a.qcow2", victim.backing);
    disk.image.storage.journal = Some(Vec::new());
    let journal = |disk: &Qcow2Disk| disk.image.storage.journal.as_ref().unwrap().len();
    // Each step with its begin and end in the journal.
    let mut script = Vec::new();
    for number in 2..250 {
        let step = victim.step(&mut random);
        let begin = journal(&disk);
        run(&mut disk, step, number).unwrap();
        script.push((step, number, begin, journal(&disk)));
    }
    let changes = disk.image.storage.journal.take().unwrap();
    drop(disk);
    // Anywhere, with all writes before a sync under way, and soon after each change of the header.
    let after = |wanted: fn(&Change) -> bool| {
        let mut all: Vec<usize> = (0..changes.len()).filter(|at| wanted(&changes[*at])).collect();
        all.push(changes.len());
        all
    };
    let places = [
        (0..=changes.len()).collect(),
        after(|change| matches!(change, Change::Sync)),
        after(|change| matches!(change, Change::Write(..100, _)))
            .iter()
            .flat_map(|at| (1..4).map(move |more| at + more))
            .map(|at| at.min(changes.len()))
            .collect::<Vec<_>>(),
    ];
    for number in 0..30 {
        let at = places[number % 3][usize::try_from(random.below(places[number % 3].len() as u64)).unwrap()];
        let mut expected = Expected::new(victim.numbers());
        for (step, number, begin, end) in &script {
            if *begin < at {
                expected.begin(*step, *number);
            }
            // A flush has ended when its last change is done.
            if matches!(step, Step::Flush) && *end <= at {
                expected.flushed();
            }
        }
        fs::write(lab.path("cut.qcow2"), cut(&start, &changes[..at], &mut random)).unwrap();
        lab.check("cut.qcow2", true);
        let mut disk = lab.open("cut.qcow2", victim.backing);
        let name = format!("seed {seed}, cut {number} at {at} of {}", changes.len());
        let found = expected.check(&read_all(&mut disk), &name);
        if number % 8 == 0 {
            // Life goes on, with the leaks.
            let mut expected = Expected::new(found);
            for number in 1000..1040 {
                let step = victim.step(&mut random);
                run(&mut disk, step, number).unwrap();
                expected.begin(step, number);
                if matches!(step, Step::Flush) {
                    expected.flushed();
                }
            }
            expected.flushed();
            let bytes = read_all(&mut disk);
            drop(disk);
            expected.check(&bytes, &name);
            lab.check("cut.qcow2", true);
            lab.compare("cut.qcow2", &bytes);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 0, ..config(2) })]
    #[test]
    fn a_power_cut_leaves_a_good_image_with_all_that_was_flushed(seed in any::<u64>()) {
        for victim in &VICTIMS {
            power_cuts(victim, seed);
        }
    }
}
