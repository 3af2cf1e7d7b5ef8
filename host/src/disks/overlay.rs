// SPDX-License-Identifier: Apache-2.0

//! Files for the changes of ephemeral disks.
//!
//! Such a file never has a name (`O_TMPFILE`, open(2)): only the process of its VM has it open. So the kernel removes it with
//! that process, whatever the cause of the end, and also if the agent dies first.

use std::{
    fs::{DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::Path,
};

use rustix::fs::{Mode, OFlags, open};

/// Makes an empty file in a directory, and the directory at need.
///
/// # Errors
/// Those of the kernel; `Unsupported` if the file system has no files without a name.
pub(super) fn create(dir: &Path) -> io::Result<File> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // EXCL: no link gives it a name later.
    let flags = OFlags::TMPFILE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(File::from(open(dir, flags, Mode::RUSR | Mode::WUSR)?))
}

/// The text of a failure.
pub(super) fn text(dir: &Path, error: &io::Error) -> String {
    let cure = match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            "under systemd, allow the agent to write there (ReadWritePaths= in a drop-in of its unit)"
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "make room on its file system",
        io::ErrorKind::Unsupported => {
            "its file system has no files without a name; choose a directory on ext4, XFS, Btrfs or tmpfs (serve \
             --ephemeral-dir)"
        }
        _ => "repair the directory, or choose another (serve --ephemeral-dir)",
    };
    format!(
        "No file for the changes of an ephemeral disk can be made in {} ({error}): {cure}.",
        dir.display()
    )
}
