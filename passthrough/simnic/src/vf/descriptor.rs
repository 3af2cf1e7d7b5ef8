// SPDX-License-Identifier: Apache-2.0

//! Advanced descriptors, 16 bytes each (`e1000_82575.h`, igbvf's `vf.h`).

use super::offload::{Offload, Transport};

const DEXT: u32 = 1 << 29;
const TYPE_MASK: u32 = 0xf << 20;
const TYPE_CONTEXT: u32 = 2 << 20;
const TYPE_DATA: u32 = 3 << 20;
const EOP: u32 = 1 << 24;
const RS: u32 = 1 << 27;
const VLE: u32 = 1 << 30;
const TSE: u32 = 1 << 31;
const IXSM: u32 = 1 << 8;
const TXSM: u32 = 1 << 9;
const IPV4: u32 = 1 << 10;

/// Status of a used descriptor: done, and the last one of its frame.
pub(super) const DONE: u32 = 1;
const LAST: u32 = 1 << 1;
const TAGGED: u32 = 1 << 3;

/// A transmit descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transmit {
    /// Replaces the context of this index.
    Context {
        index: usize,
        context: Context,
    },
    Data(Data),
    /// A kind that does not exist here. It is used up, and its packet is not sent.
    Unknown {
        report: bool,
    },
}

/// A context, to which later packets refer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Context {
    tag: u16,
    offload: Offload,
    segment: usize,
}

/// A piece of a packet. The command of the first piece counts, apart from `end` and `report`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Data {
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) end: bool,
    pub(super) report: bool,
    pub(super) command: Command,
}

/// The work on a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Command {
    context: usize,
    tagged: bool,
    segmented: bool,
    ip_checksum: bool,
    transport_checksum: bool,
}

impl Transmit {
    pub(super) fn parse(descriptor: [u8; 16]) -> Self {
        let [a, b, command, status] = words(descriptor);
        let report = command & RS != 0;
        match command & (DEXT | TYPE_MASK) {
            kind if kind == DEXT | TYPE_CONTEXT => Self::Context {
                index: context_index(status),
                context: Context {
                    tag: (a >> 16) as u16,
                    segment: (status >> 16) as usize,
                    offload: Offload {
                        mac_len: (a >> 9 & 0x7f) as usize,
                        ip_len: (a & 0x1ff) as usize,
                        transport_len: (status >> 8 & 0xff) as usize,
                        ipv4: command & IPV4 != 0,
                        transport: match command >> 11 & 3 {
                            0 => Transport::Udp,
                            1 => Transport::Tcp,
                            _ => Transport::Sctp,
                        },
                        ..Offload::default()
                    },
                },
            },
            kind if kind == DEXT | TYPE_DATA => Self::Data(Data {
                address: u64::from(a) | u64::from(b) << 32,
                len: (command & 0xffff) as usize,
                end: command & EOP != 0,
                report,
                command: Command {
                    context: context_index(status),
                    tagged: command & VLE != 0,
                    segmented: command & TSE != 0,
                    ip_checksum: status & IXSM != 0,
                    transport_checksum: status & TXSM != 0,
                },
            }),
            _ => Self::Unknown { report },
        }
    }
}

impl Command {
    /// The tag and the offload work, from the contexts of the queue.
    pub(super) fn resolve(&self, contexts: &[Context; 2]) -> (Option<u16>, Offload) {
        let [first, second] = contexts;
        let context = if self.context == 0 { first } else { second };
        let offload = Offload {
            ip_checksum: self.ip_checksum,
            transport_checksum: self.transport_checksum,
            segment: self.segmented.then_some(context.segment),
            ..context.offload
        };
        (self.tagged.then_some(context.tag), offload)
    }
}

/// An 82576 has two contexts in a queue.
fn context_index(status: u32) -> usize {
    (status >> 4 & 1) as usize
}

/// The buffers for a received frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buffers {
    pub(super) packet: u64,
    pub(super) header: u64,
}

impl Buffers {
    pub(super) fn parse(descriptor: [u8; 16]) -> Self {
        let [a, b, c, d] = words(descriptor);
        let quad = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        Self { packet: quad(a, b), header: quad(c, d) }
    }
}

/// A used receive descriptor: its two halves. Write the second one, with the status, last.
pub(super) fn received(header_len: usize, len: usize, tag: Option<u16>, last: bool) -> (u64, u64) {
    // Bits 5 to 14 are the header's length, bit 15 says that the header is separate.
    let split = if header_len > 0 { (header_len as u64 & 0x3ff) << 5 | 1 << 15 } else { 0 };
    let (tag, tagged) = tag.filter(|_| last).map_or((0, 0), |tag| (u64::from(tag), TAGGED));
    let status = DONE | tagged | if last { LAST } else { 0 };
    (split << 16, u64::from(status) | (len as u64 & 0xffff) << 32 | tag << 48)
}

/// The division of received frames into pieces (SRRCTL).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Length of the first piece, in its header buffer; 0 for none.
    pub(super) header: usize,
    /// Length of every piece, in its packet buffer.
    pub(super) packet: usize,
}

impl Cut {
    pub(super) fn of(split: u32) -> Self {
        let packet = match (split & 0x7f) as usize * 1024 {
            // The size at power-on.
            0 => 2048,
            size => size,
        };
        let splits = matches!(split >> 25 & 7, 2 | 5);
        let header = if splits { (split >> 8 & 0x3f) as usize * 64 } else { 0 };
        Self { header: header.min(0x3ff), packet }
    }

    /// The number of descriptors for a frame.
    pub(super) fn pieces(&self, len: usize) -> usize {
        len.saturating_sub(self.header).div_ceil(self.packet).max(1)
    }
}

fn words(descriptor: [u8; 16]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(descriptor.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}
