// SPDX-License-Identifier: Apache-2.0

//! Interrupt causes and their vectors. Nothing is moderated: VTEITR is only stored.

use vmm_sys_util::eventfd::EventFd;

use super::VECTORS;

const CAUSES: u32 = (1 << VECTORS) - 1;
/// Fields of a VTIVAR entry: the valid bit, and the vector.
const VALID: u8 = 0x80;
const VECTOR: u8 = 3;

/// The event that raises an interrupt, with its byte in VTIVAR or VTIVAR_MISC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Received,
    Transmitted,
    Mailbox,
}

#[derive(Default)]
pub(super) struct Interrupts {
    /// VTEICR.
    causes: u32,
    /// VTEIMS.
    enabled: u32,
    /// VTEIAC: causes that sending a message clears.
    auto_clear: u32,
    /// VTEIAM: causes that sending a message disables.
    auto_mask: u32,
    throttle: [u32; VECTORS as usize],
    vectors: u32,
    mailbox_vector: u32,
    triggers: Vec<EventFd>,
}

impl Interrupts {
    pub(super) fn read(&mut self, offset: u16) -> Option<u32> {
        Some(match offset {
            // Write only.
            0x1520 | 0x1528 => 0,
            0x1524 => self.enabled,
            0x152c => self.auto_clear,
            0x1530 => self.auto_mask,
            0x1580 => std::mem::take(&mut self.causes),
            0x1680 | 0x1684 | 0x1688 => {
                self.throttle.get(usize::from(offset - 0x1680) / 4).copied().unwrap_or(0)
            }
            0x1700 => self.vectors,
            0x1740 => self.mailbox_vector,
            _ => return None,
        })
    }

    pub(super) fn write(&mut self, offset: u16, value: u32) {
        let causes = value & CAUSES;
        match offset {
            0x1520 => self.cause(causes),
            0x1524 => {
                self.enabled |= causes;
                self.send(self.causes & causes);
            }
            0x1528 => self.enabled &= !causes,
            0x152c => self.auto_clear = causes,
            0x1530 => self.auto_mask = causes,
            0x1580 => self.causes &= !causes,
            0x1680 | 0x1684 | 0x1688 => {
                if let Some(throttle) = self.throttle.get_mut(usize::from(offset - 0x1680) / 4) {
                    *throttle = value;
                }
            }
            0x1700 => self.vectors = value,
            0x1740 => self.mailbox_vector = value,
            _ => {}
        }
    }

    /// Raises the cause of an event.
    pub(super) fn raise(&mut self, event: Event) {
        let [received, transmitted, ..] = self.vectors.to_le_bytes();
        let entry = match event {
            Event::Received => received,
            Event::Transmitted => transmitted,
            Event::Mailbox => self.mailbox_vector.to_le_bytes()[0],
        };
        if entry & VALID != 0 {
            self.cause((1 << (entry & VECTOR)) & CAUSES);
        }
    }

    /// Connects vector *n* to `triggers[n]` from now on.
    pub(super) fn connect(&mut self, triggers: Vec<EventFd>) {
        self.triggers = triggers;
    }

    /// Resets all registers to their state at power-on, and disconnects the vectors.
    pub(super) fn function_reset(&mut self) {
        *self = Self::default();
    }

    /// VTCTRL.RST: resets the registers, not the vectors, which belong to configuration space.
    pub(super) fn reset(&mut self) {
        *self = Self { triggers: std::mem::take(&mut self.triggers), ..Self::default() };
    }

    fn cause(&mut self, causes: u32) {
        self.causes |= causes;
        self.send(causes);
    }

    fn send(&mut self, causes: u32) {
        let sent = causes & self.enabled;
        for (vector, trigger) in self.triggers.iter().enumerate() {
            if sent & 1 << vector != 0 {
                // It fails only after 2^64 writes without a read.
                let _ = trigger.write(1);
            }
        }
        self.causes &= !(sent & self.auto_clear);
        self.enabled &= !(sent & self.auto_mask);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_masks_and_what_a_message_clears() {
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut interrupts = Interrupts::default();
        let spare = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        interrupts.connect(vec![spare(), event.try_clone().unwrap(), spare()]);
        let count = || event.read().unwrap_or(0);
        interrupts.write(0x1700, 0x8081);
        // Disabled: pending, and sent when enabled.
        interrupts.raise(Event::Received);
        assert_eq!(count(), 0);
        interrupts.write(0x1524, 2);
        assert_eq!((count(), interrupts.read(0x1580), interrupts.read(0x1580)), (1, Some(2), Some(0)));
        // As igbvf configures it: a message clears the cause and disables it.
        interrupts.write(0x152c, 7);
        interrupts.write(0x1530, 7);
        interrupts.raise(Event::Received);
        assert_eq!((count(), interrupts.read(0x1524), interrupts.read(0x1580)), (1, Some(0), Some(0)));
        interrupts.write(0x1520, 2);
        assert_eq!(count(), 0);
        interrupts.write(0x1524, u32::MAX);
        assert_eq!((count(), interrupts.read(0x1524)), (1, Some(5)));
        // An entry that is not valid, a vector that does not exist.
        interrupts.raise(Event::Mailbox);
        interrupts.write(0x1740, 0x83);
        interrupts.raise(Event::Mailbox);
        assert_eq!(interrupts.read(0x1580), Some(0));
        interrupts.reset();
        interrupts.write(0x1524, 2);
        interrupts.write(0x1520, 2);
        assert_eq!(count(), 1, "still connected");
        interrupts.function_reset();
        interrupts.write(0x1524, 2);
        interrupts.write(0x1520, 2);
        assert_eq!(count(), 0);
    }
}
