// SPDX-License-Identifier: Apache-2.0

//! A piece of a BAR mapped into this process.

use std::{io, os::fd::BorrowedFd, ptr};

use devices::memory::HostMemory;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Pages of a VFIO region, mapped until dropped.
pub(super) struct Window {
    address: *mut libc::c_void,
    len: usize,
}

// SAFETY: the pointer is only an address here: this process neither reads nor writes through it.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// Maps `len` bytes at `offset` of the device's file (both page aligned, inside of a region).
    pub(super) fn new(device: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        // SAFETY: the kernel chooses a free address, so that no other memory of this process is touched.
        let address = unsafe {
            mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, device, offset)
        }?;
        Ok(Self { address, len })
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, made in `new`, and by the contract of `HostMemory` every user of its
        // address holds this object.
        let _ = unsafe { munmap(self.address, self.len) };
    }
}

// SAFETY: mapped in `new`, unmapped in `drop`. mmap works on whole pages, and `len` was checked to be a
// multiple of them. No references are made into it.
unsafe impl HostMemory for Window {
    fn address(&self) -> u64 {
        self.address as u64
    }

    fn len(&self) -> u64 {
        self.len as u64
    }
}
