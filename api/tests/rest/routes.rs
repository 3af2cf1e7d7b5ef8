// SPDX-License-Identifier: Apache-2.0

//! Each route: its success and its main errors, as bytes on the wire.

use hyper::Method;
use serde_json::{Value, json};

use api::{Problem, ProblemCode};

use crate::{Answer, Server, spec};

#[tokio::test]
async fn a_vm_is_created_shown_listed_and_deleted() {
    let server = Server::start();
    let created = server.post("/v1/vms", spec("web1").to_string()).await;
    let vm = created.json();
    assert_eq!((created.status, created.header("etag")), (201, Some("\"3\"")));
    assert_eq!(created.header("location"), Some(format!("/v1/vms/{}", vm["id"].as_str().unwrap()).as_str()));
    assert_eq!(vm["spec"], spec("web1"), "what was asked comes back as it was written");
    assert_eq!(vm["status"]["state"], "defined");

    for path in ["/v1/vms/web1".to_owned(), created.header("location").unwrap().to_owned()] {
        let shown = server.get(&path).await;
        assert_eq!((shown.status, shown.header("etag"), shown.json()), (200, Some("\"3\""), vm.clone()));
    }
    assert_eq!(server.get("/v1/vms").await.json(), json!({ "items": [vm] }));

    server.post("/v1/vms", spec("web1").to_string()).await.problem(409, "name_taken");
    let deleted = server.send(Method::DELETE, "/v1/vms/web1", &[], "").await;
    assert_eq!((deleted.status, deleted.body.len()), (204, 0));
    server.get("/v1/vms/web1").await.problem(404, "not_found");
    assert_eq!(server.get("/v1/vms").await.json(), json!({ "items": [] }));
}

#[tokio::test]
async fn the_backend_learns_who_calls() {
    let server = Server::start();
    server.vm("web1").await;
    let caller = server.fake.state().callers[0].clone();
    let api::Caller::User(user) = caller else { panic!("{caller}") };
    assert_eq!(user.pid, i32::try_from(std::process::id()).ok());
    // The owner of a file that this process made is this process's user.
    let owner = std::os::unix::fs::MetadataExt::uid(&server.directory.path().metadata().unwrap());
    assert_eq!(user.uid, owner);
}

#[tokio::test]
async fn what_is_left_out_has_its_default() {
    let server = Server::start();
    let least = json!({ "name": "a", "memory": 4194304, "boot": { "kernel": "k" } });
    let spec = server.post("/v1/vms", least.to_string()).await.json()["spec"].take();
    let expect = json!({ "name": "a", "cpus": 1, "memory": "4MiB", "hugepages": false,
        "boot": { "kernel": "k" }, "adapters": [], "devices": [] });
    assert_eq!(spec, expect);
}

/// A specification with the value at this JSON pointer replaced.
fn with(pointer: &str, value: Value) -> String {
    let mut spec = spec("web1");
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match spec.pointer_mut(parent).unwrap() {
        Value::Array(items) => items[key.parse::<usize>().unwrap()] = value,
        parent => parent[key] = value,
    }
    spec.to_string()
}

#[tokio::test]
async fn a_wrong_specification_is_refused_with_its_field() {
    let server = Server::start();
    for (body, field, word) in [
        (with("/name", json!("Web 1")), "name", "a-z"),
        (with("/name", json!(1)), "name", "string"),
        (with("/cpus", json!(0)), "cpus", "254"),
        (with("/cpus", json!(255)), "cpus", "254"),
        (with("/cpus", json!(256)), "cpus", "256 is not a number of vCPUs from 1 to 254."),
        (with("/cpus", json!(-1)), "cpus", "-1 is not a number of vCPUs from 1 to 254."),
        (with("/limits", json!({ "cpu_weight": 70_000 })), "limits.cpu_weight", "from 1 to 10000."),
        (with("/limits", json!({ "cpu_percent": 5_000_000_000_u64 })), "limits.cpu_percent", "to 100000."),
        (with("/name", json!("x".repeat(90) + "/")), "name", "xxx…\" is not a name"),
        (with("/memory", json!("512MB")), "memory", "MiB"),
        (with("/memory", json!("1MiB")), "memory", "2MiB"),
        (with("/memory", json!(0)), "memory", "above 0"),
        (with("/memory", json!(-1)), "memory", "512MiB"),
        (with("/limits", json!({ "cpu_percent": 0 })), "limits.cpu_percent", "100000"),
        (with("/limits", json!({ "cpu_weight": 10_001 })), "limits.cpu_weight", "10000"),
        (with("/limits", json!({ "memory": "35MiB" })), "limits.memory", "32MiB"),
        (with("/boot/kernel", json!("")), "boot.kernel", "path"),
        (with("/boot/initramfs", json!("a\0b")), "boot.initramfs", "NUL"),
        (with("/boot/cmdline", json!("x".repeat(2048))), "boot.cmdline", "2047"),
        (with("/boot/cmdline", json!("console=ttyS0 quiet\n")), "boot.cmdline", "newline"),
        (with("/boot/cmdline", json!("a\tb")), "boot.cmdline", "one line"),
        (with("/boot/cmdline", json!("a\u{0}b")), "boot.cmdline", "one line"),
        (with("/boot/floppy", json!("x")), "boot.floppy", "unknown field `floppy`"),
        (with("/boot", json!({})), "boot.kernel", "`disk`"),
        (with("/boot/disk", json!("root")), "boot.disk", "leave one out"),
        (with("/boot", json!({ "disk": "absent" })), "boot.disk", "no disk absent"),
        (with("/adapters/0/mac", json!("ff:ff:ff:ff:ff:ff")), "adapters[0].mac", "unicast"),
        (with("/adapters/1/mac", json!("02:00:00:00:00:11")), "adapters[1].mac", "two adapters"),
        (with("/adapters/1/vf", json!("0000:01:10.0")), "adapters[1].vf", "two adapters"),
        (with("/adapters/1/vf", json!("eth0")), "adapters[1].vf", "PCI address"),
        (with("/adapters/1/id", json!("eth0")), "adapters[1].id", "two adapters"),
        (with("/adapters/0/port_group", json!("a/b")), "adapters[0].port_group", "a-z"),
        (with("/devices/0", json!("0000:01:10.0")), "devices[0]", "twice"),
        (with("/devices", json!(["0000:02:00.0", "02:00.0"])), "devices[1]", "twice"),
        (
            with("/devices", (0..15).map(|n| json!(format!("0000:02:{n:02x}.0"))).collect::<Value>()),
            "adapters",
            "16",
        ),
        (json!({ "name": "a", "memory": 4096 }).to_string(), "body", "missing field `boot`"),
        ("{".to_owned(), "body", "EOF"),
        (spec("a").to_string() + "{}", "body", "not one JSON value: trailing"),
        (String::new(), "body", "EOF"),
    ] {
        let problem = server.post("/v1/vms", body.clone()).await.problem(400, "invalid_request");
        assert_eq!(problem["field"], field, "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains(word), "{problem}");
    }
    assert!(server.fake.state().callers.is_empty(), "nothing of it reached the backend");
}

#[tokio::test]
async fn a_vm_is_replaced_patched_and_copied() {
    let server = Server::start();
    server.vm("web1").await;
    let patch = |body: Value| server.exchange(Method::PATCH, "/v1/vms/web1", &[], body.to_string());
    let vm = patch(json!({ "restart": "always", "boot": { "initramfs": null } })).await;
    assert_eq!((vm.status, vm.header("etag")), (200, Some("\"4\"")));
    let vm = vm.json();
    assert_eq!((&vm["spec"]["restart"], &vm["spec"]["boot"]["initramfs"]), (&json!("always"), &Value::Null));
    let problem = patch(json!({ "cpus": 0 })).await.problem(400, "invalid_request");
    assert_eq!(problem["field"], "cpus");
    let problem = patch(json!({ "restart": "sometimes" })).await.problem(400, "invalid_request");
    assert_eq!(problem["field"], "restart");

    let mut renamed = vm["spec"].clone();
    renamed["name"] = json!("web2");
    let put = async |etag| {
        server.exchange(Method::PUT, "/v1/vms/web1", &[("if-match", etag)], renamed.to_string()).await
    };
    put("\"3\"").await.problem(412, "revision_mismatch");
    assert_eq!(put("\"4\"").await.json()["name"], "web2");
    server.get("/v1/vms/web1").await.problem(404, "not_found");

    let copy = server.post("/v1/vms/web2/clone", json!({ "name": "web3" }).to_string()).await;
    let location = copy.header("location").unwrap().to_owned();
    assert_eq!((copy.status, &server.get(&location).await.json()["name"]), (201, &json!("web3")));
    let copy = copy.json();
    assert_eq!(copy["spec"]["restart"], "always");
    for adapter in copy["spec"]["adapters"].as_array().unwrap() {
        assert!(adapter.get("mac").is_none() && adapter.get("vf").is_none(), "{adapter}");
    }
    assert!(!vm["spec"]["adapters"][0]["mac"].is_null(), "the source has addresses");
    server.post("/v1/vms/web2/clone", json!({}).to_string()).await.problem(400, "invalid_request");
    server.post("/v1/vms/web9/clone", json!({ "name": "a" }).to_string()).await.problem(404, "not_found");
}

#[tokio::test]
async fn a_patch_is_made_on_top_of_what_others_change() {
    let server = Server::start();
    server.vm("web1").await;
    server.fake.state().refuse = Some(Problem::revision_mismatch(3, 4));
    let patch = json!({ "cpus": 2 }).to_string();
    let answer = server.exchange(Method::PATCH, "/v1/vms/web1", &[], patch).await;
    answer.problem(412, "revision_mismatch");
    // The handler uses all its tries: in this test another change always comes first.
    assert_eq!(server.fake.state().callers.len(), 1 + 5);
}

#[tokio::test]
async fn bodies_are_bounded_and_typed() {
    let server = Server::start();
    let large = |size| json!("x".repeat(size));
    // The specification of a VM has texts for the guest's first boot.
    let seed = |size| with("/cloud_init", json!({ "user_data": large(size) }));
    server.post("/v1/vms", seed(530_000)).await.problem(413, "body_too_large");
    assert_eq!(server.post("/v1/vms", seed(200_000)).await.status, 201);
    let copy = json!({ "name": large(70_000) });
    server.post("/v1/vms/web1/clone", copy.to_string()).await.problem(413, "body_too_large");
    let form = [("content-type", "application/x-www-form-urlencoded")];
    let answer = server.send(Method::POST, "/v1/vms", &form, spec("a").to_string()).await;
    answer.problem(415, "unsupported_media_type");
    let charset = [("content-type", "Application/JSON; charset=utf-8")];
    assert_eq!(server.send(Method::POST, "/v1/vms", &charset, spec("a").to_string()).await.status, 201);
}

#[tokio::test]
async fn actions_wait_within_bounds() {
    let server = Server::start();
    server.vm("web1").await;
    for (action, state) in [
        ("boot", "running"),
        ("pause", "paused"),
        ("resume", "running"),
        ("reboot", "running"),
        ("shutdown", "stopped"),
        ("stop", "stopped"),
    ] {
        let answer = server.post(&format!("/v1/vms/web1/{action}?wait=5"), "").await;
        assert_eq!((answer.status, &answer.json()["status"]["state"]), (200, &json!(state)), "{action}");
        server.post(&format!("/v1/vms/nothing/{action}"), "").await.problem(404, "not_found");
    }
    assert_eq!(server.fake.state().waits, [std::time::Duration::from_secs(5); 6]);

    server.fake.state().slow = true;
    for query in ["", "?wait=0", "?wait=600"] {
        assert_eq!(server.post(&format!("/v1/vms/web1/boot{query}"), "").await.status, 202);
    }
    for query in ["?wait=601", "?wait=-1", "?wait=soon", "?wait=1&wait=2", "?wait=99999999999999999999"] {
        let problem =
            server.post(&format!("/v1/vms/web1/boot{query}"), "").await.problem(400, "invalid_request");
        assert!(problem["detail"].as_str().unwrap().contains("wait"), "{problem}");
    }
    let problem = server.post("/v1/vms/web1/boot?wiat=5", "").await.problem(400, "invalid_request");
    assert!(problem["detail"].as_str().unwrap().contains("wiat"), "{problem}");
}

#[tokio::test]
async fn every_code_of_the_backend_has_its_status() {
    let server = Server::start();
    server.vm("web1").await;
    for code in ProblemCode::ALL {
        server.fake.state().refuse = Some(Problem::new(*code, "The thing, the cause, the cure."));
        let problem = server.exchange(Method::POST, "/v1/vms/web1/boot", &[], "").await;
        let problem = problem.problem(code.status(), code.as_str());
        assert_eq!(problem["detail"], "The thing, the cause, the cure.");
    }
}

#[tokio::test]
async fn stats_of_a_running_vm() {
    let server = Server::start();
    server.vm("web1").await;
    server.get("/v1/vms/web1/stats").await.problem(409, "wrong_state");
    server.post("/v1/vms/web1/boot", "").await;
    let stats = server.get("/v1/vms/web1/stats").await.json();
    assert_eq!(stats["memory"], 512 << 20);
}

#[tokio::test]
async fn a_console_is_read_from_an_offset() {
    let server = Server::start();
    server.vm("web1").await;
    for (query, offset, text) in [
        ("", "4", "456789"),
        ("?offset=7", "7", "789"),
        ("?offset=2&follow=false", "4", "456789"),
        ("?offset=99", "10", ""),
    ] {
        let answer = server.get(&format!("/v1/vms/web1/console{query}")).await;
        assert_eq!((answer.status, answer.header("console-offset")), (200, Some(offset)));
        assert_eq!(answer.header("content-type"), Some("application/octet-stream"));
        assert_eq!(answer.body, text);
    }
    for (query, field) in [("?offset=x", "offset"), ("?follow=perhaps", "follow"), ("?offset=-1", "offset")] {
        let answer = server.get(&format!("/v1/vms/web1/console{query}")).await;
        assert_eq!(answer.problem(400, "invalid_request")["field"], field);
    }
    server.get("/v1/vms/nothing/console").await.problem(404, "not_found");
}

#[tokio::test]
async fn a_console_takes_input() {
    let server = Server::start();
    server.vm("web1").await;
    let answer = server.send(Method::POST, "/v1/vms/web1/console", &[], "ls\n").await;
    assert_eq!((answer.status, answer.json()), (200, json!({ "taken": 3 })));
    assert_eq!(server.fake.state().typed, b"ls\n");
    let most = server.send(Method::POST, "/v1/vms/web1/console", &[], "x".repeat(4096)).await;
    assert_eq!(most.json(), json!({ "taken": 1024 }));
    for size in [4097, 70_000] {
        let answer = server.send(Method::POST, "/v1/vms/web1/console", &[], "x".repeat(size)).await;
        answer.problem(413, "body_too_large");
    }
}

async fn put_vfs(server: &Server, if_match: Option<&str>, body: &str) -> Answer {
    let headers: Vec<_> = if_match.map(|value| ("if-match", value)).into_iter().collect();
    server.send(Method::PUT, "/v1/pfs/eth0/vfs", &headers, body).await
}

#[tokio::test]
async fn pfs_and_vfs() {
    let server = Server::start();
    let pf = server.get("/v1/pfs/eth0").await;
    assert_eq!((pf.status, pf.header("etag")), (200, Some("\"0\"")));
    assert_eq!(server.get("/v1/pfs").await.json(), json!({ "items": [pf.json()] }));
    let by_id = server.get(&format!("/v1/pfs/{}", pf.json()["id"].as_str().unwrap())).await;
    assert_eq!(by_id.json(), pf.json());
    server.get("/v1/pfs/eth9").await.problem(404, "not_found");

    let answer = put_vfs(&server, None, r#"{"count": 2}"#).await;
    assert_eq!((answer.status, answer.header("etag")), (200, Some("\"1\"")));
    assert_eq!(answer.json()["spec"], json!({ "vfs": 2 }));
    let vfs = server.get("/v1/vfs").await.json();
    assert_eq!(vfs["items"][1]["bdf"], "0000:01:10.1");
    assert_eq!(vfs["items"].as_array().unwrap().len(), 2);
    put_vfs(&server, None, r#"{"count": 8}"#).await.problem(422, "too_many_vfs");
    for (body, field) in [(r#"{"count": -1}"#, "count"), (r#"{"number": 1}"#, "number"), ("[]", "body")] {
        assert_eq!(put_vfs(&server, None, body).await.problem(400, "invalid_request")["field"], field);
    }
}

#[tokio::test]
async fn if_match_guards_changes() {
    let server = Server::start();
    server.vm("web1").await;
    for value in ["\"2\"", "2"] {
        let answer = server.send(Method::DELETE, "/v1/vms/web1", &[("if-match", value)], "").await;
        answer.problem(412, "revision_mismatch");
    }
    for value in ["\"x\"", "\"2\", \"3\"", "W/\"3\"", ""] {
        let answer = server.send(Method::DELETE, "/v1/vms/web1", &[("if-match", value)], "").await;
        assert_eq!(answer.problem(400, "invalid_request")["field"], "if-match");
    }
    let twice = [("if-match", "\"3\""), ("if-match", "\"4\"")];
    server.send(Method::DELETE, "/v1/vms/web1", &twice, "").await.problem(400, "invalid_request");
    assert_eq!(server.send(Method::DELETE, "/v1/vms/web1", &[("if-match", "\"3\"")], "").await.status, 204);

    // Unsupported conditions are refused.
    for (header, value) in [("if-none-match", "*"), ("if-unmodified-since", "Sun, 29 Nov 2026 00:00:00 GMT")]
    {
        for (method, path) in [(Method::PUT, "/v1/port-groups/default"), (Method::DELETE, "/v1/vms/web1")] {
            let headers = [(header, value), ("content-type", "application/json")];
            let answer = server.send(method, path, &headers, r#"{"switch": "default"}"#).await;
            assert_eq!(answer.problem(400, "invalid_request")["field"], header);
        }
    }

    put_vfs(&server, Some("\"5\""), r#"{"count": 1}"#).await.problem(412, "revision_mismatch");
    assert_eq!(put_vfs(&server, Some("\"0\""), r#"{"count": 1}"#).await.status, 200);
    assert_eq!(put_vfs(&server, Some("*"), r#"{"count": 2}"#).await.status, 200);
}

#[tokio::test]
async fn unknown_paths_and_methods_are_problems() {
    let server = Server::start();
    for path in ["/", "/v1", "/v2/vms", "/v1/vms/web1/explode", "/v1/vms/", "/v1/vms/a/b/c"] {
        server.get(path).await.problem(404, "not_found");
    }
    let answer = server.send(Method::PATCH, "/v1/vms", &[], "").await;
    answer.problem(405, "method_not_allowed");
    let allowed = answer.header("allow").unwrap();
    assert!(allowed.contains("GET") && allowed.contains("POST"), "{allowed}");
    server.get("/v1/vms/%ff").await.problem(400, "invalid_request");
    let odd = server.get("/v1/vms/%1b%5b2J").await.problem(404, "not_found");
    assert!(odd["detail"].as_str().unwrap().contains("\\u{1b}[2J"), "{odd}");
}

#[tokio::test]
async fn a_request_keeps_the_id_that_its_caller_gave_if_it_is_fit_for_a_log() {
    let server = Server::start();
    let long = "x".repeat(129);
    for (given, kept) in [
        (vec!["deploy-7:web.1/a+b=c_d"], true),
        (vec![&long[1..]], true),
        (vec![&long], false),
        (vec![""], false),
        (vec!["two words"], false),
        (vec!["\u{e9}"], false),
        (vec!["one", "two"], false),
        (vec![], false),
    ] {
        let headers: Vec<_> = given.iter().map(|id| ("x-request-id", *id)).collect();
        for path in ["/v1/vms", "/v1/vms/nothing", "/nothing", "/healthz"] {
            let answer = server.send(Method::GET, path, &headers, "").await;
            let id = answer.header("x-request-id").unwrap();
            if kept {
                assert_eq!(id, given[0]);
            } else {
                assert!(id.parse::<uuid::Uuid>().is_ok(), "{given:?}: {id}");
            }
            if answer.status == 404 {
                answer.problem(404, "not_found");
            }
        }
    }
}

#[tokio::test]
async fn requests_are_counted_by_words_of_which_there_are_few() {
    let server = Server::start();
    server.vm("web1").await;
    server.get("/v1/vms/web1").await;
    server.get("/v1/vms/anything").await;
    server.get("/made/up").await;
    server.exchange("BREW".parse().unwrap(), "/v1/vms/web1", &[], "").await;
    let metrics = server.get("/metrics").await;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert_eq!((metrics.status, metrics.header("content-type")), (200, Some(kind)));
    assert_eq!(
        server.fake.state().answered,
        [
            "POST /v1/vms 201",
            "GET /v1/vms/{name} 200",
            "GET /v1/vms/{name} 404",
            "GET  404",
            "OTHER /v1/vms/{name} 405",
            "GET /metrics 200",
        ]
    );
}

/// The names of all pages of a list.
async fn pages(server: &Server, path: &str, limit: usize) -> Vec<Vec<String>> {
    let (mut pages, mut next) = (Vec::new(), format!("{path}?limit={limit}"));
    loop {
        let page = server.get(&next).await.json();
        let items = page["items"].as_array().unwrap();
        pages.push(items.iter().map(|item| item["name"].as_str().unwrap_or_default().to_owned()).collect());
        match page["next"].as_str() {
            Some(cursor) => next = format!("{path}?limit={limit}&cursor={cursor}"),
            None => return pages,
        }
    }
}

#[tokio::test]
async fn lists_come_in_pages() {
    let server = Server::start();
    for name in ["e", "c", "a", "d", "b"] {
        server.vm(name).await;
    }
    assert_eq!(pages(&server, "/v1/vms", 2).await, [vec!["a", "b"], vec!["c", "d"], vec!["e"]]);
    assert_eq!(pages(&server, "/v1/vms", 5).await, [["a", "b", "c", "d", "e"]]);
    // Objects that come and go between two pages do not move the others.
    let first = server.get("/v1/vms?limit=2").await.json();
    server.send(Method::DELETE, "/v1/vms/b", &[], "").await;
    server.vm("aa").await;
    let cursor = first["next"].as_str().unwrap();
    let second = server.get(&format!("/v1/vms?limit=2&cursor={cursor}")).await.json();
    assert_eq!((&second["items"][0]["name"], &second["items"][1]["name"]), (&json!("c"), &json!("d")));

    put_vfs(&server, None, r#"{"count": 3}"#).await;
    assert_eq!(pages(&server, "/v1/vfs", 1).await.len(), 3);
    for list in ["vms", "pfs", "vfs", "switches", "port-groups", "ports", "decisions"] {
        for query in ["limit=0", "limit=1001", "limit=-1", "limit=x", "cursor=x", "cursor=ff", "page=1"] {
            server.get(&format!("/v1/{list}?{query}")).await.problem(400, "invalid_request");
        }
        assert_eq!(server.get(&format!("/v1/{list}?limit=1000&cursor=")).await.status, 200, "{list}");
    }
    server.get("/v1/decisions?cursor=61").await.problem(400, "invalid_request");
}

#[tokio::test]
async fn health_is_plain_text() {
    let server = Server::start();
    let well = server.get("/healthz").await;
    assert_eq!((well.status, &*well.body), (200, b"ok\n".as_slice()));
    server.fake.state().complaints = vec!["no /dev/kvm".into(), "disk full".into()];
    let ill = server.get("/healthz").await;
    assert_eq!((ill.status, &*ill.body), (503, b"no /dev/kvm\ndisk full\n".as_slice()));
}
