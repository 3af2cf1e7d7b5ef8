// SPDX-License-Identifier: Apache-2.0

//! Function 0 of slot 0: the host bridge. It only has an identity.

use super::{DecodedBars, PciFunction, config};

const VENDOR_INTEL: u16 = 0x8086;
/// The id that other minimal machines use. No driver binds to it.
const DEVICE_VIRTUAL_HOST_BRIDGE: u16 = 0x0d57;
const CLASS_HOST_BRIDGE: u32 = 0x0600_0000;

/// A host bridge without registers of its own.
pub struct HostBridge {
    header: [u8; 64],
}

impl HostBridge {
    /// The bridge.
    #[must_use]
    pub fn new() -> Self {
        let mut header = [0; 64];
        let mut put = |offset: u16, bytes: &[u8]| {
            for (to, from) in header.iter_mut().skip(usize::from(offset)).zip(bytes) {
                *to = *from;
            }
        };
        put(config::VENDOR_ID, &VENDOR_INTEL.to_le_bytes());
        put(config::VENDOR_ID + 2, &DEVICE_VIRTUAL_HOST_BRIDGE.to_le_bytes());
        put(config::CLASS, &CLASS_HOST_BRIDGE.to_le_bytes());
        Self { header }
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        for (register, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.header.get(register).copied().unwrap_or(0);
        }
    }

    fn config_write(&self, _offset: u16, _data: &[u8]) {}

    fn decoded(&self) -> DecodedBars {
        DecodedBars::default()
    }

    fn mmio_read(&self, _gpa: u64, _data: &mut [u8]) -> bool {
        false
    }

    fn mmio_write(&self, _gpa: u64, _data: &[u8]) -> bool {
        false
    }
}
