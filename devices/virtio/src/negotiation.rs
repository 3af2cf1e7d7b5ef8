// SPDX-License-Identifier: Apache-2.0

//! The device status and the negotiation of features (the specification, 2.1, 2.2 and 3.1), without
//! registers and without threads.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};

/// The bit of a feature.
#[must_use]
pub const fn feature(number: u32) -> u64 {
    1 << number
}

/// A driver has accepted the features (FEATURES_OK).
pub const FEATURES_OK: u8 = truncate(VIRTIO_CONFIG_S_FEATURES_OK);
/// The driver is ready (DRIVER_OK).
pub const DRIVER_OK: u8 = truncate(VIRTIO_CONFIG_S_DRIVER_OK);
/// The device cannot go on until a reset (DEVICE_NEEDS_RESET).
pub const NEEDS_RESET: u8 = 0x40;
/// The bits that a driver may set.
const OF_DRIVER: u8 = truncate(
    VIRTIO_CONFIG_S_ACKNOWLEDGE
        | VIRTIO_CONFIG_S_DRIVER
        | VIRTIO_CONFIG_S_DRIVER_OK
        | VIRTIO_CONFIG_S_FEATURES_OK
        | VIRTIO_CONFIG_S_FAILED,
);

#[expect(clippy::cast_possible_truncation, reason = "the status is one byte")]
const fn truncate(bits: u32) -> u8 {
    bits as u8
}

/// The consequence of a write to the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// None.
    None,
    /// The driver is ready: the queues start.
    Start,
    /// The driver resets the device.
    Reset,
}

/// The status of a device and the features that its driver has accepted.
#[derive(Clone, Copy, Debug)]
pub struct Negotiation {
    offered: u64,
    accepted: u64,
    status: u8,
}

impl Negotiation {
    /// A device after reset. It offers `features` and VERSION_1: there is no legacy interface.
    #[must_use]
    pub fn new(features: u64) -> Self {
        Self { offered: features | feature(VIRTIO_F_VERSION_1), accepted: 0, status: 0 }
    }

    /// The offered features: bits 0 to 31 for `select` 0, 32 to 63 for 1; 0 for any other.
    #[must_use]
    pub fn offered(&self, select: u32) -> u32 {
        half(self.offered, select)
    }

    /// The features that the driver has written so far.
    #[must_use]
    pub fn written(&self, select: u32) -> u32 {
        half(self.accepted, select)
    }

    /// Takes a half of the driver's features. They are final after FEATURES_OK.
    pub fn accept(&mut self, select: u32, bits: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let bits = u64::from(bits);
        match select {
            0 => self.accepted = self.accepted & !0xffff_ffff | bits,
            1 => self.accepted = self.accepted & 0xffff_ffff | bits << 32,
            _ => {}
        }
    }

    /// The negotiated features; none before FEATURES_OK.
    #[must_use]
    pub fn features(&self) -> u64 {
        if self.status & FEATURES_OK == 0 { 0 } else { self.accepted }
    }

    /// The status as the driver reads it, but for [`NEEDS_RESET`].
    #[must_use]
    pub fn status(&self) -> u8 {
        self.status
    }

    /// Whether the driver may configure queues now: between FEATURES_OK and DRIVER_OK.
    #[must_use]
    pub fn configures_queues(&self) -> bool {
        self.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK
    }

    /// Whether the queues run.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    /// Takes a write to the status. A driver sets bits one by one and clears none but by a reset: a
    /// write that does is ignored. FEATURES_OK stays clear if the driver's features are not among
    /// the offered ones, or lack VERSION_1; DRIVER_OK stays clear without FEATURES_OK.
    pub fn write(&mut self, value: u8) -> Step {
        if value == 0 {
            *self = Self::new(self.offered);
            return Step::Reset;
        }
        let mut new = value & OF_DRIVER;
        if new & self.status != self.status {
            return Step::None;
        }
        let version_1 = feature(VIRTIO_F_VERSION_1);
        let acceptable = self.accepted & !self.offered == 0 && self.accepted & version_1 != 0;
        if self.status & FEATURES_OK == 0 && !acceptable {
            new &= !FEATURES_OK;
        }
        if new & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        let starts = new & !self.status & DRIVER_OK != 0;
        self.status = new;
        if starts { Step::Start } else { Step::None }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "each half of the features on purpose")]
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OFFERED: u64 = 1 << 5 | 1 << 29;

    fn accepting(features: u64) -> Negotiation {
        let mut negotiation = Negotiation::new(OFFERED);
        negotiation.write(3);
        negotiation.accept(0, half(features, 0));
        negotiation.accept(1, half(features, 1));
        negotiation
    }

    #[test]
    fn a_driver_goes_from_reset_to_ready() {
        let mut device = accepting(1 << 32 | 1 << 5);
        assert_eq!((device.offered(0), device.offered(1), device.offered(2)), (1 << 5 | 1 << 29, 1, 0));
        assert_eq!(device.features(), 0, "not accepted yet");
        assert_eq!(device.write(3 | FEATURES_OK), Step::None);
        assert_eq!((device.features(), device.configures_queues()), (1 << 32 | 1 << 5, true));
        device.accept(0, u32::MAX);
        assert_eq!(device.features(), 1 << 32 | 1 << 5, "final");
        assert_eq!(device.write(3 | FEATURES_OK | DRIVER_OK), Step::Start);
        assert_eq!(device.write(3 | FEATURES_OK | DRIVER_OK), Step::None, "once");
        assert!(device.runs() && !device.configures_queues());
        assert_eq!(device.write(1), Step::None);
        assert!(device.runs(), "bits are never cleared one by one");
        assert_eq!(device.write(0), Step::Reset);
        assert_eq!((device.status(), device.written(0), device.written(1)), (0, 0, 0));
    }

    #[test]
    fn features_that_cannot_be_are_not_ok() {
        for features in [0, 1 << 5, 1 << 32 | 1 << 6, 1 << 32 | 1 << 33] {
            let mut device = accepting(features);
            assert_eq!(device.write(3 | FEATURES_OK | DRIVER_OK), Step::None, "{features:#x}");
            assert_eq!((device.status(), device.runs()), (3, false), "{features:#x}");
        }
    }

    proptest! {
        #[test]
        fn no_sequence_runs_a_device_with_features_that_it_does_not_offer(
            script in prop::collection::vec((0_u8..3, any::<u32>(), any::<u8>()), 0..40)
        ) {
            let mut device = Negotiation::new(OFFERED);
            for (action, bits, status) in script {
                let ran = device.runs();
                match action {
                    0 => device.accept(bits % 3, bits),
                    // Features that are near to the offered ones.
                    1 => device.accept(bits % 3, half(OFFERED | 1 << 32, bits % 3) & !(1 << (bits % 31))),
                    _ => {
                        let step = device.write(status);
                        prop_assert_eq!(step == Step::Start, !ran && device.runs());
                    }
                }
                prop_assert_eq!(device.features() & !(OFFERED | 1 << 32), 0);
                prop_assert!(!device.runs() || device.features() & 1 << 32 != 0);
                prop_assert_eq!(device.status() & NEEDS_RESET, 0);
            }
        }
    }
}
