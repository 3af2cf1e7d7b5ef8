// SPDX-License-Identifier: Apache-2.0

//! Bodies of fuzz targets: any accesses and any guest memory. Property tests run them too.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use devices::{
    device::Device as _,
    io_thread::{Calls, IoEvent, IoSource},
    pci::PciFunction as _,
};
use vm_memory::VolatileSlice;

use crate::{
    block::{self, Block, Options, Reports},
    engine::{Configuration, Engine, Identity, Served, serve_in_order},
    limit::Limits,
    net::{self, Net, Offloads, Wire},
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
            // Rings of all queues: descriptors, available ring, used ring.
            5 => driver.write(0x1000 + u64::from(at) % driver.rings_end(), bytes),
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
    let configuration = block::configuration(DISK as u64);
    let reports = Reports { on_full: Box::new(|| {}), on_grown: Box::new(|| {}) };
    let made = Block::new(
        Box::new(disk.clone()),
        options.clone(),
        Arc::default(),
        Arc::clone(&configuration),
        reports,
    );
    let Ok((block, _remote)) = made else { return };
    let mut driver = Driver::new(block::identity(&options), configuration, Box::new(block));
    run(&mut driver, data.get(1..).unwrap_or_default());
    assert_eq!(disk.medium().bytes.len(), DISK);
    if options.read_only {
        assert!(disk.medium().bytes.iter().all(|byte| *byte == 0), "a read-only disk has changed");
    }
    driver.write(MEMORY - 16, &[0; 16]);
    works_again(&mut driver, &[(MEMORY - 16, 16, false), (0x10000, 513, true)], 513);
}

/// A wire whose frames come back.
struct Loop {
    frames: Mutex<VecDeque<Vec<u8>>>,
    ready: IoEvent,
}

/// The most frames that a [`Loop`] keeps.
const FRAMES: usize = 8;

impl Wire for Arc<Loop> {
    fn pairs(&self) -> usize {
        1
    }

    fn source(&self, _: usize) -> Option<IoSource> {
        Some(IoSource::Event(self.ready.clone()))
    }

    fn receive(&mut self, _: usize, frame: &mut [u8]) -> io::Result<usize> {
        let mut frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        let next = frames.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let len = next.len().min(frame.len());
        frame.iter_mut().zip(next).for_each(|(to, from)| *to = from);
        Ok(len)
    }

    fn send(&mut self, _: usize, frame: &[VolatileSlice<'_>]) -> io::Result<()> {
        let len = usize::try_from(length(frame)).unwrap_or(usize::MAX);
        assert!((net::HEADER + 14..=net::HEADER + (64 << 10) + 22).contains(&len), "{len} bytes");
        let mut bytes = Vec::with_capacity(len);
        for buffer in frame {
            let mut part = vec![0; buffer.len()];
            buffer.copy_to(&mut part);
            bytes.append(&mut part);
        }
        let mut frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        if frames.len() < FRAMES {
            frames.push_back(bytes);
        }
        self.ready.signal();
        Ok(())
    }

    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_pairs(&mut self, count: usize) -> io::Result<()> {
        assert_eq!(count, 1);
        Ok(())
    }
}

/// A NIC whose frames come back: no frame is shorter or longer than frames are.
pub fn fuzz_net(data: &[u8]) {
    let Ok(ready) = IoEvent::new() else { return };
    let wire = Arc::new(Loop { frames: Mutex::default(), ready });
    let options = net::Options { id: "mgmt0".into(), mac: [2, 0, 0, 0, 0, 1], mtu: None };
    let device = Net::new(Box::new(wire), options, Arc::default());
    let (identity, configuration) = (device.identity(), device.configuration());
    let mut driver = Driver::new(identity, configuration, Box::new(device));
    run(&mut driver, data);
    // A broadcast comes back.
    driver.write(0x20000, &[[0; net::HEADER].as_slice(), &[0xff; 60]].concat());
    assert!(driver.function.reset().is_ok());
    driver.enable();
    driver.start(VERSION_1, 16);
    driver.send_on(0, 0, &[(0x10000, 2000, true)]);
    driver.send_on(1, 0, &[(0x20000, 72, false)]);
    assert_eq!(driver.returned_on(1), Some((0, 0)));
    assert_eq!(driver.returned_on(0), Some((0, 72)));
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
        fn no_script_breaks_the_nic(data in prop::collection::vec(any::<u8>(), 0..STEP * 60)) {
            fuzz_net(&data);
        }

        #[test]
        fn no_script_leaves_the_disk(data in prop::collection::vec(any::<u8>(), 0..STEP * 60)) {
            fuzz_block(&data);
        }
    }
}
