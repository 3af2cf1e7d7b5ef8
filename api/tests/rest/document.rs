// SPDX-License-Identifier: Apache-2.0

//! The OpenAPI document.

use std::{fs, path::Path};

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

    // Every operation: exists (no answer of the fallbacks) and says that it can answer with a problem.
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
            let problem =
                &operation["responses"]["default"]["content"]["application/problem+json"]["schema"]["$ref"];
            assert_eq!(problem, "#/components/schemas/Problem", "{method} {path}");
            for (status, response) in operation["responses"].as_object().unwrap() {
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

    // No reference without its target.
    let text = document.to_string();
    for reference in text.split("\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(
            document["components"]["schemas"].get(name).is_some(),
            "{name} is referred to, but not there"
        );
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
        assert!(response["headers"]["x-request-id"]["schema"].is_object(), "{what}: {status}");
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

/// `docs/errors.md` is what the code says of each code. `BLESS=1 cargo test -p api` writes it.
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

/// Asserts that a problem is one of those that the document has for this operation. Every answer in these tests is held
/// against it.
pub(crate) fn knows(method: &hyper::Method, path: &str, answer: &Answer) {
    let Ok(problem) = serde_json::from_slice::<api::Problem>(&answer.body) else { return };
    let document = api::openapi();
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
    let known = match operation.responses.responses.get(&answer.status.to_string()) {
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
