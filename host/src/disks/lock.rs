// SPDX-License-Identifier: Apache-2.0

//! Locks of disk files, in QEMU's protocol: QEMU, qemu-img, libvirt and Portcullis see each other.
//!
//! QEMU's `block/file-posix.c` (since 2.10) has a byte for each permission. A user of a file holds a
//! shared lock on byte 100 + N for each permission that it has, and on byte 200 + N for each that it
//! does not share. Then it tests whether another user has one that it does not share, or does not
//! share one that it has.
//!
//! The locks belong to the open file description (`F_OFD_SETLK`, fcntl(2)). So they outlive the
//! agent's descriptor in the vmm that has got it, and end with that process.

use std::{fs::File, io, os::fd::AsRawFd as _};

const HAVE: i64 = 100;
const DO_NOT_SHARE: i64 = 200;
// The permissions, as numbers of bits (`include/block/block-common.h`).
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// The use of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Reads; others may read as well.
    Read,
    /// Reads and writes, alone.
    Write,
}

impl Use {
    fn has(self) -> &'static [i64] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    fn does_not_share(self) -> &'static [i64] {
        &[WRITE, RESIZE]
    }
}

/// Locks a file for a use. The locks last as long as the file's open description.
///
/// # Errors
/// `WouldBlock` if another user of the file is in the way; else those of the kernel.
pub(super) fn lock(file: &File, purpose: Use) -> io::Result<()> {
    for permission in purpose.has() {
        take(file, HAVE + permission)?;
    }
    for permission in purpose.does_not_share() {
        take(file, DO_NOT_SHARE + permission)?;
    }
    for permission in purpose.has() {
        test(file, DO_NOT_SHARE + permission)?;
    }
    for permission in purpose.does_not_share() {
        test(file, HAVE + permission)?;
    }
    Ok(())
}

fn of(kind: libc::c_int, byte: i64) -> libc::flock {
    // The constants fit: they are 0 to 2.
    let narrow = |value: libc::c_int| libc::c_short::try_from(value).unwrap_or_default();
    libc::flock { l_type: narrow(kind), l_whence: narrow(libc::SEEK_SET), l_start: byte, l_len: 1, l_pid: 0 }
}

/// Repeats a call that a signal has interrupted.
fn call(mut call: impl FnMut() -> libc::c_int) -> io::Result<()> {
    loop {
        if call() == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn take(file: &File, byte: i64) -> io::Result<()> {
    let range = of(libc::F_RDLCK, byte);
    // SAFETY: the descriptor is open, and the kernel reads one `flock`.
    let result = call(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) });
    result.map_err(|error| match error.raw_os_error() {
        // Another user has an exclusive lock, as programs that lock the whole file have.
        Some(libc::EAGAIN | libc::EACCES) => io::ErrorKind::WouldBlock.into(),
        _ => error,
    })
}

fn test(file: &File, byte: i64) -> io::Result<()> {
    let mut range = of(libc::F_WRLCK, byte);
    // SAFETY: the descriptor is open, and the kernel reads and writes one `flock`.
    call(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut range) })?;
    if libc::c_int::from(range.l_type) == libc::F_UNLCK {
        Ok(())
    } else {
        Err(io::ErrorKind::WouldBlock.into())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn two() -> (tempfile::NamedTempFile, File, File) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (first, second) = (open(), open());
        (file, first, second)
    }

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        for (first, second, together) in [
            (Use::Read, Use::Read, true),
            (Use::Read, Use::Write, false),
            (Use::Write, Use::Read, false),
            (Use::Write, Use::Write, false),
        ] {
            let (_file, one, two) = two();
            lock(&one, first).unwrap();
            let result = lock(&two, second).map_err(|error| error.kind());
            assert_eq!(
                result,
                if together { Ok(()) } else { Err(io::ErrorKind::WouldBlock) },
                "{first:?} {second:?}"
            );
        }
    }

    #[test]
    fn a_lock_lasts_as_long_as_any_copy_of_its_descriptor() {
        let (_file, one, two) = two();
        lock(&one, Use::Write).unwrap();
        let copy = one.try_clone().unwrap();
        drop(one);
        assert!(lock(&two, Use::Read).is_err());
        drop(copy);
        // A failed attempt leaves its own locks until its file is closed, and others do not see them afterwards.
        lock(&two, Use::Read).unwrap();
    }

    #[test]
    fn qemu_and_portcullis_see_each_other() {
        let (file, one, two) = two();
        let resize = |flag: &str| {
            let qemu = Command::new("qemu-img")
                .args(["resize", "-f", "raw", flag])
                .arg(file.path())
                .arg("1M")
                .output();
            qemu.expect("qemu-img is needed: tests/run prepare installs it")
        };
        lock(&one, Use::Write).unwrap();
        let output = resize("--shrink");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("lock"), "{said}");
        drop(one);
        assert!(resize("--shrink").status.success());
        lock(&two, Use::Read).unwrap();
        assert!(!resize("--shrink").status.success(), "a reader does not share writing");
        let info = Command::new("qemu-img").args(["info", "-f", "raw"]).arg(file.path()).output().unwrap();
        assert!(info.status.success(), "readers share: {}", String::from_utf8_lossy(&info.stderr));
    }
}
