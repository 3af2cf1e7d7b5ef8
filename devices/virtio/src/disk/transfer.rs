// SPDX-License-Identifier: Apache-2.0

//! Moves bytes between guest memory and files.

use std::{fs::File, io, os::fd::AsRawFd as _};

use vm_memory::VolatileSlice;

/// No storage has smaller blocks.
const SECTOR_BYTES: usize = 512;
/// The most buffers of one system call (`IOV_MAX`).
const BUFFERS: usize = 1024;

/// Fills all of `buffers` with the file's bytes from `offset` on.
///
/// # Errors
/// Those of the file. `UnexpectedEof` at its end: part of the buffers is filled.
pub(super) fn read(file: &File, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
    all(file, offset, buffers, |fd, iovecs, position| {
        let count = libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: each iovec is the memory of a volatile slice, which stays mapped during the call.
        // Nothing in this process holds a Rust reference into it, and the guest may write it at the
        // same time.
        unsafe { libc::preadv(fd, iovecs.as_ptr(), count, position) }
    })
}

/// Fills `buffer` with the file's bytes from `offset` on, up to the file's end. Returns their count.
///
/// # Errors
/// Those of the file.
pub(super) fn read_some(file: &File, offset: u64, buffer: VolatileSlice<'_>) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        let rest = buffer.offset(filled).map_err(io::Error::other)?;
        let position = offset.saturating_add(filled as u64);
        let position = libc::off_t::try_from(position).map_err(|_| io::ErrorKind::InvalidInput)?;
        let guard = rest.ptr_guard_mut();
        let iovec = libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() };
        // SAFETY: the iovec is the memory of a volatile slice, as in `read`.
        let moved = unsafe { libc::preadv(file.as_raw_fd(), &raw const iovec, 1, position) };
        match usize::try_from(moved) {
            Ok(moved) => {
                filled += moved;
                // The end of the file. Without the page cache, another read would begin inside of a block, and fail.
                if moved == 0 || !moved.is_multiple_of(SECTOR_BYTES) {
                    break;
                }
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(filled)
}

/// Writes all of `buffers` to the file from `offset` on.
///
/// # Errors
/// Those of the file; part of the data may be written.
pub(super) fn write(file: &File, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
    all(file, offset, buffers, |fd, iovecs, position| {
        let count = libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: as in `read`; the kernel reads the memory.
        unsafe { libc::pwritev(fd, iovecs.as_ptr(), count, position) }
    })
}

/// Moves all bytes of `buffers` by calls of `transfer(fd, iovecs, offset)`, which returns the count
/// of bytes that it has moved, or -1.
fn all(
    file: &File,
    offset: u64,
    buffers: &[VolatileSlice<'_>],
    transfer: impl Fn(libc::c_int, &[libc::iovec], libc::off_t) -> libc::ssize_t,
) -> io::Result<()> {
    let mut at = offset;
    let mut rest: Vec<VolatileSlice<'_>> = buffers.to_vec();
    rest.reverse();
    while !rest.is_empty() {
        let guards: Vec<_> = rest.iter().rev().take(BUFFERS).map(VolatileSlice::ptr_guard_mut).collect();
        let iovecs: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
            .collect();
        let position = libc::off_t::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        let moved = transfer(file.as_raw_fd(), &iovecs, position);
        drop(guards);
        let Ok(mut moved) = u64::try_from(moved) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        };
        if moved == 0 {
            // Somebody has shortened the file.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at = at.saturating_add(moved);
        while let Some(first) = rest.pop() {
            let len = first.len() as u64;
            if moved >= len {
                moved -= len;
                continue;
            }
            let done = usize::try_from(moved).unwrap_or(usize::MAX);
            let left = first.offset(done).map_err(io::Error::other)?;
            rest.push(left);
            break;
        }
    }
    Ok(())
}
