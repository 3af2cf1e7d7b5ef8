// SPDX-License-Identifier: Apache-2.0

//! The errors of every store.

use std::path::PathBuf;

use uuid::Uuid;

/// Why the store refuses or fails.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such object.
    #[error("There is no {kind} {id}")]
    NotFound {
        /// The kind in the call.
        kind: String,
        /// The id in the call.
        id: Uuid,
    },
    /// Another change of the object came first: read it again.
    #[error("The {kind} {id} has revision {actual:?}, not {expected}: read it again and repeat the change")]
    Conflict {
        /// The object's kind.
        kind: String,
        /// The object's id.
        id: Uuid,
        /// The revision that the caller expected; 0 for absent.
        expected: u64,
        /// The present revision; None if there is no object.
        actual: Option<u64>,
    },
    /// Another living object of this kind has the name.
    #[error("Another {kind} has the name {name:?}: choose another name")]
    NameTaken {
        /// The object's kind.
        kind: String,
        /// The name.
        name: String,
    },
    /// The changes after the given revision are no longer kept: list again.
    #[error("The changes after revision {from} are no longer kept (the oldest is {oldest}): list again")]
    Compacted {
        /// The revision from which the watch would continue.
        from: u64,
        /// The oldest change that is kept.
        oldest: u64,
    },
    /// The file was written by a newer version of this program.
    #[error(
        "The database {path} has schema version {found}, and this portcullis knows versions up to {known}: \
         run the newer portcullis, or move the file away to start empty"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version that this build knows.
        known: u32,
    },
    /// A background writer reports that it could not write.
    #[error("The database was not written: {0}")]
    NotWritten(String),
    /// The file is damaged, or is no database of ours.
    #[error(
        "The database {path} is damaged ({detail}): restore it from a backup, or move it away to start empty \
         (bound devices must then be released by hand)"
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The damage that was found.
        detail: String,
    },
    /// The file or its directory cannot be opened.
    #[error("The database {path} cannot be opened")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// An object does not parse as its kind.
    #[error(
        "The stored {kind} {id} cannot be read: another version wrote it, or it is damaged. Run the \
         portcullis that wrote it, or restore the database from a backup"
    )]
    Malformed {
        /// The object's kind.
        kind: String,
        /// The object's id.
        id: Uuid,
        /// The error of the parser.
        source: serde_json::Error,
    },
    /// A commit without an operation, with more than [`MAX_OPERATIONS`](super::MAX_OPERATIONS), or
    /// with two for one object.
    #[error("The database rejects this commit: {0}")]
    Commit(&'static str),
    /// The store itself failed: the disk is full, for example.
    #[error("The database failed")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The store's thread has ended.
    #[error("The database is closed")]
    Closed,
}
