// SPDX-License-Identifier: Apache-2.0

//! The file of an image. All accesses of the format go through here, so that tests can record them.

use std::{
    fs::File,
    io::{self, Seek as _, SeekFrom},
};

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use vm_memory::VolatileSlice;

use crate::{
    disk::{host_file::HostFile, lost, raw::unsupported},
    queue::length,
};

/// Zeroes to write at once.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A change of the file, in the order of the system calls.
#[cfg(test)]
#[derive(Clone, Debug)]
pub(super) enum Change {
    Write(u64, Vec<u8>),
    Punch(u64, u64),
    Sync,
}

/// An open file and its length.
pub(super) struct Storage {
    file: HostFile,
    len: u64,
    /// The changes so far, if a test asks for them.
    #[cfg(test)]
    pub(super) journal: Option<Vec<Change>>,
    /// The length at which the file system is full.
    #[cfg(test)]
    pub(super) most: Option<u64>,
    #[cfg(test)]
    pub(super) fail_sync: bool,
    /// The file system cannot make holes.
    #[cfg(test)]
    pub(super) no_holes: bool,
}

impl Storage {
    pub(super) fn new(mut file: File) -> io::Result<Self> {
        // The end of a block device is not in its status.
        let len = file.seek(SeekFrom::End(0))?;
        Ok(Self {
            file: HostFile::new(file)?,
            len,
            #[cfg(test)]
            journal: None,
            #[cfg(test)]
            most: None,
            #[cfg(test)]
            fail_sync: false,
            #[cfg(test)]
            no_holes: false,
        })
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Whether writes behind the end make the file longer.
    pub(super) fn can_grow(&self) -> io::Result<bool> {
        Ok(self.file.file.metadata()?.is_file())
    }

    #[cfg(test)]
    fn record(&mut self, change: impl FnOnce() -> Change) -> io::Result<()> {
        let change = change();
        match &change {
            Change::Write(offset, bytes)
                if self.most.is_some_and(|most| offset + bytes.len() as u64 > most.max(self.len)) =>
            {
                return Err(io::ErrorKind::StorageFull.into());
            }
            Change::Sync if self.fail_sync => return Err(io::ErrorKind::Other.into()),
            _ => {}
        }
        if let Some(journal) = &mut self.journal {
            journal.push(change);
        }
        Ok(())
    }

    /// Reads bytes of metadata. Those behind the end are 0.
    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let inside = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes.len());
        let (have, behind) = bytes.split_at_mut(inside);
        behind.fill(0);
        if have.is_empty() { Ok(()) } else { self.file.read(offset, &[have.into()]) }
    }

    pub(super) fn read_buffers(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.file.read(offset, buffers)
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        self.record(|| Change::Write(offset, bytes.to_vec()))?;
        self.file.write_bytes(offset, bytes)?;
        self.len = self.len.max(offset.saturating_add(bytes.len() as u64));
        Ok(())
    }

    pub(super) fn write_buffers(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        #[cfg(test)]
        self.record(|| {
            let mut bytes = Vec::new();
            for buffer in buffers {
                let mut part = vec![0; buffer.len()];
                buffer.copy_to(&mut part);
                bytes.extend(part);
            }
            Change::Write(offset, bytes)
        })?;
        self.file.write(offset, buffers)?;
        self.len = self.len.max(offset.saturating_add(length(buffers)));
        Ok(())
    }

    pub(super) fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROES.len());
            self.write(at, ZEROES.get(..count).unwrap_or_default())?;
            (at, left) = (at.saturating_add(count as u64), left - count as u64);
        }
        Ok(())
    }

    /// Makes all completed writes durable.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        fdatasync(&self.file.file).map_err(lost)?;
        #[cfg(test)]
        self.record(|| Change::Sync)?;
        Ok(())
    }

    /// Gives the host's room of a range back if that is possible.
    pub(super) fn punch(&mut self, offset: u64, len: u64) -> io::Result<()> {
        #[cfg(test)]
        if self.no_holes {
            return Ok(());
        }
        #[cfg(test)]
        self.record(|| Change::Punch(offset, len))?;
        match fallocate(&self.file.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
        {
            Err(errno) if unsupported(errno) => Ok(()),
            result => Ok(result?),
        }
    }
}

/// Fills buffers with zeroes.
pub(super) fn clear(buffers: &[VolatileSlice<'_>]) {
    for buffer in buffers {
        let mut at = 0;
        while at < buffer.len() {
            let count = (buffer.len() - at).min(ZEROES.len());
            let Ok(part) = buffer.subslice(at, count) else { break };
            part.copy_from(ZEROES.get(..count).unwrap_or_default());
            at += count;
        }
    }
}
