// SPDX-License-Identifier: Apache-2.0

//! The contents of a disk of the machine, for a boot from it.

use std::{io, sync::Arc};

use virtio::{disk::SECTOR, transport::VirtioFunction};

/// The most bytes of one read that needs whole sectors around it.
const BUFFER: usize = 64 << 10;

/// Reads a disk by its device, so that writes of the guest that are in no file yet are seen. The disk's I/O thread is
/// parked meanwhile: before the machine runs, and during a reset.
#[derive(Clone)]
pub struct DiskContents(Arc<VirtioFunction>);

impl DiskContents {
    pub(super) fn new(function: Arc<VirtioFunction>) -> Self {
        Self(function)
    }
}

impl boot_disk::Disk for DiskContents {
    fn size(&self) -> u64 {
        self.0.disk_size().unwrap_or(0)
    }

    fn read(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        if offset.is_multiple_of(SECTOR) && (bytes.len() as u64).is_multiple_of(SECTOR) {
            return self.0.read_disk(offset, bytes);
        }
        let mut buffer = Vec::new();
        let mut at = offset;
        for part in bytes.chunks_mut(BUFFER) {
            let end = at.checked_add(part.len() as u64).ok_or(io::ErrorKind::InvalidInput)?;
            let first = at - at % SECTOR;
            let len = end.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX) - first;
            buffer.resize(usize::try_from(len).map_err(io::Error::other)?, 0);
            self.0.read_disk(first, &mut buffer)?;
            let skip = usize::try_from(at - first).unwrap_or(usize::MAX);
            for (to, from) in part.iter_mut().zip(buffer.iter().skip(skip)) {
                *to = *from;
            }
            at = end;
        }
        Ok(())
    }
}
