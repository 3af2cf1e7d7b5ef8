// SPDX-License-Identifier: Apache-2.0

//! The reader from a JSON value to a type, stricter than serde's derived readers.
//!
//! A derived reader also accepts a list in place of an object, with values in the order of the type's members, and an object in
//! place of a word. Neither is in the OpenAPI document. A list also hides unknown members, and a new member in the middle would
//! change the meaning of the rest. Here a struct is read from an object only, and a word from a text only. Messages describe
//! faults in terms of JSON: the names of Rust's types mean nothing to a client.
//!
//! Serde buffers the content of enums that are untagged or have an internal tag, and of flattened members, so their content is
//! not checked here. No request type has such parts except for numbers and texts; a test in `api/tests/rest` sends a list in
//! place of each object.

use serde::{
    de::{
        DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _, Expected, IntoDeserializer,
        Unexpected, VariantAccess, Visitor,
        value::{MapDeserializer, SeqDeserializer},
    },
    forward_to_deserialize_any,
};
use serde_json::{Error, Value};

/// Reads a document as its type.
///
/// # Errors
/// The document has another form than the type; with the path of the wrong member.
pub fn read<T: DeserializeOwned>(value: Value) -> Result<T, serde_path_to_error::Error<Error>> {
    serde_path_to_error::deserialize(Typed(value))
}

/// Reads a value strictly in its JSON form.
struct Typed(Value);

impl Typed {
    /// The error of a value that has another form.
    fn not(&self, expected: &str) -> Error {
        let found = match &self.0 {
            Value::Null => Unexpected::Other("null"),
            Value::Bool(value) => Unexpected::Bool(*value),
            Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
                (Some(number), ..) => Unexpected::Unsigned(number),
                (_, Some(number), _) => Unexpected::Signed(number),
                (.., number) => Unexpected::Float(number.unwrap_or(f64::NAN)),
            },
            Value::String(text) => Unexpected::Str(text),
            Value::Array(_) => Unexpected::Other("list"),
            Value::Object(_) => Unexpected::Other("object"),
        };
        match found {
            Unexpected::Unsigned(_) | Unexpected::Signed(_) if expected.starts_with(WHOLE_NUMBER) => {
                Error::invalid_value(found, &expected)
            }
            _ => Error::invalid_type(found, &expected),
        }
    }

    /// Reads a whole number of this range.
    fn number<'de, V: Visitor<'de>>(
        self,
        least: impl Into<i128>,
        most: impl Into<i128>,
        visitor: V,
    ) -> Result<V::Value, Error> {
        // The readers of `NonZero` describe themselves so.
        let least = if described(&visitor).starts_with("a nonzero") { 1 } else { least.into() };
        let most = most.into();
        let number = match &self.0 {
            Value::Number(number) => {
                number.as_u64().map(i128::from).or_else(|| number.as_i64().map(i128::from))
            }
            _ => None,
        };
        match number {
            Some(number) if (least..=most).contains(&number) => self.0.deserialize_any(visitor),
            _ => Err(self.not(&format!("{WHOLE_NUMBER} from {least} to {most}"))),
        }
    }
}

const WHOLE_NUMBER: &str = "a whole number";

/// A visitor's description of the value that it expects.
fn described<'de, V: Visitor<'de>>(visitor: &V) -> String {
    (visitor as &dyn Expected).to_string()
}

/// A visitor's own description of its value; that of `form` if the visitor has only its type's name, `derived`.
fn expectation<'de, V: Visitor<'de>>(visitor: &V, derived: &str, form: impl FnOnce() -> String) -> String {
    let own = described(visitor);
    if own == derived { form() } else { own }
}

/// Names as a list: `a`, `b` or `c`.
fn listed(names: &[&str]) -> String {
    let quoted: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => "nothing".to_owned(),
    }
}

/// Methods for numbers of these types.
macro_rules! numbers {
    ($($method:ident: $number:ty,)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            self.number(<$number>::MIN, <$number>::MAX, visitor)
        }
    )*};
}

impl<'de> Deserializer<'de> for Typed {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(items) => {
                let mut items = SeqDeserializer::new(items.into_iter().map(Typed));
                let value = visitor.visit_seq(&mut items)?;
                items.end()?;
                Ok(value)
            }
            Value::Object(members) => {
                let members = members.into_iter().map(|(name, value)| (name, Typed(value)));
                let mut members = MapDeserializer::new(members);
                let value = visitor.visit_map(&mut members)?;
                members.end()?;
                Ok(value)
            }
            scalar => scalar.deserialize_any(visitor),
        }
    }

    numbers! {
        deserialize_u8: u8,
        deserialize_u16: u16,
        deserialize_u32: u32,
        deserialize_u64: u64,
        deserialize_i8: i8,
        deserialize_i16: i16,
        deserialize_i32: i32,
        deserialize_i64: i64,
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.is_array() { self.deserialize_any(visitor) } else { Err(self.not("a list")) }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.is_object() { self.deserialize_any(visitor) } else { Err(self.not("an object")) }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        members: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        if self.0.is_object() {
            return self.deserialize_any(visitor);
        }
        let form = || format!("an object (its members: {})", members.join(", "));
        let expected = expectation(&visitor, &format!("struct {name}"), form);
        Err(self.not(&expected))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        words: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let expected = expectation(&visitor, &format!("enum {name}"), || listed(words));
        match self.0 {
            // A type with a description of its own may have a number as a short form.
            Value::Number(_) if expected == described(&visitor) => self.0.deserialize_any(visitor),
            Value::String(word) => visitor.visit_enum(Form { word, content: None }),
            Value::Object(members) if members.len() == 1 => match members.into_iter().next() {
                Some((word, content)) => visitor.visit_enum(Form { word, content: Some(content) }),
                None => Err(Error::custom(format_args!("expected {expected}"))),
            },
            Value::Object(members) => {
                let count = members.len();
                Err(Error::custom(format_args!("an object with {count} members, expected {expected}")))
            }
            other => Err(Typed(other).not(&expected)),
        }
    }

    forward_to_deserialize_any! {
        bool i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple tuple_struct identifier
         ignored_any
    }
}

impl IntoDeserializer<'_, Error> for Typed {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// One form of an enum: a word, or an object of one member.
struct Form {
    word: String,
    content: Option<Value>,
}

impl<'de> EnumAccess<'de> for Form {
    type Error = Error;
    type Variant = Content;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Content), Error> {
        let form = seed.deserialize(IntoDeserializer::<Error>::into_deserializer(self.word.as_str()))?;
        Ok((form, Content { word: self.word, content: self.content }))
    }
}

/// The content of a form, beside its word.
struct Content {
    word: String,
    content: Option<Value>,
}

impl Content {
    fn some(self) -> Result<Typed, Error> {
        let Content { word, content } = self;
        let missing = || Error::custom(format_args!("`{word}` must be an object here: {{\"{word}\": …}}"));
        content.map(Typed).ok_or_else(missing)
    }
}

impl<'de> VariantAccess<'de> for Content {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        let Content { word, content } = self;
        match content {
            None => Ok(()),
            Some(_) => Err(Error::custom(format_args!("`{word}` must be a text here: \"{word}\""))),
        }
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Error> {
        seed.deserialize(self.some()?)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, visitor: V) -> Result<V::Value, Error> {
        self.some()?.deserialize_any(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        members: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let content = self.some()?;
        if content.0.is_object() {
            return content.deserialize_any(visitor);
        }
        Err(content.not(&format!("an object (its members: {})", members.join(", "))))
    }
}
