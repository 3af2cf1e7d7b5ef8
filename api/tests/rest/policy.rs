// SPDX-License-Identifier: Apache-2.0

//! Switches, port groups, ports, decisions and events.

use api::{ProblemCode, types::*};
use hyper::Method;
use serde_json::json;
use uuid::Uuid;

use crate::Server;

async fn put(server: &Server, path: &str, body: serde_json::Value) -> crate::Answer {
    server.send(Method::PUT, path, &[("content-type", "application/json")], body.to_string()).await
}

async fn patch(
    server: &Server,
    path: &str,
    if_match: Option<&str>,
    body: serde_json::Value,
) -> crate::Answer {
    let mut headers = vec![("content-type", "application/merge-patch+json")];
    headers.extend(if_match.map(|value| ("if-match", value)));
    server.send(Method::PATCH, path, &headers, body.to_string()).await
}

#[tokio::test]
async fn a_switch_is_put_shown_and_deleted() {
    let server = Server::start();
    let spec = json!({ "uplinks": ["eth0"], "settings": { "mac_changes": "accept" } });
    let made = put(&server, "/v1/switches/lan", spec.clone()).await;
    assert_eq!((made.status, made.header("etag")), (201, Some("\"1\"")));
    let expect = json!({ "kind": "standard", "uplinks": ["eth0"], "settings": { "mac_changes": "accept" } });
    assert_eq!(made.json()["spec"], expect);
    let by_id = format!("/v1/switches/{}", made.json()["id"].as_str().unwrap());
    assert_eq!(put(&server, &by_id, spec.clone()).await.json()["revision"], 2, "PUT takes an id too");
    assert_eq!(server.get("/v1/switches").await.json()["items"][0]["name"], "lan");
    put(&server, "/v1/switches/L%20AN", spec.clone()).await.problem(400, "invalid_request");
    put(&server, &format!("/v1/switches/{}", Uuid::new_v4()), spec).await.problem(404, "not_found");
    let wrong = json!({ "settings": { "mtu": 10 } });
    let problem = put(&server, "/v1/switches/lan", wrong).await.problem(400, "invalid_request");
    assert_eq!(problem["field"], "settings.mtu");

    put(&server, "/v1/port-groups/web", json!({ "switch": "lan" })).await;
    server.send(Method::DELETE, "/v1/switches/lan", &[], "").await.problem(409, "switch_in_use");
    assert_eq!(server.send(Method::DELETE, "/v1/port-groups/web", &[], "").await.status, 204);
    let old = [("if-match", "\"1\"")];
    server.send(Method::DELETE, "/v1/switches/lan", &old, "").await.problem(412, "revision_mismatch");
    assert_eq!(server.send(Method::DELETE, "/v1/switches/lan", &[], "").await.status, 204);
    server.get("/v1/switches/lan").await.problem(404, "not_found");
}

#[tokio::test]
async fn if_match_with_a_star_replaces_and_does_not_create() {
    let server = Server::start();
    for (path, spec) in [("/v1/switches/lan", json!({})), ("/v1/port-groups/web", json!({ "switch": "lan" }))]
    {
        let star = [("if-match", "*"), ("content-type", "application/json")];
        server.send(Method::PUT, path, &star, spec.to_string()).await.problem(404, "not_found");
        assert_eq!(put(&server, path, spec.clone()).await.status, 201);
        assert_eq!(server.send(Method::PUT, path, &star, spec.to_string()).await.status, 200);
    }
}

#[tokio::test]
async fn a_port_group_is_patched_by_merging() {
    let server = Server::start();
    let spec =
        json!({ "switch": "lan", "settings": { "mtu": 9000, "vlan": { "access": { "id": 10, "qos": 3 } } } });
    put(&server, "/v1/port-groups/web", spec).await;
    let change = json!({ "settings": { "mtu": null, "mac_changes": { "list": ["02:00:00:00:00:01"] } } });
    let answer = patch(&server, "/v1/port-groups/web", None, change).await;
    let settings = answer.json()["spec"]["settings"].take();
    assert_eq!((answer.status, answer.header("etag")), (200, Some("\"2\"")));
    assert_eq!(settings["vlan"], json!({ "access": { "id": 10, "qos": 3 } }), "what is not named stays");
    assert!(settings.get("mtu").is_none() && settings["mac_changes"]["list"].is_array(), "{settings}");

    for (body, field) in [
        (json!({ "settings": { "mtu": 1 } }), "settings.mtu"),
        (json!({ "setings": {} }), "setings"),
        (json!({ "switch": null }), "body"),
        (json!([1]), "body"),
    ] {
        let problem = patch(&server, "/v1/port-groups/web", None, body).await.problem(400, "invalid_request");
        assert_eq!(problem["field"], field, "{problem}");
    }
    patch(&server, "/v1/port-groups/nothing", None, json!({})).await.problem(404, "not_found");
}

#[tokio::test]
async fn patches_that_race_are_tried_again_unless_a_revision_was_named() {
    let server = Server::start();
    put(&server, "/v1/port-groups/web", json!({ "switch": "lan" })).await;
    let blocked = json!({ "settings": { "blocked": true } });
    server.policy.state().races = 4;
    let answer = patch(&server, "/v1/port-groups/web", None, blocked.clone()).await;
    assert_eq!((answer.status, &answer.json()["revision"]), (200, &json!(6)));
    server.policy.state().races = 5;
    patch(&server, "/v1/port-groups/web", None, blocked.clone()).await.problem(412, "revision_mismatch");
    let revision = server.get("/v1/port-groups/web").await.header("etag").unwrap().to_owned();
    server.policy.state().races = 1;
    patch(&server, "/v1/port-groups/web", Some(&revision), blocked).await.problem(412, "revision_mismatch");
}

#[tokio::test]
async fn a_port_is_blocked_by_id_or_name() {
    let server = Server::start();
    let port = server.policy.attach("web1");
    for path in [format!("/v1/ports/{}", port.id), "/v1/ports/web1%2Feth0".to_owned()] {
        assert_eq!(server.get(&path).await.json(), serde_json::to_value(&port).unwrap());
    }
    assert_eq!(server.get("/v1/ports").await.json()["items"].as_array().unwrap().len(), 1);
    let shown = serde_json::to_value(&port).unwrap();
    assert_eq!(shown["status"]["policy"]["mac_changes"], json!({ "value": "reject", "source": "default" }));
    let path = format!("/v1/ports/{}", port.id);
    let answer = patch(&server, &path, Some("\"0\""), json!({ "settings": { "blocked": true } })).await;
    assert_eq!(answer.json()["spec"], json!({ "settings": { "blocked": true } }));
    patch(&server, &path, Some("\"0\""), json!({})).await.problem(412, "revision_mismatch");
}

#[tokio::test]
async fn decisions_are_filtered() {
    let server = Server::start();
    let port = Uuid::new_v4();
    let query = format!("vm=web1&port={port}&verdict=denied&since=2026-01-31T12:00:00Z&limit=5");
    assert_eq!(server.get(&format!("/v1/decisions?{query}")).await.json(), json!({ "items": [] }));
    let expect = DecisionFilter {
        vm: Some("web1".into()),
        port: Some(port),
        verdict: Some(netpolicy::Outcome::Denied),
        since: Some("2026-01-31T12:00:00Z".parse().unwrap()),
        limit: 5,
        cursor: None,
    };
    server.client().decisions(&expect).await.unwrap();
    server.client().decisions(&DecisionFilter::default()).await.unwrap();
    // One more than requested, to know whether there is another page.
    let asked = [expect.clone(), expect, DecisionFilter::default()];
    let asked = asked.map(|filter| DecisionFilter { limit: filter.limit + 1, ..filter });
    assert_eq!(server.policy.state().filters, asked);
    for query in ["limit=0", "limit=1001", "verdict=maybe", "since=yesterday", "port=1", "vn=a"] {
        server.get(&format!("/v1/decisions?{query}")).await.problem(400, "invalid_request");
    }
}

#[tokio::test]
async fn the_client_follows_pages() {
    let server = Server::start();
    for n in 0..2 * MAX_PAGE + 1 {
        server.policy.attach(&format!("vm{n}"));
    }
    let first = server.get("/v1/ports").await.json();
    assert_eq!(first["items"].as_array().unwrap().len(), 1000, "a page is bounded");
    let ports = server.client().list_ports().await.unwrap();
    let mut names: Vec<_> = ports.iter().map(|port| port.name.clone()).collect();
    assert!(names.is_sorted());
    names.dedup();
    assert_eq!(names.len(), 2001);
}

fn event(id: u64) -> Event {
    let vm = Owner { vm: Uuid::new_v4(), name: "web\n1".into(), adapter: None };
    let what = EventKind::VmState { vm, state: VmState::Running, cause: None };
    Event { id, time: Timestamp::from_unix_ms(1), what }
}

#[tokio::test]
async fn events_are_streamed_and_resumed() {
    let server = Server::start();
    let mut events = server.client().events(Some(41)).await.unwrap();
    let (after, sender) = server.policy.state().subscribers.pop().unwrap();
    assert_eq!(after, Some(41));
    for sent in [event(42), event(43), Event { what: EventKind::Gap, ..event(44) }] {
        sender.send(sent.clone()).await.unwrap();
        assert_eq!(events.next().await.unwrap(), Some(sent));
    }
    drop(sender);
    assert_eq!(events.next().await.unwrap(), None);

    let answer = server.send(Method::GET, "/v1/events", &[("last-event-id", "x")], "").await;
    answer.problem(400, "invalid_request");
}

#[tokio::test]
async fn events_on_the_wire_have_id_and_kind() {
    let server = Server::start();
    let answer = tokio::join!(server.get("/v1/events"), async {
        loop {
            let subscriber = server.policy.state().subscribers.pop();
            if let Some((None, sender)) = subscriber {
                break sender.send(event(7)).await.unwrap();
            }
            tokio::task::yield_now().await;
        }
    })
    .0;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let text = String::from_utf8(answer.body.to_vec()).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert!(lines.contains(&"id: 7") && lines.contains(&"event: vm_state"), "{text}");
    let data = lines.iter().find_map(|line| line.strip_prefix("data: ")).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(data).unwrap()["event"], "vm_state");
}

#[tokio::test]
async fn the_client_round_trips() {
    let server = Server::start();
    let client = server.client();
    let switch = client.put_switch("lan", &SwitchSpec::default(), None).await.unwrap();
    assert!(switch.created);
    assert!(!client.put_switch("lan", &SwitchSpec::default(), Some(1)).await.unwrap().created);
    assert_eq!(client.list_switches().await.unwrap(), [client.get_switch("lan").await.unwrap()]);
    let spec = PortGroupSpec {
        switch: "lan".parse().unwrap(),
        settings: netpolicy::Settings::default(),
        port_overrides: [netpolicy::Setting::Mtu].into(),
    };
    let group = client.put_port_group("web", &spec, None).await.unwrap().object;
    assert_eq!(group.spec, spec);
    let patched = client.patch_port_group("web", &json!({ "port_overrides": [] }), Some(1)).await.unwrap();
    assert!(patched.spec.port_overrides.is_empty());
    assert_eq!(client.list_port_groups().await.unwrap(), [client.get_port_group("web").await.unwrap()]);
    let port = server.policy.attach("web1");
    assert_eq!(client.list_ports().await.unwrap(), [client.get_port("web1/eth0").await.unwrap()]);
    let patched =
        client.patch_port(&port.id.to_string(), &json!({ "settings": { "mtu": 1400 } }), None).await;
    assert_eq!(patched.unwrap().spec.settings.mtu.map(|mtu| mtu.get()), Some(1400));
    client.delete_port_group("web", Some(2)).await.unwrap();
    client.delete_switch("lan", None).await.unwrap();
    let error = client.delete_switch("lan", None).await.unwrap_err();
    assert_eq!(error.problem().unwrap().code, ProblemCode::NotFound);
}
