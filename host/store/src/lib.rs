// SPDX-License-Identifier: Apache-2.0

//! The agent's stored state: JSON objects with a kind, an id, a name and a revision.
//!
//! [`ObjectStore`] is the interface. A shared store for distributed switches fits it, too: list at
//! a revision, compare-and-swap in a transaction, watch from a revision. [`SqliteStore`] keeps the
//! objects in one file of this host. `MemoryStore` (tests only) keeps them in the process. The laws
//! in `tests/laws.rs` hold for both.
//!
//! Revisions belong to the store: each change takes the next number, and the revision of an object
//! is that of its last change. So a watch from the revision of a listing has no gap.
//!
//! A [`Record`] says whether its kind is shared by all hosts of a switch or belongs to this host.
//! [`Stores`] has a store for each of the two scopes; an agent without a cluster uses one store for
//! both.

mod error;
#[cfg(any(test, feature = "test-support"))]
mod memory;
mod probe;
mod schema;
mod sqlite;
mod table;
#[cfg(test)]
mod tests;

use std::{collections::HashSet, future::Future, pin::Pin, sync::Arc};

use serde_json::Value;
use tokio::sync::oneshot;
use uuid::Uuid;

pub use error::StoreError;
#[cfg(any(test, feature = "test-support"))]
pub use memory::MemoryStore;
pub use probe::{GOOD_FOR, WriteProbe};
pub use sqlite::SqliteStore;
pub use table::{Entry, Record, Scope, Table, Transaction};

/// A boxed future, which makes a trait with asynchronous methods usable as an object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Takes the result of a commit: the revision of each operation. It must not block.
pub type Completion = Box<dyn FnOnce(Result<Vec<u64>, StoreError>) + Send>;

/// The largest number of operations in one commit. etcd's default limit is the same.
pub const MAX_OPERATIONS: usize = 128;

/// One stored object.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// The kind: `vm`, `claim`, …
    pub kind: String,
    /// The immutable id.
    pub id: Uuid,
    /// The name, unique among the living objects of the kind.
    pub name: String,
    /// The revision of the last change.
    pub revision: u64,
    /// The content.
    pub value: Value,
}

/// All objects of a kind at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Listing {
    /// The store's revision at that moment. A watch from it has no gap.
    pub revision: u64,
    /// The objects, by name.
    pub objects: Vec<Object>,
}

/// The condition of an operation on the stored object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// There is no object.
    Absent,
    /// The object has this revision.
    Revision(u64),
    /// No condition: a put replaces the object, a deletion of an absent object changes nothing.
    Any,
}

/// One operation of a commit.
#[derive(Clone, Debug, PartialEq)]
pub enum Operation {
    /// Writes an object.
    Put {
        /// The kind.
        kind: &'static str,
        /// The id.
        id: Uuid,
        /// The name.
        name: String,
        /// The content.
        value: Value,
        /// The condition.
        expect: Expect,
    },
    /// Deletes an object.
    Delete {
        /// The kind.
        kind: &'static str,
        /// The id.
        id: Uuid,
        /// The condition.
        expect: Expect,
    },
}

impl Operation {
    fn key(&self) -> (&'static str, Uuid) {
        match self {
            Self::Put { kind, id, .. } | Self::Delete { kind, id, .. } => (kind, *id),
        }
    }
}

/// One change, as a watch reports it.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The store's revision of this change.
    pub revision: u64,
    /// The object's kind.
    pub kind: String,
    /// The object's id.
    pub id: Uuid,
    /// The object after the change; None after its deletion.
    pub object: Option<Object>,
}

/// A store of objects. It is cheap to share.
pub trait ObjectStore: Send + Sync + 'static {
    /// All objects of a kind, with the revision for a watch.
    fn list(&self, kind: &str) -> BoxFuture<'_, Result<Listing, StoreError>>;

    /// One object. Fails with [`StoreError::NotFound`].
    fn get(&self, kind: &str, id: Uuid) -> BoxFuture<'_, Result<Object, StoreError>>;

    /// Begins a commit: all operations in their order, or none of them, in one durable step. `done`
    /// gets the revision of each. A deletion that finds no object has the revision of the store.
    ///
    /// Commits take effect in the order of these calls. Commits that wait together may share one
    /// durable step, and of their unconditional writes of one object the last may be the only one
    /// that is carried out. Each has its own result all the same; a write that was not carried out
    /// has the revision of the write that replaced it.
    ///
    /// The commit has 1 to [`MAX_OPERATIONS`] operations, at most one for each object; otherwise it
    /// fails with [`StoreError::Commit`]. It fails with [`StoreError::Conflict`] or
    /// [`StoreError::NameTaken`] for the first operation that is not possible, and with
    /// [`StoreError::Closed`] if the store has ended.
    fn submit(&self, operations: Vec<Operation>, done: Completion);

    /// [Submits](Self::submit) a commit and waits for its result.
    fn commit(&self, operations: Vec<Operation>) -> BoxFuture<'_, Result<Vec<u64>, StoreError>> {
        let (done, result) = oneshot::channel();
        self.submit(operations, Box::new(move |revisions| drop(done.send(revisions))));
        Box::pin(async { result.await.map_err(|_| StoreError::Closed)? })
    }

    /// The changes of all kinds after `revision`, in order and without a gap.
    fn watch(&self, revision: u64) -> Box<dyn Watch>;
}

/// A stream of changes.
pub trait Watch: Send {
    /// Waits for the next change. A call that is dropped loses no change.
    ///
    /// Fails with [`StoreError::Compacted`] if the watch is too far behind: list again and start a
    /// new watch. Fails with [`StoreError::Closed`] if the store has ended.
    fn next(&mut self) -> BoxFuture<'_, Result<Change, StoreError>>;
}

/// Checks the number of operations, and that no object has two: see [`ObjectStore::submit`].
fn check_commit(operations: &[Operation]) -> Result<(), StoreError> {
    if operations.is_empty() {
        return Err(StoreError::Commit("it has no operation"));
    }
    if operations.len() > MAX_OPERATIONS {
        return Err(StoreError::Commit("it has more than 128 operations"));
    }
    let mut keys = HashSet::new();
    if operations.iter().all(|operation| keys.insert(operation.key())) {
        return Ok(());
    }
    Err(StoreError::Commit("it has two operations for one object"))
}

/// The stores of an agent, by scope.
#[derive(Clone)]
pub struct Stores {
    shared: Arc<dyn ObjectStore>,
    local: Arc<dyn ObjectStore>,
}

impl Stores {
    /// One store for both scopes: an agent without a cluster.
    #[must_use]
    pub fn on_one_host(store: Arc<dyn ObjectStore>) -> Self {
        Self { shared: Arc::clone(&store), local: store }
    }

    /// A store for each scope.
    #[must_use]
    pub fn new(shared: Arc<dyn ObjectStore>, local: Arc<dyn ObjectStore>) -> Self {
        Self { shared, local }
    }

    fn of(&self, scope: Scope) -> &Arc<dyn ObjectStore> {
        match scope {
            Scope::Shared => &self.shared,
            Scope::Local => &self.local,
        }
    }
}
