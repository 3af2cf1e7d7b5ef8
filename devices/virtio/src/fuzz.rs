// SPDX-License-Identifier: Apache-2.0

//! Bodies of fuzz targets: any accesses and any guest memory. Property tests run them too.

use std::sync::Arc;

use devices::{device::Device as _, io_thread::Calls, pci::PciFunction as _};

use crate::{
    block::{self, Block, Options},
    engine::{Configuration, Engine, Identity, Served, serve_in_order},
    limit::Limits,
    queue::{ActiveQueue, QueueError, length},
    testing::{BASE, Driver, MEMORY, MemoryDisk},
};

/// Bytes of an action in the input.
const STEP: usize = 12;
/// The most actions of one input.
const MOST: usize = 400;
/// Bytes of the disk.
const DISK: usize = 16 << 10;

const VERSION_1: u64 = 1 << 32;
const INDIRECT: u64 = 1 << 28;
const EVENT_INDEX: u64 = 1 << 29;

/// Accesses to registers, writes to rings and buffers, and the thread's work, in any order.
fn run(driver: &mut Driver, data: &[u8]) {
    driver.enable();
    for step in data.chunks_exact(STEP).take(MOST) {
        let &[action, size, low, high, ref value @ ..] = step else { continue };
        let at = u16::from_le_bytes([low, high]);
        let len = [1, 2, 4, 8][usize::from(size % 4)];
        let bytes = value.get(..len).unwrap_or_default();
        let mut read = [0; 8];
        let read = read.get_mut(..len).unwrap_or_default();
        match action % 9 {
            // Most registers are at the start.
            0 => drop(driver.function.mmio_write(BASE + u64::from(at) % 0x38, bytes)),
            1 => drop(driver.function.mmio_write(BASE + u64::from(at) % 0x4000, bytes)),
            2 => drop(driver.function.mmio_read(BASE + u64::from(at) % 0x4000, read)),
            3 => driver.function.config_write((at % 0x100) & !3, value.get(..4).unwrap_or_default()),
            4 => driver.function.config_read((at % 0x100) & !3, read),
            // Rings of queue 0: descriptors, available ring, used ring.
            5 => driver.write(0x1000 + u64::from(at) % 0x4000, bytes),
            6 => driver.write(0x10000 + u64::from(at), bytes),
            7 => {
                driver.place_bar();
                driver.set_status(0);
                driver.pump();
                driver.start(VERSION_1 | INDIRECT | EVENT_INDEX, 16);
            }
            _ => driver.pump(),
        }
    }
}

/// After a machine's reset the device is as new.
fn works_again(driver: &mut Driver, request: &[crate::testing::Buffer], expect: u32) {
    assert!(driver.function.reset().is_ok());
    driver.enable();
    driver.start(VERSION_1, 16);
    driver.send(request);
    assert_eq!(driver.returned(), Some((0, expect)));
}

/// Returns each request with the length of its readable buffers.
struct Echo;

impl Engine for Echo {
    fn serve(&mut self, _: usize, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        serve_in_order(queue, |request| {
            Served::Complete(u32::try_from(length(&request.readable)).unwrap_or(u32::MAX))
        })
    }
}

/// The transport and its queues, with a device that does nothing.
pub fn fuzz_transport(data: &[u8]) {
    let identity = Identity {
        name: "echo".into(),
        device: 4,
        class: 0,
        features: INDIRECT | EVENT_INDEX,
        queues: vec![16, 16],
        calls: Calls::None,
    };
    let mut driver = Driver::new(identity, Configuration::new(vec![7; 100]), Box::new(Echo));
    run(&mut driver, data);
    works_again(&mut driver, &[(0x10000, 7, false)], 7);
}

/// A disk: no request leaves it, and its size stays.
pub fn fuzz_block(data: &[u8]) {
    let options = Options {
        id: "root".into(),
        read_only: data.first().is_some_and(|byte| byte & 1 == 1),
        serial: "s".into(),
        discard: true,
        limits: Limits::default(),
        wait_for_room: true,
    };
    let disk = MemoryDisk::of(DISK);
    let made = Block::new(Box::new(disk.clone()), options.clone(), Arc::default(), Box::new(|| {}));
    let Ok((block, _remote)) = made else { return };
    let mut driver =
        Driver::new(block::identity(&options), block::configuration(DISK as u64), Box::new(block));
    run(&mut driver, data.get(1..).unwrap_or_default());
    assert_eq!(disk.medium().bytes.len(), DISK);
    if options.read_only {
        assert!(disk.medium().bytes.iter().all(|byte| *byte == 0), "a read-only disk has changed");
    }
    driver.write(MEMORY - 16, &[0; 16]);
    works_again(&mut driver, &[(MEMORY - 16, 16, false), (0x10000, 513, true)], 513);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
        #[test]
        fn no_script_breaks_the_transport(data in prop::collection::vec(any::<u8>(), 0..STEP * 60)) {
            fuzz_transport(&data);
        }

        #[test]
        fn no_script_leaves_the_disk(data in prop::collection::vec(any::<u8>(), 0..STEP * 60)) {
            fuzz_block(&data);
        }
    }
}
