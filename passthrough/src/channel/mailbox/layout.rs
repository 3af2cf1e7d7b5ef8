// SPDX-License-Identifier: Apache-2.0

//! The registers of a VF's mailbox page. Each [family](crate::family) has a table of them.

use std::ops::Range;

use super::message::BUFFER_WORDS;

/// Bytes of the page that holds the mailbox.
pub const PAGE_SIZE: u64 = 4096;

/// The registers of one VF family, as byte offsets in one BAR. All are 32 bits wide and aligned. The mailbox page is
/// the BAR's first page; only `trigger` and `mailbox_vector` may lie behind it.
#[derive(Debug)]
pub struct Layout {
    /// The BAR of all registers below.
    pub bar: usize,
    /// VF control (bit 26 is the VF's reset). Reads reach the hardware.
    pub control: u16,
    /// The mailbox register (request, acknowledge, ownership).
    pub mailbox: u16,
    /// The mailbox buffer's first word.
    pub buffer: u16,
    /// Registers of the mailbox page that the guest reaches in the hardware. They configure nothing beyond the VF.
    pub passed: &'static [Passed],
    /// Triggers the VF's interrupt vectors, one for each bit. The guest reaches it as well.
    pub trigger: u16,
    /// The vector of the mailbox interrupt: bit 7 valid, bits 1:0 the vector. The guest reaches it as well.
    pub mailbox_vector: u16,
}

/// Registers that the guest reaches in the hardware.
#[derive(Clone, Debug)]
pub struct Passed {
    /// From the first register to the end of the last one, in bytes.
    pub offsets: Range<u16>,
    /// Whether reads reach the hardware. Otherwise they give zero.
    pub read: bool,
    /// Whether writes reach the hardware. Otherwise they are dropped.
    pub write: bool,
}

impl Passed {
    /// One register that the guest may read.
    #[must_use]
    pub const fn read(offset: u16) -> Self {
        Self { offsets: offset..offset + 4, read: true, write: false }
    }

    /// Registers that the guest may only write.
    #[must_use]
    pub const fn write(offsets: Range<u16>) -> Self {
        Self { offsets, read: false, write: true }
    }

    /// Registers that the guest may read and write.
    #[must_use]
    pub const fn both(offsets: Range<u16>) -> Self {
        Self { offsets, read: true, write: true }
    }
}

/// The direction of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A read.
    Read,
    /// A write.
    Write,
}

/// The kind of register at a trapped offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// VF control.
    Control,
    /// The mailbox register.
    Mailbox,
    /// A word of the mailbox buffer, 0 to 15.
    Buffer(usize),
    /// A [passed](Passed) register.
    Passed {
        /// Whether reads reach the hardware.
        read: bool,
        /// Whether writes reach the hardware.
        write: bool,
    },
    /// Not emulated: reads as zero, ignores writes.
    Unknown,
}

impl Layout {
    /// The register at a byte offset of the mailbox page.
    pub fn register(&self, offset: u64) -> Register {
        let Ok(offset) = u16::try_from(offset) else { return Register::Unknown };
        let in_buffer = usize::from(offset.wrapping_sub(self.buffer) / 4);
        if offset % 4 != 0 {
            Register::Unknown
        } else if offset == self.control {
            Register::Control
        } else if offset == self.mailbox {
            Register::Mailbox
        } else if offset >= self.buffer && in_buffer < BUFFER_WORDS {
            Register::Buffer(in_buffer)
        } else if let Some(passed) = self.passed.iter().find(|passed| passed.offsets.contains(&offset)) {
            Register::Passed { read: passed.read, write: passed.write }
        } else {
            Register::Unknown
        }
    }

    /// Whether the page has registers that the guest writes in the hardware: those of its interrupts, whose accesses are
    /// as frequent as the interrupts.
    pub fn is_shared(&self) -> bool {
        self.passed.iter().any(|passed| passed.write)
    }

    /// Whether an access of `len` bytes goes straight to the hardware, past the emulated registers and their lock.
    pub fn passes(&self, offset: u64, len: usize, access: Access) -> bool {
        len == 4
            && match (self.register(offset), access) {
                (Register::Control, Access::Read) => true,
                (Register::Passed { read, .. }, Access::Read) => read,
                (Register::Passed { write, .. }, Access::Write) => write,
                _ => false,
            }
    }
}
