// SPDX-License-Identifier: Apache-2.0

//! A store in the process, for tests: the proof that the seam fits more than SQLite.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;
use uuid::Uuid;

use super::{
    BoxFuture, Change, Completion, Expect, Listing, Object, ObjectStore, Operation, StoreError, Watch,
    check_commit,
};

/// The number of changes that are kept for watches.
const CHANGES_KEPT: usize = 1000;

/// A store that ends with its last handle.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
    newest: watch::Sender<u64>,
}

#[derive(Clone, Debug, Default)]
struct State {
    revision: u64,
    objects: BTreeMap<(String, Uuid), Object>,
    changes: VecDeque<Change>,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self { state: Arc::default(), newest: watch::channel(0).0 }
    }
}

impl MemoryStore {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ObjectStore for MemoryStore {
    fn list(&self, kind: &str) -> BoxFuture<'_, Result<Listing, StoreError>> {
        let state = self.state();
        let mut objects: Vec<_> =
            state.objects.values().filter(|object| object.kind == kind).cloned().collect();
        objects.sort_by(|one, other| one.name.cmp(&other.name));
        let listing = Listing { revision: state.revision, objects };
        Box::pin(async { Ok(listing) })
    }

    fn get(&self, kind: &str, id: Uuid) -> BoxFuture<'_, Result<Object, StoreError>> {
        let key = (kind.to_owned(), id);
        let object = self.state().objects.get(&key).cloned();
        Box::pin(async move { object.ok_or(StoreError::NotFound { kind: key.0, id }) })
    }

    fn submit(&self, operations: Vec<Operation>, done: Completion) {
        let result = check_commit(&operations).and_then(|()| {
            let mut state = self.state();
            let mut next = state.clone();
            let revisions: Result<Vec<u64>, _> =
                operations.into_iter().map(|operation| next.apply(operation)).collect();
            if revisions.is_ok() {
                *state = next;
                self.newest.send_replace(state.revision);
            }
            revisions
        });
        done(result);
    }

    fn watch(&self, revision: u64) -> Box<dyn Watch> {
        Box::new(Changes { store: self.clone(), newest: self.newest.subscribe(), seen: revision })
    }
}

impl State {
    fn apply(&mut self, operation: Operation) -> Result<u64, StoreError> {
        let (kind, id) = operation.key();
        let key = (kind.to_owned(), id);
        let actual = self.objects.get(&key).map(|object| object.revision);
        let (Operation::Put { expect, .. } | Operation::Delete { expect, .. }) = operation;
        let expected = match expect {
            Expect::Any => actual,
            Expect::Absent => None,
            Expect::Revision(revision) => Some(revision),
        };
        if actual != expected {
            return Err(StoreError::Conflict { kind: key.0, id, expected: expected.unwrap_or(0), actual });
        }
        let object = match operation {
            Operation::Delete { .. } if actual.is_none() => return Ok(self.revision),
            Operation::Delete { .. } => None,
            Operation::Put { name, value, .. } => {
                let same = |other: &Object| other.kind == kind && other.name == name && other.id != id;
                if self.objects.values().any(same) {
                    return Err(StoreError::NameTaken { kind: key.0, name });
                }
                Some(Object { kind: kind.to_owned(), id, name, revision: self.revision + 1, value })
            }
        };
        self.revision += 1;
        match &object {
            Some(object) => drop(self.objects.insert(key, object.clone())),
            None => drop(self.objects.remove(&key)),
        }
        self.changes.push_back(Change { revision: self.revision, kind: kind.to_owned(), id, object });
        if self.changes.len() > CHANGES_KEPT {
            self.changes.pop_front();
        }
        Ok(self.revision)
    }
}

/// A watch, which looks for its change whenever the store has a newer revision.
struct Changes {
    store: MemoryStore,
    newest: watch::Receiver<u64>,
    seen: u64,
}

impl Watch for Changes {
    fn next(&mut self) -> BoxFuture<'_, Result<Change, StoreError>> {
        Box::pin(async {
            let seen = self.seen;
            self.newest.wait_for(|newest| *newest > seen).await.map_err(|_| StoreError::Closed)?;
            let state = self.store.state();
            let oldest = state.changes.front().map_or(0, |change| change.revision);
            if oldest > seen + 1 {
                return Err(StoreError::Compacted { from: seen, oldest });
            }
            let change = state.changes.iter().find(|change| change.revision > seen).cloned();
            self.seen = change.as_ref().map_or(seen, |change| change.revision);
            change.ok_or(StoreError::Closed)
        })
    }
}
