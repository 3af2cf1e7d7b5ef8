// SPDX-License-Identifier: Apache-2.0

//! Names and identities.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

macro_rules! id {
    ($name:ident, $what:literal) => {
        #[doc = concat!("Identity of ", $what, ": never changes and is never used again, unlike its name.")]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                Self(id)
            }
        }
    };
}

id!(SwitchId, "a switch");
id!(PortGroupId, "a port group");
id!(PortId, "a port");
id!(VmId, "a virtual machine");

/// Clips foreign text to `most` characters, and marks the cut with `…`. Control characters stay: printing escapes them.
#[must_use]
pub fn clipped(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// A name for people: `[a-z0-9][a-z0-9_.-]{0,62}`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// A text that is not a [`Name`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{0:?} is not a name: use 1 to 63 lower-case letters, digits, dashes, dots and underscores, the first a letter or digit"
)]
pub struct NameError(String);

impl Name {
    /// The most bytes of a name.
    pub const MAX_LEN: usize = 63;

    /// Makes a name of text.
    ///
    /// # Errors
    /// [`NameError`] when the text is not a name.
    pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
        let text = text.into();
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let starts = text.bytes().next().is_some_and(plain);
        if starts && text.len() <= Self::MAX_LEN && text.bytes().all(|b| plain(b) || b"-_.".contains(&b)) {
            Ok(Self(text))
        } else {
            Err(NameError(clipped(&text, 80)))
        }
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// A virtual function: the PF's name (as the agent names it, for example its netdev) and the VF's index on that PF.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VfRef {
    /// The PF's name.
    pub pf: String,
    /// Index as in `virtfnN`, from 0.
    pub index: u32,
}

impl fmt::Display for VfRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} vf {}", self.pf, self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_is_cut_off_shows_it() {
        for (text, most, expect) in
            [("", 0, ""), ("a", 0, "…"), ("äöü", 3, "äöü"), ("äöü", 2, "äö…"), ("a\n", 2, "a\n")]
        {
            assert_eq!(clipped(text, most), expect);
        }
    }
}
