// SPDX-License-Identifier: Apache-2.0

//! PATCH as a merge (RFC 7396).

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::extract::misread;
use crate::{Problem, ProblemCode};

/// How often a PATCH without `If-Match` is tried against others that change the same object.
pub(super) const TRIES: u32 = 5;

/// A specification with a patch merged into it.
pub(super) fn merged<T: Serialize + DeserializeOwned>(spec: &T, patch: &Value) -> Result<T, Problem> {
    if !patch.is_object() {
        return Err(Problem::invalid(
            "body",
            "A patch is an object with the members to change; null removes one.",
        ));
    }
    let mut value = serde_json::to_value(spec).map_err(|error| {
        Problem::new(ProblemCode::Internal, format!("A specification cannot be written: {error}."))
    })?;
    merge(&mut value, patch);
    serde_path_to_error::deserialize(value).map_err(|error| misread(&error, "body"))
}

/// RFC 7396, section 2. The depth is bounded by that of the body's parser.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Value::Object(members) = target else { return };
    for (name, value) in patch {
        if value.is_null() {
            members.remove(name);
        } else {
            merge(members.entry(name).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_cases_of_rfc_7396_appendix_a() {
        for (target, patch, expect) in [
            (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
            (json!({"a":"b"}), json!({"a":null}), json!({})),
            (json!({"a":"b","b":"c"}), json!({"a":null}), json!({"b":"c"})),
            (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"c"}), json!({"a":["b"]}), json!({"a":["b"]})),
            (json!({"a":{"b":"c"}}), json!({"a":{"b":"d","c":null}}), json!({"a":{"b":"d"}})),
            (json!({"a":[{"b":"c"}]}), json!({"a":[1]}), json!({"a":[1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a":"b"}), json!(["c"]), json!(["c"])),
            (json!({"a":"foo"}), json!(null), json!(null)),
            (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
            (json!([1, 2]), json!({"a":"b","c":null}), json!({"a":"b"})),
            (json!({}), json!({"a":{"bb":{"ccc":null}}}), json!({"a":{"bb":{}}})),
        ] {
            let mut merged = target;
            merge(&mut merged, &patch);
            assert_eq!(merged, expect);
        }
    }
}
