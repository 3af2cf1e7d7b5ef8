// SPDX-License-Identifier: Apache-2.0

//! The registers of each VF family's mailbox: one table per family.

use super::message::BUFFER_WORDS;

/// Bytes of the page that holds the mailbox.
pub const PAGE_SIZE: u64 = 4096;

/// Offsets in BAR 0 of one VF family. All registers are 32 bit wide and aligned.
#[derive(Debug)]
pub struct Layout {
    /// The family's driver in Linux, for log lines.
    pub driver: &'static str,
    /// PCI vendor and device ids of its VFs.
    pub ids: &'static [(u16, u16)],
    /// The BAR of all registers below.
    pub bar: usize,
    /// VF control (bit 26 is the VF's reset).
    pub control: u16,
    /// The mailbox register (request, acknowledge, ownership).
    pub mailbox: u16,
    /// The mailbox buffer's first word.
    pub buffer: u16,
    /// Registers of the mailbox page that the guest reads from the hardware. Writes to them are
    /// ignored.
    pub passed_reads: &'static [u16],
    /// Triggers the VF's vectors by mask. It is on another page, which the guest also writes
    /// directly.
    pub trigger: u16,
    /// The vector of the mailbox interrupt: bit 7 valid, bits 1:0 the vector.
    pub mailbox_vector: u16,
}

/// 82576 and i350 VFs, page 0. Offsets as in Linux' `igbvf/regs.h`.
pub static IGBVF: Layout = Layout {
    driver: "igbvf",
    ids: &[(0x8086, 0x10ca), (0x8086, 0x1520)],
    bar: 0,
    control: 0x0000,
    mailbox: 0x0c40,
    buffer: 0x0800,
    passed_reads: &[
        0x0008, // STATUS
        0x0f10, // VFGPRC
        0x0f14, // VFGPTC
        0x0f18, // VFGORC
        0x0f34, // VFGOTC
        0x0f3c, // VFMPRC
        0x0f40, // VFGPRLBC
        0x0f44, // VFGPTLBC
        0x0f48, // VFGORLBC
        0x0f50, // VFGOTLBC
    ],
    trigger: 0x1520,
    mailbox_vector: 0x1740,
};

/// The layouts that the relay supports.
pub static FAMILIES: &[&Layout] = &[&IGBVF];

/// The kind of register at a trapped offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// VF control.
    Control,
    /// The mailbox register.
    Mailbox,
    /// A word of the mailbox buffer, 0 to 15.
    Buffer(usize),
    /// Read from the hardware; writes are ignored.
    PassedRead,
    /// Not emulated: reads as zero, ignores writes.
    Unknown,
}

impl Layout {
    /// The layout of a VF, if the relay supports its family.
    pub fn of(vendor: u16, device: u16) -> Option<&'static Self> {
        FAMILIES.iter().copied().find(|layout| layout.ids.contains(&(vendor, device)))
    }

    /// The register at an offset of the mailbox page.
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
        } else if self.passed_reads.contains(&offset) {
            Register::PassedRead
        } else {
            Register::Unknown
        }
    }
}
