// SPDX-License-Identifier: Apache-2.0

//! The receive queue: frames to descriptors.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::{
    Shared,
    descriptor::{self, Buffers, Cut},
    interrupts::Event,
    queue::{DESCRIPTOR, Ring},
};
use crate::wire::Frame;

/// Offset of the half with the status in a descriptor.
const SECOND_HALF: u64 = 8;

impl Shared {
    /// Puts a frame into the guest's buffers. Without enough of them the frame is dropped, as by a queue with
    /// SRRCTL.DROP_EN.
    pub(super) fn receive(&self, frame: Frame<'_>, looped: bool) {
        let dma = self.dma();
        if !self.config().bus_master() {
            return;
        }
        let (ring, cut, generation) = {
            let registers = self.registers();
            (registers.receive.ring(), Cut::of(registers.receive.split()), registers.generation)
        };
        let Some(mut ring) = ring else { return };
        let pieces = cut.pieces(frame.bytes.len());
        if usize::try_from(ring.available()).unwrap_or(0) < pieces {
            return;
        }
        let stored = self.store(&mut ring, cut, frame, pieces);
        let mut registers = self.registers();
        if registers.generation != generation {
            return;
        }
        if stored.is_none() {
            registers.receive.disable();
            self.count_dma_error();
            return;
        }
        registers.receive.used(ring.head);
        let counted = &mut registers.statistics;
        let len = u32::try_from(frame.bytes.len()).unwrap_or(0);
        counted.received = counted.received.wrapping_add(1);
        counted.received_bytes = counted.received_bytes.wrapping_add(len);
        let group = frame.bytes.first().is_some_and(|byte| byte & 1 != 0);
        counted.received_multicast = counted.received_multicast.wrapping_add(group.into());
        if looped {
            counted.looped = counted.looped.wrapping_add(1);
            counted.looped_bytes = counted.looped_bytes.wrapping_add(len);
        }
        registers.interrupts.raise(Event::Received);
        drop(registers);
        drop(dma);
    }

    /// Stores a frame; None if ring or buffers cannot be accessed.
    fn store(&self, ring: &mut Ring, cut: Cut, frame: Frame<'_>, pieces: usize) -> Option<()> {
        let mut rest = frame.bytes;
        let mut header_room = cut.header;
        for _ in 0..pieces {
            let at = ring.advance()?;
            let mut bytes = [0; DESCRIPTOR];
            self.memory.read_slice(&mut bytes, at).ok()?;
            let buffers = Buffers::parse(bytes);
            let (header, after) = rest.split_at(rest.len().min(std::mem::take(&mut header_room)));
            let (packet, after) = after.split_at(after.len().min(cut.packet));
            rest = after;
            for (data, address) in [(header, buffers.header), (packet, buffers.packet)] {
                if !data.is_empty() {
                    self.memory.write_slice(data, GuestAddress(address)).ok()?;
                }
            }
            let (first, second) =
                descriptor::received(header.len(), packet.len(), frame.tag, rest.is_empty());
            self.memory.store(first.to_le(), at, Ordering::Relaxed).ok()?;
            let status = GuestAddress(at.0.checked_add(SECOND_HALF)?);
            self.memory.store(second.to_le(), status, Ordering::Release).ok()?;
        }
        Some(())
    }
}
