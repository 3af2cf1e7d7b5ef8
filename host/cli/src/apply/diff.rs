// SPDX-License-Identifier: Apache-2.0

//! Differences between an existing specification and a wanted one.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::Value;

/// A member that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Difference {
    /// Its place, as `settings.mtu` or `adapters[0].mac`.
    path: String,
    /// The existing value; null if there is none.
    from: Value,
    /// The wanted value.
    to: Value,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |value: &Value| match value {
            Value::Null => "(none)".to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        write!(f, "{}: {} -> {}", self.path, text(&self.from), text(&self.to))
    }
}

/// The members of two specifications that differ, by place. Specifications bound the depth.
pub(super) fn differences<T: Serialize>(from: &T, to: &T) -> Vec<Difference> {
    let mut found = Vec::new();
    // A specification from the API can be written again.
    let value = |spec: &T| serde_json::to_value(spec).unwrap_or_default();
    compare(String::new(), &value(from), &value(to), &mut found);
    found
}

fn compare(path: String, from: &Value, to: &Value, found: &mut Vec<Difference>) {
    match (from, to) {
        _ if from == to => {}
        (Value::Object(old), Value::Object(new)) => {
            let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
            for name in names {
                let place = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                let member = |of: &serde_json::Map<String, Value>| of.get(name).cloned().unwrap_or_default();
                compare(place, &member(old), &member(new), found);
            }
        }
        (Value::Array(old), Value::Array(new)) if old.iter().chain(new).all(Value::is_object) => {
            for n in 0..old.len().max(new.len()) {
                let item = |of: &[Value]| of.get(n).cloned().unwrap_or_default();
                compare(format!("{path}[{n}]"), &item(old), &item(new), found);
            }
        }
        _ => found.push(Difference { path, from: from.clone(), to: to.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_member_that_differs_is_named() {
        for (from, to, expect) in [
            (json!({"a": 1}), json!({"a": 1}), vec![]),
            (json!({"a": 1}), json!({"a": 2}), vec!["a: 1 -> 2"]),
            (
                json!({"a": {"b": "x"}}),
                json!({"a": {"b": "y", "c": true}}),
                vec!["a.b: x -> y", "a.c: (none) -> true"],
            ),
            (json!({"a": [1, 2]}), json!({"a": [1]}), vec!["a: [1,2] -> [1]"]),
            (
                json!({"a": [{"id": "eth0"}]}),
                json!({"a": [{"id": "eth0", "vf": "v"}, {"id": "eth1"}]}),
                vec!["a[0].vf: (none) -> v", "a[1]: (none) -> {\"id\":\"eth1\"}"],
            ),
            (json!({"a": [{"id": "x"}]}), json!({"a": []}), vec!["a[0]: {\"id\":\"x\"} -> (none)"]),
            (json!({"a": {"b": 1}}), json!({}), vec!["a: {\"b\":1} -> (none)"]),
        ] {
            let found: Vec<String> = differences(&from, &to).iter().map(ToString::to_string).collect();
            assert_eq!(found, expect);
        }
    }
}
