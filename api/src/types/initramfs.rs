// SPDX-License-Identifier: Apache-2.0

//! The initramfs of a VM: one file, or several.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{SeqAccess, Visitor},
};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{ArrayBuilder, ObjectBuilder, OneOfBuilder, RefOr, Schema, Type},
};

use crate::problem::Problem;

/// The most files of an initramfs.
pub const MAX_INITRAMFS: usize = 16;

/// The initramfs files, in their order. The kernel unpacks one after the other: a later file replaces those of an earlier one.
/// On the wire one file is a path, and several are a list of paths.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Initramfs(Vec<String>);

impl Initramfs {
    /// The paths.
    #[must_use]
    pub fn paths(&self) -> &[String] {
        &self.0
    }

    /// Each path with its field.
    pub fn fields(&self) -> impl Iterator<Item = (String, &String)> {
        let alone = self.0.len() == 1;
        let field = move |number| match alone {
            true => FIELD.to_owned(),
            false => format!("{FIELD}[{number}]"),
        };
        self.0.iter().enumerate().map(move |(number, path)| (field(number), path))
    }
}

const FIELD: &str = "boot.initramfs";

impl From<&str> for Initramfs {
    fn from(path: &str) -> Self {
        Self(vec![path.to_owned()])
    }
}

impl From<Vec<String>> for Initramfs {
    fn from(paths: Vec<String>) -> Self {
        Self(paths)
    }
}

impl Serialize for Initramfs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            // As agents wrote it that knew one file only.
            [path] => path.serialize(serializer),
            paths => paths.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Initramfs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Paths)
    }
}

struct Paths;

impl<'de> Visitor<'de> for Paths {
    type Value = Initramfs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path, or a list of paths")
    }

    fn visit_str<E>(self, path: &str) -> Result<Initramfs, E> {
        Ok(path.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Initramfs, A::Error> {
        let mut paths = Vec::new();
        while let Some(path) = list.next_element()? {
            paths.push(path);
        }
        Ok(Initramfs(paths))
    }
}

impl PartialSchema for Initramfs {
    fn schema() -> RefOr<Schema> {
        let path = || ObjectBuilder::new().schema_type(Type::String);
        let list = ArrayBuilder::new().items(path()).min_items(Some(1)).max_items(Some(MAX_INITRAMFS));
        OneOfBuilder::new().item(path()).item(list).into()
    }
}

impl ToSchema for Initramfs {}

/// The rules that types cannot hold.
///
/// # Errors
/// `invalid_request` with the field of the first rule that is broken.
pub(super) fn check(initramfs: &Initramfs) -> Result<(), Problem> {
    let count = initramfs.paths().len();
    if !(1..=MAX_INITRAMFS).contains(&count) {
        let detail = format!("The list has {count} files, and an initramfs 1 to {MAX_INITRAMFS}.");
        return Err(Problem::invalid(FIELD, detail));
    }
    initramfs.fields().try_for_each(|(field, path)| super::vm::check_path(&field, path))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::VmSpec;

    fn spec(initramfs: Value) -> Result<VmSpec, serde_json::Error> {
        let boot = json!({ "kernel": "k", "initramfs": initramfs });
        serde_json::from_value(json!({ "name": "web1", "memory": "2MiB", "boot": boot }))
    }

    #[test]
    fn one_file_is_a_path_and_several_are_a_list() {
        for (read, written) in [
            (json!("a"), json!("a")),
            (json!(["a"]), json!("a")),
            (json!(["a", "b"]), json!(["a", "b"])),
            (Value::Null, Value::Null),
        ] {
            let spec = spec(read).unwrap();
            assert_eq!(serde_json::to_value(&spec).unwrap()["boot"]["initramfs"], written);
            assert!(spec.check().is_ok());
        }
        for wrong in [json!(1), json!({ "a": "b" }), json!([1]), json!([["a"]])] {
            assert!(spec(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_path_is_checked_and_there_are_at_most_sixteen() {
        let field =
            |initramfs: Value| spec(initramfs).unwrap().check().err().and_then(|problem| problem.field);
        for (initramfs, expect) in [
            (json!(vec!["a"; 16]), None),
            (json!(vec!["a"; 17]), Some("boot.initramfs")),
            (json!([]), Some("boot.initramfs")),
            (json!(""), Some("boot.initramfs")),
            (json!(["a", ""]), Some("boot.initramfs[1]")),
        ] {
            assert_eq!(field(initramfs.clone()).as_deref(), expect, "{initramfs}");
        }
    }
}
