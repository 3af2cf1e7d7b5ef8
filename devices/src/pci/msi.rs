// SPDX-License-Identifier: Apache-2.0

//! The MSI capability (PCI Local Bus 3.0, 6.8.1), emulated: 32 or 64-bit addresses, several messages, masks.

use std::{io, sync::Arc};

use vmm_sys_util::eventfd::EventFd;

use super::{msix::Transition, vectors::Vectors};
use crate::interrupt::{MsiMessage, MsiRouter};

const ENABLE: u16 = 1;
const MULTIPLE_CAPABLE_SHIFT: u32 = 1;
const MULTIPLE_ENABLE_SHIFT: u32 = 4;
const MULTIPLE_MASK: u16 = 7;
const IS_64BIT: u16 = 1 << 7;
const PER_VECTOR_MASK: u16 = 1 << 8;
/// log2 of the largest number of messages, 32.
const MAX_LOG2: u16 = 5;

/// The abilities of the function's MSI capability: the read-only bits of message control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiShape {
    /// log2 of the largest number of messages, 0 to 5.
    pub messages_log2: u16,
    /// Whether it has an upper address register.
    pub is_64bit: bool,
    /// Whether it has mask and pending registers.
    pub per_vector_mask: bool,
}

impl MsiShape {
    /// The shape in a message control register. Reserved message counts become 32.
    #[must_use]
    pub fn from_control(control: u16) -> Self {
        Self {
            messages_log2: ((control >> MULTIPLE_CAPABLE_SHIFT) & MULTIPLE_MASK).min(MAX_LOG2),
            is_64bit: control & IS_64BIT != 0,
            per_vector_mask: control & PER_VECTOR_MASK != 0,
        }
    }

    /// Bytes of the capability, its two header bytes included.
    #[must_use]
    pub fn size(self) -> u16 {
        let address = if self.is_64bit { 14 } else { 10 };
        // The mask register is aligned: two reserved bytes come before it.
        if self.per_vector_mask { address + 10 } else { address }
    }
}

/// The MSI state of one function.
pub struct Msi {
    shape: MsiShape,
    control: u16,
    address: u64,
    data: u16,
    mask: u32,
    vectors: Vectors,
}

impl Msi {
    /// Makes a disabled MSI state, with as many vectors as the shape allows.
    ///
    /// # Errors
    /// Those of making the eventfds.
    pub fn new(shape: MsiShape, router: Arc<dyn MsiRouter>) -> io::Result<Self> {
        let shape = MsiShape { messages_log2: shape.messages_log2.min(MAX_LOG2), ..shape };
        let vectors = Vectors::new(1 << shape.messages_log2, router)?;
        Ok(Self { shape, control: 0, address: 0, data: 0, mask: 0, vectors })
    }

    /// The capability's shape.
    #[must_use]
    pub fn shape(&self) -> MsiShape {
        self.shape
    }

    /// The eventfds for the hardware to signal. The first [`Transition::Enabled`] count of them are in use.
    #[must_use]
    pub fn triggers(&self) -> &[EventFd] {
        self.vectors.triggers()
    }

    /// Whether MSI is on.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// Reads the capability at `offset` from its start. The two header bytes belong to the owner of the list.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let image = self.image();
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes the capability at `offset` from its start.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Transition {
        let mut image = self.image();
        for (at, byte) in (usize::from(offset)..).zip(data) {
            if let Some(place) = image.get_mut(at) {
                *place = *byte;
            }
        }
        let was = self.enabled().then(|| self.enabled_messages());
        self.take(&image);
        let is = self.enabled().then(|| self.enabled_messages());
        match (was, is) {
            (Some(_), None) => {
                self.vectors.clear();
                Transition::Disabled
            }
            (was, Some(messages)) => {
                self.sync();
                if was == Some(messages) { Transition::None } else { Transition::Enabled(messages) }
            }
            (None, None) => Transition::None,
        }
    }

    /// Resets the state. The caller stops the hardware first.
    pub fn reset(&mut self) {
        (self.control, self.address, self.data, self.mask) = (0, 0, 0, 0);
        self.vectors.clear();
    }

    fn enabled_messages(&self) -> usize {
        let log2 = (self.control >> MULTIPLE_ENABLE_SHIFT) & MULTIPLE_MASK;
        1 << log2.min(self.shape.messages_log2)
    }

    /// Offsets of data, mask and pending in the capability.
    fn layout(&self) -> (usize, usize, usize) {
        if self.shape.is_64bit { (12, 16, 20) } else { (8, 12, 16) }
    }

    fn image(&self) -> [u8; 24] {
        let mut image = [0; 24];
        let mut put = |offset: usize, bytes: &[u8]| {
            for (to, from) in image.iter_mut().skip(offset).zip(bytes) {
                *to = *from;
            }
        };
        let wide = if self.shape.is_64bit { IS_64BIT } else { 0 };
        let maskable = if self.shape.per_vector_mask { PER_VECTOR_MASK } else { 0 };
        let capable = self.shape.messages_log2 << MULTIPLE_CAPABLE_SHIFT;
        put(2, &(self.control | capable | wide | maskable).to_le_bytes());
        put(4, &self.address.to_le_bytes());
        let (data, mask, pending) = self.layout();
        // In the 32-bit form this overwrites the upper address half, which is 0 there.
        put(data, &self.data.to_le_bytes());
        if self.shape.per_vector_mask {
            put(mask, &self.mask.to_le_bytes());
            put(pending, &self.pending().to_le_bytes());
        }
        image
    }

    /// Takes the writable fields from `image`.
    fn take(&mut self, image: &[u8; 24]) {
        let word = |offset: usize| {
            let byte = |at: usize| u16::from(image.get(at).copied().unwrap_or(0));
            byte(offset) | byte(offset + 1) << 8
        };
        let dword = |offset: usize| u32::from(word(offset)) | u32::from(word(offset + 2)) << 16;
        self.control = word(2) & (ENABLE | MULTIPLE_MASK << MULTIPLE_ENABLE_SHIFT);
        let (data, mask, _) = self.layout();
        let upper = if self.shape.is_64bit { dword(8) } else { 0 };
        self.address = u64::from(upper) << 32 | u64::from(dword(4) & !3);
        self.data = word(data);
        if self.shape.per_vector_mask {
            self.mask = dword(mask);
        }
    }

    fn pending(&self) -> u32 {
        if !self.enabled() {
            return 0;
        }
        (0..self.enabled_messages())
            .filter(|vector| self.vectors.pending(*vector))
            .fold(0, |bits, vector| bits | 1 << vector)
    }

    fn sync(&mut self) {
        let count = self.enabled_messages();
        for vector in 0..self.vectors.triggers().len() {
            let masked = self.mask & (1 << vector) != 0;
            // With several messages, the low bits of the data identify the vector (6.8.1.6).
            let number = u16::try_from(vector).unwrap_or(0);
            let low = u16::try_from(count - 1).unwrap_or(0);
            let data = u32::from((self.data & !low) | number);
            let message = MsiMessage { address: self.address, data };
            self.vectors.set(vector, (vector < count && !masked).then_some(message));
        }
    }
}

#[cfg(test)]
mod tests;
