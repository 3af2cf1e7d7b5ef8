// SPDX-License-Identifier: Apache-2.0

//! Configuration space of a simulated 82576 VF.

use devices::pci::config::{self, capability};

use super::{BAR_SIZE, MSIX_BAR, MSIX_PENDING, VECTORS};

/// Intel, 82576 virtual function.
pub const IDS: (u16, u16) = (0x8086, 0x10ca);
/// Ethernet controller, revision 1.
const CLASS_REVISION: u32 = 0x0200_0001;
const SUBSYSTEM: u16 = 0x2c;
/// Offsets as on an 82576.
const MSIX: u16 = 0x70;
const EXPRESS: u16 = 0xa0;
const EXPRESS_CONTROL: u16 = EXPRESS + 8;
/// Version 2, endpoint.
const EXPRESS_HEADER: u16 = 0x0002;
/// Payloads of 512 bytes, role-based error reporting, function level reset.
const EXPRESS_CAPABILITIES: u32 = 1 << 28 | 1 << 15 | 2;
const FLR: u8 = 1 << 7;

/// Configuration space, and the bits that a write changes.
pub(super) struct ConfigSpace {
    bytes: Box<[u8; config::SPACE]>,
    writable: Box<[u8; config::SPACE]>,
}

impl ConfigSpace {
    pub(super) fn new() -> Self {
        let mut space = Self { bytes: Box::new([0; config::SPACE]), writable: Box::new([0; config::SPACE]) };
        let [vendor, device] = [IDS.0, IDS.1].map(u16::to_le_bytes);
        space.set(config::VENDOR_ID, &vendor);
        space.set(config::VENDOR_ID + 2, &device);
        space.set(SUBSYSTEM, &vendor);
        space.set(SUBSYSTEM + 2, &device);
        space.set(config::STATUS, &config::STATUS_CAPABILITIES.to_le_bytes());
        space.set(config::CLASS, &CLASS_REVISION.to_le_bytes());
        space.set(config::CAPABILITIES, &MSIX.to_le_bytes());
        space.set(MSIX, &(u16::from(capability::MSIX) | EXPRESS << 8).to_le_bytes());
        space.set(MSIX + 2, &(VECTORS - 1).to_le_bytes());
        // Tables are at multiples of 8: the low bits hold the BAR.
        space.set(MSIX + 4, &MSIX_BAR.to_le_bytes());
        space.set(MSIX + 8, &(MSIX_PENDING | MSIX_BAR).to_le_bytes());
        space.set(EXPRESS, &u16::from(capability::EXPRESS).to_le_bytes());
        space.set(EXPRESS + 2, &EXPRESS_HEADER.to_le_bytes());
        space.set(EXPRESS + 4, &EXPRESS_CAPABILITIES.to_le_bytes());
        let command = config::COMMAND_MEMORY
            | config::COMMAND_BUS_MASTER
            | config::COMMAND_PARITY
            | config::COMMAND_SERR
            | config::COMMAND_INTX_DISABLE;
        space.allow(config::COMMAND, &command.to_le_bytes());
        space.allow(config::INTERRUPT_LINE, &[0xff]);
        for bar in [config::BAR0, config::BAR0 + 4 * 3] {
            space.allow(bar, &(!(BAR_SIZE - 1)).to_le_bytes());
        }
        space.allow(MSIX + 2, &0xc000u16.to_le_bytes());
        space.allow(EXPRESS_CONTROL, &0x7fffu16.to_le_bytes());
        space
    }

    fn set(&mut self, offset: u16, data: &[u8]) {
        for (place, byte) in self.bytes.iter_mut().skip(offset.into()).zip(data) {
            *place = *byte;
        }
    }

    fn allow(&mut self, offset: u16, mask: &[u8]) {
        for (place, byte) in self.writable.iter_mut().skip(offset.into()).zip(mask) {
            *place = *byte;
        }
    }

    /// Reads; all-ones outside.
    pub(super) fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(offset.into())) {
            *to = *from;
        }
    }

    /// Writes; returns whether the write requests a function level reset.
    pub(super) fn write(&mut self, offset: u16, data: &[u8]) -> bool {
        let places = self.bytes.iter_mut().zip(self.writable.iter()).skip(offset.into());
        for ((place, mask), byte) in places.zip(data) {
            *place = (*place & !mask) | (byte & mask);
        }
        let control = (EXPRESS_CONTROL + 1).checked_sub(offset).map(usize::from);
        control.and_then(|at| data.get(at)).is_some_and(|byte| byte & FLR != 0)
    }

    /// Whether the function may access memory.
    pub(super) fn bus_master(&self) -> bool {
        let mut command = [0; 2];
        self.read(config::COMMAND, &mut command);
        u16::from_le_bytes(command) & config::COMMAND_BUS_MASTER != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes() {
        let mut space = ConfigSpace::new();
        let read = |space: &ConfigSpace, at| {
            let mut data = [0; 4];
            space.read(at, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(read(&space, 0), 0x10ca_8086);
        assert_eq!(read(&space, 0x34) & 0xff, 0x70);
        assert_eq!(read(&space, 0x70), 0x0002_a011);
        assert_eq!((read(&space, 0x74), read(&space, 0x78)), (3, 0x2003));
        assert_eq!(read(&space, 0xa4) & 1 << 28, 1 << 28);
        assert_eq!(read(&space, 0x100), 0);
        assert!(!space.bus_master());
        assert!(!space.write(4, &[0xff, 0xff]));
        assert!(space.bus_master() && read(&space, 4) & 1 == 0, "no I/O space");
        space.write(0, &[0; 4]);
        assert_eq!(read(&space, 0), 0x10ca_8086);
        assert!(space.write(0xa8, &[0, 0x80]));
        assert_eq!(read(&space, 0xa8) & 0x8000, 0, "FLR reads as 0");
        space.write(0x10, &[0xff; 4]);
        assert_eq!(read(&space, 0x10), 0xffff_c000);
        assert_eq!(read(&space, 4094) >> 16, 0xffff, "outside");
        space.write(u16::MAX, &[1; 8]);
    }
}
