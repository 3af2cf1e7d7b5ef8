// SPDX-License-Identifier: Apache-2.0

//! Bounded reads of a disk and of its parts.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use crate::{Disk, error::Fault};

/// The least cost of a read in bytes: a sector, and this part of the budget, as a shift. So a budget has about two million
/// reads at most, which take some seconds.
const LEAST: u64 = 512;
const READS: u32 = 21;

/// A disk with a budget. All volumes of a boot share it.
pub(crate) struct Reader {
    disk: RefCell<Box<dyn Disk>>,
    left: Cell<u64>,
    budget: u64,
}

/// A part of a disk: a partition, or all of it.
#[derive(Clone)]
pub(crate) struct Volume {
    reader: Rc<Reader>,
    start: u64,
    size: u64,
}

impl Volume {
    /// All of a disk. All reads of it and its parts take no more than `budget` bytes.
    pub(crate) fn whole(disk: Box<dyn Disk>, budget: u64) -> Self {
        let size = disk.size();
        let reader = Reader { disk: RefCell::new(disk), left: Cell::new(budget), budget };
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

    /// Takes the cost of work that reads nothing.
    pub(crate) fn charge(&self, bytes: u64) -> Result<(), Fault> {
        let cost = bytes.max(LEAST).max(self.reader.budget >> READS);
        let left = self.reader.left.get().checked_sub(cost);
        let left = left.ok_or(Fault::Budget(self.reader.budget))?;
        self.reader.left.set(left);
        Ok(())
    }

    /// Fills `bytes` from `offset` on.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Fault> {
        let len = bytes.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(Fault::Damaged("a place behind its end"));
        }
        self.charge(len)?;
        let at = self.start.saturating_add(offset);
        self.reader.disk.borrow_mut().read(at, bytes).map_err(Fault::Read)
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
