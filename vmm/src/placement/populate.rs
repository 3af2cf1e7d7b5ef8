// SPDX-License-Identifier: Apache-2.0

//! The first access to guest memory in huge pages.
//!
//! The kernel fills a page with zeros at its first access: seconds for many GiB, at which the guest would stand still.
//! If there is no page, the access ends the process by SIGBUS. So several threads make the first access while the machine
//! is built, and a missing page is an error of the build.

use std::{
    fs::File,
    io,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use rustix::{fs::MemfdFlags, mm::Advice};
use vm_memory::{
    Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

use super::affinity::CpuMask;

/// The memory for which a further thread is worth its start.
const PER_THREAD: u64 = if cfg!(test) { 8 << 20 } else { 1 << 30 };
/// The most threads: one does 4 to 10 GiB a second, and these are as fast as a host's memory.
const THREADS: usize = 16;
/// The memory of one piece of work. A multiple of each page size up to it.
const PIECE: u64 = if cfg!(test) { 4 << 20 } else { 256 << 20 };

/// Reasons why huge pages cannot be filled.
#[derive(Debug)]
pub(crate) enum PopulateError {
    /// The kernel provides no page: the pool has none left on the allowed nodes, or a control group has a limit of huge pages.
    NoPage(io::Error),
    /// A control group has no memory left, or the work cannot be done.
    Work(io::Error),
}

impl From<io::Error> for PopulateError {
    fn from(error: io::Error) -> Self {
        Self::Work(error)
    }
}

/// A part of a region.
struct Piece<'a> {
    region: &'a GuestRegionMmap<()>,
    start: u64,
    len: u64,
}

/// Makes the kernel provide all pages of `memory`, which are `page` bytes each. The threads have ended when it returns,
/// and there are at most as many as this thread has CPUs.
///
/// # Errors
/// [`PopulateError`].
pub(crate) fn populate(memory: &GuestMemoryMmap<()>, page: u64) -> Result<(), PopulateError> {
    let step = PIECE.max(page);
    let pieces: Vec<Piece<'_>> = memory
        .iter()
        .flat_map(|region| {
            let starts = (0..region.len()).step_by(usize::try_from(step).unwrap_or(usize::MAX));
            starts.map(move |start| Piece { region, start, len: step.min(region.len() - start) })
        })
        .collect();
    let size = pieces.iter().map(|piece| piece.len).fold(0, u64::saturating_add);
    let wanted = usize::try_from(size.div_ceil(PER_THREAD)).unwrap_or(THREADS).min(THREADS);
    let threads = if wanted > 1 { wanted.min(CpuMask::current()?.count()) } else { 1 };
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            provide(piece, page)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let start = |_| thread::Builder::new().name("populate".into()).spawn_scoped(scope, work);
        let others = (1..threads).map(start).collect::<io::Result<Vec<_>>>()?;
        let own = work();
        let others = others.into_iter().map(|other| {
            let panicked = || io::Error::other("a thread that fills memory panicked");
            other.join().unwrap_or_else(|_| Err(panicked().into()))
        });
        // Wait for all: a thread that is left would have no filter.
        others.fold(own, Result::and)
    })
}

fn provide(piece: &Piece<'_>, page: u64) -> Result<(), PopulateError> {
    match advise(piece) {
        // Linux before 5.14.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => touch(piece, page),
        result => result.map_err(of_kernel),
    }
}

/// The reason of the kernel's refusal of a page (madvise(2), `MADV_POPULATE_WRITE`): EFAULT where an access would end the
/// process by SIGBUS, ENOMEM where a control group's limit of memory is reached.
fn of_kernel(error: io::Error) -> PopulateError {
    match error.raw_os_error() {
        Some(libc::EFAULT) => PopulateError::NoPage(error),
        _ => PopulateError::Work(error),
    }
}

fn advise(piece: &Piece<'_>) -> io::Result<()> {
    let fault = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let start = piece.region.get_host_address(MemoryRegionAddress(piece.start)).map_err(fault)?;
    let len = usize::try_from(piece.len).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the range is a part of a mapping that the region owns. The advice provides pages and does not change their
    // contents.
    unsafe { rustix::mm::madvise(start.cast(), len, Advice::LinuxPopulateWrite) }.map_err(Into::into)
}

/// Writes a zero into each page by `read`: where a page is missing the system call fails, and no signal comes.
fn touch(piece: &Piece<'_>, page: u64) -> Result<(), PopulateError> {
    let mut zeros =
        File::from(rustix::fs::memfd_create("zeros", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
    zeros.set_len(piece.len.div_ceil(page))?;
    for at in (piece.start..piece.start.saturating_add(piece.len))
        .step_by(usize::try_from(page).unwrap_or(usize::MAX))
    {
        let read = piece.region.read_exact_volatile_from(MemoryRegionAddress(at), &mut zeros, 1);
        // By far the most likely cause: the file is in memory, and each read is of a byte.
        read.map_err(|error| PopulateError::NoPage(io::Error::other(error.to_string())))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
