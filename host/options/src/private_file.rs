// SPDX-License-Identifier: Apache-2.0

//! Reads secrets, tokens and private keys, from files that no other user may read or change.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::process::geteuid;

/// The longest file in bytes.
const MAX: u64 = 64 << 10;

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    /// The file cannot be read.
    #[error("{what} {} cannot be read", .path.display())]
    Read {
        /// The expected content, and the option that names the file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Other users can read the file, or change it.
    #[error(
        "{what} {} must belong to this user alone (owner {owner}, mode {mode:04o}): chown it, chmod 600 it",
        .path.display()
    )]
    Open {
        /// The expected content, and the option that names the file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
}

/// Readers of a file beside its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readers {
    /// No other user.
    Owner,
    /// The file's group, if root owns the file: Debian keeps keys this way, for the group `ssl-cert`.
    GroupOfRoot,
}

/// Reads a private file: a regular one of this user or root, of at most 64 KiB, that no other user may change. Errors begin
/// with the second argument.
///
/// # Errors
/// See [`PrivateFileError`].
pub fn read(path: &Path, what: &'static str, readers: Readers) -> Result<Vec<u8>, PrivateFileError> {
    let failed = |source| PrivateFileError::Read { what, path: path.to_owned(), source };
    // Does not wait for a writer if the file is a pipe.
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = File::options().read(true).custom_flags(nonblock).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() > MAX {
        return Err(failed(io::Error::other("it is not a regular file, or is too long")));
    }
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    let forbidden = if owner == 0 && readers == Readers::GroupOfRoot { 0o037 } else { 0o077 };
    if (owner != 0 && owner != geteuid().as_raw()) || mode & forbidden != 0 {
        return Err(PrivateFileError::Open { what, path: path.to_owned(), owner, mode });
    }
    let mut bytes = Vec::new();
    file.take(MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn only_a_private_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let read = |readers| read(&path, "The file", readers);
        let is_open = |readers, mode: u32| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            matches!(read(readers), Err(PrivateFileError::Open { mode: seen, .. }) if seen == mode)
        };
        assert!(matches!(read(Readers::Owner), Err(PrivateFileError::Read { .. })));
        fs::write(&path, "secret").unwrap();
        for mode in [0o666, 0o644, 0o604, 0o620, 0o660] {
            assert!(is_open(Readers::Owner, mode) && is_open(Readers::GroupOfRoot, mode), "{mode:o}");
        }
        assert!(is_open(Readers::Owner, 0o640));
        assert_eq!(is_open(Readers::GroupOfRoot, 0o640), !geteuid().is_root());
        assert!(!is_open(Readers::Owner, 0o600));
        assert_eq!(read(Readers::Owner).unwrap(), b"secret");
        let link = dir.path();
        assert!(matches!(super::read(link, "The file", Readers::Owner), Err(PrivateFileError::Read { .. })));
    }
}
