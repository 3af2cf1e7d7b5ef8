// SPDX-License-Identifier: Apache-2.0

//! First boot: the guest's disk with texts for cloud-init, its credentials, and the secrets in them.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use api::{
    problem::ProblemCode,
    types::{VmAction, VmSpec},
};
use serde_json::{Value, json};

use crate::fixture::{Agent, Options, SmallGuest, agent::binary, wire};

/// Sectors of the seed in which its files begin, for small files.
const SECTORS: u32 = 64;
const SECTOR_STEP: usize = 8;

fn spec(agent: &Agent, name: &str, seed: Value) -> Value {
    let mut spec = SmallGuest::spec(agent, name, json!([]), "");
    spec["cloud_init"] = seed;
    spec
}

/// The beginnings of the sectors of a disk, as the guest reads them.
fn texts(guest: &mut SmallGuest<'_>, index: u32) -> Vec<String> {
    assert!(guest.ask(&format!("disk-probe {index}")).starts_with("slot="));
    let mut texts = Vec::new();
    for sector in (0..SECTORS).step_by(SECTOR_STEP) {
        let answer = guest.ask(&format!("disk-read {sector} count={SECTOR_STEP}"));
        let read = answer.strip_prefix("ok ").unwrap_or_else(|| panic!("{sector}: {answer}"));
        texts.extend(read.split('|').map(str::to_owned));
    }
    texts
}

#[track_caller]
fn has(texts: &[String], text: &str) {
    assert!(texts.iter().any(|found| found == text), "{text}: {texts:?}");
}

#[test]
fn a_guest_finds_its_texts_at_each_boot() {
    let mut agent = Agent::start();
    agent.disk("web1.raw", 1 << 20);
    let mut spec =
        spec(&agent, "web1", json!({ "user_data": "#cloud-config one", "network_config": "network" }));
    spec["disks"] = json!([{ "id": "root", "path": "web1.raw", "format": "raw" }]);
    let id = agent.create(&spec).unwrap().id;
    agent.act("web1", VmAction::Boot).unwrap();
    let followed = |agent: &Agent| {
        let mut guest = SmallGuest { guest: crate::fixture::Guest::new(agent, "web1".into()) };
        guest.wait_for_ready();
        let own = guest.ask("disk-probe 0");
        assert!(own.ends_with(" sectors=2048") && guest.ask("disk-serial") == "ok root", "{own}");
        let found = texts(&mut guest, 1);
        has(&found, "network");
        has(&found, &format!("instance-id: \"{id}\""));
        assert_eq!(guest.ask("disk-serial"), "ok cidata");
        assert_eq!(guest.ask("disk-write 0 changed"), "io-error");
        assert_eq!(guest.ask("disk-flush"), "ok");
        assert_eq!(guest.ask("disk-probe 2"), "none");
        assert_eq!(guest.ask("reboot"), "ok");
        guest.wait_for_ready();
        assert_eq!(texts(&mut guest, 1), found, "after a reboot of the guest");
        found
    };
    has(&followed(&agent), "#cloud-config one");
    // An edit is for the next boot by the agent.
    let patch = json!({ "cloud_init": { "user_data": "#cloud-config two" } });
    agent.ask(agent.client.patch_vm("web1", &patch, None)).unwrap();
    // The process has the disk, whatever becomes of the agent.
    agent.kill_and_restart();
    let mut guest = SmallGuest { guest: crate::fixture::Guest::new(&agent, "web1".into()) };
    assert_eq!(guest.ask("reboot"), "ok");
    guest.wait_for_ready();
    has(&texts(&mut guest, 1), "#cloud-config one");
    drop(guest);
    agent.act("web1", VmAction::Stop).unwrap();
    agent.act("web1", VmAction::Boot).unwrap();
    let mut guest = SmallGuest { guest: crate::fixture::Guest::new(&agent, "web1".into()) };
    guest.guest.begin_anew();
    guest.wait_for_ready();
    let found = texts(&mut guest, 1);
    has(&found, "#cloud-config two");
    has(&found, "network");
}

#[test]
fn hidden_texts_keep_what_is_stored() {
    let agent = Agent::start();
    let hidden = spec(&agent, "web1", json!({ "user_data": "(hidden)" }));
    let problem = agent.create(&hidden).unwrap_err();
    assert_eq!(
        (problem.code, problem.field.as_deref()),
        (ProblemCode::InvalidRequest, Some("cloud_init.user_data"))
    );
    let vm = agent.create(&spec(&agent, "web1", json!({ "user_data": "text-one" }))).unwrap();
    // What was read is written back.
    let mut again: VmSpec = vm.spec.clone();
    let same = agent.ask(agent.client.put_vm("web1", &again, Some(vm.revision))).unwrap();
    assert_eq!(same.revision, vm.revision, "nothing has changed");
    again.cpus = 2;
    agent.ask(agent.client.put_vm("web1", &again, None)).unwrap();
    let patch = json!({ "cloud_init": { "user_data": "(hidden)", "meta_data": "(hidden)" } });
    let problem = agent.ask(agent.client.patch_vm("web1", &patch, None)).unwrap_err();
    assert_eq!(problem.field.as_deref(), Some("cloud_init.meta_data"), "{problem}");
    // The limit counts what is stored, not what was sent.
    let large = "x".repeat(32_000);
    agent.ask(agent.client.patch_vm("web1", &json!({ "credentials": { "a": large } }), None)).unwrap();
    let more = json!({ "credentials": { "b": large } });
    let problem = agent.ask(agent.client.patch_vm("web1", &more, None)).unwrap_err();
    assert_eq!(problem.code, ProblemCode::InvalidRequest, "{problem}");
    agent.ask(agent.client.patch_vm("web1", &json!({ "credentials": { "a": null } }), None)).unwrap();
    agent
        .ask(agent.client.clone_vm("web1", &serde_json::from_value(json!({ "name": "web2" })).unwrap()))
        .unwrap();
    for name in ["web1", "web2"] {
        agent.act(name, VmAction::Boot).unwrap();
        let mut guest = SmallGuest { guest: crate::fixture::Guest::new(&agent, name.into()) };
        guest.wait_for_ready();
        has(&texts(&mut guest, 0), "text-one");
    }
}

#[test]
fn a_guest_finds_its_identity_and_its_credentials() {
    let agent = Agent::start();
    let mut spec = SmallGuest::spec(&agent, "web1", json!([]), "");
    spec["credentials"] = json!({ "ssh.authorized_keys.root": "key", "motd": "two\nlines" });
    let id = agent.create(&spec).unwrap().id;
    let wanted = |motd: &str| {
        format!("uuid={id}|io.systemd.credential{motd}|io.systemd.credential:ssh.authorized_keys.root=key")
    };
    let guest = |agent| SmallGuest { guest: crate::fixture::Guest::new(agent, "web1".into()) };
    agent.act("web1", VmAction::Boot).unwrap();
    let mut first = guest(&agent);
    first.wait_for_ready();
    let lines = wanted(".binary:motd=dHdvCmxpbmVz");
    assert_eq!(first.ask("smbios"), lines);
    assert_eq!(first.ask("reboot"), "ok");
    first.wait_for_ready();
    assert_eq!(first.ask("smbios"), lines, "after a reboot of the guest");
    // An edit is for the next boot by the agent.
    agent.ask(agent.client.patch_vm("web1", &json!({ "credentials": { "motd": "one" } }), None)).unwrap();
    assert_eq!(first.ask("reboot"), "ok");
    first.wait_for_ready();
    assert_eq!(first.ask("smbios"), lines);
    agent.act("web1", VmAction::Stop).unwrap();
    agent.act("web1", VmAction::Boot).unwrap();
    let mut next = guest(&agent);
    next.guest.begin_anew();
    next.wait_for_ready();
    assert_eq!(next.ask("smbios"), wanted(":motd=one"));
    // Without credentials there is the identity only.
    agent.act("web1", VmAction::Stop).unwrap();
    agent.ask(agent.client.patch_vm("web1", &json!({ "credentials": null }), None)).unwrap();
    agent.act("web1", VmAction::Boot).unwrap();
    let mut last = guest(&agent);
    last.guest.begin_anew();
    last.wait_for_ready();
    assert_eq!(last.ask("smbios"), format!("uuid={id}"));
}

/// As much as the API takes, in the form that needs most room.
#[test]
fn a_vm_boots_with_the_largest_credentials_and_texts() {
    let agent = Agent::start();
    let mut spec = spec(&agent, "web1", json!({ "user_data": "u".repeat(256 << 10) }));
    let value = "\n".repeat((32 << 10) / 32 - 3);
    spec["credentials"] =
        (10..42).map(|n| (format!("c{n}"), json!(value))).collect::<serde_json::Map<_, _>>().into();
    agent.create(&spec).unwrap();
    agent.act("web1", VmAction::Boot).unwrap();
}

fn run(agent: &Agent, line: &str) -> Output {
    let socket = agent.directory().join("api.sock");
    let mut command = Command::new(binary());
    command.arg("--socket").arg(socket).args(line.split_whitespace());
    command.stdin(Stdio::null()).output().unwrap()
}

#[test]
fn apply_of_an_unchanged_file_changes_nothing() {
    let agent = Agent::start();
    let file = agent.directory().join("web1.json");
    let write = |text: &str| {
        fs::write(&file, spec(&agent, "web1", json!({ "user_data": text })).to_string()).unwrap();
    };
    let apply = |more: &str| -> Value {
        let output = run(&agent, &format!("apply -f {} --output json {more}", file.display()));
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<Value>(&output.stdout).unwrap()[0]["action"].take()
    };
    let revision = || agent.vm("web1").revision;
    write("one");
    assert_eq!(apply(""), "create");
    let created = revision();
    assert_eq!(apply("--dry-run"), "compare", "only the agent can compare the texts");
    assert_eq!((apply(""), revision()), (json!("unchanged"), created));
    write("two");
    assert_eq!((apply("--dry-run"), revision()), (json!("compare"), created));
    assert_eq!(apply(""), "change");
    assert!(revision() > created);
    write("(hidden)");
    assert_eq!(apply(""), "unchanged");
}

/// The files below a directory with a text in them.
fn files_with(directory: &Path, text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            found.extend(files_with(&path, text));
        } else if entry.file_type().unwrap().is_file()
            && fs::read(&path).unwrap().windows(text.len()).any(|part| part == text.as_bytes())
        {
            found.push(path);
        }
    }
    found
}

const SECRET: &str = "s3cret-";

/// Each way to read a VM. The secret is in the database, in the guest, and nowhere else.
#[test]
fn no_reader_of_the_agent_gets_a_secret() {
    let environment = vec![("PORTCULLIS_LOG".to_owned(), "debug".to_owned())];
    let agent = Agent::start_with(Options {
        arguments: ["--sim-pf", "sim0=4"].map(Into::into).into(),
        environment,
        ..Options::default()
    });
    let seed = json!({
        "user_data": "s3cret-user", "meta_data": "s3cret-meta", "network_config": "s3cret-network",
    });
    let mut shown: Vec<(String, String)> = Vec::new();
    let socket = agent.directory().join("api.sock");
    let mut call = |method: &str, path: &str, body: &Value| {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = wire::exchange(wire::connect(&socket), &request);
        assert!(answer.status < 300, "{method} {path}: {} {}", answer.status, answer.body);
        shown.push((format!("{method} {path}"), answer.body));
    };
    let mut web1 = spec(&agent, "web1", seed.clone());
    web1["adapters"] = json!([{ "id": "eth0" }]);
    web1["credentials"] = json!({ "motd": "s3cret-credential" });
    call("POST", "/v1/vms", &web1);
    call("POST", "/v1/vms/web1/boot?wait=60", &Value::Null);
    let mut guest = SmallGuest { guest: crate::fixture::Guest::new(&agent, "web1".into()) };
    guest.wait_for_ready();
    let found = texts(&mut guest, 0);
    for secret in ["s3cret-user", "s3cret-meta", "s3cret-network"] {
        has(&found, secret);
    }
    assert!(guest.ask("smbios").contains("s3cret-credential"));
    guest.ask("up");
    guest.ask("set-mac 02:00:00:00:00:99");
    for path in ["vms", "vms/web1", "vms/web1/stats", "ports", "decisions", "pfs", "vfs", "switches"] {
        call("GET", &format!("/v1/{path}"), &Value::Null);
    }
    call("GET", "/metrics", &Value::Null);
    call("PATCH", "/v1/vms/web1", &json!({ "autostart": true }));
    web1["autostart"] = json!(true);
    web1["cloud_init"]["user_data"] = json!("s3cret-other");
    call("PUT", "/v1/vms/web1", &web1);
    for action in ["pause", "resume", "reboot", "stop"] {
        call("POST", &format!("/v1/vms/web1/{action}?wait=60"), &Value::Null);
    }
    call("POST", "/v1/vms/web1/clone", &json!({ "name": "web2" }));

    let file = agent.directory().join("file.json");
    let write = |spec: &Value| fs::write(&file, spec.to_string()).unwrap();
    let mut cli = |line: &str| {
        for format in ["table", "json", "yaml"] {
            let output = run(&agent, &format!("{line} --output {format}"));
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            shown.push((format!("{line} ({format})"), text(&output.stdout) + &text(&output.stderr)));
        }
    };
    for line in [
        "vm list",
        "vm show web1",
        "vm patch web1 --cpus 2",
        "vm rename web2 web2",
        "port list",
        "decisions",
        "events --since 0 --limit 3",
        "pf list",
    ] {
        cli(line);
    }
    web1["cloud_init"]["user_data"] = json!("s3cret-third");
    write(&web1);
    cli(&format!("apply -f {} --dry-run", file.display()));
    cli(&format!("apply -f {}", file.display()));
    cli(&format!("vm set web1 -f {}", file.display()));
    // Refused: the name is taken; and a text too many.
    cli(&format!("vm create {}", file.display()));
    web1["cloud_init"]["vendor_data"] = json!("s3cret-vendor");
    write(&web1);
    cli(&format!("vm set web1 -f {}", file.display()));

    for (what, text) in &shown {
        assert!(!text.is_empty(), "{what}");
        assert!(!text.contains(SECRET), "{what}: {text}");
    }
    assert!(shown.iter().any(|(_, text)| text.contains("(hidden)")));
    assert!(agent.log().contains("DEBUG"), "{}", agent.log());
    fs::remove_file(&file).unwrap();
    let files = files_with(agent.directory(), SECRET);
    assert!(!files.is_empty(), "the database has the secret");
    // The guest has printed what it read.
    for path in files.into_iter().filter(|path| !path.ends_with("console")) {
        assert!(path.starts_with(agent.directory().join("state")), "{}", path.display());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
    }
}
