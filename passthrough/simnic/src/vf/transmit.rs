// SPDX-License-Identifier: Apache-2.0

//! The transmit queue: descriptors to frames.

use vm_memory::{Bytes, GuestAddress};

use super::{
    Shared,
    descriptor::{Command, Context, DONE, Transmit},
    interrupts::Event,
    offload,
    queue::{DESCRIPTOR, Ring},
};
use crate::wire::{Frame, MAX_FRAME, MIN_FRAME, Packet};

/// Longest packet before segmentation: the largest IP packet, with room for headers.
const MAX_PACKET: usize = 0x1_0000 + 512;
/// Descriptors processed before others get their turn.
const BATCH: usize = 64;
/// Offset of the status in a descriptor.
const STATUS: u64 = 12;

/// An incomplete packet, and the contexts of the queue.
#[derive(Default)]
pub(super) struct Transmitter {
    generation: u64,
    contexts: [Context; 2],
    packet: Vec<u8>,
    command: Option<Command>,
    bad: bool,
}

/// The result of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Round {
    /// There are no descriptors.
    Idle,
    /// There may be more.
    More,
}

#[derive(Default)]
struct Counts {
    frames: u32,
    bytes: u32,
    report: bool,
}

impl Transmitter {
    /// Takes descriptors until a packet is complete, and puts its frames, as packets for the PF, into `out`.
    pub(super) fn round(&mut self, shared: &Shared, out: &mut Vec<Vec<u8>>) -> Round {
        let dma = shared.dma();
        if !shared.config().bus_master() {
            return Round::Idle;
        }
        let (ring, generation) = {
            let registers = shared.registers();
            (registers.transmit.ring(), registers.generation)
        };
        if self.generation != generation {
            *self = Self { generation, ..Self::default() };
        }
        let Some(mut ring) = ring.filter(|ring| ring.available() > 0) else { return Round::Idle };
        let mut counts = Counts::default();
        let result = self.take(shared, &mut ring, out, &mut counts);
        let mut registers = shared.registers();
        if registers.generation == generation {
            registers.transmit.used(ring.head);
            if result.is_none() {
                registers.transmit.disable();
            }
            let counted = &mut registers.statistics;
            counted.sent = counted.sent.wrapping_add(counts.frames);
            counted.sent_bytes = counted.sent_bytes.wrapping_add(counts.bytes);
            if counts.report {
                registers.interrupts.raise(Event::Transmitted);
            }
        }
        drop(registers);
        drop(dma);
        if result.is_none() {
            shared.count_dma_error();
            return Round::Idle;
        }
        Round::More
    }

    /// Takes descriptors; None if the ring cannot be accessed.
    fn take(
        &mut self,
        shared: &Shared,
        ring: &mut Ring,
        out: &mut Vec<Vec<u8>>,
        counts: &mut Counts,
    ) -> Option<()> {
        for _ in 0..BATCH {
            if ring.available() == 0 {
                break;
            }
            let at = ring.advance()?;
            let mut bytes = [0; DESCRIPTOR];
            shared.memory.read_slice(&mut bytes, at).ok()?;
            let (end, report) = match Transmit::parse(bytes) {
                Transmit::Context { index, context } => {
                    if let Some(place) = self.contexts.get_mut(index) {
                        *place = context;
                    }
                    (false, false)
                }
                Transmit::Unknown { report } => {
                    self.bad = true;
                    (false, report)
                }
                Transmit::Data(data) => {
                    self.command.get_or_insert(data.command);
                    self.append(shared, data.address, data.len);
                    if data.end {
                        self.finish(out, counts);
                    }
                    (data.end, data.report)
                }
            };
            if report {
                let status = GuestAddress(at.0.checked_add(STATUS)?);
                shared.memory.store(DONE.to_le(), status, std::sync::atomic::Ordering::Release).ok()?;
                counts.report = true;
            }
            if end {
                break;
            }
        }
        Some(())
    }

    fn append(&mut self, shared: &Shared, address: u64, len: usize) {
        let old = self.packet.len();
        if self.bad || old + len > MAX_PACKET {
            self.bad = true;
            return;
        }
        self.packet.resize(old + len, 0);
        let place = self.packet.get_mut(old..).unwrap_or_default();
        if !place.is_empty() && shared.memory.read_slice(place, GuestAddress(address)).is_err() {
            shared.count_dma_error();
            self.bad = true;
        }
    }

    fn finish(&mut self, out: &mut Vec<Vec<u8>>, counts: &mut Counts) {
        let command = self.command.take().unwrap_or_default();
        let (tag, offload) = command.resolve(&self.contexts);
        if !std::mem::take(&mut self.bad) {
            // A packet with impossible lengths is dropped.
            let _ = offload::frames(&mut self.packet, &offload, &mut |bytes| {
                if !(MIN_FRAME..=MAX_FRAME).contains(&bytes.len()) {
                    return;
                }
                counts.frames += 1;
                counts.bytes = counts.bytes.wrapping_add(u32::try_from(bytes.len()).unwrap_or(0));
                let mut packet = Vec::new();
                Packet::Frame { frame: Frame { tag, bytes }, looped: false }.encode(&mut packet);
                out.push(packet);
            });
        }
        self.packet.clear();
        // Release the memory of a large packet.
        self.packet.shrink_to(MAX_FRAME);
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::SimVf;
    use passthrough::threads::ThreadStart;

    #[test]
    fn a_packet_without_end_takes_no_more_than_its_bound() {
        let flags = SocketFlags::CLOEXEC;
        let (connection, _pf) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2_0000)]).unwrap();
        let vf = SimVf::new(connection, memory, &ThreadStart::default()).unwrap();
        let mut transmitter = Transmitter::default();
        for _ in 0..1000 {
            transmitter.append(&vf.shared, 0, 0xffff);
        }
        assert!(transmitter.bad && transmitter.packet.len() <= MAX_PACKET);
        assert!(transmitter.packet.capacity() <= 2 * MAX_PACKET);
        let (mut out, mut counts) = (Vec::new(), Counts::default());
        transmitter.finish(&mut out, &mut counts);
        assert!(out.is_empty() && !transmitter.bad && transmitter.packet.capacity() <= MAX_FRAME);
    }
}
