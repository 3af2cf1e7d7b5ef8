// SPDX-License-Identifier: Apache-2.0

//! The image of configuration space: the bytes that the guest reads from here instead of the
//! hardware.

use devices::pci::config;

use super::{FunctionError, capabilities::Capabilities};
use crate::hardware::VfHardware;

const HEADER_TYPE_MASK: u8 = 0x7f;

/// The emulated bytes and their values. A byte is emulated as a whole or not at all.
pub(super) struct ConfigSpace {
    emulated: Box<[bool; config::SPACE]>,
    image: Box<[u8; config::SPACE]>,
}

impl ConfigSpace {
    /// The image of a function with these capabilities, before the first write.
    pub(super) fn new(hardware: &dyn VfHardware, capabilities: &Capabilities) -> Result<Self, FunctionError> {
        let mut space =
            Self { emulated: Box::new([false; config::SPACE]), image: Box::new([0; config::SPACE]) };
        let mut header = [0];
        hardware.config_read(config::HEADER_TYPE, &mut header);
        let header = header[0] & HEADER_TYPE_MASK;
        if header != 0 {
            return Err(FunctionError::NotEndpoint(header));
        }
        // The guest sees single functions: the multi-function bit is off.
        space.set(config::HEADER_TYPE, &[0, 0]);
        space.set(config::COMMAND, &[0; 2]);
        space.set(config::BAR0, &[0; (config::BARS_END - config::BAR0) as usize]);
        space.set(config::EXPANSION_ROM, &[0; 4]);
        space.set(config::CAPABILITIES, &[capabilities.first()]);
        space.set(config::INTERRUPT_LINE, &[0; 2]);
        for &(offset, next) in &capabilities.chain {
            space.set(offset + 1, &[next]);
        }
        for &(offset, header) in &capabilities.extended {
            space.set(offset, &header.to_le_bytes());
        }
        for hidden in &capabilities.hidden {
            for offset in hidden.clone() {
                // A null capability may stand in for a hidden one: its header stays.
                if !space.is_emulated(offset) {
                    space.set(offset, &[0]);
                }
            }
        }
        Ok(space)
    }

    /// Emulates these bytes from now on, with these values.
    pub(super) fn set(&mut self, offset: u16, data: &[u8]) {
        let start = usize::from(offset);
        let places = self.emulated.iter_mut().zip(self.image.iter_mut()).skip(start);
        for ((emulated, place), byte) in places.zip(data) {
            *emulated = true;
            *place = *byte;
        }
    }

    pub(super) fn is_emulated(&self, offset: u16) -> bool {
        self.emulated.get(usize::from(offset)).copied().unwrap_or(true)
    }

    /// Reads, from the hardware only if some byte comes from there.
    pub(super) fn read(&self, hardware: &dyn VfHardware, offset: u16, data: &mut [u8]) {
        let last = offset.saturating_add(u16::try_from(data.len()).unwrap_or(u16::MAX));
        if (offset..last).any(|offset| !self.is_emulated(offset)) {
            hardware.config_read(offset, data);
        }
        let start = usize::from(offset);
        let places = self.emulated.iter().zip(self.image.iter()).skip(start);
        for (byte, (emulated, value)) in data.iter_mut().zip(places) {
            if *emulated {
                *byte = *value;
            }
        }
    }

    /// Writes the other bytes to the hardware, in one piece if possible.
    pub(super) fn forward(&self, hardware: &dyn VfHardware, offset: u16, data: &[u8]) {
        let bytes = || (offset..).zip(data);
        if bytes().all(|(offset, _)| !self.is_emulated(offset)) {
            return hardware.config_write(offset, data);
        }
        for (offset, byte) in bytes().filter(|(offset, _)| !self.is_emulated(*offset)) {
            hardware.config_write(offset, std::slice::from_ref(byte));
        }
    }

    /// The word at `offset` of the image with `data` written over it at `at`.
    pub(super) fn merged_word(&self, offset: u16, at: u16, data: &[u8]) -> u16 {
        let byte = |offset: u16| {
            let written = offset.checked_sub(at).and_then(|index| data.get(usize::from(index)));
            let old = || self.image.get(usize::from(offset)).copied().unwrap_or(0);
            u16::from(written.copied().unwrap_or_else(old))
        };
        byte(offset) | byte(offset.saturating_add(1)) << 8
    }
}
