// SPDX-License-Identifier: Apache-2.0

//! The configuration space of a virtio function: header, MSI-X capability, and virtio's capabilities
//! (the specification, 4.1.2 and 4.1.4).

use devices::pci::config::{self, capability};

use super::{BAR, DEVICE, DEVICE_END, ISR, NOTIFY, NOTIFY_STEP, PENDING, TABLE};
use crate::engine::Identity;

/// Red Hat's vendor id, which all virtio functions have.
const VENDOR: u16 = 0x1af4;
/// The first device id of modern functions.
const FIRST_DEVICE: u16 = 0x1040;

// Kinds of capabilities (4.1.4).
const VIRTIO_PCI_CAP_COMMON_CFG: u8 = 1;
const VIRTIO_PCI_CAP_NOTIFY_CFG: u8 = 2;
const VIRTIO_PCI_CAP_ISR_CFG: u8 = 3;
const VIRTIO_PCI_CAP_DEVICE_CFG: u8 = 4;
const VIRTIO_PCI_CAP_PCI_CFG: u8 = 5;

const MSIX: u16 = 0x40;
const MSIX_CONTROL: u16 = MSIX + 2;
const COMMON: u16 = 0x50;
const NOTIFICATIONS: u16 = 0x60;
const INTERRUPT: u16 = 0x74;
const CONFIGURATION: u16 = 0x84;
const WINDOW: u16 = 0x94;
const WINDOW_BAR: u16 = WINDOW + 4;
const WINDOW_OFFSET: u16 = WINDOW + 8;
const WINDOW_LENGTH: u16 = WINDOW + 12;
const WINDOW_DATA: u16 = WINDOW + 16;
const END: usize = 0xa8;

/// Bits of the command register that keep their value.
const COMMAND_BITS: u16 = config::COMMAND_MEMORY
    | config::COMMAND_BUS_MASTER
    | config::COMMAND_PARITY
    | config::COMMAND_SERR
    | config::COMMAND_INTX_DISABLE;

/// Configuration space up to the last capability, without BARs and MSI-X control.
pub(super) struct ConfigSpace([u8; END]);

/// Whether an access is to the data register of the window.
pub(super) fn is_window_data(offset: u16) -> bool {
    (WINDOW_DATA..WINDOW_DATA + 4).contains(&offset)
}

impl ConfigSpace {
    pub(super) fn new(identity: &Identity, msix_control: u16) -> Self {
        let mut space = Self([0; END]);
        let device = FIRST_DEVICE + u16::from(identity.device);
        space.put(config::VENDOR_ID, &VENDOR.to_le_bytes());
        space.put(config::VENDOR_ID + 2, &device.to_le_bytes());
        space.put(config::STATUS, &config::STATUS_CAPABILITIES.to_le_bytes());
        // Revision 1: no legacy interface (4.1.2.1).
        space.put(config::CLASS, &(identity.class & !0xff | 1).to_le_bytes());
        space.put(0x2c, &VENDOR.to_le_bytes());
        space.put(0x2e, &device.to_le_bytes());
        let [first, _] = MSIX.to_le_bytes();
        space.put(config::CAPABILITIES, &[first]);

        let [next, _] = COMMON.to_le_bytes();
        space.put(MSIX, &[capability::MSIX, next]);
        space.put(MSIX_CONTROL, &msix_control.to_le_bytes());
        let table = |offset: u64| u32::try_from(offset).unwrap_or(0).to_le_bytes();
        space.put(MSIX + 4, &table(TABLE));
        space.put(MSIX + 8, &table(PENDING));

        let queues = u64::try_from(identity.queues.len()).unwrap_or(0);
        space.capability(COMMON, NOTIFICATIONS, 16, VIRTIO_PCI_CAP_COMMON_CFG, 0..0x38);
        let doorbells = NOTIFY..NOTIFY + queues * NOTIFY_STEP;
        space.capability(NOTIFICATIONS, INTERRUPT, 20, VIRTIO_PCI_CAP_NOTIFY_CFG, doorbells);
        space.put(NOTIFICATIONS + 16, &table(NOTIFY_STEP));
        space.capability(INTERRUPT, CONFIGURATION, 16, VIRTIO_PCI_CAP_ISR_CFG, ISR..ISR + 1);
        space.capability(CONFIGURATION, WINDOW, 16, VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE..DEVICE_END);
        space.capability(WINDOW, 0, 20, VIRTIO_PCI_CAP_PCI_CFG, 0..0);
        space
    }

    fn capability(&mut self, at: u16, next: u16, len: u8, kind: u8, range: std::ops::Range<u64>) {
        let [next, _] = next.to_le_bytes();
        let bar = u8::try_from(BAR).unwrap_or(0);
        self.put(at, &[capability::VENDOR, next, len, kind, bar, 0, 0, 0]);
        let word = |value: u64| u32::try_from(value).unwrap_or(0).to_le_bytes();
        self.put(at + 8, &word(range.start));
        self.put(at + 12, &word(range.end - range.start));
    }

    fn put(&mut self, offset: u16, bytes: &[u8]) {
        for (to, from) in self.0.iter_mut().skip(offset.into()).zip(bytes) {
            *to = *from;
        }
    }

    fn get<const N: usize>(&self, offset: u16) -> [u8; N] {
        let from = self.0.get(usize::from(offset)..).and_then(|bytes| bytes.first_chunk());
        from.copied().unwrap_or([0; N])
    }

    pub(super) fn read(&mut self, offset: u16, data: &mut [u8], msix_control: u16) {
        self.put(MSIX_CONTROL, &msix_control.to_le_bytes());
        for (register, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.0.get(register).copied().unwrap_or(0);
        }
    }

    /// Writes registers that keep their values. Returns the new MSI-X control, if the write is to it.
    pub(super) fn write(&mut self, offset: u16, data: &[u8], msix_control: u16) -> Option<u16> {
        self.put(MSIX_CONTROL, &msix_control.to_le_bytes());
        let mut new = self.0;
        for (to, from) in new.iter_mut().skip(offset.into()).zip(data) {
            *to = *from;
        }
        let new = Self(new);
        let command = u16::from_le_bytes(new.get(config::COMMAND)) & COMMAND_BITS;
        self.put(config::COMMAND, &command.to_le_bytes());
        self.put(config::INTERRUPT_LINE, &new.get::<1>(config::INTERRUPT_LINE));
        self.put(WINDOW_BAR, &new.get::<1>(WINDOW_BAR));
        self.put(WINDOW_OFFSET, &new.get::<8>(WINDOW_OFFSET));
        let control = u16::from_le_bytes(new.get(MSIX_CONTROL));
        let end = offset.saturating_add(u16::try_from(data.len()).unwrap_or(u16::MAX));
        (offset < MSIX_CONTROL + 2 && end > MSIX_CONTROL).then_some(control)
    }

    pub(super) fn command(&self) -> u16 {
        u16::from_le_bytes(self.get(config::COMMAND))
    }

    /// Offset and length of the window's access, if they are valid.
    pub(super) fn window(&self) -> Option<(u64, usize)> {
        let [bar] = self.get(WINDOW_BAR);
        let offset = u32::from_le_bytes(self.get(WINDOW_OFFSET));
        let length = u32::from_le_bytes(self.get(WINDOW_LENGTH));
        let length = usize::try_from(length).ok().filter(|length| matches!(length, 1 | 2 | 4))?;
        (usize::from(bar) == BAR && u64::from(offset).is_multiple_of(length as u64))
            .then_some((offset.into(), length))
    }
}
