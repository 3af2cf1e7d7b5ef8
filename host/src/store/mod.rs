// SPDX-License-Identifier: Apache-2.0

//! What the agent remembers: objects with a kind, an id, a name and a revision, as JSON values.
//!
//! The shape is that of the shared stores that distributed switches live in: list at a revision, compare-and-swap
//! put, watch from a revision. [`SqliteStore`] keeps it in one file on this host.
//!
//! Revisions are the store's own: each change takes the next number, and an object's revision is that of its last
//! change. So a listing's revision is where a watch goes on without a gap.

mod probe;
mod schema;
mod sqlite;
mod table;

use std::{future::Future, path::PathBuf, pin::Pin};

use serde_json::Value;
use uuid::Uuid;

pub use probe::{GOOD_FOR, WriteProbe};
pub use sqlite::{SqliteStore, Watch};
pub use table::{Entry, Record, Table};

/// A boxed future: what lets the store be a trait object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One stored object.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// What it is: `vm`, `claim`, …
    pub kind: String,
    /// Its immutable id.
    pub id: Uuid,
    /// Its name, unique among the living objects of its kind.
    pub name: String,
    /// The revision of its last change.
    pub revision: u64,
    /// The object itself.
    pub value: Value,
}

/// All objects of a kind at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Listing {
    /// The store's revision at that moment: where a watch goes on.
    pub revision: u64,
    /// The objects, by name.
    pub objects: Vec<Object>,
}

/// What a write requires of the object that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// There is none.
    Absent,
    /// It has this revision.
    Revision(u64),
    /// Nothing: whatever is there is overwritten.
    Any,
}

/// One change, as a watch tells it.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The store's revision of this change.
    pub revision: u64,
    /// The object's kind.
    pub kind: String,
    /// The object's id.
    pub id: Uuid,
    /// The object as it became; None: it was deleted.
    pub object: Option<Object>,
}

/// Why the store cannot do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such object.
    #[error("There is no {kind} {id}")]
    NotFound {
        /// The kind that was asked for.
        kind: String,
        /// The id that was asked for.
        id: Uuid,
    },
    /// Someone else changed the object first: read it again.
    #[error(
        "The {kind} {id} has revision {actual:?} by now, not {expected}: read it again and repeat the change"
    )]
    Conflict {
        /// The object's kind.
        kind: String,
        /// The object's id.
        id: Uuid,
        /// What the caller believed; 0 for absent.
        expected: u64,
        /// What it is; None if there is none.
        actual: Option<u64>,
    },
    /// Another living object of this kind has the name.
    #[error("The name {name:?} is taken by another {kind}")]
    NameTaken {
        /// The object's kind.
        kind: String,
        /// The name.
        name: String,
    },
    /// The changes after the given revision are no longer kept: list again.
    #[error("The changes after revision {from} are no longer kept (the oldest is {oldest}): list again")]
    Compacted {
        /// Where the watch wanted to go on.
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
        /// What this build knows.
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
        /// What was found.
        detail: String,
    },
    /// The file or its directory cannot be had.
    #[error("The database {path} cannot be opened")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// An object does not read as what its kind says.
    #[error(
        "The stored {kind} {id} cannot be read, it was written by another version or is damaged: run the portcullis that \
         wrote it, or restore the database from a backup"
    )]
    Malformed {
        /// The object's kind.
        kind: String,
        /// The object's id.
        id: Uuid,
        /// The reader's words.
        source: serde_json::Error,
    },
    /// SQLite failed.
    #[error("The database failed")]
    Sqlite(#[from] rusqlite::Error),
    /// The store's thread has ended.
    #[error("The database is closed")]
    Closed,
}

/// A store of objects. Cheap to share; every call is one atomic, durable step.
pub trait ObjectStore: Send + Sync + 'static {
    /// All objects of a kind, and the revision to watch from.
    fn list(&self, kind: &str) -> BoxFuture<'_, Result<Listing, StoreError>>;

    /// One object.
    fn get(&self, kind: &str, id: Uuid) -> BoxFuture<'_, Result<Object, StoreError>>;

    /// Writes an object if `expect` holds, and returns it with its new revision.
    fn put(
        &self,
        kind: &str,
        id: Uuid,
        name: &str,
        value: Value,
        expect: Expect,
    ) -> BoxFuture<'_, Result<Object, StoreError>>;

    /// Deletes an object if `expect` holds, and returns the revision of the deletion.
    fn delete(&self, kind: &str, id: Uuid, expect: Expect) -> BoxFuture<'_, Result<u64, StoreError>>;

    /// Every change of every kind after `revision`, in order and without a gap.
    fn watch(&self, revision: u64) -> Watch;
}
