// SPDX-License-Identifier: Apache-2.0

use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::pci::bar::{BarLayout, Bars};

/// Config space of plain memory, one page of MMIO.
struct Plain {
    config: Mutex<Vec<u8>>,
    page: u64,
}

impl Plain {
    fn new(page: u64) -> Arc<Self> {
        Arc::new(Self { config: Mutex::new((0..4096u16).map(|n| n.to_le_bytes()[0]).collect()), page })
    }
}

impl PciFunction for Plain {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        assert!(usize::from(offset).is_multiple_of(data.len()), "naturally aligned");
        let offset = usize::from(offset);
        data.copy_from_slice(&self.config.lock().unwrap()[offset..offset + data.len()]);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        assert!(usize::from(offset).is_multiple_of(data.len()), "naturally aligned");
        let offset = usize::from(offset);
        self.config.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
    }
    fn decoded(&self) -> DecodedBars {
        [Some(self.page..self.page + 0x1000), None, None, None, None, None]
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let hit = gpa & !0xfff == self.page;
        if hit {
            data.fill(0x11);
        }
        hit
    }
    fn mmio_write(&self, gpa: u64, _data: &[u8]) -> bool {
        gpa & !0xfff == self.page
    }
}

fn ecam(bus: &PciBus, slot: u64, function: u64, register: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    bus.ecam_read(slot << 15 | function << 12 | register, &mut data);
    data
}

#[test]
fn slot_zero_is_a_host_bridge() {
    let bus = PciBus::new(Windows::default());
    assert_eq!(ecam(&bus, 0, 0, 0, 4), [0x86, 0x80, 0x57, 0x0d]);
    assert_eq!(ecam(&bus, 0, 0, 8, 4), [0, 0, 0, 6], "class host bridge");
    assert_eq!(ecam(&bus, 0, 0, 0x34, 1), [0], "no capabilities");
    assert_eq!(ecam(&bus, 0, 0, 0x100, 4), [0; 4]);
}

#[test]
fn what_is_absent_reads_all_ones() {
    let bus = PciBus::new(Windows::default());
    let slot = bus.add(Plain::new(0x1000)).unwrap();
    assert_eq!(slot, 1);
    let check = |slot, function, register, expect: [u8; 4]| {
        assert_eq!(ecam(&bus, slot, function, register, 4), expect, "{slot}.{function} {register:#x}");
    };
    check(1, 0, 4, [4, 5, 6, 7]);
    check(1, 1, 4, [0xff; 4]);
    check(2, 0, 4, [0xff; 4]);
    check(31, 0, 4, [0xff; 4]);
    check(32, 0, 4, [0xff; 4]);
    check(1, 0, 2, [2, 3, 4, 5]);
}

#[test]
fn functions_come_and_go() {
    let bus = PciBus::new(Windows::default());
    bus.insert(3, Plain::new(0x3000)).unwrap();
    assert_eq!(bus.insert(3, Plain::new(0x3000)), Err(SlotError::Taken(3)));
    assert_eq!(bus.insert(0, Plain::new(0x3000)), Err(SlotError::Taken(0)));
    assert_eq!(bus.insert(32, Plain::new(0x3000)), Err(SlotError::NoSuchSlot(32)));
    let mut data = [0];
    assert!(bus.mmio_read(0x3004, &mut data));
    assert_eq!(data, [0x11]);
    assert!(bus.remove(3).is_some());
    assert!(bus.remove(3).is_none());
    assert!(!bus.mmio_read(0x3004, &mut data));
    assert_eq!(data, [0xff]);
    assert!(!bus.mmio_write(0x3004, &data));
    for _ in 1..SLOTS {
        bus.add(Plain::new(0)).unwrap();
    }
    assert_eq!(bus.add(Plain::new(0)), Err(SlotError::Full));
}

#[test]
fn legacy_ports_follow_the_address_register() {
    let bus = PciBus::new(Windows::default());
    bus.add(Plain::new(0)).unwrap();
    let read = |port, len| {
        let mut data = vec![0; len];
        bus.port_read(port, &mut data);
        data
    };
    // Linux' probe of mechanism 1: the byte must not change the address register.
    bus.port_write(0xcf8, &0x8000_0000u32.to_le_bytes());
    bus.port_write(0xcfb, &[1]);
    bus.port_write(0xcf9, &[6]);
    assert_eq!(read(0xcf8, 4), 0x8000_0000u32.to_le_bytes());
    assert_eq!(read(0xcf9, 1), [0xff]);
    assert_eq!(read(0xcfc, 2), [0x86, 0x80]);
    let check = |address: u32, port, len, expect: &[u8]| {
        bus.port_write(0xcf8, &address.to_le_bytes());
        assert_eq!(read(port, len), expect, "{address:#x} {port:#x}");
    };
    check(0x8000_0804, 0xcfc, 4, &[4, 5, 6, 7]);
    check(0x8000_0807, 0xcfc, 4, &[4, 5, 6, 7]);
    check(0x8000_0804, 0xcfe, 2, &[6, 7]);
    check(0x8000_0804, 0xcff, 1, &[7]);
    check(0x8000_0804, 0xcfd, 2, &[5, 6]);
    check(0x8000_0804, 0xcfe, 4, &[0xff; 4]);
    check(0x0000_0804, 0xcfc, 4, &[0xff; 4]);
    check(0x8001_0804, 0xcfc, 4, &[0xff; 4]);
    check(0x8000_0904, 0xcfc, 4, &[0xff; 4]);
    bus.port_write(0xcf8, &0x8000_0840u32.to_le_bytes());
    bus.port_write(0xcfe, &[0xaa]);
    assert_eq!(ecam(&bus, 1, 0, 0x40, 4), [0x40, 0x41, 0xaa, 0x43]);
    bus.reset().unwrap();
    assert_eq!(read(0xcf8, 4), [0; 4]);
}

const WINDOW: Range<u64> = 0xc000_0000..0xc001_0000;
const PAGE: u64 = 0x1000;

/// A function with the registers of real BARs, which marks the data that it returns.
struct Moving {
    bars: Mutex<Bars>,
    mark: u8,
}

impl Moving {
    fn new(mark: u8) -> Arc<Self> {
        let bar = |size| Some(BarLayout { size, is_64bit: false, prefetchable: false });
        let layouts = [bar(PAGE), bar(4 * PAGE), None, bar(0x10), None, None];
        let bars = Bars::new(layouts, Arc::new([WINDOW])).unwrap();
        Arc::new(Self { bars: Mutex::new(bars), mark })
    }

    /// Stops decoding without a write through the bus, as a function level reset does at its end.
    fn reset(&self) {
        self.bars.lock().unwrap().clear();
    }
}

impl PciFunction for Moving {
    fn config_read(&self, _: u16, _: &mut [u8]) {}
    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut bars = self.bars.lock().unwrap();
        match offset {
            config::COMMAND => bars.set_memory_enabled(data[0] & 2 != 0),
            config::BAR0..config::BARS_END => bars.write(offset - config::BAR0, data),
            _ => {}
        }
    }
    fn decoded(&self) -> DecodedBars {
        let bars = self.bars.lock().unwrap();
        std::array::from_fn(|bar| bars.decoded(bar))
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let hit = self.bars.lock().unwrap().decode(gpa, data.len()).is_some();
        if hit {
            data.fill(self.mark);
        }
        hit
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        self.bars.lock().unwrap().decode(gpa, data.len()).is_some()
    }
}

fn move_bar(bus: &PciBus, slot: u8, bar: u64, address: u64) {
    let address = u32::try_from(address).unwrap();
    bus.ecam_write((u64::from(slot) << 15) + 0x10 + 4 * bar, &address.to_le_bytes());
}

fn enable(bus: &PciBus, slot: u8, enabled: bool) {
    bus.port_write(0xcf8, &(1 << 31 | u32::from(slot) << 11 | 4).to_le_bytes());
    bus.port_write(0xcfc, &(if enabled { 2_u16 } else { 0 }).to_le_bytes());
}

fn read(bus: &PciBus, gpa: u64, len: usize) -> Option<Vec<u8>> {
    let mut data = vec![0; len];
    bus.mmio_read(gpa, &mut data).then_some(data)
}

/// Finds a function without the map: each one is asked, the lowest slot first.
fn ask(functions: &[Option<Arc<Moving>>], gpa: u64, len: usize) -> Option<Vec<u8>> {
    let mut data = vec![0; len];
    functions.iter().flatten().any(|function| function.mmio_read(gpa, &mut data)).then_some(data)
}

#[derive(Clone, Debug)]
enum Action {
    Move { slot: u8, bar: u64, address: u64 },
    Enable { slot: u8, enabled: bool },
    Reset { slot: u8 },
    Remove { slot: u8 },
    Insert { slot: u8 },
    Access { gpa: u64, len: usize },
}

const MOVERS: u8 = 3;

fn action() -> impl Strategy<Value = Action> {
    // Addresses inside of the window, and some beyond it.
    let address = || (0..20_u64).prop_map(|page| WINDOW.start + page * PAGE);
    let slot = || 1..=MOVERS;
    prop_oneof![
        4 => (slot(), prop::sample::select(vec![0, 1, 3]), address())
            .prop_map(|(slot, bar, address)| Action::Move { slot, bar, address }),
        3 => (slot(), prop::bool::weighted(0.8)).prop_map(|(slot, enabled)| Action::Enable { slot, enabled }),
        1 => slot().prop_map(|slot| Action::Reset { slot }),
        1 => slot().prop_map(|slot| Action::Remove { slot }),
        1 => slot().prop_map(|slot| Action::Insert { slot }),
        6 => (address(), prop::sample::select(vec![0, 4, 0xc, 0xfff, 0xffc]), prop::sample::select(vec![1, 4, 8]))
            .prop_map(|(page, offset, len)| Action::Access { gpa: page + offset, len }),
    ]
}

proptest! {
    #[test]
    fn the_map_finds_the_function_that_asking_finds(actions in prop::collection::vec(action(), 1..60)) {
        let bus = PciBus::new(Windows::default());
        let mut functions: Vec<Option<Arc<Moving>>> = vec![None; 1 + usize::from(MOVERS)];
        for slot in 1..=MOVERS {
            functions[usize::from(slot)] = Some(Moving::new(slot));
            bus.insert(slot, functions[usize::from(slot)].clone().unwrap()).unwrap();
            enable(&bus, slot, true);
        }
        for action in actions {
            match action {
                Action::Move { slot, bar, address } => move_bar(&bus, slot, bar, address),
                Action::Enable { slot, enabled } => enable(&bus, slot, enabled),
                Action::Reset { slot } => {
                    if let Some(function) = &functions[usize::from(slot)] {
                        function.reset();
                    }
                }
                Action::Remove { slot } => {
                    bus.remove(slot);
                    functions[usize::from(slot)] = None;
                }
                Action::Insert { slot } if functions[usize::from(slot)].is_none() => {
                    // It decodes already, as a function that was assigned its addresses.
                    let function = Moving::new(slot);
                    function.config_write(config::COMMAND, &[2, 0]);
                    let start = u32::try_from(WINDOW.start).unwrap();
                    function.config_write(config::BAR0, &start.to_le_bytes());
                    bus.insert(slot, function.clone()).unwrap();
                    functions[usize::from(slot)] = Some(function);
                }
                Action::Insert { .. } => {}
                Action::Access { gpa, len } => {
                    prop_assert_eq!(read(&bus, gpa, len), ask(&functions, gpa, len), "{:#x} {}", gpa, len);
                }
            }
        }
        for gpa in (WINDOW.start..WINDOW.end + 4 * PAGE).step_by(0x800) {
            prop_assert_eq!(read(&bus, gpa, 4), ask(&functions, gpa, 4), "{:#x} in the end", gpa);
        }
    }
}

#[test]
fn a_moved_bar_is_found_at_once_while_others_move() {
    let bus = PciBus::new(Windows::default());
    let functions: Vec<_> = (0..=MOVERS).map(|slot| (slot > 0).then(|| Moving::new(slot))).collect();
    for function in functions.iter().flatten() {
        bus.insert(function.mark, function.clone()).unwrap();
        enable(&bus, function.mark, true);
    }
    std::thread::scope(|threads| {
        for slot in 1..=MOVERS {
            let bus = &bus;
            threads.spawn(move || {
                for turn in 0..3000_u64 {
                    let address = WINDOW.start + (turn * u64::from(slot) % 13) * PAGE;
                    move_bar(bus, slot, 0, address);
                    assert!(read(bus, address, 4).is_some(), "{slot} at {address:#x}, turn {turn}");
                    assert!(bus.mmio_write(address + 8, &[0; 8]));
                }
            });
        }
        // Two vCPUs move one BAR: the map must follow the later one.
        for _ in 0..2 {
            threads.spawn(|| {
                for turn in 0..3000_u64 {
                    move_bar(&bus, 1, 1, WINDOW.start + (turn % 3) * 4 * PAGE);
                }
            });
        }
    });
    for gpa in WINDOW.step_by(0x800) {
        assert_eq!(read(&bus, gpa, 4), ask(&functions, gpa, 4), "{gpa:#x}");
    }
}

/// A function that is slow to say where it decodes, once: a move by another vCPU comes in between.
struct Slow {
    function: Arc<Moving>,
    /// Sends when it is asked for the first time.
    asked: Mutex<Option<std::sync::mpsc::Sender<()>>>,
}

impl PciFunction for Slow {
    fn config_read(&self, _: u16, _: &mut [u8]) {}
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.function.config_write(offset, data);
    }
    fn decoded(&self) -> DecodedBars {
        let decoded = self.function.decoded();
        let asked = self.asked.lock().unwrap().take();
        if let Some(asked) = asked {
            asked.send(()).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        decoded
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        self.function.mmio_read(gpa, data)
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        self.function.mmio_write(gpa, data)
    }
}

#[test]
fn of_two_moves_the_later_one_counts() {
    let bus = PciBus::new(Windows::default());
    let slow = Arc::new(Slow { function: Moving::new(1), asked: Mutex::new(None) });
    bus.insert(1, slow.clone()).unwrap();
    enable(&bus, 1, true);
    let (asked, begun) = std::sync::mpsc::channel();
    *slow.asked.lock().unwrap() = Some(asked);
    std::thread::scope(|threads| {
        threads.spawn(|| move_bar(&bus, 1, 0, WINDOW.start));
        begun.recv().unwrap();
        move_bar(&bus, 1, 0, WINDOW.start + PAGE);
        assert!(read(&bus, WINDOW.start + PAGE, 4).is_some());
    });
    assert!(read(&bus, WINDOW.start + PAGE, 4).is_some());
    assert!(read(&bus, WINDOW.start, 4).is_none());
}
