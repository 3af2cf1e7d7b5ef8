// SPDX-License-Identifier: Apache-2.0

//! A tap device as the simulated adapter's wire.

use std::{
    ffi::c_short,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::fs::{Mode, OFlags, open};

/// `IFNAMSIZ`, with the zero at its end.
const NAME: usize = 16;

/// `struct ifreq`, as far as `TUNSETIFF` reads it.
#[repr(C)]
struct Request {
    name: [u8; NAME],
    flags: c_short,
    rest: [u8; 22],
}

/// Opens tap device `name`. It is made if it does not exist, and then lives as long as it is open. Its frames have no
/// packet information. This function neither sets it up nor gives it addresses.
///
/// # Errors
/// `InvalidInput` for a name that no interface can have. `PermissionDenied`: making one needs CAP_NET_ADMIN, and only
/// its owner can open an existing one. `ResourceBusy` while another process has it open. `NotFound` without
/// `/dev/net/tun`.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let mut request = Request { name: [0; NAME], flags: 0, rest: [0; 22] };
    let allowed = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b'%';
    if name.is_empty() || name.len() >= NAME || !name.bytes().all(allowed) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.name.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    request.flags = c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI).unwrap_or(0);
    let tap = open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq` (40 bytes), which `request` is, and keeps no pointer.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(tap) }
}

#[cfg(test)]
mod tests {
    use rustix::{
        event::{PollFd, PollFlags, Timespec, poll},
        io::write,
    };

    use super::*;

    #[test]
    fn names_that_no_interface_can_have() {
        assert_eq!(size_of::<Request>(), size_of::<libc::ifreq>());
        for name in ["", "a/b", "tap%d", "0123456789abcdef", "a b", "tap\0"] {
            let error = open_tap(name).expect_err(name);
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name:?}");
        }
    }

    #[test]
    fn a_device_is_made_where_that_is_possible() {
        match open_tap("pctest0") {
            Ok(tap) => {
                assert!(std::path::Path::new("/sys/class/net/pctest0").exists());
                assert!(open_tap("pctest0").is_err(), "it is open");
                // It is down: `poll` must not keep a process busy that waits for frames.
                let mut fds = [PollFd::new(&tap, PollFlags::IN)];
                assert_eq!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0));
                assert!(write(&tap, &[0; 60]).is_err());
                drop(tap);
            }
            // No device node, or no permission to make one.
            Err(error) => assert!(
                matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied)
                    || error.raw_os_error() == Some(libc::ENODEV),
                "{error}"
            ),
        }
    }
}
