// SPDX-License-Identifier: Apache-2.0

//! Dispatch of port and memory accesses to devices by address.

use std::{collections::BTreeMap, fmt, ops::Range, sync::Arc};

/// A device with registers on a [`Bus`].
pub trait BusDevice: Send + Sync {
    /// Reads registers at `offset` from the start of the device's range. `data` is 1 to 8 bytes inside of the range. It
    /// arrives filled with ones, the value of a register that does not exist.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes registers; same rules.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The reason why a range cannot be inserted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range has no addresses.
    #[error("Range {0:#x?} of a device is empty: give it at least one address")]
    Empty(Range<u64>),
    /// Two devices claim one address.
    #[error("Range {new:#x?} of a device overlaps {old:#x?} of another: move one of them")]
    Overlap {
        /// The new range.
        new: Range<u64>,
        /// The existing range.
        old: Range<u64>,
    },
}

/// Port or memory addresses of a machine, each owned by at most one device. The bus is built before the vCPUs run and
/// does not change afterwards, so that an access takes no lock here.
#[derive(Default)]
pub struct Bus {
    /// By start address. The value is the end (exclusive) and the device.
    ranges: BTreeMap<u64, (u64, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// A bus without devices.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives the addresses of `range` to `device`.
    ///
    /// # Errors
    /// [`BusError`]; the bus is then unchanged.
    pub fn insert(&mut self, range: Range<u64>, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        if range.is_empty() {
            return Err(BusError::Empty(range));
        }
        let below = self.ranges.range(..range.end).next_back();
        if let Some((&start, &(end, _))) = below
            && end > range.start
        {
            return Err(BusError::Overlap { new: range, old: start..end });
        }
        self.ranges.insert(range.start, (range.end, device));
        Ok(())
    }

    /// Reads at `address`; false if no device is there or the access leaves its range. `data` is filled with ones
    /// first, also if there is no device.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        let Some((device, offset)) = self.find(address, data.len()) else { return false };
        device.read(offset, data);
        true
    }

    /// Writes at `address`; false if no device is there or the access leaves its range.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((device, offset)) = self.find(address, data.len()) else { return false };
        device.write(offset, data);
        true
    }

    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let (&start, (end, device)) = self.ranges.range(..=address).next_back()?;
        let last = address.checked_add(u64::try_from(len).ok()?)?;
        (last <= *end).then_some((device.as_ref(), address - start))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.ranges.iter().map(|(start, (end, _))| *start..*end)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = offset.to_le_bytes()[0];
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn ranges_are_disjoint_and_not_empty() {
        let mut bus = Bus::new();
        let device: Arc<dyn BusDevice> = Arc::new(Recorder::default());
        let mut check = |range: Range<u64>, ok: bool| {
            assert_eq!(bus.insert(range.clone(), device.clone()).is_ok(), ok, "{range:x?}");
        };
        check(0x100..0x108, true);
        check(0x100..0x101, false);
        check(0x107..0x109, false);
        check(0xf0..0x101, false);
        check(0xf0..0x200, false);
        check(0x50..0x50, false);
        check(0x108..0x109, true);
        check(0xff..0x100, true);
    }

    #[test]
    fn accesses_reach_the_device_that_owns_all_their_bytes() {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::new();
        bus.insert(0x100..0x108, device.clone()).unwrap();
        let read = |address, len| {
            let mut data = vec![0; len];
            bus.read(address, &mut data).then_some(data)
        };
        assert_eq!(read(0x102, 1), Some(vec![2]));
        assert_eq!(read(0x104, 4), Some(vec![4, 0xff, 0xff, 0xff]));
        assert_eq!(read(0x106, 4), None, "it ends outside");
        assert_eq!(read(0xff, 2), None, "it starts outside");
        assert_eq!(read(0x108, 1), None);
        assert_eq!(read(u64::MAX, 8), None);
        assert!(bus.write(0x101, &[7, 8]));
        assert!(!bus.write(0x107, &[7, 8]));
        assert_eq!(*device.0.lock().unwrap(), vec![(1, vec![7, 8])]);
    }
}
