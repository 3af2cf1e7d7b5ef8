// SPDX-License-Identifier: Apache-2.0

//! The console ring: the last MiB that a guest wrote to its serial port.
//!
//! The file has a header page and 1 MiB of data. The first 8 bytes of the header count the bytes ever written
//! (little-endian), and byte *n* lies at `4096 + n % 1 MiB`. The vmm writes data first, then the count. The reader
//! trusts neither: a count is only a number to clamp with, and a second read of the count shows how much was overwritten
//! during the read.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

/// Bytes before the data.
const HEADER: u64 = 4096;

/// Bytes of data kept.
pub const CAPACITY: u64 = 1024 * 1024;

/// Length of the file.
pub const FILE_LEN: u64 = HEADER + CAPACITY;

/// The most bytes of one [`Reader::read`].
pub const CHUNK: usize = 64 * 1024;

/// Reads a console ring.
#[derive(Debug)]
pub struct Reader(File);

/// A piece of console output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Offset of the first byte, counted from the console's beginning: beyond the requested one if older bytes are no
    /// longer kept.
    pub offset: u64,
    /// The bytes; empty at the console's end.
    pub bytes: Vec<u8>,
}

impl Piece {
    /// Offset of the byte after this piece.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes.len() as u64)
    }
}

impl Reader {
    /// Opens the ring at `path`.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn open(path: &Path) -> io::Result<Self> {
        File::open(path).map(Self)
    }

    /// Bytes ever written.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn count(&self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, 0)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Up to [`CHUNK`] bytes from `offset` on. Offsets before the kept window or beyond the end are moved into it.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn read(&self, offset: u64) -> io::Result<Piece> {
        let count = self.count()?;
        let offset = offset.clamp(count.saturating_sub(CAPACITY), count);
        let len = usize::try_from(count - offset).map_or(CHUNK, |len| len.min(CHUNK));
        let mut bytes = vec![0; len];
        let start = offset % CAPACITY;
        let first = usize::try_from(CAPACITY - start).map_or(len, |room| room.min(len));
        let (head, tail) = bytes.split_at_mut(first);
        self.0.read_exact_at(head, HEADER + start)?;
        self.0.read_exact_at(tail, HEADER)?;
        // Output of the guest during the read has replaced the oldest bytes.
        let lost = self.count()?.saturating_sub(CAPACITY).saturating_sub(offset).min(len as u64);
        bytes.drain(..usize::try_from(lost).unwrap_or(len));
        Ok(Piece { offset: offset + lost, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Ring {
        file: tempfile::NamedTempFile,
        count: u64,
    }

    impl Ring {
        fn new() -> Self {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(FILE_LEN).unwrap();
            Self { file, count: 0 }
        }

        fn write(&mut self, bytes: &[u8]) {
            for byte in bytes {
                self.file.as_file().write_all_at(&[*byte], HEADER + self.count % CAPACITY).unwrap();
                self.count += 1;
            }
            self.set_count(self.count);
        }

        fn set_count(&self, count: u64) {
            self.file.as_file().write_all_at(&count.to_le_bytes(), 0).unwrap();
        }

        fn reader(&self) -> Reader {
            Reader::open(self.file.path()).unwrap()
        }
    }

    #[test]
    fn reads_what_was_written_and_goes_on_where_it_ended() {
        let mut ring = Ring::new();
        let reader = ring.reader();
        assert_eq!(reader.read(0).unwrap(), Piece::default());
        ring.write(b"hello");
        let piece = reader.read(0).unwrap();
        assert_eq!(piece, Piece { offset: 0, bytes: b"hello".to_vec() });
        ring.write(b" world");
        assert_eq!(reader.read(piece.end()).unwrap().bytes, b" world");
        assert_eq!(reader.read(999).unwrap(), Piece { offset: 11, bytes: Vec::new() });
    }

    #[test]
    fn wraps_and_skips_what_is_no_longer_kept() {
        let mut ring = Ring::new();
        ring.count = CAPACITY - 3;
        ring.write(b"abcdef");
        let reader = ring.reader();
        assert_eq!(reader.read(CAPACITY - 3).unwrap().bytes, b"abcdef");
        assert_eq!(reader.read(0).unwrap().offset, 3);
    }

    #[test]
    fn a_count_made_up_by_the_vmm_does_no_harm() {
        let ring = Ring::new();
        for count in [u64::MAX, u64::MAX - 1, 1 << 63, CAPACITY + 1] {
            ring.set_count(count);
            for offset in [0, 1, count - 1, count, u64::MAX] {
                let piece = ring.reader().read(offset).unwrap();
                assert!(piece.bytes.len() <= CHUNK);
                assert!(piece.end() <= count);
            }
        }
        ring.file.as_file().set_len(100).unwrap();
        ring.set_count(50);
        assert!(ring.reader().read(0).is_err());
    }
}
