// SPDX-License-Identifier: Apache-2.0

//! Files of tap and macvtap interfaces (`Documentation/networking/tuntap.rst`).

use std::{
    ffi::{c_int, c_short},
    fs::File,
    io,
    os::fd::AsRawFd as _,
    path::Path,
};

use rustix::fs::{Mode, OFlags, open};

/// Bytes of `struct virtio_net_hdr_v1`, in front of each frame.
const HEADER: c_int = 12;

/// `struct ifreq`, as far as `TUNSETIFF` reads it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: c_short,
    rest: [u8; 22],
}

/// The state in which the interface must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// It must not exist.
    New,
    /// It exists.
    Existing,
}

/// Opens one queue of a tap or macvtap interface by `node`, which is `/dev/net/tun` or that of a macvtap interface. `several`:
/// the interface has several queues. The file does not block.
///
/// # Errors
/// Those of the system calls. `ResourceBusy`: another process has the interface, or it exists although it must not.
/// `InvalidInput`: the interface was made for one queue and not for several, or the other way round.
pub(super) fn queue(node: &Path, name: &str, several: bool, way: Way) -> io::Result<File> {
    let mut request = Request { name: [0; libc::IFNAMSIZ], flags: 0, rest: [0; 22] };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.name.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if several {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    if way == Way::New {
        flags |= libc::IFF_TUN_EXCL;
    }
    // The highest flag is the sign bit of the field.
    request.flags = u16::try_from(flags).unwrap_or_default().cast_signed();
    let file = open(node, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq` (40 bytes), which `request` is, and keeps no pointer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let size = HEADER;
    // SAFETY: TUNSETVNETHDRSZ reads one int, and keeps no pointer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // This is the default of a tap. With its own default, a macvtap would drop frames while the uplink sends
    // others.
    let unlimited = c_int::MAX;
    // SAFETY: TUNSETSNDBUF reads one int, and keeps no pointer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETSNDBUF, &raw const unlimited) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(File::from(file)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_the_kernels() {
        assert_eq!(size_of::<Request>(), size_of::<libc::ifreq>());
    }
}
