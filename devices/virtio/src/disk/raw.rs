// SPDX-License-Identifier: Apache-2.0

//! Raw disks: a file or a block device, byte for byte.

use std::{
    fs::File,
    io::{self, Seek as _, SeekFrom},
    os::{fd::AsRawFd as _, unix::fs::FileTypeExt as _},
};

use rustix::{
    fs::{FallocateFlags, fallocate, fdatasync},
    io::Errno,
};
use vm_memory::VolatileSlice;

use super::{
    Disk, GrowError, SECTOR,
    host_file::{BLOCK, HostFile},
    lost,
};

/// `_IO(0x12, 119)` (linux/fs.h).
const BLKDISCARD: libc::Ioctl = 0x1277;
/// Zeroes to write at once.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A file or a block device.
#[derive(Debug)]
pub struct RawDisk {
    file: HostFile,
    size: u64,
    is_device: bool,
    /// The kernel reports a failed write of its cache once, and then takes the data for written (fsync(2)). So a flush
    /// never succeeds again after one has failed.
    lost: bool,
}

impl RawDisk {
    /// Takes an open file or block device: for reading, and for writing unless the disk is
    /// read-only. A last incomplete sector is left out.
    ///
    /// # Errors
    /// Those of reading the size. A file that is open with O_DIRECT needs whole blocks of 4 KiB.
    pub fn new(mut file: File) -> io::Result<Self> {
        // The end of a block device is not in its status.
        let end = file.seek(SeekFrom::End(0))?;
        let is_device = file.metadata()?.file_type().is_block_device();
        let (file, size) = (HostFile::new(file)?, end - end % SECTOR);
        if file.is_direct() && !end.is_multiple_of(BLOCK) {
            // The last block could only be written as a whole, and that would make the file longer.
            let text = format!(
                "it has {end} bytes, and without the host's cache it needs a multiple of {BLOCK}: leave out cache"
            );
            return Err(io::Error::other(text));
        }
        Ok(Self { file, size, is_device, lost: false })
    }

    /// The length of the file that writes need; 0 for a block device, whose length is fixed.
    #[must_use]
    pub fn file_length(&self) -> u64 {
        if self.is_device { 0 } else { self.size }
    }

    /// Makes the file of `has` bytes longer, unless it is so long already.
    fn lengthen(&mut self, has: u64, size: u64) -> io::Result<()> {
        let file = &self.file.file;
        if has > self.size && has < self.size.saturating_add(SECTOR) {
            // A last incomplete sector was left out. The guest never saw it, and must not see it now.
            file.set_len(self.size)?;
        }
        if has < size {
            file.set_len(size)?;
        }
        self.flush()
    }

    /// Makes a hole. Returns whether the host's file system or device can.
    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        match fallocate(&self.file.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
        {
            Err(errno) if unsupported(errno) => Ok(false),
            result => Ok(result.map(|()| true)?),
        }
    }
}

/// Whether the host's file system or device cannot do this at all.
pub(super) fn unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL)
}

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.file.read(offset, buffers)
    }

    fn write(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.file.write(offset, buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.lost {
            return Err(io::Error::other("data was lost at an earlier flush"));
        }
        let result = fdatasync(&self.file.file).map_err(lost);
        self.lost = result.is_err();
        result
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        if self.is_device {
            let range = [offset, len];
            // SAFETY: the descriptor is open, and the kernel reads two numbers (linux/fs.h, BLKDISCARD).
            let result = unsafe { libc::ioctl(self.file.file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
            let error = io::Error::last_os_error();
            // A hint only.
            let unable = matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY));
            return if result == 0 || unable { Ok(()) } else { Err(error) };
        }
        self.punch(offset, len).map(drop)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, may_discard: bool) -> io::Result<()> {
        if may_discard && self.punch(offset, len)? {
            return Ok(());
        }
        let (mut at, mut left) = (offset, len);
        while left > 0 {
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROES.len());
            self.file.write_bytes(at, ZEROES.get(..count).unwrap_or_default())?;
            (at, left) = (at.saturating_add(count as u64), left - count as u64);
        }
        Ok(())
    }

    fn grow(&mut self, size: u64) -> io::Result<bool> {
        if self.file.is_direct() && !size.is_multiple_of(BLOCK) {
            return Err(GrowError::Blocks { wanted: size, block: BLOCK }.into());
        }
        let has = self.file.file.seek(SeekFrom::End(0))?;
        if !self.is_device {
            self.lengthen(has, size)?;
        } else if has < size {
            return Err(GrowError::Device { has, wanted: size }.into());
        }
        self.size = size;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        os::{fd::OwnedFd, unix::fs::FileExt as _},
    };

    use vm_memory::{GuestAddress, GuestMemoryBackend as _};

    use super::*;
    use crate::{GuestMemory, queue::fill};

    fn disk(bytes: &[u8]) -> (RawDisk, File) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        (RawDisk::new(file.try_clone().unwrap()).unwrap(), file)
    }

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 10)]).unwrap()
    }

    fn slices<'a>(memory: &'a GuestMemory, ranges: &[(u64, usize)]) -> Vec<VolatileSlice<'a>> {
        ranges.iter().map(|(at, len)| memory.get_slice(GuestAddress(*at), *len).unwrap()).collect()
    }

    fn contents(file: &File, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    #[test]
    fn data_moves_between_scattered_buffers_and_the_file() {
        let (mut disk, file) = disk(&[7; 4096]);
        let memory = memory();
        fill(&memory, 0x100, &[1; 300]);
        fill(&memory, 0x8000, &[2; 212]);
        disk.write(1024, &slices(&memory, &[(0x100, 300), (0x8000, 212)])).unwrap();
        let expect = [vec![7; 1024], vec![1; 300], vec![2; 212], vec![7; 4096 - 1536]].concat();
        assert_eq!(contents(&file, 0, 4096), expect);
        disk.read(1024, &slices(&memory, &[(0x2000, 512), (0x4000, 512)])).unwrap();
        disk.write(2048, &slices(&memory, &[(0x4000, 512), (0x2000, 512)])).unwrap();
        assert_eq!(contents(&file, 2048, 1024), [vec![7; 512], vec![1; 300], vec![2; 212]].concat());
        disk.flush().unwrap();
    }

    #[test]
    fn more_buffers_than_one_call_takes_are_moved() {
        let (mut disk, file) = disk(&vec![0; 4 * 2048]);
        let memory = memory();
        fill(&memory, 0, &[3, 4, 5, 6]);
        let buffers = slices(&memory, &vec![(0, 4); 2048]);
        disk.write(0, &buffers).unwrap();
        assert_eq!(contents(&file, 0, 8192), [3, 4, 5, 6].repeat(2048));
    }

    #[test]
    fn a_file_that_was_shortened_is_an_error_and_no_endless_loop() {
        let (mut disk, file) = disk(&[7; 4096]);
        file.set_len(1000).unwrap();
        let memory = memory();
        let error = disk.read(512, &slices(&memory, &[(0, 1024)])).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    /// The kernel forgets a failed write of its cache once it has told of it.
    #[test]
    fn a_flush_never_succeeds_after_one_has_failed() {
        let (mut disk, _file) = disk(&[7; 4096]);
        disk.flush().unwrap();
        let (reader, _writer) = io::pipe().unwrap();
        // A pipe cannot be flushed.
        let file =
            std::mem::replace(&mut disk.file, HostFile::new(File::from(OwnedFd::from(reader))).unwrap());
        assert!(disk.flush().is_err());
        disk.file = file;
        assert!(disk.flush().is_err());
    }

    #[test]
    fn zeroes_and_holes_leave_the_rest_in_place() {
        for may_discard in [false, true] {
            let (mut disk, file) = disk(&[7; 16 << 10]);
            disk.write_zeroes(1024, 5120, may_discard).unwrap();
            assert_eq!(contents(&file, 0, 1024), [7; 1024]);
            assert_eq!(contents(&file, 1024, 5120), [0; 5120]);
            assert_eq!(contents(&file, 6144, 10240), [7; 10240]);
            disk.discard(8192, 8192).unwrap();
            assert_eq!(file.metadata().unwrap().len(), 16 << 10, "the file keeps its length");
            assert_eq!(contents(&file, 6144, 2048), [7; 2048]);
        }
    }

    #[test]
    fn a_longer_file_has_zeroes_behind_the_old_end() {
        let (mut disk, file) = disk(&[7; 1535]);
        disk.grow(4096).unwrap();
        assert_eq!((disk.size(), file.metadata().unwrap().len()), (4096, 4096));
        assert_eq!(contents(&file, 0, 1024), [7; 1024]);
        assert_eq!(contents(&file, 1024, 3072), [0; 3072], "the cut sector, too");
    }

    #[test]
    fn an_incomplete_sector_at_the_end_is_left_out() {
        assert_eq!(disk(&[0; 1535]).0.size(), 1024);
        assert_eq!(disk(&[]).0.size(), 0);
    }
}
