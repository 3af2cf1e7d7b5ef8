// SPDX-License-Identifier: Apache-2.0

//! The frames of a tap or macvtap interface of the host (`Documentation/networking/tuntap.rst`).
//!
//! The caller opens the interface's files with the header of virtio (`IFF_VNET_HDR`, 12 bytes), and
//! non-blocking. So a frame passes unchanged between the host's kernel and the guest. The kernel
//! checks the header.

use std::{
    ffi::c_short,
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    sync::Arc,
};

use devices::io_thread::IoSource;
use vm_memory::VolatileSlice;

use super::{Offloads, Wire};

/// The most buffers of a frame (`UIO_MAXIOV`).
const BUFFERS: usize = 1024;

/// `struct ifreq`, as far as `TUNSETQUEUE` reads it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: c_short,
    rest: [u8; 22],
}

/// An interface with one file for each pair of queues.
#[derive(Debug)]
pub struct Tap {
    queues: Vec<Arc<OwnedFd>>,
    /// The number of attached queues.
    attached: usize,
    /// The lock of the interface, if the host has one.
    _lock: Option<OwnedFd>,
}

impl Tap {
    /// An interface with these files, all of which are attached. `lock` stays open as long as the
    /// interface.
    #[must_use]
    pub fn new(queues: Vec<File>, lock: Option<OwnedFd>) -> Self {
        let attached = queues.len();
        let queues = queues.into_iter().map(|file| Arc::new(file.into())).collect();
        Self { queues, attached, _lock: lock }
    }

    fn queue(&self, pair: usize) -> io::Result<&Arc<OwnedFd>> {
        self.queues.get(pair).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Wire for Tap {
    fn pairs(&self) -> usize {
        self.queues.len()
    }

    fn source(&self, pair: usize) -> Option<IoSource> {
        self.queues.get(pair).map(|queue| IoSource::Readable(Arc::clone(queue)))
    }

    fn receive(&mut self, pair: usize, frame: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(self.queue(pair)?, frame)?)
    }

    fn send(&mut self, pair: usize, frame: &[VolatileSlice<'_>]) -> io::Result<()> {
        let file = self.queue(pair)?.as_raw_fd();
        if frame.len() > BUFFERS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let guards: Vec<_> = frame.iter().map(VolatileSlice::ptr_guard).collect();
        let iovecs: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() })
            .collect();
        let count = libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: each iovec is the memory of a volatile slice, which stays mapped during the call.
        // The kernel only reads it, and the guest may write it at the same time.
        let sent = unsafe { libc::writev(file, iovecs.as_ptr(), count) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let flags = [
            (offloads.checksum, libc::TUN_F_CSUM),
            (offloads.tcp4, libc::TUN_F_TSO4),
            (offloads.tcp6, libc::TUN_F_TSO6),
        ];
        let bits = flags.into_iter().filter(|(on, _)| *on).fold(0, |bits, (_, flag)| bits | flag);
        // SAFETY: TUNSETOFFLOAD takes a number.
        let result = unsafe {
            libc::ioctl(self.queue(0)?.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(bits))
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn set_pairs(&mut self, count: usize) -> io::Result<()> {
        let count = count.min(self.queues.len());
        while self.attached != count {
            let attach = self.attached < count;
            let (pair, flag, next) = if attach {
                (self.attached, libc::IFF_ATTACH_QUEUE, self.attached + 1)
            } else {
                (self.attached - 1, libc::IFF_DETACH_QUEUE, self.attached - 1)
            };
            let flags = c_short::try_from(flag).unwrap_or_default();
            let request = Request { name: [0; libc::IFNAMSIZ], flags, rest: [0; 22] };
            // SAFETY: TUNSETQUEUE reads one `struct ifreq` (40 bytes), which `request` is, and keeps
            // no pointer.
            let result =
                unsafe { libc::ioctl(self.queue(pair)?.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
            self.attached = next;
        }
        Ok(())
    }
}
