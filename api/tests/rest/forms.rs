// SPDX-License-Identifier: Apache-2.0

//! Documents of a wrong form: a list in place of an object, an object in place of a word.

use hyper::Method;
use serde_json::{Value, json};

use crate::{Server, spec};

/// Every object of a document, by its JSON pointer.
fn objects(value: &Value, at: &str, all: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            all.push(at.to_owned());
            members.iter().for_each(|(name, value)| objects(value, &format!("{at}/{name}"), all));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(n, item)| objects(item, &format!("{at}/{n}"), all));
        }
        _ => {}
    }
}

/// The field of a problem with the value at this pointer.
fn field(pointer: &str) -> String {
    let place = |part: &str| match part.parse::<usize>() {
        Ok(index) => format!("[{index}]"),
        Err(_) => format!(".{part}"),
    };
    let path: String = pointer.split('/').skip(1).map(place).collect();
    if path.is_empty() { "body".to_owned() } else { path.trim_start_matches('.').to_owned() }
}

/// Settings with every form that is an object.
fn settings() -> Vec<Value> {
    vec![
        json!({ "vlan": { "access": { "id": 100, "qos": 3 } }, "rate": { "max_tx_mbit": 100 } }),
        json!({ "vlan": { "trunk": [7, "100-200"] }, "mac_changes": { "list": ["02:00:00:00:00:01"] } }),
    ]
}

/// Each request with a body, with valid documents. They have every object that such a document can have.
fn requests(port: &str) -> Vec<(Method, String, Vec<Value>)> {
    let mut vm = spec("web2");
    vm["limits"] = json!({ "cpu_percent": 150, "cpu_weight": 50, "memory": "1088MiB" });
    let mut changes = vm.clone();
    changes["name"] = json!("web1");
    let with = |members: Value| {
        settings()
            .into_iter()
            .map(|settings| {
                let mut document = members.clone();
                document["settings"] = settings;
                document
            })
            .collect::<Vec<_>>()
    };
    let group = json!({ "switch": "lan", "port_overrides": ["mtu"] });
    vec![
        (Method::POST, "/v1/vms".to_owned(), vec![vm]),
        (Method::PUT, "/v1/vms/web1".to_owned(), vec![changes.clone()]),
        (Method::PATCH, "/v1/vms/web1".to_owned(), vec![changes]),
        (Method::POST, "/v1/vms/web1/clone".to_owned(), vec![json!({ "name": "web3" })]),
        (Method::PUT, "/v1/pfs/eth0/vfs".to_owned(), vec![json!({ "count": 2 })]),
        (
            Method::PUT,
            "/v1/switches/lan".to_owned(),
            with(json!({ "kind": "standard", "uplinks": ["eth0"] })),
        ),
        (Method::PUT, "/v1/port-groups/web".to_owned(), with(group.clone())),
        (Method::PATCH, "/v1/port-groups/web".to_owned(), with(group)),
        (Method::PATCH, format!("/v1/ports/{port}"), with(json!({}))),
    ]
}

/// Serde reads a struct from a list, too: its values in the order of the members. The API's document has no such form, and a
/// new member would change the list's meaning.
#[tokio::test]
async fn a_list_in_place_of_an_object_is_refused_with_its_field() {
    let server = Server::start();
    server.vm("web1").await;
    let port = server.policy.attach("web1").id.to_string();
    let headers = [("content-type", "application/json")];
    let mut refused = 0;
    for (method, path, documents) in requests(&port) {
        for document in documents {
            let mut places = Vec::new();
            objects(&document, "", &mut places);
            for pointer in places {
                let mut wrong = document.clone();
                let place = wrong.pointer_mut(&pointer).unwrap();
                *place = place.as_object().unwrap().values().cloned().collect();
                let answer = server.send(method.clone(), &path, &headers, wrong.to_string()).await;
                let what = format!("{method} {path} {wrong}");
                assert_eq!(answer.status, 400, "{what}: {:?}", answer.body);
                let problem = answer.problem(400, "invalid_request");
                assert_eq!(problem["field"], field(&pointer), "{what}: {problem}");
                let detail = problem["detail"].as_str().unwrap();
                let expect = if pointer.is_empty() { "object" } else { "list, expected " };
                assert!(detail.contains(expect), "{what}: {detail}");
                for word in ["struct", "enum", "sequence", "Spec", "element"] {
                    assert!(!detail.contains(word), "{word}, {what}: {detail}");
                }
                refused += 1;
            }
            let answer = server.send(method.clone(), &path, &headers, document.to_string()).await;
            assert!(answer.status < 300, "{method} {path} {document}: {:?}", answer.body);
        }
    }
    assert!(refused >= 40, "{refused}");
}

#[tokio::test]
async fn a_value_of_another_form_is_refused_with_the_forms_that_there_are() {
    let server = Server::start();
    let headers = [("content-type", "application/json")];
    for (member, value, expect) in [
        (
            "vlan",
            json!(true),
            r#"expected "none", 100, {"access": {"id": 100}} or {"trunk": [7, "100-200"]}."#,
        ),
        ("vlan", json!(0), "settings.vlan: VLAN 0 does not exist: use 1 to 4094."),
        ("vlan", json!(4095), "settings.vlan: VLAN 4095 does not exist: use 1 to 4094."),
        ("vlan", json!(-1), "settings.vlan: VLAN -1 does not exist: use 1 to 4094."),
        ("vlan", json!(1.5), r#"floating point `1.5`, expected "none", 100, {"#),
        ("vlan", json!("100"), "unknown variant `100`, expected one of `none`, `access`, `trunk`"),
        ("vlan", json!({ "access": 100 }), "vlan.access: invalid type: integer `100`, expected an object"),
        ("vlan", json!("access"), r#"`access` must be an object here: {"access": …}."#),
        ("vlan", json!({ "none": null }), r#"`none` must be a text here: "none"."#),
        ("vlan", json!({}), r#"an object with 0 members, expected "none", 100, {"#),
        ("vlan", json!({ "access": { "id": 1 }, "trunk": [1] }), "an object with 2 members, expected"),
        ("vlan", json!({ "trunk": "1-5" }), "vlan.trunk: invalid type: string \"1-5\", expected a list"),
        ("rate", json!(100), r#"integer `100`, expected "unlimited" or {"max_tx_mbit": 100}."#),
        ("mac_changes", json!(["02:00:00:00:00:01"]), r#"list, expected "reject", "accept" or {"list": ["#),
        ("mac_changes", json!(null), ""),
        ("forged_transmits", json!(1), "integer `1`, expected `reject` or `accept`."),
        ("forged_transmits", json!(true), "boolean `true`, expected `reject` or `accept`."),
        ("promiscuous", json!("some"), "unknown variant `some`, expected one of `reject`, `multicast`"),
        ("blocked", json!("yes"), "expected a boolean"),
        ("mtu", json!("9000"), "string \"9000\", expected a whole number"),
        ("mtu", json!(1500.5), "floating point `1500.5`, expected a whole number"),
    ] {
        let body = json!({ "settings": { member: value } }).to_string();
        let answer = server.send(Method::PUT, "/v1/switches/lan", &headers, body.clone()).await;
        if expect.is_empty() {
            assert!(answer.status < 300, "{body}: {:?}", answer.body);
            continue;
        }
        let problem = answer.problem(400, "invalid_request");
        assert!(problem["detail"].as_str().unwrap().contains(expect), "{body}: {problem}");
        assert!(problem["field"].as_str().unwrap().starts_with(&format!("settings.{member}")), "{problem}");
    }
}

/// The number of a VLAN means an access VLAN in each call that has settings. Every response has the one form that clients know.
#[tokio::test]
async fn a_vlan_may_be_its_number_and_is_answered_in_the_long_form() {
    let server = Server::start();
    server.vm("web1").await;
    let port = server.policy.attach("web1").id.to_string();
    let headers = [("content-type", "application/json")];
    let group = |vlan: Value| json!({ "switch": "lan", "settings": { "vlan": vlan, "mtu": 9000 } });
    let long = json!({ "access": { "id": 100 } });
    for (method, path, document) in [
        (
            Method::PUT,
            "/v1/switches/lan".to_owned(),
            json!({ "uplinks": ["eth0"], "settings": { "vlan": 100 } }),
        ),
        (Method::PUT, "/v1/port-groups/web".to_owned(), group(json!(100))),
        (Method::PUT, "/v1/port-groups/web".to_owned(), group(json!({ "access": { "id": 5, "qos": 3 } }))),
        (Method::PATCH, "/v1/port-groups/web".to_owned(), json!({ "settings": { "vlan": 100 } })),
        (Method::PATCH, format!("/v1/ports/{port}"), json!({ "settings": { "vlan": 100 } })),
    ] {
        let answer = server.send(method.clone(), &path, &headers, document.to_string()).await;
        assert!(answer.status < 300, "{method} {path} {document}: {:?}", answer.body);
        let vlan = |answer: &Value| answer["spec"]["settings"]["vlan"].clone();
        let expect = if document.to_string().contains("qos") {
            json!({ "access": { "id": 5, "qos": 3 } })
        } else {
            long.clone()
        };
        assert_eq!(vlan(&answer.json()), expect, "{method} {path}");
        let read = server.send(Method::GET, &path, &[], String::new()).await;
        assert_eq!(vlan(&read.json()), expect, "{path}");
    }
}
