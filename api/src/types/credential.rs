// SPDX-License-Identifier: Apache-2.0

//! Credentials for systemd in the guest.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{Invalid, Secret};
use crate::problem::Problem;

/// The most credentials of a VM.
pub const MAX_CREDENTIALS: usize = 32;
/// The most bytes of all their names and values together.
pub const MAX_CREDENTIAL_BYTES: usize = 32 << 10;
/// The longest name in bytes.
const MAX_NAME: usize = 128;

/// The name of a credential: letters, digits, `.`, `_`, `-`; 1 to 128 bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CredentialName(String);

impl CredentialName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for CredentialName {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        // systemd stores a credential as a file of this name.
        let right =
            (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(plain) && text != "." && text != "..";
        if right {
            return Ok(Self(text.to_owned()));
        }
        Err(Invalid(format!(
            "the name of a credential has 1 to {MAX_NAME} of a-z, A-Z, 0-9, '.', '_', '-', and is not . or .."
        )))
    }
}

impl TryFrom<String> for CredentialName {
    type Error = Invalid;
    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<CredentialName> for String {
    fn from(name: CredentialName) -> Self {
        name.0
    }
}

impl fmt::Display for CredentialName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The credentials of a VM, by their names.
pub type Credentials = BTreeMap<CredentialName, Secret>;

/// The rules that types cannot hold.
///
/// # Errors
/// `invalid_request` with the field of the first rule that is broken.
pub(super) fn check(credentials: &Credentials) -> Result<(), Problem> {
    let count = credentials.len();
    if count > MAX_CREDENTIALS {
        let detail = format!("A VM has at most {MAX_CREDENTIALS} credentials, not {count}.");
        return Err(Problem::invalid("credentials", detail));
    }
    let sizes =
        credentials.iter().map(|(name, value)| name.as_str().len().saturating_add(value.reveal().len()));
    let size: usize = sizes.sum();
    if size > MAX_CREDENTIAL_BYTES {
        let detail = format!(
            "The names and values of all credentials have {size} bytes, more than {MAX_CREDENTIAL_BYTES}: put large \
             texts into cloud_init, or on a disk."
        );
        return Err(Problem::invalid("credentials", detail));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{super::VmSpec, *};

    #[test]
    fn names_are_those_of_systemd() {
        for (name, expect) in [
            ("ssh.authorized_keys.root", true),
            ("A-1_b", true),
            ("...", true),
            (&*"x".repeat(128), true),
            ("", false),
            (".", false),
            ("..", false),
            ("a b", false),
            ("a:b", false),
            ("a/b", false),
            ("a=b", false),
            ("ä", false),
            (&*"x".repeat(129), false),
        ] {
            assert_eq!(name.parse::<CredentialName>().is_ok(), expect, "{name}");
        }
    }

    #[test]
    fn credentials_are_bounded() {
        let check = |credentials: Value| {
            let spec = json!({
                "name": "web1", "memory": "2MiB", "boot": { "kernel": "k" }, "credentials": credentials,
            });
            serde_json::from_value::<VmSpec>(spec).unwrap().check().map_err(|problem| problem.field)
        };
        let count = |count: usize| {
            (0..count).map(|n| (format!("c{n}"), json!("x"))).collect::<serde_json::Map<_, _>>()
        };
        let most = MAX_CREDENTIAL_BYTES - 1;
        let refused = Err(Some("credentials".into()));
        assert_eq!(check(json!(count(32))), Ok(()));
        assert_eq!(check(json!(count(33))), refused);
        assert_eq!(check(json!({ "a": "x".repeat(most) })), Ok(()));
        assert_eq!(check(json!({ "a": "x".repeat(most), "b": "" })), refused);
    }
}
