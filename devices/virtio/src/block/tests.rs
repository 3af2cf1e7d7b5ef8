// SPDX-License-Identifier: Apache-2.0

use std::{collections::BTreeMap, time::Duration};

use devices::device::Device as _;

use proptest::prelude::*;

use super::*;
use crate::{
    limit::Rate,
    testing::{Driver, MemoryDisk},
};

const VERSION_1: u64 = 1 << 32;
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;
const ZEROES: u64 = 1 << 14;
const READ_ONLY: u64 = 1 << 5;

const HEADER_AT: u64 = 0x10000;
const STATUS_AT: u64 = 0x11000;
const DATA_AT: u64 = 0x20000;

fn options() -> Options {
    Options {
        id: "root".into(),
        read_only: false,
        serial: "serial-of-20-letters!".into(),
        discard: true,
        limits: Limits::default(),
        wait_for_room: true,
    }
}

/// A driver that has not started, and the machine's end of the disk's commands.
fn connected(
    disk: &MemoryDisk,
    options: Options,
    counters: Arc<Counters>,
    on_full: Box<dyn Fn() + Send>,
) -> (Driver, Remote) {
    let (identity, configuration) = (identity(&options), configuration(disk.size()));
    let reports = Reports { on_full, on_grown: Box::new(|| {}) };
    let block = Block::new(Box::new(disk.clone()), options, counters, Arc::clone(&configuration), reports);
    let (block, remote) = block.unwrap();
    (Driver::new(identity, configuration, Box::new(block)), remote)
}

/// A driver of a disk of 16 KiB with these features.
fn commanded(options: Options, features: u64) -> (Driver, MemoryDisk, Arc<Counters>, Remote) {
    let (disk, counters) = (MemoryDisk::of(16 << 10), Arc::<Counters>::default());
    let (mut driver, remote) = connected(&disk, options, Arc::clone(&counters), Box::new(|| {}));
    driver.start(VERSION_1 | features, 16);
    (driver, disk, counters, remote)
}

/// The same, without the machine's end of its commands.
fn driver(options: Options, features: u64) -> (Driver, MemoryDisk, Arc<Counters>) {
    let (driver, disk, counters, _) = commanded(options, features);
    (driver, disk, counters)
}

/// Sends a request with `out` bytes of data for the device, and `room` bytes for its data. Returns
/// status and length.
fn request(driver: &mut Driver, kind: u32, sector: u64, out: &[u8], room: u32) -> (u8, u32) {
    driver.write(HEADER_AT, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    driver.write(DATA_AT, out);
    driver.write(STATUS_AT, &[0x55]);
    let mut buffers = vec![(HEADER_AT, 16, false)];
    if !out.is_empty() {
        buffers.push((DATA_AT, u32::try_from(out.len()).unwrap(), false));
    }
    if room > 0 {
        buffers.push((DATA_AT, room, true));
    }
    buffers.push((STATUS_AT, 1, true));
    driver.send(&buffers);
    let (_, len) = driver.returned().expect("every request comes back");
    (driver.read(STATUS_AT, 1)[0], len)
}

const OK: u8 = 0;
const ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn data_goes_out_and_comes_back() {
    let (mut driver, disk, counters) = driver(options(), FLUSH);
    assert_eq!(request(&mut driver, 1, 2, &[7; 1024], 0), (OK, 1));
    assert_eq!(disk.medium().bytes[1024..2048], [7; 1024]);
    driver.write(DATA_AT, &[0; 1536]);
    assert_eq!(request(&mut driver, 0, 1, &[], 1536), (OK, 1537));
    assert_eq!(driver.read(DATA_AT, 1536), [vec![0; 512], vec![7; 1024]].concat());
    assert_eq!(request(&mut driver, 4, 0, &[], 0), (OK, 1));
    let counted =
        [&counters.reads, &counters.writes, &counters.flushes, &counters.read_bytes, &counters.written_bytes]
            .map(|counter| counter.load(Ordering::Relaxed));
    assert_eq!(counted, [1, 1, 1, 1536, 1024]);
    assert_eq!(disk.medium().flushes, 1);
}

/// For a boot from the disk, between two boots.
#[test]
fn the_machine_reads_whole_sectors_past_limits_and_counters() {
    let one = Some(Rate { per_second: 1, burst: 1 });
    let options = Options { limits: Limits { bytes: one, operations: one }, ..options() };
    let (mut driver, _, counters) = driver(options, FLUSH);
    assert_eq!(driver.function.disk_size(), Some(16 << 10));
    // One token pays for the first request of any length.
    assert_eq!(request(&mut driver, 1, 31, &[7; 512], 0), (OK, 1));
    let read = |offset: u64, len: usize| {
        let mut bytes = vec![1; len];
        driver.function.read_disk(offset, &mut bytes).map(|()| bytes).map_err(|error| error.kind())
    };
    for _ in 0..3 {
        assert_eq!(read(15 << 10, 1024), Ok([vec![0; 512], vec![7; 512]].concat()));
    }
    assert_eq!(counters.reads.load(Ordering::Relaxed), 0);
    for (offset, len) in [(16 << 10, 512), (15 << 10, 1536), (100, 512), (0, 100), (u64::MAX - 511, 512)] {
        assert_eq!(read(offset, len), Err(io::ErrorKind::InvalidInput), "{offset} {len}");
    }
}

#[test]
fn header_and_data_may_be_split_anywhere() {
    let (mut driver, disk, _) = driver(options(), FLUSH);
    driver.write(HEADER_AT, &[&1_u32.to_le_bytes()[..], &[0; 4], &4_u64.to_le_bytes(), &[9; 100]].concat());
    driver.write(DATA_AT, &[8; 412]);
    let buffers =
        [(HEADER_AT, 3, false), (HEADER_AT + 3, 113, false), (DATA_AT, 412, false), (STATUS_AT, 1, true)];
    driver.send(&buffers);
    assert_eq!(driver.returned(), Some((0, 1)));
    assert_eq!(disk.medium().bytes[2048..2560], [vec![9; 100], vec![8; 412]].concat());
    // The status is the last byte of the device's buffers, wherever that is.
    driver.write(HEADER_AT, &[&0_u32.to_le_bytes()[..], &[0; 4], &4_u64.to_le_bytes()].concat());
    driver.send(&[(HEADER_AT, 16, false), (DATA_AT, 500, true), (DATA_AT + 0x1000, 13, true)]);
    assert_eq!(driver.returned(), Some((0, 513)));
    assert_eq!(driver.read(DATA_AT + 0x1000, 13), [vec![8; 12], vec![OK]].concat());
}

#[test]
fn a_driver_that_does_not_flush_has_each_write_on_the_medium() {
    let (mut driver, disk, _) = driver(options(), ZEROES);
    request(&mut driver, 1, 0, &[7; 512], 0);
    assert_eq!(disk.medium().flushes, 1);
    request(&mut driver, 13, 0, &range(0, 1, 0), 0);
    assert_eq!(disk.medium().flushes, 2);
}

#[test]
fn requests_that_leave_the_disk_fail_and_change_nothing() {
    let (mut driver, disk, _) = driver(options(), FLUSH | DISCARD | ZEROES);
    disk.medium().bytes.fill(3);
    for (name, kind, sector, out, room) in [
        ("read behind the end", 0, 32, vec![], 512),
        ("read over the end", 0, 31, vec![], 1024),
        ("an address that wraps around", 0, u64::MAX / 512, vec![], 1024),
        ("an address that does not fit", 0, u64::MAX, vec![], 512),
        ("half a sector", 0, 0, vec![], 100),
        ("write over the end", 1, 31, vec![7; 1024], 0),
        ("write half a sector", 1, 0, vec![7; 700], 0),
        ("discard over the end", 11, 0, range(30, 4, 0), 0),
        ("discard at an address that wraps", 11, 0, range(u64::MAX, 1, 0), 0),
        ("half a range", 11, 0, vec![0; 8], 0),
        ("too many ranges", 11, 0, range(0, 1, 0).repeat(2), 0),
        ("zeroes over the end", 13, 0, range(31, 2, 0), 0),
    ] {
        assert_eq!(request(&mut driver, kind, sector, &out, room), (ERROR, 1), "{name}");
    }
    assert_eq!(request(&mut driver, 11, 0, &range(0, 1, 1), 0).0, UNSUPPORTED, "a discard has no flags");
    assert_eq!(request(&mut driver, 13, 0, &range(0, 1, 2), 0).0, UNSUPPORTED);
    for kind in [2, 3, 14, 15, 0x8000_0000, u32::MAX] {
        assert_eq!(request(&mut driver, kind, 0, &[], 0), (UNSUPPORTED, 1), "type {kind}");
    }
    let medium = disk.medium();
    assert!(medium.bytes.iter().all(|byte| *byte == 3));
    assert!(medium.discarded.is_empty() && medium.zeroed.is_empty());
}

#[test]
fn requests_without_header_or_status_come_back() {
    let (mut driver, _, _) = driver(options(), FLUSH);
    driver.send(&[(HEADER_AT, 15, false), (STATUS_AT, 1, true)]);
    assert_eq!(driver.returned(), Some((0, 1)));
    assert_eq!(driver.read(STATUS_AT, 1), [ERROR]);
    driver.send(&[(HEADER_AT, 16, false)]);
    assert_eq!(driver.returned(), Some((0, 0)));
}

/// Whatever the driver has accepted.
#[test]
fn a_read_only_disk_is_never_written() {
    let read_only = Options { read_only: true, ..options() };
    let (mut driver, disk, _) = driver(read_only.clone(), FLUSH | READ_ONLY);
    assert_eq!(request(&mut driver, 1, 0, &[7; 512], 0), (ERROR, 1));
    for kind in [11, 13] {
        assert_eq!(request(&mut driver, kind, 0, &range(0, 1, 0), 0), (UNSUPPORTED, 1));
    }
    assert_eq!(request(&mut driver, 4, 0, &[], 0), (OK, 1), "a flush succeeds: firmware sends it");
    assert_eq!(request(&mut driver, 0, 0, &[], 512), (OK, 513));
    let medium = disk.medium();
    assert_eq!((medium.flushes, medium.bytes[0]), (0, 0));
    let offered = identity(&read_only).features;
    assert_eq!(offered & (READ_ONLY | DISCARD | ZEROES), READ_ONLY);
}

#[test]
fn ranges_are_discarded_and_filled_with_zeroes() {
    let (mut driver, disk, counters) = driver(options(), FLUSH | DISCARD | ZEROES);
    assert_eq!(request(&mut driver, 11, 0, &range(8, 8, 0), 0), (OK, 1));
    assert_eq!(request(&mut driver, 11, 0, &range(0, 1, 0), 0), (OK, 1));
    assert_eq!(request(&mut driver, 11, 0, &range(5, 0, 0), 0), (OK, 1));
    assert_eq!(request(&mut driver, 13, 0, &range(4, 2, 1), 0), (OK, 1));
    assert_eq!(request(&mut driver, 13, 0, &range(4, 2, 0), 0), (OK, 1));
    let medium = disk.medium();
    assert_eq!(medium.discarded, [(4096, 4096), (0, 512)]);
    assert_eq!(medium.zeroed, [(2048, 1024, true), (2048, 1024, false)]);
    assert_eq!(counters.discards.load(Ordering::Relaxed), 3);
    drop(medium);
    let kept = Options { discard: false, ..options() };
    assert_eq!(identity(&kept).features & (DISCARD | ZEROES), ZEROES);
}

#[test]
fn zeroes_keep_the_room_of_a_disk_without_discard() {
    let (mut driver, disk, _) = driver(Options { discard: false, ..options() }, FLUSH | ZEROES);
    assert_eq!(request(&mut driver, 13, 0, &range(4, 2, 1), 0), (OK, 1));
    assert_eq!(disk.medium().zeroed, [(2048, 1024, false)]);
    assert_eq!(request(&mut driver, 11, 0, &range(4, 2, 0), 0), (UNSUPPORTED, 1));
}

#[test]
fn the_serial_number_has_twenty_bytes() {
    let (mut driver, _, _) = driver(options(), FLUSH);
    assert_eq!(request(&mut driver, 8, 0, &[], 20), (OK, 21));
    assert_eq!(driver.read(DATA_AT, 20), b"serial-of-20-letters");
    assert_eq!(request(&mut driver, 8, 0, &[], 5), (OK, 6));
}

#[test]
fn errors_of_the_hosts_file_reach_the_driver_and_are_counted() {
    let fails = Options { wait_for_room: false, ..options() };
    let (mut driver, disk, counters) = driver(fails, FLUSH | DISCARD | ZEROES);
    disk.medium().fail = Some(io::ErrorKind::StorageFull);
    for (kind, out, room) in [
        (0, vec![], 512),
        (1, vec![7; 512], 0),
        (4, vec![], 0),
        (11, range(0, 1, 0), 0),
        (13, range(0, 1, 0), 0),
    ] {
        assert_eq!(request(&mut driver, kind, 0, &out, room), (ERROR, 1), "type {kind}");
    }
    assert_eq!(counters.errors.load(Ordering::Relaxed), 5);
    assert_eq!(counters.writes.load(Ordering::Relaxed), 0);
    disk.medium().fail = None;
    assert_eq!(request(&mut driver, 0, 0, &[], 512), (OK, 513), "it goes on");
}

/// As dm reports a bad block, whatever the reaction to a full file system.
#[test]
fn a_medium_that_fails_is_an_error_in_the_guest_and_no_wait() {
    for wait_for_room in [false, true] {
        let options = Options { wait_for_room, ..options() };
        let (mut driver, disk, counters) = driver(options, FLUSH | DISCARD | ZEROES);
        disk.medium().fail = Some(io::ErrorKind::Other);
        for (kind, out, room) in
            [(0, vec![], 512), (1, vec![7; 512], 0), (4, vec![], 0), (13, range(0, 1, 0), 0)]
        {
            assert_eq!(request(&mut driver, kind, 0, &out, room), (ERROR, 1), "type {kind}");
        }
        assert_eq!(counters.errors.load(Ordering::Relaxed), 4);
        assert_eq!(counters.read_bytes.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn one_request_cannot_move_more_than_its_bound() {
    let disk = MemoryDisk::of(64 << 20);
    let (mut driver, _) = connected(&disk, options(), Arc::default(), Box::new(|| {}));
    driver.start(VERSION_1 | FLUSH, 256);
    driver.write(HEADER_AT, &[0; 16]);
    let mut buffers = vec![(HEADER_AT, 16, false)];
    buffers.extend([(DATA_AT, 0xc0000, true); 44]);
    buffers.push((STATUS_AT, 1, true));
    driver.send(&buffers);
    assert_eq!(driver.returned(), Some((0, 1)));
    assert_eq!(driver.read(STATUS_AT, 1), [ERROR], "33 MiB");
}

#[test]
fn the_configuration_says_the_capacity_in_sectors() {
    let (driver, _, _) = driver(options(), FLUSH);
    assert_eq!(u64::from_le_bytes(driver.get(0x200)), 32);
    assert_eq!(u32::from_le_bytes(driver.get(0x20c)), 254);
    assert_eq!(driver.offered() & (FLUSH | DISCARD | ZEROES | READ_ONLY), FLUSH | DISCARD | ZEROES);
}

#[test]
fn a_request_over_the_limit_stays_in_the_ring_until_its_time() {
    let rate = |per_second, burst| Some(Rate { per_second, burst });
    // The second operation is allowed 100 ms after the first one.
    let limits = Limits { bytes: None, operations: rate(10, 1) };
    let (mut driver, _, counters, remote) = commanded(Options { limits, ..options() }, FLUSH);
    let begun = Instant::now();
    assert_eq!(request(&mut driver, 4, 0, &[], 0), (OK, 1));
    driver.write(HEADER_AT, &4_u32.to_le_bytes());
    driver.send(&[(HEADER_AT, 16, false), (STATUS_AT, 1, true)]);
    while driver.returned().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(10), "the timer rings the queue");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(begun.elapsed() >= Duration::from_millis(100), "{:?}", begun.elapsed());
    // One byte in ten years: only a change of the limit lets the request pass.
    remote.limit(Limits { bytes: rate(1, 512), operations: None });
    assert_eq!(request(&mut driver, 1, 0, &[7; 512], 0), (OK, 1), "the burst");
    driver.write(HEADER_AT, &[&0_u32.to_le_bytes()[..], &[0; 12]].concat());
    driver.send(&[(HEADER_AT, 16, false), (DATA_AT, 512, true), (STATUS_AT, 1, true)]);
    assert_eq!(driver.returned(), None);
    assert_eq!(driver.returned(), None, "nor at the next doorbell");
    remote.limit(Limits::default());
    assert_eq!(driver.returned(), Some((0, 513)));
    assert_eq!(driver.read(DATA_AT, 512), [7; 512]);
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!((count(&counters.flushes), count(&counters.writes), count(&counters.reads)), (2, 1, 1));
}

#[test]
fn a_reset_frees_the_driver_from_a_request_that_waits() {
    let limits = Limits { bytes: Some(Rate { per_second: 1, burst: 512 }), operations: None };
    let (mut driver, ..) = commanded(Options { limits, ..options() }, FLUSH);
    assert_eq!(request(&mut driver, 1, 0, &[7; 512], 0), (OK, 1));
    driver.send(&[(HEADER_AT, 16, false), (DATA_AT, 512, false), (STATUS_AT, 1, true)]);
    assert_eq!(driver.returned(), None);
    driver.set_status(0);
    driver.pump();
    driver.start(VERSION_1 | FLUSH, 16);
    assert_eq!(request(&mut driver, 4, 0, &[], 0), (OK, 1), "a flush moves no bytes");
}

#[test]
fn a_request_without_room_waits_until_the_machine_runs_again() {
    let (disk, fulls) = (MemoryDisk::of(16 << 10), Arc::new(AtomicU64::new(0)));
    let counters = Arc::<Counters>::default();
    let counted = Arc::clone(&fulls);
    let on_full = Box::new(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let (mut driver, _) = connected(&disk, options(), Arc::clone(&counters), on_full);
    driver.start(VERSION_1 | FLUSH | DISCARD | ZEROES, 16);
    let fulls = || fulls.load(Ordering::Relaxed);
    let mut expected = 0;
    for (kind, data) in [(1_u32, vec![7; 512]), (4, vec![]), (13, range(0, 1, 0)), (11, range(0, 1, 0))] {
        disk.medium().fail = Some(io::ErrorKind::StorageFull);
        driver.write(HEADER_AT, &[&kind.to_le_bytes()[..], &[0; 12]].concat());
        driver.write(DATA_AT, &data);
        driver.write(STATUS_AT, &[0x55]);
        let mut buffers = vec![(HEADER_AT, 16, false), (DATA_AT, u32::try_from(data.len()).unwrap(), false)];
        buffers.push((STATUS_AT, 1, true));
        driver.send(&buffers);
        for _ in 0..3 {
            assert_eq!(driver.returned(), None);
            driver.set(0x1000, &[0, 0]);
        }
        expected += 1;
        assert_eq!(fulls(), expected, "once, whatever the guest rings");
        // There is no room yet.
        driver.function.resume();
        assert_eq!(driver.returned(), None);
        expected += 1;
        assert_eq!(fulls(), expected);
        disk.medium().fail = None;
        assert_eq!(driver.returned(), None, "only a machine that runs again tries");
        driver.function.resume();
        assert_eq!((driver.returned(), driver.read(STATUS_AT, 1)), (Some((0, 1)), vec![OK]), "type {kind}");
    }
    assert_eq!(counters.errors.load(Ordering::Relaxed), 0);
    assert_eq!(disk.medium().flushes, 1);
    driver.function.resume();
    assert_eq!((driver.returned(), fulls()), (None, expected));
}

#[test]
fn a_request_that_waited_for_room_pays_its_limit_once() {
    let limits = Limits { bytes: None, operations: Some(Rate { per_second: 1, burst: 1 }) };
    let (mut driver, disk, ..) = commanded(Options { limits, ..options() }, FLUSH);
    disk.medium().fail = Some(io::ErrorKind::StorageFull);
    driver.write(HEADER_AT, &[&4_u32.to_le_bytes()[..], &[0; 12]].concat());
    driver.send(&[(HEADER_AT, 16, false), (STATUS_AT, 1, true)]);
    assert_eq!(driver.returned(), None);
    disk.medium().fail = None;
    driver.function.resume();
    assert_eq!((driver.returned(), driver.read(STATUS_AT, 1)), (Some((0, 1)), vec![OK]));
    driver.send(&[(HEADER_AT, 16, false), (STATUS_AT, 1, true)]);
    assert_eq!(driver.returned(), None, "the next one waits");
}

#[test]
fn a_reset_ends_the_wait_for_room() {
    let (mut driver, disk, _) = driver(options(), FLUSH);
    disk.medium().fail = Some(io::ErrorKind::StorageFull);
    driver.write(HEADER_AT, &[&4_u32.to_le_bytes()[..], &[0; 12]].concat());
    driver.send(&[(HEADER_AT, 16, false), (STATUS_AT, 1, true)]);
    assert_eq!(driver.returned(), None);
    disk.medium().fail = None;
    driver.set_status(0);
    driver.pump();
    driver.start(VERSION_1 | FLUSH, 16);
    assert_eq!(request(&mut driver, 4, 0, &[], 0), (OK, 1));
}

/// The ranges of zeroes are not in the length of the request.
#[test]
fn zeroes_are_charged_to_the_requests_behind_them() {
    let limits = Limits { bytes: Some(Rate { per_second: 512, burst: 512 }), operations: None };
    let (mut driver, ..) = commanded(Options { limits, ..options() }, FLUSH | ZEROES);
    assert_eq!(request(&mut driver, 13, 0, &range(0, 32, 0), 0), (OK, 1));
    driver.send(&[(HEADER_AT, 16, false), (DATA_AT, 512, true), (STATUS_AT, 1, true)]);
    driver.write(HEADER_AT, &0_u32.to_le_bytes());
    assert_eq!(driver.returned(), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    /// Any requests, against a map of sectors.
    #[test]
    fn the_disk_is_what_valid_writes_made_of_it(
        script in prop::collection::vec((0_u32..16, 0_u64..36, 0_usize..3000, any::<u8>()), 0..30)
    ) {
        let (mut driver, disk, _) = driver(options(), FLUSH | ZEROES);
        let mut model: BTreeMap<u64, u8> = BTreeMap::new();
        for (kind, sector, len, byte) in script {
            let len = if byte % 4 == 0 { len } else { len / 512 * 512 };
            let valid = len % 512 == 0 && sector * 512 + len as u64 <= 16 << 10;
            match kind {
                0..6 => {
                    let (status, _) = request(&mut driver, 1, sector, &vec![byte; len], 0);
                    prop_assert_eq!(status == OK, valid);
                    if valid {
                        model.extend((sector..sector + len as u64 / 512).map(|sector| (sector, byte)));
                    }
                }
                6..12 => {
                    let (status, written) = request(&mut driver, 0, sector, &[], u32::try_from(len).unwrap());
                    prop_assert_eq!(status == OK, valid);
                    prop_assert_eq!(written as usize, if valid { len + 1 } else { 1 });
                    for (at, sector) in (sector..).enumerate().take(if valid { len / 512 } else { 0 }) {
                        let expect = vec![model.get(&sector).copied().unwrap_or(0); 512];
                        prop_assert_eq!(driver.read(DATA_AT + 512 * at as u64, 512), expect);
                    }
                }
                _ => { request(&mut driver, kind, sector, &vec![byte; len], 7); }
            }
        }
        let medium = disk.medium();
        for (sector, bytes) in medium.bytes.chunks(512).enumerate() {
            let expect = model.get(&(sector as u64)).copied().unwrap_or(0);
            prop_assert!(bytes.iter().all(|byte| *byte == expect), "sector {}", sector);
        }
    }
}

/// A paused machine takes no change before it runs again, and its reset drops events.
#[test]
fn the_last_change_of_limits_counts_and_outlives_a_reset() {
    let (mut driver, _, _, remote) = commanded(options(), 0);
    for per_second in (1..=100).rev() {
        let bytes = Some(Rate { per_second, burst: 512 });
        remote.limit(Limits { bytes, operations: None });
    }
    driver.forget();
    assert!(driver.function.reset().is_ok());
    driver.enable();
    driver.start(1 << 32, 16);
    assert_eq!(request(&mut driver, 1, 0, &[7; 512], 0), (OK, 1), "the burst");
    driver.write(HEADER_AT, &[&0_u32.to_le_bytes()[..], &[0; 12]].concat());
    driver.send(&[(HEADER_AT, 16, false), (DATA_AT, 512, true), (STATUS_AT, 1, true)]);
    assert_eq!(driver.returned(), None, "one byte per second, the last of them");
}

/// Whether the driver was told of another configuration since the last call (the specification, 4.1.4.5).
fn changes(driver: &Driver) -> bool {
    driver.get::<1>(0x100)[0] & 2 != 0
}

#[test]
fn a_disk_grows_under_its_driver_which_learns_the_new_size() {
    let (mut driver, disk, _, remote) = commanded(options(), FLUSH);
    let capacity = |driver: &Driver| driver.get::<8>(0x200);
    assert_eq!(capacity(&driver), 32_u64.to_le_bytes());
    assert!(!changes(&driver));
    assert_eq!(request(&mut driver, 1, 32, &[7; 512], 0).0, ERROR, "behind the end");
    remote.grow(1, 20 << 10);
    assert!(remote.grown(1).is_none(), "only the disk's thread can grow it");
    // Two steps, and the thread may do other work between.
    disk.medium().more_steps = true;
    driver.pump();
    remote.grown(1).unwrap().unwrap();
    assert_eq!(capacity(&driver), 40_u64.to_le_bytes());
    assert!(changes(&driver));
    assert_eq!(request(&mut driver, 1, 32, &[7; 512], 0), (OK, 1));
    // The same size again changes nothing.
    remote.grow(2, 20 << 10);
    driver.pump();
    assert!(remote.grown(2).unwrap().is_ok());
    assert!(!changes(&driver));
    // A disk never becomes smaller, and a host without room changes nothing.
    remote.grow(3, 16 << 10);
    driver.pump();
    assert!(remote.grown(3).unwrap().unwrap_err().to_string().contains("20480"));
    disk.medium().fail = Some(io::ErrorKind::StorageFull);
    remote.grow(4, 24 << 10);
    driver.pump();
    assert_eq!(remote.grown(4).unwrap().unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert_eq!(capacity(&driver), 40_u64.to_le_bytes());
    assert!(!changes(&driver));
}

#[test]
fn a_growth_that_a_reset_overtakes_is_made_afterwards() {
    for begun in [false, true] {
        let (mut driver, disk, _, remote) = commanded(options(), FLUSH);
        remote.grow(1, 20 << 10);
        if begun {
            disk.medium().more_steps = true;
            driver.pump_once();
        }
        driver.forget();
        assert!(driver.function.reset().is_ok());
        assert_eq!(disk.medium().bytes.len(), 16 << 10, "not on the thread of the reset");
        driver.enable();
        driver.start(VERSION_1 | FLUSH, 16);
        driver.pump();
        remote.grown(1).unwrap().unwrap();
        assert_eq!(driver.get::<8>(0x200), 40_u64.to_le_bytes());
    }
}

/// A driver reads the size before it is ready, and must not keep an old one.
#[test]
fn a_disk_that_grows_before_its_driver_is_ready_reports_that() {
    let (mut driver, _, _, remote) = commanded(options(), FLUSH);
    driver.set_status(0);
    driver.pump();
    driver.negotiate(VERSION_1 | FLUSH);
    assert_eq!(driver.get::<8>(0x200), 32_u64.to_le_bytes());
    remote.grow(1, 20 << 10);
    driver.pump();
    assert!(!changes(&driver), "nobody is ready for it");
    driver.start(VERSION_1 | FLUSH, 16);
    assert!(changes(&driver));
}

#[test]
fn a_growth_can_be_cancelled_and_has_only_its_own_result() {
    let (mut driver, disk, _, remote) = commanded(options(), FLUSH);
    for begun in [false, true] {
        remote.grow(1, 20 << 10);
        if begun {
            disk.medium().more_steps = true;
            driver.pump_once();
        }
        remote.cancel_growth();
        driver.pump();
        assert!(remote.grown(1).is_none());
        assert_eq!(disk.medium().bytes.len(), 16 << 10, "begun: {begun}");
    }
    // The thread may have been parked before it saw the growth: the next one must not end for that.
    remote.grow(1, 20 << 10);
    remote.cancel_growth();
    driver.pump();
    disk.medium().more_steps = true;
    remote.grow(5, 20 << 10);
    driver.pump();
    remote.grown(5).unwrap().unwrap();
    disk.medium().bytes.truncate(16 << 10);
    // A caller who is gone leaves a result that is not the next one's.
    remote.grow(2, 20 << 10);
    driver.pump();
    remote.grow(3, 24 << 10);
    assert!(remote.grown(3).is_none());
    driver.pump();
    remote.grown(3).unwrap().unwrap();
    assert_eq!(disk.medium().bytes.len(), 24 << 10);
}
