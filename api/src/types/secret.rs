// SPDX-License-Identifier: Apache-2.0

//! Texts of a specification that can hold secrets: stored and given to guests, and never shown.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{CredentialName, VmSpec};
use crate::problem::Problem;

/// A text that can hold secrets. Its serialized form is the text itself: for the store, and for a client's request. The agent
/// answers with [`VmSpec::masked`].
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The text that an answer has in place of a secret. In a request it keeps the stored text.
    pub const HIDDEN: &str = "(hidden)";

    /// Takes a text.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself: for the guest only.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    fn is_hidden(&self) -> bool {
        self.0 == Self::HIDDEN
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::HIDDEN)
    }
}

fn field_of(credential: &CredentialName) -> String {
    format!("credentials.{credential}")
}

impl VmSpec {
    /// Its secrets, each with its field.
    fn secrets(&self) -> Vec<(String, &Secret)> {
        let texts = self.cloud_init.iter().flat_map(|seed| seed.secrets());
        let named = |(name, value)| (field_of(name), value);
        texts.chain(self.credentials.iter().map(named)).collect()
    }

    fn secrets_mut(&mut self) -> Vec<(String, &mut Secret)> {
        let texts = self.cloud_init.iter_mut().flat_map(|seed| seed.secrets_mut());
        let named = |(name, value)| (field_of(name), value);
        texts.chain(self.credentials.iter_mut().map(named)).collect()
    }

    /// The specification as answers show it: with [`Secret::HIDDEN`] in place of each secret.
    #[must_use]
    pub fn masked(&self) -> Self {
        let mut shown = self.clone();
        for (_, secret) in shown.secrets_mut() {
            *secret = Secret::new(Secret::HIDDEN.to_owned());
        }
        shown
    }

    /// Puts the secrets of the stored specification in place of those that are [`Secret::HIDDEN`]. `stored` is None for a new
    /// VM.
    ///
    /// # Errors
    /// `invalid_request` with the first field that has no stored text.
    pub fn unmask(&mut self, stored: Option<&Self>) -> Result<(), Problem> {
        let stored = stored.map(Self::secrets).unwrap_or_default();
        for (field, secret) in self.secrets_mut().into_iter().filter(|(_, secret)| secret.is_hidden()) {
            let Some((_, kept)) = stored.iter().find(|(other, _)| *other == field) else {
                let detail = format!(
                    "{} keeps a stored text, and the VM has none here: give the text itself.",
                    Secret::HIDDEN
                );
                return Err(Problem::invalid(field, detail));
            };
            *secret = (*kept).clone();
        }
        Ok(())
    }

    /// Whether it has a secret that is not [`Secret::HIDDEN`]. Only the agent can compare it with the stored one.
    #[must_use]
    pub fn has_secrets(&self) -> bool {
        self.secrets().iter().any(|(_, secret)| !secret.is_hidden())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(seed: Value) -> VmSpec {
        let spec = json!({ "name": "web1", "memory": "2MiB", "boot": { "kernel": "k" }, "cloud_init": seed });
        serde_json::from_value(spec).unwrap()
    }

    fn shown(spec: &VmSpec) -> Value {
        serde_json::to_value(spec).unwrap()["cloud_init"].clone()
    }

    #[test]
    fn answers_and_debug_text_have_no_secret() {
        let texts = json!({ "user_data": "s3cret-u", "meta_data": "s3cret-m", "network_config": "s3cret-n" });
        let spec = spec(texts.clone());
        assert_eq!(shown(&spec), texts, "the store needs the texts");
        let hidden =
            json!({ "user_data": "(hidden)", "meta_data": "(hidden)", "network_config": "(hidden)" });
        assert_eq!(shown(&spec.masked()), hidden);
        assert!(!format!("{spec:?} {spec:#?}").contains("s3cret"), "{spec:?}");
    }

    #[test]
    fn credentials_are_secrets_by_their_names() {
        let spec = |credentials: Value| -> VmSpec {
            let spec = json!({
                "name": "web1", "memory": "2MiB", "boot": { "kernel": "k" }, "credentials": credentials,
            });
            serde_json::from_value(spec).unwrap()
        };
        let stored = spec(json!({ "a": "s3cret-a", "b": "s3cret-b" }));
        assert!(stored.has_secrets() && !format!("{stored:?}").contains("s3cret"));
        assert_eq!(stored.masked(), spec(json!({ "a": "(hidden)", "b": "(hidden)" })));
        let mut edited = spec(json!({ "b": "(hidden)", "c": "new" }));
        edited.unmask(Some(&stored)).unwrap();
        assert_eq!(edited, spec(json!({ "b": "s3cret-b", "c": "new" })));
        let problem = spec(json!({ "c": "(hidden)" })).unmask(Some(&stored)).unwrap_err();
        assert_eq!(problem.field.as_deref(), Some("credentials.c"));
    }

    #[test]
    fn a_hidden_text_keeps_the_stored_one_and_needs_one() {
        let stored = spec(json!({ "user_data": "old", "network_config": "net" }));
        let mut edited = stored.masked();
        edited.unmask(Some(&stored)).unwrap();
        assert_eq!(edited, stored);
        let mut other = spec(json!({ "user_data": "new", "network_config": "(hidden)" }));
        other.unmask(Some(&stored)).unwrap();
        assert_eq!(shown(&other), json!({ "user_data": "new", "network_config": "net" }));
        let mut none_stored = spec(json!({ "meta_data": "(hidden)" }));
        let no_seed = spec(Value::Null);
        for stored in [None, Some(&stored), Some(&no_seed)] {
            let problem = none_stored.unmask(stored).unwrap_err();
            assert_eq!(problem.field.as_deref(), Some("cloud_init.meta_data"), "{problem}");
        }
        assert!(!stored.masked().has_secrets() && !no_seed.has_secrets() && other.has_secrets());
    }
}
