// SPDX-License-Identifier: Apache-2.0

//! Events of the whole machine that a guest causes through a device register.

use std::sync::atomic::{AtomicU8, Ordering};

/// The end of a boot, by the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MachineEvent {
    /// ACPI S5: switch the machine off.
    PowerOff,
    /// Reset the machine (i8042 command 0xfe, ACPI reset register).
    Reset,
}

/// A receiver of [`MachineEvent`]s. Called on the vCPU thread that wrote the register, before its exit handler
/// returns.
pub trait MachineEvents: Send + Sync {
    /// Reports the event. It must not wait.
    fn raise(&self, event: MachineEvent);
}

/// Keeps the first event until the exit handler takes it after an access to a device. The first event wins: a dying
/// kernel writes to other reset registers afterwards, with the same intent.
#[derive(Debug, Default)]
pub struct EventLatch(AtomicU8);

const NONE: u8 = 0;
const POWER_OFF: u8 = 1;
const RESET: u8 = 2;

impl EventLatch {
    /// An empty latch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The event, if there is one; leaves it in place.
    #[must_use]
    pub fn peek(&self) -> Option<MachineEvent> {
        decode(self.0.load(Ordering::Acquire))
    }

    /// Takes the event, for the machine to handle.
    pub fn take(&self) -> Option<MachineEvent> {
        decode(self.0.swap(NONE, Ordering::AcqRel))
    }
}

impl MachineEvents for EventLatch {
    fn raise(&self, event: MachineEvent) {
        let code = match event {
            MachineEvent::PowerOff => POWER_OFF,
            MachineEvent::Reset => RESET,
        };
        // A failed exchange means that an earlier event is still there, and it wins.
        let _ = self.0.compare_exchange(NONE, code, Ordering::AcqRel, Ordering::Acquire);
    }
}

fn decode(code: u8) -> Option<MachineEvent> {
    match code {
        POWER_OFF => Some(MachineEvent::PowerOff),
        RESET => Some(MachineEvent::Reset),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_event_wins_until_it_is_taken() {
        let latch = EventLatch::new();
        assert_eq!(latch.take(), None);
        latch.raise(MachineEvent::Reset);
        latch.raise(MachineEvent::PowerOff);
        assert_eq!(latch.peek(), Some(MachineEvent::Reset));
        assert_eq!(latch.take(), Some(MachineEvent::Reset));
        assert_eq!(latch.take(), None);
        latch.raise(MachineEvent::PowerOff);
        assert_eq!(latch.take(), Some(MachineEvent::PowerOff));
    }
}
