// SPDX-License-Identifier: Apache-2.0

//! Layout of configuration space (PCI Local Bus 3.0, chapter 6; PCI Express Base 5.0, chapter 7).

/// Bytes of a function's configuration space with its extended part.
pub const SPACE: usize = 4096;
/// Bytes of the part that legacy mechanisms can address.
pub const LEGACY_SPACE: u16 = 256;

/// Vendor id, 2 bytes.
pub const VENDOR_ID: u16 = 0x00;
/// Command register, 2 bytes.
pub const COMMAND: u16 = 0x04;
/// Status register, 2 bytes.
pub const STATUS: u16 = 0x06;
/// Revision and class code, 4 bytes.
pub const CLASS: u16 = 0x08;
/// Header type, 1 byte.
pub const HEADER_TYPE: u16 = 0x0e;
/// Built-in self test, 1 byte.
pub const BIST: u16 = 0x0f;
/// First BAR of six, 4 bytes each.
pub const BAR0: u16 = 0x10;
/// First byte after the BARs.
pub const BARS_END: u16 = 0x28;
/// Expansion ROM base address, 4 bytes.
pub const EXPANSION_ROM: u16 = 0x30;
/// Offset of the first capability, 1 byte.
pub const CAPABILITIES: u16 = 0x34;
/// Interrupt line, 1 byte.
pub const INTERRUPT_LINE: u16 = 0x3c;
/// Interrupt pin, 1 byte.
pub const INTERRUPT_PIN: u16 = 0x3d;
/// First extended capability.
pub const EXTENDED_CAPABILITIES: u16 = 0x100;

/// Command: I/O BARs are decoded.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command: memory BARs are decoded.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may do DMA and raise MSIs.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command: respond to parity errors.
pub const COMMAND_PARITY: u16 = 1 << 6;
/// Command: report system errors.
pub const COMMAND_SERR: u16 = 1 << 8;
/// Command: INTx is off.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status: there is a list of capabilities.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Capability ids.
pub mod capability {
    /// Power management.
    pub const POWER_MANAGEMENT: u8 = 0x01;
    /// Vital product data.
    pub const VPD: u8 = 0x03;
    /// Message-signalled interrupts.
    pub const MSI: u8 = 0x05;
    /// Vendor specific.
    pub const VENDOR: u8 = 0x09;
    /// PCI Express.
    pub const EXPRESS: u8 = 0x10;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
    /// Advanced features (conventional PCI).
    pub const ADVANCED_FEATURES: u8 = 0x13;
}

/// Splits an access of any alignment and length into naturally aligned ones of 1, 2 or 4 bytes: pairs of offset
/// and position in the data.
pub fn aligned_parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let here = offset.wrapping_add(done as u64);
        let left = len.checked_sub(done).filter(|left| *left > 0)?;
        let size = [4, 2, 1].into_iter().find(|size| left >= *size && here.is_multiple_of(*size as u64))?;
        let part = done..done + size;
        done += size;
        Some((here, part))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_split_naturally() {
        let check = |offset, len, expect: &[(u64, usize)]| {
            let parts: Vec<_> =
                aligned_parts(offset, len).map(|(offset, range)| (offset, range.len())).collect();
            assert_eq!(parts, expect, "{len} at {offset:#x}");
        };
        check(0, 4, &[(0, 4)]);
        check(0, 8, &[(0, 4), (4, 4)]);
        check(3, 4, &[(3, 1), (4, 2), (6, 1)]);
        check(2, 2, &[(2, 2)]);
        check(5, 1, &[(5, 1)]);
        check(0, 0, &[]);
        check(6, 8, &[(6, 2), (8, 4), (12, 2)]);
    }
}
