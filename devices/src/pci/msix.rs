// SPDX-License-Identifier: Apache-2.0

//! MSI-X (PCI Local Bus 3.0, 6.8.2): the table, the pending bits, and the two masks, emulated.

use std::{io, sync::Arc};

use super::vectors::Vectors;
use crate::interrupt::{MsiMessage, MsiRouter};
use vmm_sys_util::eventfd::EventFd;

/// The most vectors that a function can have.
pub const MAX_VECTORS: u16 = 2048;
/// Bytes of a table entry.
pub const ENTRY: u64 = 16;
/// Message control: MSI-X is on.
pub const ENABLE: u16 = 1 << 15;
/// Message control: every vector is masked.
pub const FUNCTION_MASK: u16 = 1 << 14;

const VECTOR_MASK: u32 = 1;

/// The effect of a write to message control, for the owner of the hardware's interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// Nothing for the hardware.
    None,
    /// Interrupts are on now, with this many vectors.
    Enabled(usize),
    /// Interrupts are off now.
    Disabled,
}

/// The MSI-X state of one function.
pub struct Msix {
    /// Address low, address high, data, control: as the guest reads them.
    table: Vec<[u32; 4]>,
    vectors: Vectors,
    enabled: bool,
    function_masked: bool,
}

impl Msix {
    /// Makes `count` vectors (1 to 2048, clamped), disabled and masked.
    ///
    /// # Errors
    /// Those of making the eventfds.
    pub fn new(count: u16, router: Arc<dyn MsiRouter>) -> io::Result<Self> {
        let count = usize::from(count.clamp(1, MAX_VECTORS));
        Ok(Self {
            table: vec![[0, 0, 0, VECTOR_MASK]; count],
            vectors: Vectors::new(count, router)?,
            enabled: false,
            function_masked: false,
        })
    }

    /// The eventfds for the hardware to signal, one per vector.
    #[must_use]
    pub fn triggers(&self) -> &[EventFd] {
        self.vectors.triggers()
    }

    /// Bytes of the table.
    #[must_use]
    pub fn table_len(&self) -> u64 {
        self.table.len() as u64 * ENTRY
    }

    /// Bytes of the pending bit array: whole quadwords.
    #[must_use]
    pub fn pba_len(&self) -> u64 {
        (self.table.len() as u64).div_ceil(64) * 8
    }

    /// The message control register.
    #[must_use]
    pub fn control(&self) -> u16 {
        let size = u16::try_from(self.table.len() - 1).unwrap_or(MAX_VECTORS - 1);
        let enable = if self.enabled { ENABLE } else { 0 };
        let mask = if self.function_masked { FUNCTION_MASK } else { 0 };
        size | enable | mask
    }

    /// Writes the message control register. On [`Transition::Enabled`] the caller makes the hardware signal
    /// [`triggers`](Self::triggers), on [`Transition::Disabled`] the caller stops the hardware.
    pub fn write_control(&mut self, value: u16) -> Transition {
        let was = self.enabled;
        self.enabled = value & ENABLE != 0;
        self.function_masked = value & FUNCTION_MASK != 0;
        match (was, self.enabled) {
            (true, false) => {
                self.vectors.clear();
                Transition::Disabled
            }
            (false, true) => {
                self.sync_all();
                Transition::Enabled(self.table.len())
            }
            _ => {
                self.sync_all();
                Transition::None
            }
        }
    }

    /// Reads the table: aligned dwords or quadwords, as the specification requires. Other reads yield all-ones.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !well_formed(offset, data.len()) {
            return;
        }
        for (at, dword) in (offset / 4..).zip(data.chunks_exact_mut(4)) {
            let (entry, field) = split(at);
            if let Some(value) = self.table.get(entry).and_then(|entry| entry.get(field)) {
                dword.copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    /// Writes the table: aligned dwords or quadwords. Other writes are ignored.
    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        if !well_formed(offset, data.len()) {
            return;
        }
        for (at, dword) in (offset / 4..).zip(data.as_chunks::<4>().0) {
            let (entry, field) = split(at);
            let Some(place) = self.table.get_mut(entry).and_then(|entry| entry.get_mut(field)) else {
                continue;
            };
            let value = u32::from_le_bytes(*dword);
            // Only the mask bit of the control dword exists.
            *place = if field == 3 { value & VECTOR_MASK } else { value };
            self.sync(entry);
        }
    }

    /// Reads the pending bit array. Writes to it are ignored (the specification leaves them undefined).
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (at, byte) in (offset..).zip(data) {
            let Ok(first) = usize::try_from(at.saturating_mul(8)) else { continue };
            for bit in 0..8 {
                // Without MSI-X nothing is pending: signals of a disabled function are dropped.
                if self.enabled && self.vectors.pending(first.saturating_add(bit)) {
                    *byte |= 1 << bit;
                }
            }
        }
    }

    /// Whether MSI-X is on.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Restores the state after a reset: disabled, every vector masked, nothing pending. The caller stops the
    /// hardware first.
    pub fn reset(&mut self) {
        self.enabled = false;
        self.function_masked = false;
        self.table.fill([0, 0, 0, VECTOR_MASK]);
        self.vectors.clear();
    }

    fn sync_all(&mut self) {
        for vector in 0..self.table.len() {
            self.sync(vector);
        }
    }

    /// Brings a vector's route in line with the registers.
    fn sync(&mut self, vector: usize) {
        if !self.enabled {
            return;
        }
        let Some([low, high, data, control]) = self.table.get(vector).copied() else { return };
        let masked = self.function_masked || control & VECTOR_MASK != 0;
        let message = MsiMessage { address: u64::from(high) << 32 | u64::from(low), data };
        self.vectors.set(vector, (!masked).then_some(message));
    }
}

fn well_formed(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

fn split(dword: u64) -> (usize, usize) {
    let entry = usize::try_from(dword / 4).unwrap_or(usize::MAX);
    (entry, usize::try_from(dword % 4).unwrap_or(0))
}

#[cfg(test)]
mod tests;
