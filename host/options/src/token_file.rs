// SPDX-License-Identifier: Apache-2.0

//! Reads tokens for the API over TCP, from a file that no other user may read.

use std::path::{Path, PathBuf};

use api::token::{TokenError, Tokens};

use crate::private_file::{self, PrivateFileError, Readers};

/// Why a file has no tokens.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// The file cannot be read, or other users can read it.
    #[error(transparent)]
    File(#[from] PrivateFileError),
    /// The content is malformed.
    #[error("The token file {} cannot be used (--token-file)", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: TokenError,
    },
    /// The file is not text.
    #[error("The token file {} is not text (--token-file)", .path.display())]
    NotText {
        /// The file.
        path: PathBuf,
    },
}

/// Reads a token file: a regular one of this user (or root), which no other user may read.
///
/// # Errors
/// See [`TokenFileError`].
pub fn read(path: &Path) -> Result<Tokens, TokenFileError> {
    let bytes = private_file::read(path, "The token file (--token-file)", Readers::Owner)?;
    let text = String::from_utf8(bytes).map_err(|_| TokenFileError::NotText { path: path.to_owned() })?;
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
        assert!(matches!(read(&path), Err(TokenFileError::File(PrivateFileError::Read { .. }))));
        fs::write(&path, format!("ci:{}", "x".repeat(40))).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 600") && error.contains("--token-file"), "{error}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(read(&path).unwrap().first(), "x".repeat(40));
        fs::write(&path, "ci").unwrap();
        assert!(matches!(read(&path), Err(TokenFileError::Content { .. })));
        fs::write(&path, [b'c', b'i', b':', 0xff]).unwrap();
        assert!(matches!(read(&path), Err(TokenFileError::NotText { .. })));
    }
}
