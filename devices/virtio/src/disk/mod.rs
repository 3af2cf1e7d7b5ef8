// SPDX-License-Identifier: Apache-2.0

//! The contents of disks. Each format is a file of its own with a [`Disk`].

mod host_file;
pub mod qcow2;
pub mod raw;
mod transfer;

use std::io;

use vm_memory::VolatileSlice;

/// Bytes of a sector, the unit of a block device's addresses.
pub const SECTOR: u64 = 512;

/// The format of a file. It is never probed: a guest can write any header to a raw file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Byte for byte.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// Whether a request has failed since the host's file system, or its user's quota, has no room. All that
/// was completed before stands, and the same request can succeed later.
#[must_use]
pub fn is_full(error: &io::Error) -> bool {
    // Other errors of this kind have a text: the limits of a format, for which the host cannot make room.
    error.get_ref().is_none()
        && matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The error of a failed `fdatasync`. It is never [`is_full`]: the kernel has dropped the data, and a
/// repetition could not write them.
pub(crate) fn lost(errno: rustix::io::Errno) -> io::Error {
    io::Error::other(errno)
}

/// The contents of a disk. All calls come from one thread, and block until the work is done.
///
/// Callers pass ranges inside of [`Self::size`], in whole sectors.
pub trait Disk: Send {
    /// The size in bytes, a multiple of [`SECTOR`].
    fn size(&self) -> u64;

    /// Fills `buffers` with the contents from `offset` on. A format may write its metadata to make room in memory.
    ///
    /// # Errors
    /// Those of the host's file; part of the buffers may be filled.
    fn read(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// The same, for a thread that may not write: the host's file stays as it is.
    ///
    /// # Errors
    /// As for [`Self::read`].
    fn read_without_writes(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.read(offset, buffers)
    }

    /// Writes `buffers` from `offset` on. The data may be lost with the host's power until
    /// [`Self::flush`].
    ///
    /// # Errors
    /// Those of the host's file; part of the data may be written. `StorageFull` if the file system
    /// has no room.
    fn write(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// Those of the host's file: data may be lost.
    fn flush(&mut self) -> io::Result<()>;

    /// Hands all completed writes to the host's file. No call follows but the drop.
    ///
    /// # Errors
    /// Those of the host's file: data may be lost.
    fn close(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Gives the host's room of a range back if that is possible. The contents are undefined then.
    ///
    /// # Errors
    /// Those of the host's file.
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()>;

    /// Fills a range with zeroes. `may_discard`: the host's room may be given back.
    ///
    /// # Errors
    /// Those of the host's file.
    fn write_zeroes(&mut self, offset: u64, len: u64, may_discard: bool) -> io::Result<()>;

    /// Takes a step to enlarge the disk to `size` bytes, in whole sectors and not less than now. Returns whether it was the last
    /// one: then the size is on stable storage, and the new part reads as zeroes, unless the host's block device has other
    /// contents there. Other calls may come between two steps. After an error, or without further steps, the disk has its
    /// old size.
    ///
    /// # Errors
    /// Those of the host's file, [`GrowError`] as the source of others.
    fn grow(&mut self, size: u64) -> io::Result<bool>;
}

/// A disk cannot have a size, whatever its host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrowError {
    /// The disk is larger already.
    #[error("it has {has} bytes, more than {wanted}, and a disk cannot become smaller")]
    Smaller {
        /// Its size in bytes.
        has: u64,
        /// The size that the disk was to have.
        wanted: u64,
    },
    /// The block device below has its own size.
    #[error("the block device has {has} bytes, fewer than {wanted}: enlarge it first")]
    Device {
        /// Its size in bytes.
        has: u64,
        /// The size that the disk was to have.
        wanted: u64,
    },
    /// Without the host's cache a file has whole blocks.
    #[error("{wanted} is not a multiple of {block} bytes, which a file without the host's cache needs")]
    Blocks {
        /// The size that the disk was to have.
        wanted: u64,
        /// Bytes of a block.
        block: u64,
    },
    /// The format has a largest size.
    #[error(
        "{wanted} bytes are more than the {most} that this image can have: convert it to one with larger clusters"
    )]
    TooLarge {
        /// The largest size in bytes.
        most: u64,
        /// The size that the disk was to have.
        wanted: u64,
    },
}

impl From<GrowError> for io::Error {
    fn from(error: GrowError) -> Self {
        Self::other(error)
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn only_a_host_without_room_is_full() {
        for errno in [Errno::NOSPC, Errno::DQUOT] {
            assert!(is_full(&errno.into()));
            assert!(!is_full(&lost(errno)), "a flush that has failed cannot be repeated");
        }
        for errno in [Errno::IO, Errno::FBIG, Errno::ROFS] {
            assert!(!is_full(&errno.into()), "{errno}");
        }
        assert!(!is_full(&qcow2::Damage::Full.into()), "the format's own limit");
    }
}
