// SPDX-License-Identifier: Apache-2.0

//! Every call of the REST API on the agent's own binary, and every response that its document promises.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::fixture::{
    Agent, Options, SmallGuest,
    wire::{self, Answer},
};

const DOCUMENT: &str = include_str!("../../../resources/openapi.json");

/// Responses that no caller can cause here: other users' calls and files, a failing host or agent, actions that take
/// longer than the caller's wait, clients that are slow or lack a token.
const NOT_HERE: [&str; 6] = ["202", "401", "403", "408", "500", "503"];
/// The same for one call: a device that fails during its release, and a VM between two states.
const NOT_OF_THESE: [(&str, &str, &str); 2] =
    [("DELETE", "/v1/vms/{name}", "409"), ("POST", "/v1/vms/{name}/stop", "409")];

/// A caller that records its calls and their responses.
struct Caller {
    socket: PathBuf,
    operations: BTreeMap<(String, String), Value>,
    seen: BTreeSet<(String, String, String)>,
    /// Responses that the document does not have.
    undocumented: Vec<String>,
}

impl Caller {
    fn new(agent: &Agent) -> Self {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        let operations = document["paths"].as_object().unwrap().iter().flat_map(|(path, calls)| {
            let calls = calls.as_object().unwrap().iter();
            calls
                .filter(|(_, call)| call["responses"].is_object())
                .map(|(method, call)| ((method.to_uppercase(), path.clone()), call.clone()))
        });
        let mut operations: BTreeMap<_, Value> = operations.collect();
        for answer in
            operations.values_mut().flat_map(|call| call["responses"].as_object_mut().unwrap().values_mut())
        {
            if let Some(name) =
                answer["$ref"].as_str().and_then(|place| place.strip_prefix("#/components/responses/"))
            {
                *answer = document["components"]["responses"][name].clone();
            }
        }
        Self {
            socket: agent.directory().join("api.sock"),
            operations,
            seen: BTreeSet::new(),
            undocumented: Vec::new(),
        }
    }

    /// The document's path that matches this one.
    fn template(&self, method: &str, path: &str) -> Option<String> {
        let path = path.split('?').next().unwrap();
        let of = |template: &str| {
            let mut parts = template.split('/').zip(path.split('/'));
            template.split('/').count() == path.split('/').count()
                && parts.all(|(a, b)| a == b || a.starts_with('{'))
        };
        self.operations.keys().find(|(m, template)| m == method && of(template)).map(|key| key.1.clone())
    }

    fn call_with(&mut self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
        );
        let answer = wire::exchange(wire::connect(&self.socket), &request);
        self.note(method, path, &answer);
        answer
    }

    /// Compares the response with the document.
    fn note(&mut self, method: &str, path: &str, answer: &Answer) {
        let Some(template) = self.template(method, path) else { return };
        let status = answer.status.to_string();
        let documented = &self.operations[&(method.to_owned(), template.clone())]["responses"][&status];
        let mut right = documented.is_object();
        if answer.status >= 400 {
            right &= answer.problem().is_some_and(|problem| {
                let code = format!("`{}`", problem.code);
                let codes = documented["description"].as_str().unwrap_or_default();
                codes.contains(&code) && !problem.detail.is_empty()
            });
        }
        if !right {
            self.undocumented.push(format!("{method} {template}: {status} {}", answer.body));
        }
        self.seen.insert((method.to_owned(), template, status));
    }

    #[track_caller]
    fn expect(&mut self, status: u16, method: &str, path: &str, body: &Value) -> Value {
        let text = if body.is_null() { String::new() } else { body.to_string() };
        let answer = self.call_with(method, path, "content-type: application/json\r\n", &text);
        assert_eq!(answer.status, status, "{method} {path} {body}: {}", answer.body);
        serde_json::from_str(&answer.body).unwrap_or(Value::Null)
    }

    /// Holds the lease of a VM until another call ends it.
    fn lease(&mut self, vm: &str) {
        let path = format!("{vm}/lease");
        let (socket, request) = (
            self.socket.clone(),
            format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"),
        );
        let held = thread::spawn(move || wire::exchange(wire::connect(&socket), &request));
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.get(vm)["status"]["lease"].is_null() {
            assert!(Instant::now() < deadline, "no lease of {vm}");
            thread::sleep(Duration::from_millis(10));
        }
        let stranger = format!("{path}?holder=8a6e0804-2bd0-4672-b79d-d97027f90001");
        self.expect(409, "POST", &stranger, &Value::Null);
        self.expect(204, "DELETE", &path, &Value::Null);
        let answer = held.join().unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        self.note("POST", &path, &answer);
        assert_eq!(self.get(vm)["status"]["lease"], Value::Null, "the VM lives on");
    }

    #[track_caller]
    fn get(&mut self, path: &str) -> Value {
        self.expect(200, "GET", path, &Value::Null)
    }

    /// The errors that the document gives for all calls alike: no such object, a malformed name, an older revision, a
    /// body that is too long or of another kind.
    fn general_errors(&mut self, existing: &dyn Fn(&str) -> String) {
        let operations: Vec<_> =
            self.operations.iter().map(|(key, call)| (key.clone(), call.clone())).collect();
        for ((method, template), call) in operations {
            let documented = |status: &str| call["responses"][status].is_object();
            let with = |name: &str| template.replace("{name}", name).replace("{id}", name);
            let path = with(&existing(&template));
            let body = body(&method, &template).to_string();
            let json = "content-type: application/json\r\n";
            let mut check = |status: u16, path: &str, headers: &str, body: &str| {
                let answer = self.call_with(&method, path, headers, body);
                assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
            };
            if documented("404") {
                check(404, &with("b4f9d6f0-0000-4000-8000-000000000000"), json, &body);
            }
            if template.contains('{') {
                check(400, &with("%ff"), json, &body);
            }
            if documented("412") {
                check(412, &path, &format!("{json}if-match: \"999999\"\r\n"), &body);
                check(400, &path, &format!("{json}if-match: newest\r\n"), &body);
            }
            if documented("413") {
                // Not much more than each call takes: the agent closes the connection and does not read the rest.
                let size = if template.starts_with("/v1/vms") { 530_000 } else { 100_000 };
                check(413, &path, json, &"\n".repeat(size));
            }
            if documented("415") {
                check(415, &path, "content-type: text/plain\r\n", &body);
                check(400, &path, json, "{\"no_such_member\": 1}");
                check(400, &path, json, "{");
            }
        }
    }

    /// Responses that the document promises and no call has had.
    fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        for ((method, template), call) in &self.operations {
            for status in call["responses"].as_object().unwrap().keys() {
                let exempt = status == "default"
                    || NOT_HERE.contains(&status.as_str())
                    || NOT_OF_THESE.contains(&(method, template, status));
                if !exempt && !self.seen.contains(&(method.clone(), template.clone(), status.clone())) {
                    missing.push(format!("{method} {template} {status}"));
                }
            }
        }
        missing
    }
}

/// A valid body for such a call.
fn body(method: &str, template: &str) -> Value {
    match (method, template) {
        ("PUT", "/v1/pfs/{name}/vfs") => json!({"count": 1}),
        ("PUT", "/v1/port-groups/{name}") => json!({"switch": "default"}),
        ("POST", "/v1/vms/{name}/clone") => json!({"name": "copy"}),
        ("POST", "/v1/vms/{name}/resize-disk") => json!({"disk": "data", "size": "2MiB"}),
        ("POST", "/v1/vms") | ("PUT", "/v1/vms/{name}") => {
            json!({"name": "other", "memory": "2MiB", "boot": {"kernel": "small-guest"}})
        }
        _ => json!({}),
    }
}

#[test]
fn every_call_gives_every_answer_that_its_document_promises() {
    let arguments =
        ["--sim-pf", "sim0=2", "--sim-pf", "sim1=1", "--sandbox-off", "limits"].map(Into::into).into();
    let agent = Agent::start_with(Options { arguments, ..Options::default() });
    let mut rest = Caller::new(&agent);
    let nothing = Value::Null;
    let document: Value = serde_json::from_str(DOCUMENT).unwrap();
    assert!(rest.get("/v1/openapi.json") == document);
    assert_eq!(rest.call_with("GET", "/healthz", "", "").body, "ok\n");
    rest.expect(404, "GET", "/v1/nothing", &nothing);
    rest.expect(405, "POST", "/v1/vfs", &nothing);

    // Policy.
    let uplinks = json!({"uplinks": ["sim1"]});
    rest.expect(201, "PUT", "/v1/switches/lab", &uplinks);
    rest.expect(200, "PUT", "/v1/switches/lab", &uplinks);
    rest.expect(409, "PUT", "/v1/switches/other", &uplinks);
    rest.expect(201, "PUT", "/v1/port-groups/web", &json!({"switch": "default"}));
    rest.expect(200, "PUT", "/v1/port-groups/web", &json!({"switch": "default", "port_overrides": ["mtu"]}));
    rest.expect(422, "PUT", "/v1/port-groups/other", &json!({"switch": "nowhere"}));
    rest.expect(422, "PATCH", "/v1/port-groups/web", &json!({"switch": "nowhere"}));
    rest.expect(200, "PATCH", "/v1/port-groups/web", &json!({"settings": {"mtu": 1400}}));
    rest.expect(201, "PUT", "/v1/port-groups/short", &json!({"switch": "lab"}));
    rest.expect(409, "DELETE", "/v1/switches/lab", &nothing);
    rest.expect(204, "DELETE", "/v1/port-groups/short", &nothing);
    rest.expect(204, "DELETE", "/v1/switches/lab", &nothing);

    // VMs.
    let adapters = json!([{"id": "eth0", "port_group": "web", "mac": "02:00:00:00:00:11"}]);
    let mut spec = SmallGuest::spec(&agent, "web1", adapters, "");
    agent.disk("data.raw", 1 << 20);
    spec["disks"] = json!([{"id": "data", "path": "data.raw", "format": "raw"}]);
    rest.expect(201, "POST", "/v1/vms", &spec);
    rest.expect(409, "POST", "/v1/vms", &spec);
    let mut wrong = spec.clone();
    wrong["name"] = json!("web2");
    wrong["adapters"] = json!([{"id": "eth0", "port_group": "nowhere"}]);
    rest.expect(422, "POST", "/v1/vms", &wrong);
    wrong["adapters"] = json!([]);
    wrong["boot"]["kernel"] = json!("no-such-file");
    rest.expect(201, "POST", "/v1/vms", &wrong);
    rest.expect(422, "POST", "/v1/vms/web2/boot?wait=60", &nothing);
    rest.expect(204, "DELETE", "/v1/vms/web2", &nothing);

    // Edits of a stopped VM.
    rest.expect(201, "POST", "/v1/vms/web1/clone", &json!({"name": "web2"}));
    rest.expect(409, "POST", "/v1/vms/web1/clone", &json!({"name": "web2"}));
    rest.expect(409, "PATCH", "/v1/vms/web2", &json!({"name": "web1"}));
    let mut taken = spec.clone();
    taken["name"] = json!("web2");
    rest.expect(409, "PUT", "/v1/vms/web2", &taken);
    let moved = json!([{"id": "eth0", "port_group": "nowhere"}]);
    rest.expect(422, "PATCH", "/v1/vms/web2", &json!({"adapters": moved}));
    taken["adapters"] = moved;
    rest.expect(422, "PUT", "/v1/vms/web2", &taken);
    taken["adapters"] = json!([]);
    rest.expect(200, "PUT", "/v1/vms/web2", &taken);
    rest.expect(200, "PATCH", "/v1/vms/web2", &json!({"restart": "always", "memory": "4MiB"}));
    rest.expect(204, "DELETE", "/v1/vms/web2", &nothing);
    rest.lease("/v1/vms/web1");
    for action in ["pause", "resume", "reboot"] {
        rest.expect(409, "POST", &format!("/v1/vms/web1/{action}"), &nothing);
    }
    rest.expect(409, "GET", "/v1/vms/web1/stats", &nothing);
    rest.expect(409, "POST", "/v1/vms/web1/console", &json!("x"));
    let resize = "/v1/vms/web1/resize-disk";
    rest.expect(409, "POST", resize, &json!({"disk": "data", "size": "2MiB"}));

    // A running VM.
    rest.expect(200, "POST", "/v1/vms/web1/boot?wait=60", &nothing);
    rest.expect(409, "POST", "/v1/vms/web1/boot", &nothing);
    assert_eq!(rest.get("/v1/vms/web1")["status"]["state"], "running");
    assert_eq!(rest.get("/v1/vms")["items"].as_array().unwrap().len(), 1);
    rest.get("/v1/vms/web1/stats");
    rest.expect(200, "POST", resize, &json!({"disk": "data", "size": "2MiB"}));
    rest.expect(422, "POST", resize, &json!({"disk": "data", "size": "1MiB"}));
    rest.get("/v1/vms/web1/console");
    rest.expect(200, "POST", "/v1/vms/web1/console", &json!("help"));
    rest.expect(200, "POST", "/v1/vms/web1/pause?wait=60", &nothing);
    rest.expect(409, "POST", "/v1/vms/web1/shutdown", &nothing);
    rest.expect(200, "POST", "/v1/vms/web1/resume?wait=60", &nothing);
    rest.expect(200, "POST", "/v1/vms/web1/reboot?wait=60", &nothing);
    let ports = rest.get("/v1/ports");
    let port = ports["items"][0]["id"].as_str().unwrap().to_owned();
    let port_path = format!("/v1/ports/{port}");
    assert_eq!(rest.get(&port_path)["name"], "web1/eth0");
    rest.expect(200, "PATCH", &port_path, &json!({"settings": {"mtu": 1300}}));
    // An 82576 cannot take a VF's link down, nor give it other VFs' frames.
    rest.expect(409, "PATCH", &port_path, &json!({"settings": {"blocked": true}}));
    let promiscuous = json!({"switch": "default", "settings": {"promiscuous": "accept"}});
    rest.expect(409, "PUT", "/v1/port-groups/web", &promiscuous);
    rest.expect(409, "PATCH", "/v1/port-groups/web", &promiscuous);
    rest.expect(409, "DELETE", "/v1/port-groups/web", &nothing);
    rest.expect(409, "PUT", "/v1/pfs/sim0/vfs", &json!({"count": 1}));
    rest.expect(422, "PUT", "/v1/pfs/sim1/vfs", &json!({"count": 1000}));
    rest.expect(200, "PUT", "/v1/pfs/sim1/vfs", &json!({"count": 2}));
    for list in ["pfs", "pfs/sim0", "vfs", "switches", "switches/default", "port-groups", "port-groups/web"] {
        rest.get(&format!("/v1/{list}"));
    }
    rest.get("/v1/decisions?limit=10&vm=web1");
    for list in ["decisions", "pfs", "vfs", "vms", "ports", "switches", "port-groups"] {
        rest.expect(400, "GET", &format!("/v1/{list}?limit=0"), &nothing);
    }
    rest.get("/v1/events");
    let answer = rest.call_with("GET", "/v1/events", "last-event-id: x\r\n", "");
    assert_eq!(answer.status, 400);

    rest.general_errors(&|template| {
        let which = template.split('/').nth(2).unwrap();
        let names = [("pfs", "sim0"), ("switches", "default"), ("port-groups", "web"), ("ports", &port)];
        names.iter().find(|(kind, _)| *kind == which).map_or("web1", |(_, name)| name).to_owned()
    });
    assert_eq!(rest.get("/v1/vms/web1")["status"]["state"], "running", "nothing of that had an effect");

    rest.expect(200, "POST", "/v1/vms/web1/shutdown?wait=60", &nothing);
    rest.expect(200, "POST", "/v1/vms/web1/stop?wait=60", &nothing);
    rest.expect(204, "DELETE", "/v1/vms/web1", &nothing);
    let none: &[String] = &[];
    assert_eq!((rest.missing().as_slice(), rest.undocumented.as_slice()), (none, none));
}
