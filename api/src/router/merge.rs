// SPDX-License-Identifier: Apache-2.0

//! PATCH as a merge (RFC 7396), except that settings of a policy are replaced as a whole.
//!
//! A setting's value has one of several forms (`{"access": …}`, `{"trunk": …}`). A merge of two forms is neither, and a member
//! that a form omits for its default would keep its old value.

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::extract::misread;
use crate::{Problem, ProblemCode, document};

/// The most tries of a PATCH without `If-Match`, when others change the same object meanwhile.
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
    check_removed::<T>(&value, patch)?;
    document::read(value).map_err(|error| misread(&error, "body"))
}

/// The most members that one patch removes: the check of each copies the whole specification.
const MOST_REMOVED: usize = 64;

/// Refuses to remove a member that no specification has: a misspelled name would pass unnoticed.
fn check_removed<T: DeserializeOwned>(merged: &Value, patch: &Value) -> Result<(), Problem> {
    let mut removed = Vec::new();
    note_removed(patch, &mut Vec::new(), &mut removed);
    if removed.len() > MOST_REMOVED {
        let detail = format!("A patch removes at most {MOST_REMOVED} members (null): use several patches.");
        return Err(Problem::invalid("body", detail));
    }
    for (path, name) in removed {
        let mut with_it = merged.clone();
        let place = path.iter().try_fold(&mut with_it, |value, name| value.get_mut(*name));
        let Some(Value::Object(members)) = place else { continue };
        members.insert(name.to_owned(), Value::Null);
        if let Err(error) = document::read::<T>(with_it)
            && error.inner().to_string().starts_with("unknown field")
        {
            return Err(misread(&error, "body"));
        }
    }
    Ok(())
}

/// Collects the members of a patch that are null, each with the names of the objects around it.
fn note_removed<'a>(patch: &'a Value, path: &mut Vec<&'a str>, removed: &mut Vec<(Vec<&'a str>, &'a str)>) {
    for (name, value) in patch.as_object().into_iter().flatten() {
        if value.is_null() {
            removed.push((path.clone(), name));
        } else {
            path.push(name);
            note_removed(value, path, removed);
            path.pop();
        }
        if removed.len() > MOST_REMOVED {
            return;
        }
    }
}

/// The name of the member that holds settings.
const SETTINGS: &str = "settings";

/// RFC 7396, section 2. The body's parser bounds the depth.
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

/// Replaces each named member as a whole; null removes it.
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
    fn a_member_that_no_specification_has_is_not_removed_without_a_word() {
        let spec: crate::types::VmSpec =
            serde_json::from_value(json!({"name": "web1", "memory": "2MiB", "boot": {"kernel": "vmlinuz"}}))
                .unwrap();
        for known in [
            json!({"limits": null, "cpus": null}),
            json!({"boot": {"initramfs": null}}),
            json!({"adapters": null}),
        ] {
            assert!(merged(&spec, &known).is_ok(), "{known}");
        }
        let many: serde_json::Map<_, _> = (0..100).map(|n| (format!("m{n}"), Value::Null)).collect();
        for (wrong, field) in [
            (json!({"": null}), "body"),
            (json!({"cpus": null, "limts": null}), "limts"),
            (json!({"boot": {"kernal": null}}), "boot.kernal"),
            (json!({"boot": {"cmdline": "x", "initrd": null}, "limits": null}), "boot.initrd"),
            (Value::Object(many), "body"),
        ] {
            let problem = merged(&spec, &wrong).unwrap_err();
            assert_eq!(
                (problem.code, problem.field.as_deref()),
                (ProblemCode::InvalidRequest, Some(field)),
                "{wrong}"
            );
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
            // And back to the original, from each form.
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
