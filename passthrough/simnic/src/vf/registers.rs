// SPDX-License-Identifier: Apache-2.0

//! BAR 0: the effects of a register access. Offsets as in Linux' `igbvf/regs.h`.

use passthrough::{
    channel::mailbox::{layout::Register, register_bits::CONTROL_RST},
    family::igb::IGBVF,
};

use super::{
    interrupts::{Event, Interrupts},
    mailbox::Mailbox,
    queue::Queue,
};

const STATUS: u16 = 0x0008;
/// Full duplex, 1000 Mbit/s.
const STATUS_VALUE: u32 = 0x81;
const STATUS_LINK_UP: u32 = 1 << 1;
const INTERRUPTS: std::ops::Range<u16> = 0x1000..0x2000;
const RECEIVE: u16 = 0x2800;
const TRANSMIT: u16 = 0x3800;
const QUEUE_REGISTERS: u16 = 0x100;

/// The counters that the driver reads every two seconds. They wrap, and a reset does not change them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Statistics {
    pub(super) received: u32,
    pub(super) received_bytes: u32,
    pub(super) received_multicast: u32,
    pub(super) looped: u32,
    pub(super) looped_bytes: u32,
    pub(super) sent: u32,
    pub(super) sent_bytes: u32,
}

/// All registers. One lock, held for one access.
#[derive(Default)]
pub(super) struct Registers {
    pub(super) mailbox: Mailbox,
    pub(super) interrupts: Interrupts,
    pub(super) receive: Queue,
    pub(super) transmit: Queue,
    pub(super) statistics: Statistics,
    pub(super) link_up: bool,
    /// Generation of the queues: a reset begins a new one, and work for an old one is dropped.
    pub(super) generation: u64,
}

impl Registers {
    pub(super) fn read(&mut self, offset: u16) -> u32 {
        match IGBVF.layout.register(offset.into()) {
            Register::Mailbox => return self.mailbox.read(),
            Register::Buffer(word) => return self.mailbox.words.get(word).copied().unwrap_or(0),
            // Write only.
            Register::Control => return 0,
            Register::Passed { .. } | Register::Unknown => {}
        }
        let counted = &self.statistics;
        match offset {
            STATUS => STATUS_VALUE | if self.link_up { STATUS_LINK_UP } else { 0 },
            0x0f10 => counted.received,
            0x0f14 => counted.sent,
            0x0f18 => counted.received_bytes,
            0x0f34 => counted.sent_bytes,
            0x0f3c => counted.received_multicast,
            0x0f40 => counted.looped,
            0x0f48 => counted.looped_bytes,
            _ if INTERRUPTS.contains(&offset) => self.interrupts.read(offset).unwrap_or(0),
            _ => in_queue(offset, RECEIVE)
                .and_then(|at| self.receive.read(at))
                .or_else(|| in_queue(offset, TRANSMIT).and_then(|at| self.transmit.read(at)))
                .unwrap_or(0),
        }
    }

    /// Returns whether the VF's thread has work.
    pub(super) fn write(&mut self, offset: u16, value: u32) -> bool {
        match IGBVF.layout.register(offset.into()) {
            Register::Mailbox => {
                let (wake, raise) = self.mailbox.write(value);
                if raise {
                    self.interrupts.raise(Event::Mailbox);
                }
                return wake;
            }
            Register::Buffer(word) => {
                if let Some(place) = self.mailbox.words.get_mut(word) {
                    *place = value;
                }
                return false;
            }
            Register::Control => {
                if value & CONTROL_RST != 0 {
                    self.interrupts.reset();
                    self.stop();
                }
                return value & CONTROL_RST != 0;
            }
            Register::Passed { .. } | Register::Unknown => {}
        }
        if INTERRUPTS.contains(&offset) {
            self.interrupts.write(offset, value);
            return false;
        }
        if let Some(at) = in_queue(offset, RECEIVE) {
            // Frames do not wait for descriptors, so there is no work.
            self.receive.write(at, value);
            return false;
        }
        in_queue(offset, TRANSMIT).is_some_and(|at| self.transmit.write(at, value))
    }

    /// FLR.
    pub(super) fn function_reset(&mut self) {
        self.interrupts.function_reset();
        self.stop();
        self.mailbox.words = Default::default();
        self.statistics = Statistics::default();
    }

    fn stop(&mut self) {
        self.mailbox.reset();
        self.receive = Queue::default();
        self.transmit = Queue::default();
        self.generation = self.generation.wrapping_add(1);
    }
}

/// The second queue of an 82576 VF, after the first one's registers, does not exist here; igbvf uses one.
fn in_queue(offset: u16, base: u16) -> Option<u16> {
    offset.checked_sub(base).filter(|at| *at < QUEUE_REGISTERS)
}
