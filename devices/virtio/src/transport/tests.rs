// SPDX-License-Identifier: Apache-2.0

use std::sync::{Arc, Mutex};

use devices::{device::Device as _, io_thread::Calls, pci::PciFunction as _};
use proptest::prelude::*;

use super::*;
use crate::{
    engine::{Served, serve_in_order},
    queue::{ActiveQueue, NO_VECTOR, QueueError, length},
    testing::{BASE, Driver},
};

const VERSION_1: u64 = 1 << 32;
const EVENT_INDEX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;

/// Returns each request with the length of its readable buffers, and notes the calls.
struct Echo(Arc<Mutex<Vec<String>>>);

impl Engine for Echo {
    fn start(&mut self, features: u64) {
        self.0.lock().unwrap().push(format!("start {features:#x}"));
    }

    fn serve(&mut self, _: usize, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        serve_in_order(queue, |request| Served::Complete(u32::try_from(length(&request.readable)).unwrap()))
    }

    fn stop(&mut self) {
        self.0.lock().unwrap().push("stop".to_owned());
    }
}

fn echo() -> (Driver, Arc<Mutex<Vec<String>>>) {
    let calls = Arc::default();
    let identity = Identity {
        name: "echo".into(),
        device: 4,
        class: 0x00ff_0000,
        features: INDIRECT | EVENT_INDEX,
        queues: vec![16, 16],
        calls: Calls::None,
    };
    let configuration = Configuration::new(vec![1, 2, 3]);
    (Driver::new(identity, configuration, Box::new(Echo(Arc::clone(&calls)))), calls)
}

#[test]
fn its_configuration_space_names_a_modern_function_and_each_structure() {
    let (driver, _) = echo();
    assert_eq!(driver.config(0), [0xf4, 0x1a, 0x44, 0x10]);
    assert_eq!(driver.config(8), [1, 0, 0xff, 0], "revision 1");
    assert_eq!(driver.config(0x3d), [0], "no INTx");
    let mut found = Vec::new();
    let mut at = u16::from(driver.config::<1>(0x34)[0]);
    while at != 0 {
        let [id, next, length, kind] = driver.config(at);
        if id == 9 {
            let [bar] = driver.config(at + 4);
            let (offset, len) =
                (u32::from_le_bytes(driver.config(at + 8)), u32::from_le_bytes(driver.config(at + 12)));
            found.push((kind, length, bar, offset, len));
        } else {
            assert_eq!((id, at), (0x11, 0x40), "MSI-X");
            assert_eq!(u16::from_le_bytes(driver.config(at + 2)) & 0x7ff, 2, "three vectors");
            assert_eq!(u32::from_le_bytes(driver.config(at + 4)), 0x2000);
            assert_eq!(u32::from_le_bytes(driver.config(at + 8)), 0x3000);
        }
        at = next.into();
    }
    assert_eq!(
        found,
        [
            (1, 16, 0, 0, 0x38),
            (2, 20, 0, 0x1000, 8),
            (3, 16, 0, 0x100, 1),
            (4, 16, 0, 0x200, 0x200),
            (5, 20, 0, 0, 0)
        ]
    );
    assert_eq!(u32::from_le_bytes(driver.config(0x70)), 4, "bytes between doorbells");
    driver.function.config_write(0, &[0; 4]);
    driver.function.config_write(0x34, &[0]);
    assert_eq!((driver.config(0), driver.config(0x34)), ([0xf4, 0x1a, 0x44, 0x10], [0x40]), "read-only");
}

#[test]
fn a_request_goes_round() {
    let (mut driver, calls) = echo();
    driver.start(VERSION_1, 16);
    assert_eq!(calls.lock().unwrap().as_slice(), ["start 0x100000000"]);
    assert_eq!(driver.get(0x12), [2, 0], "queues");
    driver.send(&[(0x8000, 7, false), (0x9000, 5, false), (0xa000, 3, true)]);
    assert_eq!(driver.returned(), Some((0, 12)));
    assert_eq!(driver.get::<1>(0x100), [1], "the ISR shows a queue");
    assert_eq!(driver.get::<1>(0x100), [0], "and is read once");
    assert_eq!(driver.returned(), None);
}

#[test]
fn configuration_and_its_generation_are_read() {
    let (driver, _) = echo();
    driver.enable();
    assert_eq!(driver.get(0x200), [1, 2, 3, 0]);
    assert_eq!(driver.get(0x15), [0]);
    driver.function.configuration.change(1, &[9]);
    assert_eq!((driver.get(0x200), driver.get(0x15)), ([1, 9, 3, 0], [1]));
    assert_eq!(driver.get::<8>(0x3fc), [0; 8], "up to its end, and behind it");
}

#[test]
fn a_driver_that_may_not_access_memory_is_not_served() {
    let (mut driver, _) = echo();
    driver.start(VERSION_1, 16);
    driver.function.config_write(4, &2_u16.to_le_bytes());
    driver.send(&[(0x8000, 7, false)]);
    assert_eq!(driver.returned(), None);
    driver.enable();
    assert_eq!(driver.returned(), Some((0, 7)), "the request waited");
}

#[test]
fn doorbells_follow_the_bar_while_the_driver_is_ready() {
    let (mut driver, _) = echo();
    let doorbells = |driver: &Driver| driver.recorder.doorbells.lock().unwrap().clone();
    driver.enable();
    assert_eq!(doorbells(&driver), [0; 0]);
    driver.start(VERSION_1, 16);
    assert_eq!(doorbells(&driver), [BASE + 0x1000, BASE + 0x1004]);
    driver.function.config_write(0x10, &0x4001_0000_u32.to_le_bytes());
    assert_eq!(doorbells(&driver), [0x4001_1000, 0x4001_1004]);
    driver.function.config_write(4, &[0, 0]);
    assert_eq!(doorbells(&driver), [0; 0], "memory is off");
    driver.function.config_write(0x10, &0x4000_0000_u32.to_le_bytes());
    driver.enable();
    assert_eq!(doorbells(&driver).len(), 2);
    driver.set_status(0);
    assert_eq!(doorbells(&driver), [0; 0]);
}

#[test]
fn a_reset_is_over_when_the_thread_has_let_go_of_the_rings() {
    let (mut driver, calls) = echo();
    driver.start(VERSION_1, 16);
    driver.set_status(0);
    assert_eq!(driver.status(), 0xf, "not yet");
    driver.set_status(1);
    driver.set(0x16, &[1, 0]);
    assert_eq!((driver.status(), driver.get(0x16)), (0xf, [0, 0]), "writes have no effect meanwhile");
    driver.pump();
    assert_eq!(driver.status(), 0);
    assert_eq!(calls.lock().unwrap().as_slice(), ["start 0x100000000", "stop"]);
    driver.start(VERSION_1, 16);
    driver.send(&[(0x8000, 7, false)]);
    assert_eq!(driver.returned(), Some((0, 7)), "the next driver begins with entry 0");
    driver.set_status(0);
    driver.function.reset().unwrap();
    assert_eq!(driver.config(4), [0, 0], "a machine's reset in the middle of one");
    driver.start(VERSION_1, 16);
}

#[test]
fn the_machines_reset_leaves_nothing_of_the_last_driver() {
    let (mut driver, _) = echo();
    driver.start(VERSION_1 | EVENT_INDEX, 16);
    driver.set(0x10, &[0, 0]);
    driver.function.config_write(0x42, &0x8000_u16.to_le_bytes());
    driver.send(&[(0x8000, 7, false)]);
    driver.function.reset().unwrap();
    driver.pump();
    assert_eq!(driver.recorder.doorbells.lock().unwrap().len(), 0);
    assert_eq!(driver.recorder.connected.lock().unwrap().len(), 0);
    let (fresh, _) = echo();
    fresh.enable();
    driver.enable();
    let registers = |driver: &Driver| {
        (driver.get::<8>(0), driver.get::<8>(8), driver.get::<8>(0x10), driver.get::<1>(0x100))
    };
    assert_eq!(registers(&driver), registers(&fresh));
    assert_eq!(driver.config::<4>(0x40), fresh.config(0x40));
    assert_eq!(u16::from_le_bytes(driver.get(0x10)), NO_VECTOR);
}

#[test]
fn a_driver_that_breaks_its_rings_needs_a_reset() {
    type Break = fn(&mut Driver);
    let [descriptors, available, _] = Driver::rings();
    let breaks: [(&str, Break); 7] = [
        ("an available index far ahead", |driver| {
            driver.write(Driver::rings()[1] + 2, &900_u16.to_le_bytes());
            driver.set(0x1000, &[0, 0]);
        }),
        ("a buffer outside of memory", |driver| driver.send(&[(MEMORY_END - 4, 8, false)])),
        ("a buffer that wraps around", |driver| driver.send(&[(u64::MAX - 1, 8, false)])),
        ("a buffer to read behind one to write", |driver| {
            driver.send(&[(0x8000, 8, true), (0x9000, 8, false)]);
        }),
        ("an indirect table that is too long", |driver| {
            for entry in 0..64 {
                driver.descriptor(64 + entry, 0x8000, 8, 1, u16::try_from(entry + 1).unwrap());
            }
            driver.descriptor(0, Driver::rings()[0] + 64 * 16, 64 * 16, 4, 0);
            driver.offer(0);
        }),
        ("a used ring outside of memory", |driver| {
            driver.set_status(0);
            driver.pump();
            driver.negotiate(VERSION_1);
            driver.set(0x18, &[16, 0]);
            driver.set(0x30, &(MEMORY_END - 8).to_le_bytes());
            driver.set(0x1c, &[1, 0]);
            driver.set_status(0xf);
        }),
        ("a size that is no power of two", |driver| {
            driver.set_status(0);
            driver.pump();
            driver.negotiate(VERSION_1);
            driver.set(0x18, &[15, 0]);
            driver.set(0x1c, &[1, 0]);
            driver.set_status(0xf);
        }),
    ];
    assert!(descriptors < available);
    for (name, break_it) in breaks {
        let (mut driver, _) = echo();
        driver.start(VERSION_1 | INDIRECT, 16);
        break_it(&mut driver);
        driver.pump();
        assert_eq!(driver.status(), 0x4f, "{name}");
        assert_eq!(driver.get::<1>(0x100), [2], "{name}: the driver hears of it");
        driver.set_status(0);
        driver.pump();
        assert_eq!(driver.status(), 0, "{name}");
        driver.start(VERSION_1, 16);
        driver.send(&[(0x8000, 7, false)]);
        assert_eq!(driver.returned(), Some((0, 7)), "{name}: a reset helps");
    }
}

const MEMORY_END: u64 = crate::testing::MEMORY;

#[test]
fn indirect_tables_and_empty_buffers_are_taken() {
    let (mut driver, _) = echo();
    driver.start(VERSION_1 | INDIRECT, 16);
    driver.descriptor(8, 0x8000, 7, 1, 1);
    driver.descriptor(9, 0x8000, 0, 1, 2);
    driver.descriptor(10, 0x9000, 5, 0, 0);
    driver.descriptor(0, Driver::rings()[0] + 8 * 16, 3 * 16, 4, 0);
    driver.offer(0);
    assert_eq!(driver.returned(), Some((0, 12)));
}

#[test]
fn a_loop_of_buffers_ends_at_the_queues_size() {
    let (mut driver, _) = echo();
    driver.start(VERSION_1, 16);
    driver.descriptor(0, 0x8000, 8, 1, 1);
    driver.descriptor(1, 0x8000, 8, 1, 0);
    driver.offer(0);
    assert_eq!(driver.returned(), Some((0, 16 * 8)));
}

#[test]
fn an_interrupt_comes_when_the_driver_wants_it() {
    let (mut driver, _) = echo();
    driver.start(VERSION_1 | EVENT_INDEX, 16);
    let [_, available, _] = Driver::rings();
    let used_event = available + 4 + 2 * 16;
    driver.write(used_event, &1_u16.to_le_bytes());
    driver.send(&[(0x8000, 7, false)]);
    assert_eq!(driver.returned(), Some((0, 7)));
    assert_eq!(driver.get::<1>(0x100), [0], "not for the first");
    driver.send(&[(0x8000, 7, false)]);
    assert_eq!(driver.returned(), Some((0, 7)));
    assert_eq!(driver.get::<1>(0x100), [1], "for the second");
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let (driver, _) = echo();
    let window = |offset: u32, len: u32| {
        driver.function.config_write(0x98, &[0]);
        driver.function.config_write(0x9c, &offset.to_le_bytes());
        driver.function.config_write(0xa0, &len.to_le_bytes());
    };
    window(0x200, 2);
    assert_eq!(driver.config::<4>(0xa4), [1, 2, 0, 0]);
    window(0x14, 1);
    driver.function.config_write(0xa4, &[1, 0, 0, 0]);
    driver.enable();
    assert_eq!(driver.status(), 1);
    for (offset, len) in [(0x200, 3), (0x201, 2), (0x4000, 4), (u32::MAX, 1), (0x200, 8)] {
        window(offset, len);
        assert_eq!(driver.config::<4>(0xa4), [0; 4], "{offset:#x} {len}");
        driver.function.config_write(0xa4, &[0xff; 4]);
    }
    window(0x200, 4);
    driver.function.config_write(0x98, &[1]);
    assert_eq!(driver.config::<4>(0xa4), [0; 4], "another BAR");
}

#[test]
fn vectors_and_queues_that_are_not_there_read_as_none() {
    let (driver, _) = echo();
    driver.negotiate(VERSION_1);
    for (register, vector, expect) in
        [(0x10, 2_u16, 2), (0x10, 3, NO_VECTOR), (0x1a, 0, 0), (0x1a, 9, NO_VECTOR)]
    {
        driver.set(register, &vector.to_le_bytes());
        assert_eq!(u16::from_le_bytes(driver.get(register)), expect, "{register:#x} {vector}");
    }
    driver.set(0x16, &[2, 0]);
    assert_eq!(driver.get::<8>(0x18), [0; 8]);
    driver.set(0x1c, &[1, 0]);
    assert_eq!(driver.get::<2>(0x1c), [0, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    /// Any accesses, in any order, with the thread's work in between.
    #[test]
    fn no_sequence_of_accesses_breaks_the_function(
        script in prop::collection::vec((0_u8..6, any::<u16>(), any::<u64>(), 0_usize..4), 0..120)
    ) {
        let (mut driver, _) = echo();
        driver.enable();
        for (action, at, value, size) in script {
            let (bytes, len) = (value.to_le_bytes(), [1, 2, 4, 8][size]);
            // Nearly all registers are at the start.
            let register = u64::from(at) % 0x3c;
            let mut data = [0; 8];
            match action {
                0 => { driver.function.mmio_write(BASE + register, &bytes[..len]); }
                1 => { driver.function.mmio_write(BASE + u64::from(at) % 0x4000, &bytes[..len]); }
                2 => { driver.function.mmio_read(BASE + u64::from(at) % 0x4000, &mut data[..len]); }
                3 => driver.function.config_write((at % 0x100) & !3, &bytes[..4]),
                4 => driver.function.config_read((at % 0x1000) & !3, &mut data[..4]),
                _ => driver.pump(),
            }
        }
        driver.pump();
        driver.function.reset().unwrap();
        driver.enable();
        driver.start(VERSION_1, 16);
        driver.send(&[(0x8000, 7, false)]);
        prop_assert_eq!(driver.returned(), Some((0, 7)));
    }
}
