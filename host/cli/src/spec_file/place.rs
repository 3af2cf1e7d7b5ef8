// SPDX-License-Identifier: Apache-2.0

//! The lines of fields in a file, in each format by its own parser.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_path_to_error::Segment;

use super::Format;

/// A step from a value to a part of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Member(String),
    Item(usize),
}

/// The steps to a field such as `adapters[0].mac`.
pub(super) fn of_field(field: &str) -> Vec<Step> {
    field
        .split(['.', '['])
        .filter(|part| !part.is_empty())
        .map(|part| match part.strip_suffix(']').and_then(|index| index.parse().ok()) {
            Some(index) => Step::Item(index),
            None => Step::Member(part.to_owned()),
        })
        .collect()
}

/// The steps to the value that a typed reader did not take.
pub(super) fn of_path(path: &serde_path_to_error::Path) -> Vec<Step> {
    path.iter()
        .map_while(|segment| match segment {
            Segment::Map { key } => Some(Step::Member(key.clone())),
            Segment::Enum { variant } => Some(Step::Member(variant.clone())),
            Segment::Seq { index } => Some(Step::Item(*index)),
            Segment::Unknown => None,
        })
        .collect()
}

/// The line of the value at `path`, from 1. A value that is missing has the line of the object that lacks it (in JSON of its
/// first member); the document itself has none.
pub(super) fn line(format: Format, text: &str, path: &[Step]) -> Option<usize> {
    (1..=path.len()).rev().find_map(|length| {
        let seek = Seek { path: path.get(..length)? };
        match format {
            Format::Json => seek
                .deserialize(&mut serde_json::Deserializer::from_str(text))
                .err()
                .map(|error| error.line()),
            Format::Toml => {
                let error = seek.deserialize(toml::Deserializer::parse(text).ok()?).err()?;
                Some(text.get(..error.span()?.start)?.matches('\n').count() + 1)
            }
            Format::Yaml => {
                let error = seek.deserialize(yaml_serde::Deserializer::from_str(text)).err()?;
                Some(error.location()?.line())
            }
        }
    })
}

/// Fails at the value at the end of a path, so that the parser's error has the place. Succeeds if there is no such value.
struct Seek<'a> {
    path: &'a [Step],
}

impl<'de> DeserializeSeed<'de> for Seek<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// Values without parts fail by the default methods: the path ends here, or has no further step in this file.
impl<'de> Visitor<'de> for Seek<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("another value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        let Some((Step::Member(wanted), rest)) = self.path.split_first() else {
            return Err(A::Error::custom("found"));
        };
        while let Some(name) = members.next_key::<String>()? {
            if name == *wanted {
                members.next_value_seed(Seek { path: rest })?;
            } else {
                members.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let Some((Step::Item(wanted), rest)) = self.path.split_first() else {
            return Err(A::Error::custom("found"));
        };
        for _ in 0..*wanted {
            if items.next_element::<IgnoredAny>()?.is_none() {
                return Ok(());
            }
        }
        items.next_element_seed(Seek { path: rest })?;
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_has_its_line_in_each_format() {
        const JSON: &str = "{\n\"b\": {\n\"kernel\": \"k\"\n},\n\"list\": [\n{\"id\": \"x\"},\n{\"id\": \"y\"}\n],\n\"cpus\":\n3\n}";
        const TOML: &str =
            "cpus = 3\nb.initramfs = \"i\"\nb.kernel = \"k\"\n\n[[list]]\nid = \"x\"\n[[list]]\nid = \"y\"\n";
        const YAML: &str = "\n# kernel: none\nb:\n  kernel: k\nlist:\n- id: x\n-\n  id: y\ncpus: 3\n";
        const FLOW: &str =
            "list: [{id: x},\n  {id: y}]\nb: {initramfs: 'kernel: ', kernel:\n   k}\ncpus: 3\n";
        for (field, json, toml, yaml, flow) in [
            ("b.kernel", Some(3), Some(3), Some(4), Some(4)),
            ("list[0].id", Some(6), Some(6), Some(6), Some(1)),
            ("list[1].id", Some(7), Some(8), Some(8), Some(2)),
            // The list that ends before, and the item that lacks a member.
            ("list[2].id", Some(6), Some(5), Some(6), Some(1)),
            ("list[1].mac", Some(7), Some(7), Some(8), Some(2)),
            ("cpus", Some(10), Some(1), Some(9), Some(5)),
            // The reader expected an object.
            ("cpus.most", Some(10), Some(1), Some(9), Some(5)),
            ("memory", None, None, None, None),
            ("", None, None, None, None),
        ] {
            let steps = of_field(field);
            for (format, text, expect) in [
                (Format::Json, JSON, json),
                (Format::Toml, TOML, toml),
                (Format::Yaml, YAML, yaml),
                (Format::Yaml, FLOW, flow),
            ] {
                assert_eq!(line(format, text, &steps), expect, "{field} in {format:?}: {text}");
            }
        }
    }
}
