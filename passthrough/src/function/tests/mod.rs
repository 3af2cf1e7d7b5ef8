// SPDX-License-Identifier: Apache-2.0

mod fakes;
mod irqs;
mod properties;
mod reset;

use std::{
    ops::Range,
    sync::{Arc, Mutex},
    time::Duration,
};

use devices::pci::{PciFunction, config};

use self::fakes::{Call, Fake, HOST, Mapper, Router, VECTORS};
use super::{AssignedFunction, BarHandler, HardwareAccess, TrappedRange};
use crate::{hardware::IrqKind, threads::ThreadStart};

const WINDOWS: [Range<u64>; 2] = [0xc000_0000..0xe000_0000, 0x40_0000_0000..0x80_0000_0000];
const BAR0: u64 = 0xc000_0000;
const BAR3: u64 = 0x40_0000_0000;
const BAR5: u64 = 0xc010_0000;
const PBA: u64 = 0x2000;

/// Accesses to the mailbox page.
#[derive(Default)]
struct Page(Mutex<Vec<String>>);

impl BarHandler for Page {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.lock().unwrap().push(format!("read {offset:#x}"));
        data.fill(0xab);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push(format!("write {offset:#x} {data:x?}"));
    }
    fn before_reset(&self) {
        self.0.lock().unwrap().push("before reset".into());
    }
    fn after_reset(&self) {
        self.0.lock().unwrap().push("after reset".into());
    }
}

struct Fixture {
    hardware: Arc<Fake>,
    mapper: Arc<Mapper>,
    router: Arc<Router>,
    page: Arc<Page>,
    function: AssignedFunction,
}

/// A function whose first page of BAR 0 is trapped, BARs assigned, memory disabled.
fn fixture() -> Fixture {
    with(Duration::ZERO)
}

fn with(reset_time: Duration) -> Fixture {
    let (mapper, router, page) =
        (Arc::new(Mapper::default()), Arc::new(Router::default()), Arc::new(Page::default()));
    let mut hardware = Fake::new(mapper.clone());
    hardware.reset_time = reset_time;
    let hardware = Arc::new(hardware);
    let traps = [TrappedRange { bar: 0, range: 0..0x1000, handler: page.clone() }];
    let function = AssignedFunction::new(
        "test",
        HardwareAccess::new(hardware.clone()),
        Arc::from(WINDOWS),
        &traps,
        mapper.clone(),
        router.clone(),
        &ThreadStart::default(),
    )
    .unwrap();
    for (bar, address) in [(0, BAR0), (3, BAR3), (5, BAR5)] {
        function.assign_bar(bar, address).unwrap();
    }
    Fixture { hardware, mapper, router, page, function }
}

impl Fixture {
    fn read(&self, offset: u16, len: usize) -> u32 {
        let mut data = [0; 4];
        self.function.config_read(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }
    fn write(&self, offset: u16, len: usize, value: u32) {
        self.function.config_write(offset, &value.to_le_bytes()[..len]);
    }
    fn enable_memory(&self) {
        self.write(config::COMMAND, 2, u32::from(config::COMMAND_MEMORY | config::COMMAND_BUS_MASTER));
    }
    fn mmio(&self, gpa: u64, len: usize) -> Option<Vec<u8>> {
        let mut data = vec![0; len];
        self.function.mmio_read(gpa, &mut data).then_some(data)
    }
    fn mmio_write(&self, gpa: u64, value: u32) -> bool {
        self.function.mmio_write(gpa, &value.to_le_bytes())
    }
    /// Programs and unmasks a vector.
    fn program(&self, vector: u64, data: u32) {
        for (field, value) in [0xfee0_0000, 0, data, 0].into_iter().enumerate() {
            assert!(self.mmio_write(BAR3 + vector * 16 + field as u64 * 4, value));
        }
    }
    fn all_ones(&self) -> bool {
        self.read(0, 4) == u32::MAX
    }
}

/// The windows of the fixture's BARs at these addresses: page 0 of BAR 0 is trapped, of BAR 3 the table (page 0) and
/// the pending bits (page 2).
fn expected(bar0: u64, bar3: u64) -> Vec<(u64, u64, u64)> {
    let mut windows = vec![
        (bar0 + 0x1000, HOST + 0x1000, 0x3000),
        (bar3 + 0x1000, 4 * HOST + 0x1000, 0x1000),
        (bar3 + 0x3000, 4 * HOST + 0x3000, 0x1000),
    ];
    windows.sort_unstable();
    windows
}

#[test]
fn windows_follow_memory_enable_and_the_addresses() {
    let f = fixture();
    assert_eq!(f.mapper.windows(), []);
    f.enable_memory();
    assert_eq!(f.mapper.windows(), expected(BAR0, BAR3));
    f.write(config::BAR0, 4, 0xd000_0000);
    assert_eq!(f.mapper.windows(), expected(0xd000_0000, BAR3));
    f.write(config::BAR0 + 4 * 4, 4, 0x50);
    assert_eq!(f.mapper.windows(), expected(0xd000_0000, 0x50_0000_0000));
    f.write(config::BAR0, 4, 0x1000_0000);
    assert_eq!(f.mapper.windows().len(), 2, "in guest memory nothing is decoded");
    f.write(config::COMMAND, 2, 0);
    assert_eq!(f.mapper.windows(), []);
}

#[test]
fn a_function_in_d3hot_decodes_nothing_and_its_hardware_stays_on() {
    let f = fixture();
    f.enable_memory();
    f.write(0x44, 2, 3);
    assert_eq!(f.mapper.windows(), [], "D3hot");
    assert_eq!(f.mmio(BAR0, 4), None);
    assert_eq!(f.read(0x44, 2), 3 | 8);
    f.write(0x44, 2, 0);
    assert_eq!(f.mapper.windows(), expected(BAR0, BAR3));
    let to_pm = |call: &Call| matches!(call, Call::Config(0x40..0x48, _));
    assert!(!f.hardware.take_calls().iter().any(to_pm), "power states are only emulated");
}

#[test]
fn pages_that_must_stay_trapped_are_forbidden_and_never_mapped() {
    let f = fixture();
    let mut forbidden = f.mapper.forbidden.lock().unwrap().clone();
    forbidden.sort_by_key(|range| range.start);
    let msix = 4 * HOST;
    let table = u64::from(VECTORS) * 16;
    assert_eq!(forbidden, [HOST..HOST + 0x1000, msix..msix + table, msix + PBA..msix + PBA + 8]);
    for (bar, range) in f.hardware.map_calls.lock().unwrap().iter() {
        let trapped: &[Range<u64>] = if *bar == 0 { &[0..0x1000] } else { &[0..0x1000, 0x2000..0x3000] };
        assert!(trapped.iter().all(|t| range.end <= t.start || t.end <= range.start), "{bar} {range:x?}");
    }
}

#[test]
fn accesses_reach_whom_they_belong_to() {
    let f = fixture();
    f.enable_memory();
    f.hardware.take_calls();
    assert_eq!(f.mmio(BAR0 + 0x800, 4), Some(vec![0xab; 4]), "the page's handler");
    assert!(f.mmio_write(BAR0 + 0xc40, 1));
    assert_eq!(*f.page.0.lock().unwrap(), ["read 0x800", "write 0xc40 [1, 0, 0, 0]"]);
    assert_eq!(f.mmio(BAR0 + 0xffe, 4), Some(vec![0xff; 4]), "across the edge of a range");
    assert_eq!(f.mmio(BAR3 + 0x40, 4), Some(vec![0x13; 4]), "beside the table");
    assert_eq!(f.mmio(BAR3 + 12, 4), Some(vec![1, 0, 0, 0]), "the table");
    assert_eq!(f.mmio(BAR3 + PBA, 8), Some(vec![0; 8]));
    assert!(f.mmio_write(BAR3 + PBA, 1), "ignored");
    assert_eq!(f.mmio(BAR5 + 0xfc, 4), Some(vec![0x15; 4]), "a BAR below a page");
    assert_eq!(f.mmio(BAR5 + 0x100, 4), None);
    assert!(f.mmio_write(BAR0 + 0x1000, 7), "an unmapped window exits");
    assert_eq!(f.hardware.take_calls(), [Call::BarWrite(0, 0x1000, vec![7, 0, 0, 0])]);
    let stats = f.function.stats();
    let exits: Vec<_> = stats.bar_exits.iter().map(|(key, count)| (key.as_str(), *count)).collect();
    assert_eq!(exits, [("0:0", 3), ("0:1", 1), ("3:0", 2), ("3:2", 2), ("5:0", 1)]);
}

#[test]
fn the_header_is_the_guests_own() {
    let f = fixture();
    let check = |offset, len, expect| assert_eq!(f.read(offset, len), expect, "{offset:#x}");
    check(0, 4, 0x10ca_8086);
    check(0x0e, 1, 0);
    check(0x10, 4, 0xc000_0004);
    check(0x18, 4, 0);
    check(0x1c, 4, 4);
    check(0x20, 4, 0x40);
    check(0x30, 4, 0);
    check(0x3c, 2, 0);
    f.write(0x30, 4, u32::MAX);
    check(0x30, 4, 0);
    f.write(0x18, 4, u32::MAX);
    check(0x18, 4, 0);
    f.write(0x24, 4, u32::MAX);
    check(0x24, 4, 0xffff_ff00);
    f.write(0x3c, 4, 0xffff_ff0a);
    check(0x3c, 2, 0x0a);
    f.write(4, 2, 0xffff);
    check(4, 2, 0x546);
}

#[test]
fn command_reaches_the_hardware_without_io_space() {
    let f = fixture();
    f.write(4, 2, 0x0407);
    f.write(4, 2, 0x0407);
    f.write(5, 1, 0);
    assert_eq!(
        f.hardware.take_calls(),
        [Call::Config(4, vec![6, 4]), Call::Config(4, vec![6, 0])],
        "only changes are passed on"
    );
}

#[test]
fn capability_lists_are_filtered_and_bounded() {
    let f = fixture();
    let mut found = Vec::new();
    let mut next = f.read(0x34, 1) as u16;
    while next != 0 && found.len() < 20 {
        found.push((next, f.read(next, 1)));
        next = f.read(next + 1, 1) as u16;
    }
    assert_eq!(found, [(0x40, 1), (0x50, 5), (0x70, 0x11), (0xa0, 0x10)]);
    assert_eq!(f.read(0x42, 2), 0x0003, "neither PME nor D1");
    assert_eq!(f.read(0x68, 4), 0, "hidden");
    assert_eq!([f.read(0xb0, 4), f.read(0xc0, 4)], [0, 0], "the second of a kind is hidden");
    assert_eq!(f.read(0x100, 4), 0x1501_0001, "leads past ARI");
    assert_eq!(f.read(0x140, 4), 0);
    assert_eq!(f.read(0x144, 4), 0);
    assert_eq!(f.read(0x150, 4), 0x0001_0003, "SR-IOV is gone, so this is the last");
    assert_eq!(f.read(0x154, 4), 0x9999_9999);
    assert_eq!(f.read(0x160, 4), 0);
    f.write(0x144, 4, 1);
    f.write(0x68, 4, 1);
    assert_eq!(f.hardware.take_calls(), []);
    f.write(0x44, 2, 3);
    assert_eq!(f.read(0x44, 2) & 3, 3, "the first of a kind is the one that is emulated");
    assert!(!f.hardware.take_calls().iter().any(|call| matches!(call, Call::Config(0x40..0xd0, _))));
}

#[test]
fn msix_is_emulated_and_masked_vectors_wait() {
    let f = fixture();
    f.enable_memory();
    f.hardware.take_calls();
    f.program(0, 40);
    f.program(2, 42);
    f.write(0x72, 2, 0xc000);
    assert_eq!(f.hardware.take_calls(), [Call::Enable(IrqKind::Msix, 3)]);
    assert_eq!(f.read(0x72, 2), 0xc002);
    assert_eq!(f.router.connected(), [0u32; 0], "function masked");
    f.write(0x72, 2, 0x8000);
    assert_eq!(f.router.connected(), [40, 42]);
    f.mmio_write(BAR3 + 2 * 16 + 12, 1);
    assert_eq!(f.router.connected(), [40]);
    f.hardware.triggers.lock().unwrap()[2].write(1).unwrap();
    assert_eq!(f.mmio(BAR3 + PBA, 4), Some(vec![0b100, 0, 0, 0]));
    f.mmio_write(BAR3 + 2 * 16 + 12, 0);
    assert_eq!(f.router.connected(), [40, 42]);
    f.write(0x72, 2, 0);
    assert_eq!(f.hardware.take_calls(), [Call::Disable(IrqKind::Msix)]);
    assert_eq!(f.router.connected(), [0u32; 0]);
}

#[test]
fn msi_is_emulated_and_replaced_by_msix() {
    let f = fixture();
    assert_eq!(f.read(0x50, 4), 0x0186_7005, "header, leading past the hidden one");
    f.write(0x54, 4, 0xfee0_0000);
    f.write(0x5c, 2, 0x48);
    f.write(0x52, 2, 0x21);
    assert_eq!(f.hardware.take_calls(), [Call::Enable(IrqKind::Msi, 4)]);
    assert_eq!(f.router.connected(), [0x48, 0x49, 0x4a, 0x4b]);
    f.write(0x60, 4, 1);
    f.hardware.triggers.lock().unwrap()[0].write(1).unwrap();
    assert_eq!(f.read(0x64, 4), 1, "pending");
    f.write(0x72, 2, 0x8000);
    assert_eq!(f.hardware.take_calls(), [Call::Disable(IrqKind::Msi), Call::Enable(IrqKind::Msix, 3)]);
}
