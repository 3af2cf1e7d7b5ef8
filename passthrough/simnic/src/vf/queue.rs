// SPDX-License-Identifier: Apache-2.0

//! The registers of a descriptor ring. Advanced descriptors only, 16 bytes each.

use vm_memory::GuestAddress;

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR: usize = 16;

const ENABLE: u32 = 1 << 25;
/// RDLEN and TDLEN: bits 19:7.
const LENGTH_MASK: u32 = 0x000f_ff80;
/// Bases are at multiples of 128. The low bits of an unaligned one are ignored.
const BASE_MASK: u64 = !0x7f;
const INDEX_MASK: u32 = 0xffff;

#[derive(Clone, Default)]
pub(super) struct Queue {
    base: u64,
    length: u32,
    split: u32,
    head: u32,
    tail: u32,
    cache: u32,
    control: u32,
}

/// An enabled ring, with the index of the next descriptor to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ring {
    base: u64,
    count: u32,
    pub(super) head: u32,
    tail: u32,
}

impl Queue {
    /// The register at `offset` from RDBAL or TDBAL.
    pub(super) fn read(&self, offset: u16) -> Option<u32> {
        Some(match offset {
            0x00 => (self.base & 0xffff_ffff) as u32,
            0x04 => (self.base >> 32) as u32,
            0x08 => self.length,
            0x0c => self.split,
            0x10 => self.head,
            0x14 => self.cache,
            0x18 => self.tail,
            0x28 => self.control,
            _ => return None,
        })
    }

    /// Returns whether there may be work now.
    pub(super) fn write(&mut self, offset: u16, value: u32) -> bool {
        match offset {
            0x00 => self.base = (self.base & !0xffff_ffff) | u64::from(value),
            0x04 => self.base = (self.base & 0xffff_ffff) | u64::from(value) << 32,
            0x08 => self.length = value & LENGTH_MASK,
            0x0c => self.split = value,
            0x10 => self.head = value & INDEX_MASK,
            0x14 => self.cache = value,
            0x18 => self.tail = value & INDEX_MASK,
            0x28 => self.control = value,
            _ => {}
        }
        matches!(offset, 0x18 | 0x28) && self.control & ENABLE != 0
    }

    /// SRRCTL.
    pub(super) fn split(&self) -> u32 {
        self.split
    }

    /// The ring, if it is enabled and its indices are inside of it.
    pub(super) fn ring(&self) -> Option<Ring> {
        let count = self.length / 16;
        let sound = self.control & ENABLE != 0 && self.head < count && self.tail < count;
        sound.then_some(Ring { base: self.base & BASE_MASK, count, head: self.head, tail: self.tail })
    }

    /// Marks the descriptors before `head` as used.
    pub(super) fn used(&mut self, head: u32) {
        self.head = head;
    }

    /// Stops the queue, because its memory cannot be accessed, until the driver enables it again.
    pub(super) fn disable(&mut self) {
        self.control &= !ENABLE;
    }
}

impl Ring {
    /// The number of descriptors that the driver has handed over.
    pub(super) fn available(&self) -> u32 {
        if self.tail >= self.head { self.tail - self.head } else { self.count - self.head + self.tail }
    }

    /// The next descriptor, which is then used; None if the driver has handed over no more, or if its address
    /// overflows.
    pub(super) fn advance(&mut self) -> Option<GuestAddress> {
        if self.head == self.tail {
            return None;
        }
        let address = self.base.checked_add(u64::from(self.head) * DESCRIPTOR as u64)?;
        self.head = if self.head + 1 == self.count { 0 } else { self.head + 1 };
        Some(GuestAddress(address))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_ring_is_walked_once_around_whatever_is_written(writes in proptest::collection::vec(
            (0..12u16, prop_oneof![any::<u32>(), 0..64u32, Just(ENABLE)]), 0..24)) {
            let mut queue = Queue::default();
            for (register, value) in writes {
                queue.write(register * 4, value);
            }
            if let Some(mut ring) = queue.ring() {
                let (available, mut steps) = (ring.available(), 0);
                prop_assert!(available < ring.count);
                while let Some(address) = ring.advance() {
                    prop_assert!(address.0 % DESCRIPTOR as u64 == 0);
                    steps += 1;
                    prop_assert!(steps <= available);
                }
                prop_assert!(ring.head < ring.count);
            }
        }
    }
}
