// SPDX-License-Identifier: Apache-2.0

//! Typed access to one kind of objects.

use std::{marker::PhantomData, sync::Arc};

use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::{Expect, Object, ObjectStore, StoreError};

/// A type that is stored as one kind of objects.
pub trait Record: Serialize + DeserializeOwned + Send {
    /// The kind's name.
    const KIND: &'static str;
}

/// One stored record.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry<T> {
    /// Its immutable id.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// The revision of its last change.
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
    /// The records of kind `T::KIND` in `store`.
    #[must_use]
    pub fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self { store, kind: PhantomData }
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

    /// Writes a record if `expect` holds.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn put(&self, id: Uuid, name: &str, value: &T, expect: Expect) -> Result<u64, StoreError> {
        let value = serde_json::to_value(value).map_err(|source| StoreError::Malformed {
            kind: T::KIND.to_owned(),
            id,
            source,
        })?;
        Ok(self.store.put(T::KIND, id, name, value, expect).await?.revision)
    }

    /// Deletes a record; that there is none is no error.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn remove(&self, id: Uuid) -> Result<(), StoreError> {
        match self.store.delete(T::KIND, id, Expect::Any).await {
            Ok(_) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn entry<T: Record>(object: Object) -> Result<Entry<T>, StoreError> {
    let Object { kind, id, name, revision, value } = object;
    let value = serde_json::from_value(value).map_err(|source| StoreError::Malformed { kind, id, source })?;
    Ok(Entry { id, name, revision, value })
}
