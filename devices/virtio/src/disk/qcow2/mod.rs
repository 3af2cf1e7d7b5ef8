// SPDX-License-Identifier: Apache-2.0

//! Disks in QEMU's format qcow2 (versions 2 and 3), over a chain of backing files.
//!
//! An image is a file of clusters. Two levels of tables (L1, L2) map the disk to them, and refcounts
//! say which ones are in use. Writes go to the first image of a chain only.
//!
//! * `header`: the fields of an image, and the images that are refused.
//! * `image`: mapping and reading, also of compressed clusters.
//! * `allocate`: refcounts and free clusters.
//! * `overlay`: a new image over a chain.
//! * `grow`: a larger disk.
//! * `write`: writes, discards, and the order of the flush.
//! * `cache`: tables in memory, 4 MiB at most. `storage`: the file.
//!
//! Nothing here opens a file, or probes a format. The names in headers are for errors only: a guest
//! that writes such a header reaches no other file.
//!
//! **Crashes.** The file is a consistent image at any moment. After the death of the process, or of
//! the host, it has all that the guest has flushed. Clusters that were allocated and not flushed are
//! leaks. They are harmless, and `qemu-img check -r leaks` frees them.
//!
//! **Damaged images.** All bytes of an image may be invalid. Data is never written over the header,
//! the L1 table, the refcount table, or a table in the cache. New clusters are never taken from there.
//! Each search has a bound, and no field of the header makes an allocation large.

mod allocate;
mod cache;
mod error;
#[cfg(any(test, feature = "test-support"))]
pub mod fuzz;
mod grow;
mod header;
mod image;
mod overlay;
mod storage;
#[cfg(test)]
mod tests;
mod write;

use std::{fmt, fs::File, io};

use vm_memory::VolatileSlice;

pub use self::error::{Damage, Layer, OpenError, Refusal};
use self::{
    image::{Backing, Image},
    storage::Storage,
};
use super::{Disk, Format};

/// The most backing files of a disk.
pub const MOST_BACKING: usize = 16;

/// A disk in the format qcow2.
pub struct Qcow2Disk {
    image: Image,
    /// The file ends with the process: its last changes need not reach it.
    ephemeral: bool,
    /// [`Disk::close`] was called.
    closed: bool,
}

impl fmt::Debug for Qcow2Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2Disk").field("header", &self.image.header).finish_non_exhaustive()
    }
}

impl Qcow2Disk {
    /// Takes the open file of an image, and its backing files, the next one first. The image is
    /// opened for writing if the disk is `writable`; backing files are only read.
    ///
    /// # Errors
    /// [`OpenError`]: the chain is not as the headers have it, an image has a feature that is not
    /// supported, or is damaged.
    pub fn open(image: File, backing: Vec<(Format, File)>, writable: bool) -> Result<Self, OpenError> {
        let below = chain(backing)?;
        let image = Image::open(image, below, writable).map_err(at(Layer::Image))?;
        Ok(Self { image, ephemeral: false, closed: false })
    }

    /// Makes a writable disk with the contents of `base` and of its backing files, the next one first.
    /// These are only read. All changes are in `overlay`, an empty file that ends with the process.
    ///
    /// # Errors
    /// [`OpenError`], as for [`Self::open`]; the layer [`Layer::Image`] is `base`.
    pub fn overlay(
        overlay: File,
        base: (Format, File),
        backing: Vec<(Format, File)>,
    ) -> Result<Self, OpenError> {
        let below = chain(backing)?;
        let below = layer(base, below).map_err(at(Layer::Image))?;
        let image = Image::overlay(overlay, below).map_err(at(Layer::Overlay))?;
        Ok(Self { image, ephemeral: true, closed: false })
    }
}

fn at(layer: Layer) -> impl Fn(Refusal) -> OpenError {
    move |refusal| OpenError { layer, refusal }
}

/// Opens backing files, the next one first.
fn chain(files: Vec<(Format, File)>) -> Result<Option<Backing>, OpenError> {
    if files.len() > MOST_BACKING {
        return Err(at(Layer::Image)(Refusal::ChainTooLong(MOST_BACKING + 1)));
    }
    let mut below = None;
    for (number, file) in (1..).zip(files).collect::<Vec<_>>().into_iter().rev() {
        below = Some(layer(file, below).map_err(at(Layer::Backing(number)))?);
    }
    Ok(below)
}

/// Opens a file for reading, over those below it.
fn layer((format, file): (Format, File), below: Option<Backing>) -> Result<Backing, Refusal> {
    Ok(match format {
        Format::Raw if below.is_some() => return Err(Refusal::BackingUnexpected),
        Format::Raw => Backing::Raw(Storage::new(file)?),
        Format::Qcow2 => Backing::Qcow2(Box::new(Image::open(file, below, false)?)),
    })
}

impl Qcow2Disk {
    /// The length of the file at this moment.
    #[must_use]
    pub fn file_length(&self) -> u64 {
        self.image.storage.len()
    }
}

impl Disk for Qcow2Disk {
    fn size(&self) -> u64 {
        self.image.header.size
    }

    fn read(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.image.read(offset, buffers)
    }

    fn read_without_writes(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.image.cache.writes_nothing = true;
        let result = self.image.read(offset, buffers);
        self.image.cache.writes_nothing = false;
        result
    }

    fn write(&mut self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.image.write(offset, buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.image.writer.is_some() { self.image.flush() } else { Ok(()) }
    }

    fn close(&mut self) -> io::Result<()> {
        self.closed = true;
        if self.ephemeral {
            return Ok(());
        }
        // The second flush writes the refcounts of clusters that the first one has freed.
        for _ in 0..2 {
            if self.image.writer.is_some() && self.image.cache.has_changes() {
                self.image.flush()?;
            }
        }
        Ok(())
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.image.discard(offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, may_discard: bool) -> io::Result<()> {
        self.image.write_zeroes(offset, len, may_discard)
    }

    fn grow(&mut self, size: u64) -> io::Result<bool> {
        self.image.grow(size)
    }
}

impl Drop for Qcow2Disk {
    /// Keeps the changes of a guest that has not flushed before the end of its VM, as a raw file does.
    fn drop(&mut self) {
        if !self.closed
            && let Err(error) = self.close()
        {
            tracing::warn!(%error, "The last changes of a qcow2 image are lost");
        }
    }
}
