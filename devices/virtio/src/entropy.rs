// SPDX-License-Identifier: Apache-2.0

//! The entropy device (the specification, 5.4): random bytes of the host's kernel.

use devices::io_thread::Calls;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::{
    virtio_ids::VIRTIO_ID_RNG,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use crate::{
    engine::{Engine, Identity, Served, serve_in_order},
    negotiation::feature,
    queue::{ActiveQueue, QueueError, Request, length, part, write_bytes},
};

/// Entries of the queue.
const QUEUE: u16 = 64;
/// The most bytes of one request: the cost of a request has a bound.
const MOST: u64 = 64 << 10;
/// The most bytes of one system call that a signal does not interrupt (getrandom(2)).
const AT_ONCE: usize = 256;
/// PCI class: unclassified, other.
const CLASS: u32 = 0x00ff_0000;

/// The registers' facts of the device.
#[must_use]
pub fn identity() -> Identity {
    Identity {
        name: "entropy".to_owned(),
        device: u8::try_from(VIRTIO_ID_RNG).unwrap_or_default(),
        class: CLASS,
        features: feature(VIRTIO_RING_F_INDIRECT_DESC) | feature(VIRTIO_RING_F_EVENT_IDX),
        queues: vec![QUEUE],
        calls: Calls::None,
    }
}

/// The device.
#[derive(Debug, Default)]
pub struct Entropy;

fn fill(request: &Request<'_>) -> u32 {
    let wanted = length(&request.writable).min(MOST);
    let mut done = 0;
    while done < wanted {
        let mut bytes = [0; AT_ONCE];
        let count = usize::try_from(wanted - done).unwrap_or(AT_ONCE).min(AT_ONCE);
        let Ok(got) = getrandom(bytes.get_mut(..count).unwrap_or_default(), GetRandomFlags::empty()) else {
            break;
        };
        let bytes = bytes.get(..got).unwrap_or_default();
        let written = write_bytes(&part(&request.writable, done, got as u64), bytes);
        done += written as u64;
        if written == 0 {
            break;
        }
    }
    u32::try_from(done).unwrap_or_default()
}

impl Engine for Entropy {
    fn serve(&mut self, _: usize, queue: &mut ActiveQueue) -> Result<bool, QueueError> {
        serve_in_order(queue, |request| Served::Complete(fill(request)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{engine::Configuration, testing::Driver};

    #[test]
    fn buffers_are_filled_up_to_the_bound() {
        let mut driver = Driver::new(identity(), Configuration::new(Vec::new()), Box::new(Entropy));
        driver.start(1 << 32, 16);
        driver.send(&[(0x10000, 10, true), (0x11000, 1000, true)]);
        assert_eq!(driver.returned(), Some((0, 1010)));
        let bytes = driver.read(0x11000, 1000);
        let zeroes = bytes.iter().filter(|byte| **byte == 0).count();
        assert!(zeroes < 40, "{zeroes} of 1000 random bytes are 0");
        driver.send(&[(0x10000, 0x8000, true), (0x20000, 0x9000, true)]);
        assert_eq!(driver.returned(), Some((0, 0x10000)));
        assert_eq!(driver.read(0x28000, 0x1000), [0; 0x1000], "behind the bound");
        driver.send(&[(0x10000, 10, false)]);
        assert_eq!(driver.returned(), Some((0, 0)));
    }
}
