// SPDX-License-Identifier: Apache-2.0

//! File systems and their files.

use std::{
    io::{self, Read},
    rc::Rc,
};

use crate::error::Fault;

/// The most names of a directory that are looked at.
pub(crate) const MOST_NAMES: usize = 512;
/// The longest path in bytes (PATH_MAX of Linux).
pub(crate) const MOST_PATH: usize = 4096;
/// The longest text file in bytes, but for files of which there are many.
pub(crate) const MOST_TEXT: u64 = 1 << 20;

/// A file system of a volume. Paths begin at its root and never leave it.
pub(crate) trait FileSystem {
    /// Its kind, for errors and logs.
    fn kind(&self) -> &'static str;

    /// The names in a directory, at most [`MOST_NAMES`].
    fn list(&self, path: &str) -> Result<Vec<String>, Fault>;

    /// Takes the cost of work with bytes that were read.
    fn charge(&self, bytes: u64) -> Result<(), Fault>;

    /// Opens a regular file.
    fn open(&self, path: &str) -> Result<Rc<dyn Contents>, Fault>;
}

/// An open file.
pub(crate) trait Contents {
    /// Bytes.
    fn size(&self) -> u64;

    /// Fills `bytes` from `offset` on. All of them are inside of the file.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Fault>;
}

/// A part of a file on the disk, which is read while the guest's memory is filled.
pub struct Part {
    contents: Rc<dyn Contents>,
    offset: u64,
    left: u64,
}

impl Part {
    /// All of a file.
    pub(crate) fn whole(contents: Rc<dyn Contents>) -> Self {
        let left = contents.size();
        Self { contents, offset: 0, left }
    }

    /// A range of a file. None if it is not inside.
    pub(crate) fn range(contents: Rc<dyn Contents>, offset: u64, size: u64) -> Option<Self> {
        let end = offset.checked_add(size)?;
        (end <= contents.size()).then_some(Self { contents, offset, left: size })
    }

    /// The bytes that are left to read.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.left
    }

    /// Reads the first bytes that are left, `most` at most.
    pub(crate) fn head(&self, most: usize) -> Result<Vec<u8>, Fault> {
        let mut bytes = vec![0; usize::try_from(self.left).unwrap_or(most).min(most)];
        self.contents.read(self.offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads all that is left, `most` bytes at most. `path` is for the error.
    pub(crate) fn all(&self, path: &str, most: u64) -> Result<Vec<u8>, Fault> {
        let too_large = || Fault::TooLarge { path: path.to_owned(), size: self.left, most };
        if self.left > most {
            return Err(too_large());
        }
        let mut bytes = Vec::new();
        let size = usize::try_from(self.left).map_err(|_| too_large())?;
        bytes.try_reserve_exact(size).map_err(|_| too_large())?;
        bytes.resize(size, 0);
        self.contents.read(self.offset, &mut bytes)?;
        Ok(bytes)
    }
}

impl Read for Part {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
        let bytes = bytes.get_mut(..count).unwrap_or_default();
        self.contents.read(self.offset, bytes)?;
        self.offset = self.offset.saturating_add(count as u64);
        self.left = self.left.saturating_sub(count as u64);
        Ok(count)
    }
}

/// Reads a text file of `most` bytes at most. Bytes that are no UTF-8 become replacement characters.
pub(crate) fn text(files: &dyn FileSystem, path: &str, most: u64) -> Result<String, Fault> {
    let bytes = Part::whole(files.open(path)?).all(path, most)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
