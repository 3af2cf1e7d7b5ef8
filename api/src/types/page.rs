// SPDX-License-Identifier: Apache-2.0

//! Lists in pages.
//!
//! A page ends with a cursor, which holds the key of its last item. The next page begins after that key, even if
//! objects have come or gone meanwhile. An object that is there all the time is listed once.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, PartialSchema, ToSchema, openapi};
use uuid::Uuid;

use super::{Decision, Invalid, Pf, Port, PortGroup, Switch, Timestamp, Vf, Vm};

/// The most items in one response.
pub const MAX_PAGE: u32 = 1000;

/// The longest key in bytes: a port's name is shorter.
const MAX_KEY: usize = 256;

/// The end of a page. Clients send this text back unchanged; an empty one is the list's beginning.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cursor(String);

impl Cursor {
    /// The cursor behind the item of this key.
    pub fn after(key: impl Into<String>) -> Self {
        Cursor(key.into())
    }

    /// The key of the last item of the page.
    pub fn key(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Cursor {
    /// The key's bytes in hexadecimal: safe in every query, and not to be mistaken for a name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.bytes().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl From<Cursor> for String {
    fn from(cursor: Cursor) -> Self {
        cursor.to_string()
    }
}

impl FromStr for Cursor {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let wrong = || Invalid("It is not the `next` of a page of this API".to_owned());
        if !text.len().is_multiple_of(2) || text.len() > 2 * MAX_KEY || !text.as_bytes().iter().all(digit) {
            return Err(wrong());
        }
        let pairs = text.as_bytes().chunks(2).map(|pair| {
            let pair = std::str::from_utf8(pair).ok()?;
            u8::from_str_radix(pair, 16).ok()
        });
        let bytes: Vec<u8> = pairs.collect::<Option<_>>().ok_or_else(wrong)?;
        String::from_utf8(bytes).map(Cursor).map_err(|_| wrong())
    }
}

impl TryFrom<String> for Cursor {
    type Error = Invalid;
    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl PartialSchema for Cursor {
    fn schema() -> openapi::RefOr<openapi::Schema> {
        openapi::ObjectBuilder::new()
            .schema_type(openapi::Type::String)
            .description(Some("Opaque: sent back as it came."))
            .pattern(Some("^([0-9a-f]{2})*$"))
            .max_length(Some(2 * MAX_KEY))
            .into()
    }
}

impl ToSchema for Cursor {}

/// The requested part of a list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Page {
    /// At most this many, 1 to 1000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<u32>, minimum = 1, maximum = 1000, default = 1000)]
    pub limit: Option<u32>,
    /// The `next` of the page before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<Cursor>,
}

/// An object in lists.
pub trait Listed {
    /// The key that lists are ordered by: unique in a list, and the same as long as the object is there.
    fn key(&self) -> String;
}

/// Lists that are ordered by name.
macro_rules! by_name {
    ($($object:ty),*) => {$(
        impl Listed for $object {
            fn key(&self) -> String {
                self.name.to_string()
            }
        }
    )*};
}

by_name!(Vm, Pf, Switch, PortGroup, Port);

impl Listed for Vf {
    fn key(&self) -> String {
        // Padded digits sort like the numbers. No name has a NUL.
        format!("{}\0{:010}", self.pf, self.index)
    }
}

impl Listed for Decision {
    fn key(&self) -> String {
        format!("{}/{}", self.last.unix_ms(), self.id)
    }
}

impl Cursor {
    /// The time and id of the last decision on a page of decisions; None if this is a cursor of another list.
    pub fn decision(&self) -> Option<(Timestamp, Uuid)> {
        let (time, id) = self.0.split_once('/')?;
        Some((Timestamp::from_unix_ms(time.parse().ok()?), Uuid::try_parse(id).ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_read_as_it_is_written_and_nothing_else_is_one() {
        for key in ["", "web1", "web1/eth0", "eth0\u{0}0000000007", "ä"] {
            let cursor = Cursor::after(key);
            assert_eq!(cursor.to_string().parse::<Cursor>().unwrap(), cursor);
        }
        for text in ["web1", "7", "7G", "7A", "ff", "é", &"61".repeat(MAX_KEY + 1)] {
            assert!(text.parse::<Cursor>().is_err(), "{text}");
        }
    }
}
