// SPDX-License-Identifier: Apache-2.0

//! Strict readers of documents: request bodies, and the command line's files in any format.
//!
//! RFC 8259 does not define the meaning of a repeated member. Readers differ, and a policy must not have two readings, so a
//! repeated member is an error at any depth. Each document becomes a JSON value first, and a typed value from that: a file
//! means the same in each format, and the same as a request with its content.

mod typed;

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

pub use typed::read;

/// Reads one JSON value, and rejects anything behind it. The parser bounds the depth (128).
///
/// # Errors
/// The text is not JSON, repeats a member, or has more than one value.
pub fn json(text: &[u8]) -> Result<Value, serde_json::Error> {
    let mut parser = serde_json::Deserializer::from_slice(text);
    let value = value(&mut parser)?;
    parser.end()?;
    Ok(value)
}

/// Reads a value from a document of any format.
///
/// # Errors
/// The document repeats a member, or has a value that JSON lacks.
pub fn value<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
    Strict.deserialize(deserializer)
}

/// Accepts any value without repeated members.
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    /// A YAML tag.
    fn visit_enum<A: EnumAccess<'de>>(self, _tagged: A) -> Result<Value, A::Error> {
        Err(A::Error::custom("a tag such as !access is not supported: write a mapping, {access: …}"))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number that is not finite"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(item) = items.next_element_seed(Strict)? {
            all.push(item);
        }
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut all = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            let value = members.next_value_seed(Strict)?;
            if all.contains_key(&name) {
                return Err(A::Error::custom(format_args!("duplicate field `{name}`")));
            }
            all.insert(name, value);
        }
        Ok(Value::Object(all))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_those_of_other_readers() {
        for text in [r#"{"a": [1, -2, 0.5, null, true, "x"], "b": {"c": {}}}"#, "17", "null", " [] "] {
            assert_eq!(json(text.as_bytes()).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        }
        assert_eq!(json(b"18446744073709551615").unwrap(), json!(u64::MAX));
    }

    #[test]
    fn what_readers_understand_differently_is_an_error() {
        for (text, expect) in [
            (r#"{"a": 1, "a": 1}"#, "duplicate field `a`"),
            (r#"{"s": {"mac_changes": "reject", "mac_changes": "accept"}}"#, "duplicate field `mac_changes`"),
            (r#"[{"a": 1, "\u0061": 2}]"#, "duplicate field `a`"),
            (r#"{} {}"#, "trailing characters"),
            (r#"{} garbage"#, "trailing characters"),
            ("", "EOF"),
        ] {
            let error = json(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expect), "{text}: {error}");
        }
        assert!(json("[".repeat(100_000).as_bytes()).is_err(), "depth is bounded");
    }
}
