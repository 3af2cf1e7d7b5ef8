// SPDX-License-Identifier: Apache-2.0

//! Typed access to one kind of objects.

use std::{marker::PhantomData, sync::Arc};

use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::{Expect, Object, ObjectStore, Operation, StoreError, Stores};

/// The hosts to which the objects of a kind belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All hosts that share a switch: its definition, its port groups and its ports.
    Shared,
    /// This host alone: claims, processes, the state of VFs.
    Local,
}

/// A type that is stored as one kind of objects.
pub trait Record: Serialize + DeserializeOwned + Send {
    /// The kind's name.
    const KIND: &'static str;
    /// The store that has the kind.
    const SCOPE: Scope = Scope::Local;
}

/// One stored record.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry<T> {
    /// The immutable id.
    pub id: Uuid,
    /// The name.
    pub name: String,
    /// The revision of the last change.
    pub revision: u64,
    /// The record.
    pub value: T,
}

/// The objects of one kind.
pub struct Table<T> {
    store: Arc<dyn ObjectStore>,
    kind: PhantomData<fn() -> T>,
}

impl<T> Clone for Table<T> {
    fn clone(&self) -> Self {
        Self { store: Arc::clone(&self.store), kind: PhantomData }
    }
}

impl<T: Record> Table<T> {
    /// The records of kind `T::KIND` in the store of their scope.
    #[must_use]
    pub fn new(stores: &Stores) -> Self {
        Self { store: Arc::clone(stores.of(T::SCOPE)), kind: PhantomData }
    }

    /// All records, by name.
    ///
    /// # Errors
    /// Those of the store; [`StoreError::Malformed`] names the record that cannot be read.
    pub async fn list(&self) -> Result<Vec<Entry<T>>, StoreError> {
        self.store.list(T::KIND).await?.objects.into_iter().map(entry).collect()
    }

    /// One record.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn get(&self, id: Uuid) -> Result<Entry<T>, StoreError> {
        entry(self.store.get(T::KIND, id).await?)
    }

    /// Writes a record if `expect` holds, and returns its revision.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn put(&self, id: Uuid, name: &str, value: &T, expect: Expect) -> Result<u64, StoreError> {
        let revisions = self.store.commit(vec![operation(id, name, Some(value), expect)?]).await?;
        Ok(revisions.first().copied().unwrap_or_default())
    }

    /// Deletes a record. An absent record is no error.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn remove(&self, id: Uuid) -> Result<(), StoreError> {
        self.store.commit(vec![operation::<T>(id, "", None, Expect::Any)?]).await.map(drop)
    }

    /// Begins to write (`Some`) or delete (`None`) a record without a condition: see
    /// [`ObjectStore::submit`]. A record's id is its name, too.
    pub fn submit(
        &self,
        id: Uuid,
        value: Option<&T>,
        done: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) {
        match operation(id, &id.to_string(), value, Expect::Any) {
            Ok(operation) => {
                self.store.submit(vec![operation], Box::new(|revisions| done(revisions.map(drop))));
            }
            Err(error) => done(Err(error)),
        }
    }
}

/// Operations on records of several kinds of one scope, for one durable step.
pub struct Transaction {
    store: Arc<dyn ObjectStore>,
    scope: Scope,
    operations: Vec<Operation>,
}

impl Stores {
    /// An empty transaction in the store of a scope.
    #[must_use]
    pub fn transaction(&self, scope: Scope) -> Transaction {
        Transaction { store: Arc::clone(self.of(scope)), scope, operations: Vec::new() }
    }
}

impl Transaction {
    /// Adds the write of a record, which happens if `expect` holds.
    ///
    /// # Errors
    /// [`StoreError::Commit`] for a kind of another scope, [`StoreError::Malformed`] for a record that JSON cannot hold.
    pub fn put<T: Record>(self, id: Uuid, name: &str, value: &T, expect: Expect) -> Result<Self, StoreError> {
        self.with::<T>(operation(id, name, Some(value), expect)?)
    }

    /// Adds the deletion of a record. An absent record is no error.
    ///
    /// # Errors
    /// [`StoreError::Commit`] for a kind of another scope.
    pub fn remove<T: Record>(self, id: Uuid) -> Result<Self, StoreError> {
        self.with::<T>(operation::<T>(id, "", None, Expect::Any)?)
    }

    fn with<T: Record>(mut self, operation: Operation) -> Result<Self, StoreError> {
        if T::SCOPE != self.scope {
            return Err(StoreError::Commit("its objects belong to two stores"));
        }
        self.operations.push(operation);
        Ok(self)
    }

    /// Carries out all operations or none, and returns the revision of each.
    ///
    /// # Errors
    /// Those of [`ObjectStore::commit`].
    pub async fn commit(self) -> Result<Vec<u64>, StoreError> {
        self.store.commit(self.operations).await
    }
}

fn operation<T: Record>(
    id: Uuid,
    name: &str,
    value: Option<&T>,
    expect: Expect,
) -> Result<Operation, StoreError> {
    let kind = T::KIND;
    let Some(value) = value else { return Ok(Operation::Delete { kind, id, expect }) };
    let value = serde_json::to_value(value).map_err(|source| StoreError::Malformed {
        kind: kind.to_owned(),
        id,
        source,
    })?;
    Ok(Operation::Put { kind, id, name: name.to_owned(), value, expect })
}

fn entry<T: Record>(object: Object) -> Result<Entry<T>, StoreError> {
    let Object { kind, id, name, revision, value } = object;
    let value = serde_json::from_value(value).map_err(|source| StoreError::Malformed { kind, id, source })?;
    Ok(Entry { id, name, revision, value })
}
