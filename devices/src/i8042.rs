// SPDX-License-Identifier: Apache-2.0

//! The one command of the i8042 keyboard controller that kernels still use: pulse the CPU's reset line.

use std::sync::Arc;

use crate::{
    bus::BusDevice,
    device::{Decoded, Device, ResetError},
    machine::{MachineEvent, MachineEvents},
};

/// First port of the controller.
pub const PORT: u16 = 0x60;
/// Number of its ports: data at 0x60, command and status at 0x64.
pub const PORTS: u64 = 5;

const COMMAND: u64 = 4;
const PULSE_RESET: u8 = 0xfe;

/// A controller without keyboard or mouse. Its status reads as zero (input buffer empty); otherwise
/// Linux would wait before it writes the reset command.
pub struct I8042 {
    events: Arc<dyn MachineEvents>,
}

impl I8042 {
    /// A controller that reports resets to `events`.
    #[must_use]
    pub fn new(events: Arc<dyn MachineEvents>) -> Self {
        Self { events }
    }
}

impl Device for I8042 {
    fn decodes(self: Arc<Self>) -> Vec<Decoded> {
        vec![Decoded::ports(PORT, PORTS, self)]
    }

    /// There is nothing to reset.
    fn reset(&self) -> Result<(), ResetError> {
        Ok(())
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data.first() == Some(&PULSE_RESET) {
            self.events.raise(MachineEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::EventLatch;

    #[test]
    fn only_the_reset_command_resets() {
        let latch = Arc::new(EventLatch::new());
        let device = I8042::new(latch.clone());
        device.write(COMMAND, &[0xaa]);
        device.write(0, &[PULSE_RESET]);
        assert_eq!(latch.take(), None);
        let mut status = [0xff];
        device.read(COMMAND, &mut status);
        assert_eq!(status, [0]);
        device.write(COMMAND, &[PULSE_RESET]);
        assert_eq!(latch.take(), Some(MachineEvent::Reset));
    }
}
