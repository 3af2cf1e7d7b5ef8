// SPDX-License-Identifier: Apache-2.0

//! Bounded reads of a disk and of its parts.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::{Duration, Instant},
};

use crate::{Disk, error::Fault};

/// The least cost of a read in bytes: a sector, and this part of the budget, as a shift. So a budget has about two million
/// reads at most, which take some seconds.
const LEAST: u64 = 512;
const READS: u32 = 21;

/// The most bytes that are read between two looks at the clock.
const SLICE: usize = 1 << 20;

/// The bounds of all reads of one boot.
pub(crate) struct Budget {
    /// Bytes.
    pub(crate) bytes: u64,
    /// Whether the time is up.
    pub(crate) is_late: Box<dyn Fn() -> bool>,
}

impl Budget {
    /// Bytes, and a time from now on.
    pub(crate) fn new(bytes: u64, time: Duration) -> Self {
        let begun = Instant::now();
        Self { bytes, is_late: Box::new(move || begun.elapsed() > time) }
    }
}

/// A disk with a budget. All volumes of a boot share it.
pub(crate) struct Reader {
    disk: RefCell<Box<dyn Disk>>,
    left: Cell<u64>,
    budget: Budget,
}

/// A part of a disk: a partition, or all of it.
#[derive(Clone)]
pub(crate) struct Volume {
    reader: Rc<Reader>,
    start: u64,
    size: u64,
}

impl Volume {
    /// All of a disk. The budget is for all reads of it and its parts.
    pub(crate) fn whole(disk: Box<dyn Disk>, budget: Budget) -> Self {
        let size = disk.size();
        let reader = Reader { disk: RefCell::new(disk), left: Cell::new(budget.bytes), budget };
        Self { reader: Rc::new(reader), start: 0, size }
    }

    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// A part. None if it is not inside.
    pub(crate) fn part(&self, start: u64, size: u64) -> Option<Self> {
        let end = start.checked_add(size)?;
        (end <= self.size).then(|| Self {
            reader: Rc::clone(&self.reader),
            start: self.start.saturating_add(start),
            size,
        })
    }

    /// Takes the cost of work that reads nothing. At the end of the time, [`Fault::Late`].
    pub(crate) fn charge(&self, bytes: u64) -> Result<(), Fault> {
        let budget = &self.reader.budget;
        if (budget.is_late)() {
            return Err(Fault::Late);
        }
        let cost = bytes.max(LEAST).max(budget.bytes >> READS);
        let left = self.reader.left.get().checked_sub(cost);
        self.reader.left.set(left.ok_or(Fault::Budget(budget.bytes))?);
        Ok(())
    }

    /// Fills `bytes` from `offset` on.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let len = bytes.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(Fault::Damaged("a place behind its end"));
        }
        let mut at = self.start.saturating_add(offset);
        for slice in bytes.chunks_mut(SLICE) {
            self.charge(slice.len() as u64)?;
            self.reader.disk.borrow_mut().read(at, slice).map_err(Fault::Read)?;
            at = at.saturating_add(slice.len() as u64);
        }
        Ok(())
    }

    /// Reads an array.
    pub(crate) fn array<const N: usize>(&self, offset: u64) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads `len` bytes, of which the caller knows a bound.
    pub(crate) fn bytes(&self, offset: u64, len: usize) -> Result<Vec<u8>, Fault> {
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }
}

/// Bytes `at..at + N`, or zeroes where there are none.
pub(crate) fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut value = [0; N];
    for (to, from) in value.iter_mut().zip(bytes.iter().skip(at)) {
        *to = *from;
    }
    value
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}
