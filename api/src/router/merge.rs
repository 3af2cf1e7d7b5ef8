// SPDX-License-Identifier: Apache-2.0

//! PATCH as a merge (RFC 7396), but for settings of a policy: each is replaced as a whole.
//!
//! A setting's value is one of several forms (`{"access": …}`, `{"trunk": …}`). A merge of two of them is neither, and a member that
//! a form leaves out where it has its default would stay as it was.

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::extract::misread;
use crate::{Problem, ProblemCode, document};

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
    document::read(value).map_err(|error| misread(&error, "body"))
}

/// The member of a specification whose own members are settings.
const SETTINGS: &str = "settings";

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
            continue;
        }
        let member = members.entry(name).or_insert(Value::Null);
        match (name.as_str(), value) {
            (SETTINGS, Value::Object(settings)) => replace(member, settings),
            _ => merge(member, value),
        }
    }
}

/// Replaces each member that is named as a whole; null removes it.
fn replace(target: &mut Value, patch: &Map<String, Value>) {
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(members) = target else { return };
    for (name, value) in patch {
        if value.is_null() {
            members.remove(name);
        } else {
            members.insert(name.clone(), value.clone());
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

    #[test]
    fn a_setting_is_replaced_as_a_whole() {
        let before = json!({"switch": "default", "settings": {"vlan": {"access": {"id": 100, "qos": 3}}, "mtu": 9000}});
        for (vlan, expect) in [
            (json!({"access": {"id": 200}}), json!({"access": {"id": 200}})),
            (json!({"access": {"id": 100}}), json!({"access": {"id": 100}})),
            (json!({"trunk": ["7"]}), json!({"trunk": ["7"]})),
            (json!("none"), json!("none")),
        ] {
            let mut merged = before.clone();
            merge(&mut merged, &json!({"settings": {"vlan": vlan}}));
            assert_eq!(merged["settings"], json!({"vlan": expect, "mtu": 9000}));
            assert_eq!(merged["switch"], "default");
            // And back, from any of them.
            merge(&mut merged, &json!({"settings": {"vlan": {"access": {"id": 100, "qos": 3}}}}));
            assert_eq!(merged, before);
        }
        let mut merged = before;
        merge(&mut merged, &json!({"settings": {"mtu": null, "rate": {"max_tx_mbit": 5}}}));
        assert_eq!(
            merged["settings"],
            json!({"vlan": {"access": {"id": 100, "qos": 3}}, "rate": {"max_tx_mbit": 5}})
        );
    }
}
