// SPDX-License-Identifier: Apache-2.0

use std::sync::Mutex;

use super::*;

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
