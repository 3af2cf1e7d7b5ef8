// SPDX-License-Identifier: Apache-2.0

//! Reading tokens for the API over TCP: a file that nobody else may read.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use api::token::{TokenError, Tokens};
use rustix::process::geteuid;

/// The longest file.
const MAX: u64 = 64 << 10;

/// Why a file has no tokens.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// It cannot be read.
    #[error("The token file {} cannot be read (--token-file)", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others can read it, or change it.
    #[error(
        "The token file {} is not this user's alone (owner {owner}, mode {mode:04o}): chown it, and chmod 600 it",
        .path.display()
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
    /// Its content is not as it must be.
    #[error("The token file {} cannot be used (--token-file)", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Why.
        source: TokenError,
    },
}

/// Reads a token file: a regular one of this user (or root), which nobody else may read.
///
/// # Errors
/// See [`TokenFileError`].
pub fn read(path: &Path) -> Result<Tokens, TokenFileError> {
    let failed = |source| TokenFileError::Read { path: path.to_owned(), source };
    // Not waiting for a writer, should it be a pipe.
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = File::options().read(true).custom_flags(nonblock).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() > MAX {
        return Err(failed(io::Error::other("it is no regular file, or too long")));
    }
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if (owner != 0 && owner != geteuid().as_raw()) || mode & 0o077 != 0 {
        return Err(TokenFileError::Open { path: path.to_owned(), owner, mode });
    }
    let mut text = String::new();
    file.take(MAX).read_to_string(&mut text).map_err(failed)?;
    Tokens::parse(&text).map_err(|source| TokenFileError::Content { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn only_a_private_file_has_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        assert!(matches!(read(&path), Err(TokenFileError::Read { .. })));
        fs::write(&path, format!("ci:{}", "x".repeat(40))).unwrap();
        for mode in [0o644, 0o640, 0o604, 0o620] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = read(&path).unwrap_err();
            assert!(matches!(error, TokenFileError::Open { .. }), "{mode:o}");
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(read(&path).unwrap().first(), "x".repeat(40));
        fs::write(&path, "ci").unwrap();
        assert!(matches!(read(&path), Err(TokenFileError::Content { .. })));
        assert!(matches!(read(dir.path()), Err(TokenFileError::Read { .. })));
    }
}
