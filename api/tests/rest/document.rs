// SPDX-License-Identifier: Apache-2.0

//! The OpenAPI document.

use std::{fs, path::Path, sync::LazyLock};

use serde_json::Value;
use utoipa::openapi::RefOr;

use crate::{Answer, Server};

/// The document in `resources/` is the one that the code generates. `BLESS=1 cargo test -p api` writes it.
#[test]
fn the_document_in_resources_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/openapi.json");
    let generated = api::openapi().to_pretty_json().unwrap() + "\n";
    if std::env::var_os("BLESS").is_some() {
        fs::write(&path, &generated).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == generated,
        "resources/openapi.json has drifted: BLESS=1 cargo test -p api writes it anew"
    );
}

#[tokio::test]
async fn the_served_document_describes_what_is_served() {
    let server = Server::start();
    let answer = server.get("/v1/openapi.json").await;
    let document = answer.json();
    assert_eq!(document, serde_json::to_value(api::openapi()).unwrap());

    // Every operation exists (no response of the fallbacks) and has a problem among its responses.
    let mut operations = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            if path == "/v1/events" {
                operations += 1;
                continue; // Its answer has no end; its own test reads it.
            }
            let method = method.to_uppercase().parse::<hyper::Method>().unwrap();
            let answer = server
                .send(method.clone(), &path.replace("{name}", "nothing").replace("{id}", "nothing"), &[], "")
                .await;
            let of_fallback = String::from_utf8_lossy(&answer.body).contains("/v1/openapi.json");
            assert!(answer.status != 405 && !of_fallback, "{method} {path}");
            let default = resolved(&document, &operation["responses"]["default"]);
            let problem = &default["content"]["application/problem+json"]["schema"]["$ref"];
            assert_eq!(problem, "#/components/schemas/Problem", "{method} {path}");
            for (status, response) in operation["responses"].as_object().unwrap() {
                let response = resolved(&document, response);
                assert!(response["description"].is_string(), "{method} {path}: {status}");
            }
            examples(&document, operation, &format!("{method} {path}"));
            for text in ["summary", "description"] {
                assert!(
                    operation[text].as_str().is_some_and(|text| text.len() > 10),
                    "{method} {path}: {text}"
                );
            }
            operations += 1;
        }
    }
    assert!(operations >= 30, "{operations}");

    // Each reference has a target.
    let text = document.to_string();
    for reference in text.split("\"#/components/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(
            document.pointer(&format!("/components/{name}")).is_some(),
            "{name} is referred to, but not there"
        );
    }
}

/// The target of a reference, or the value itself.
fn resolved<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    let reference = value["$ref"].as_str().and_then(|reference| reference.strip_prefix('#'));
    reference.map_or(value, |pointer| document.pointer(pointer).unwrap())
}

/// Generators make a type of each component, and another one of each schema that is written out in place of a reference.
#[test]
fn the_document_is_one_that_clients_can_be_generated_from() {
    let document = serde_json::to_value(api::openapi()).unwrap();
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let mut lists = 0;
    for (name, schema) in schemas {
        if let Some(item) = name.strip_prefix("List_") {
            let items = &schema["properties"]["items"]["items"];
            assert_eq!(items["$ref"], format!("#/components/schemas/{item}"), "{name}");
            lists += 1;
        }
    }
    assert_eq!(lists, 7);

    // An object, not a choice or a sum of objects.
    let event = &schemas["Event"];
    assert_eq!((&event["type"], event.get("allOf"), event.get("oneOf")), (&"object".into(), None, None));
    assert_eq!(event["required"], serde_json::json!(["id", "time", "event"]));

    assert_eq!(document["components"]["securitySchemes"]["token"]["scheme"], "bearer");
    assert_eq!(document["security"], serde_json::json!([{}, { "token": [] }]));

    // Problems are components, each there once.
    let responses = document["components"]["responses"].as_object().unwrap();
    for (name, response) in responses {
        assert_eq!(responses.values().filter(|other| *other == response).count(), 1, "{name}");
    }
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            for (status, response) in operation["responses"].as_object().unwrap() {
                let what = format!("{method} {path} {status}");
                assert_eq!(status.starts_with('2'), response.get("$ref").is_none(), "{what}");
            }
            if method == "patch" {
                let body = &operation["requestBody"]["content"]["application/merge-patch+json"]["schema"];
                assert!(body["$ref"].as_str().is_some_and(|name| name.ends_with("Patch")), "{path}: {body}");
            }
        }
    }
    let length = api::openapi().to_pretty_json().unwrap().len();
    assert!(length < 375_000, "{length} bytes: what is repeated?");
}

/// Descriptions are for users of the API: no links of rustdoc, no names of Rust's types, no notes on the code.
#[test]
fn descriptions_are_not_notes_on_the_code() {
    fn texts<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(members) => members.iter().for_each(|(name, value)| match value {
                Value::String(text) if ["description", "summary", "title"].contains(&&**name) => {
                    found.push(text)
                }
                _ => texts(value, found),
            }),
            Value::Array(items) => items.iter().for_each(|item| texts(item, found)),
            _ => {}
        }
    }
    let document = serde_json::to_value(api::openapi()).unwrap();
    let mut found = Vec::new();
    texts(&document, &mut found);
    assert!(found.len() > 300, "{}", found.len());
    for text in found {
        for wrong in ["[`", "::", "None", "Some(", "Boxed", " struct", " enum", "Option", "serde", "?.", ".."]
        {
            assert!(!text.contains(wrong), "{wrong:?} in a public text: {text}");
        }
    }
}

/// Every body has an example, every problem one for each of its codes, and every answer the request's id.
fn examples(document: &Value, operation: &Value, what: &str) {
    if let Some(contents) = operation["requestBody"]["content"].as_object() {
        for (kind, content) in contents {
            assert!(!content["example"].is_null(), "{what} has no example of the {kind} that it takes");
            has_members(document, &content["schema"], &content["example"], what);
        }
    }
    for (status, response) in operation["responses"].as_object().unwrap() {
        let response = resolved(document, response);
        let header = resolved(document, &response["headers"]["x-request-id"]);
        assert!(header["schema"].is_object(), "{what}: {status}");
        for (kind, content) in response["content"].as_object().into_iter().flatten() {
            if kind != "application/problem+json" {
                assert!(!content["example"].is_null(), "{what} has no example of {status}");
                has_members(document, &content["schema"], &content["example"], what);
                continue;
            }
            let codes: Vec<_> =
                response["description"].as_str().unwrap().split('`').skip(1).step_by(2).collect();
            assert_eq!(status == "default", codes.is_empty(), "{what}: {status} names its codes");
            for code in codes {
                let example = &content["examples"][code]["value"];
                let problem: api::Problem = serde_json::from_value(example.clone()).unwrap();
                assert_eq!(
                    (problem.code.as_str(), &*problem.status.to_string()),
                    (code, &**status),
                    "{what}"
                );
            }
        }
    }
}

/// The members of an example of an object are those of its schema.
fn has_members(document: &Value, schema: &Value, example: &Value, what: &str) {
    let name = schema["$ref"].as_str().map(|reference| reference.rsplit('/').next().unwrap());
    let schema = name.map_or(schema, |name| &document["components"]["schemas"][name]);
    let (Some(known), Some(example)) = (schema["properties"].as_object(), example.as_object()) else {
        return;
    };
    for required in schema["required"].as_array().into_iter().flatten() {
        assert!(example.contains_key(required.as_str().unwrap()), "{what}: {required} is missing");
    }
    for (member, value) in example {
        let schema = known.get(member).unwrap_or_else(|| panic!("{what}: {member}"));
        has_members(document, schema, value, what);
        if let (Some(items), Some(values)) = (schema.get("items"), value.as_array()) {
            values.iter().for_each(|value| has_members(document, items, value, what));
        }
    }
}

/// `docs/errors.md` has the texts of the code. `BLESS=1 cargo test -p api` writes it.
#[test]
fn the_errors_in_the_docs_are_those_of_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/errors.md");
    let kept = fs::read_to_string(&path).unwrap();
    let mut text = String::new();
    let mut skipping = false;
    for line in kept.lines() {
        skipping &= line.starts_with('|');
        if skipping {
            continue;
        }
        text.push_str(line);
        text.push('\n');
        // The tables follow these lines.
        let rows: Vec<String> = match line {
            "<!-- problems -->" => {
                ["code | status | meaning | cause | cure".to_owned(), ["---"; 5].join(" | ")]
                    .into_iter()
                    .chain(api::ProblemCode::ALL.iter().map(|code| {
                        let (name, status) = (code.as_str(), code.status());
                        format!("`{name}` | {status} | {} | {} | {}", code.title(), code.cause(), code.cure())
                    }))
                    .collect()
            }
            "<!-- causes -->" => ["code | meaning | cure".to_owned(), ["---"; 3].join(" | ")]
                .into_iter()
                .chain(
                    api::types::CauseCode::ALL
                        .map(|code| format!("`{}` | {} | {}", code.as_str(), code.meaning(), code.cure())),
                )
                .collect(),
            _ => continue,
        };
        rows.iter().for_each(|row| text.push_str(&format!("| {row} |\n")));
        skipping = true;
    }
    if std::env::var_os("BLESS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    assert!(text.matches("\n| `").count() == api::ProblemCode::ALL.len() + api::types::CauseCode::ALL.len());
    assert!(
        fs::read_to_string(&path).unwrap() == text,
        "docs/errors.md has drifted: BLESS=1 cargo test -p api writes it anew"
    );
}

/// Asserts that the document has the problem for this operation. These tests check every response with it.
pub(crate) fn knows(method: &hyper::Method, path: &str, answer: &Answer) {
    let Ok(problem) = serde_json::from_slice::<api::Problem>(&answer.body) else { return };
    // The document takes long to make, and some tests have a hundred requests.
    static DOCUMENT: LazyLock<utoipa::openapi::OpenApi> = LazyLock::new(api::openapi);
    let document = &*DOCUMENT;
    let parts: Vec<&str> = path.split('?').next().unwrap().split('/').collect();
    let same = |template: &str| {
        let template: Vec<&str> = template.split('/').collect();
        let fits = |(part, wanted): (&&str, &&str)| part == wanted || wanted.starts_with('{');
        template.len() == parts.len() && parts.iter().zip(&template).all(fits)
    };
    let Some((_, item)) = document.paths.paths.iter().find(|(template, _)| same(template)) else { return };
    let operation = match method.as_str() {
        "GET" => &item.get,
        "PUT" => &item.put,
        "POST" => &item.post,
        "PATCH" => &item.patch,
        "DELETE" => &item.delete,
        _ => return,
    };
    let Some(operation) = operation else { return };
    let responses = &document.components.as_ref().unwrap().responses;
    let known = match operation.responses.responses.get(&answer.status.to_string()) {
        Some(RefOr::Ref(reference)) => responses.get(reference.ref_location.rsplit('/').next().unwrap()),
        other => other,
    };
    let known = match known {
        Some(RefOr::T(response)) => response.description.as_str(),
        _ => "",
    };
    assert!(
        known.contains(&format!("`{}`", problem.code)),
        "{method} {path} answers {} {}: add it in codes.rs ({known})",
        answer.status,
        problem.code
    );
}
