// SPDX-License-Identifier: Apache-2.0

//! Parts that all objects share.

use std::{convert::Infallible, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::Cursor;

/// A path's reference to an object: its id or its name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(from = "String")]
pub enum ObjectRef {
    /// The immutable id.
    Id(Uuid),
    /// The name, as the caller wrote it: it may be invalid.
    Name(String),
}

impl ObjectRef {
    /// Whether this refers to an object of this id and name.
    pub fn means(&self, id: Uuid, name: &str) -> bool {
        match self {
            ObjectRef::Id(wanted) => *wanted == id,
            ObjectRef::Name(wanted) => wanted == name,
        }
    }
}

impl ObjectRef {
    /// The text, without escapes or a bound: not for messages.
    pub fn text(&self) -> String {
        match self {
            ObjectRef::Id(id) => id.to_string(),
            ObjectRef::Name(name) => name.clone(),
        }
    }
}

impl From<String> for ObjectRef {
    fn from(text: String) -> Self {
        match Uuid::try_parse(&text) {
            Ok(id) => ObjectRef::Id(id),
            Err(_) => ObjectRef::Name(text),
        }
    }
}

impl FromStr for ObjectRef {
    type Err = Infallible;
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(text.to_owned().into())
    }
}

impl fmt::Display for ObjectRef {
    /// Escapes unprintable characters and clips, so that the text can go into messages and logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectRef::Id(id) => id.fmt(f),
            ObjectRef::Name(name) => netpolicy::clipped(name, 64).escape_debug().fmt(f),
        }
    }
}

/// A page of a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct List<T> {
    /// The objects.
    pub items: Vec<T>,
    /// The `cursor` of the next page; absent on the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Cursor>,
}

/// A VM as others refer to it: the id for programs, the name for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Owner {
    /// The VM's id.
    pub vm: Uuid,
    /// The VM's name.
    pub name: String,
    /// The adapter's id within the VM, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
}
