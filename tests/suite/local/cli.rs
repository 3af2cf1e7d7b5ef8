// SPDX-License-Identifier: Apache-2.0

//! The command line as users and scripts see it: processes, their output, their exit codes and their terminal.

use std::{
    fs,
    io::{Read, Write},
    path::Path,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use api::types::{VmAction, VmState};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fixture::{Agent, OnTerminal, Options, SmallGuest, agent::binary};

const PATIENCE: Duration = Duration::from_secs(60);

fn start() -> Agent {
    let arguments = ["--sim-pf", "sim0=4"].map(Into::into).into();
    Agent::start_with(Options { arguments, ..Options::default() })
}

fn command(agent: &Agent, line: &str) -> Command {
    let mut command = Command::new(binary());
    command.arg("--socket").arg(agent.directory().join("api.sock")).args(line.split_whitespace());
    command
}

fn run(agent: &Agent, line: &str) -> Output {
    command(agent, line).stdin(Stdio::null()).output().unwrap()
}

#[track_caller]
fn json(agent: &Agent, line: &str) -> Value {
    let output = run(agent, &format!("{line} --output json"));
    assert!(output.status.success(), "{line}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn fails(agent: &Agent, line: &str, code: i32, word: &str) {
    let output = run(agent, line);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(code) && said.contains(word), "{line}: {output:?}");
}

#[test]
fn a_site_is_made_from_a_directory_and_can_be_run() {
    let agent = start();
    let site = TempDir::with_prefix("site").unwrap();
    let write = |name: &str, text: String| fs::write(site.path().join(name), text).unwrap();
    write("10-lan.toml", "object = \"switch\"\nname = \"lan\"\nuplinks = [\"sim0\"]\n".into());
    let group = |mtu: u32| format!("object: port_group\nname: web\nswitch: lan\nsettings: {{mtu: {mtu}}}\n");
    write("20-web.yaml", group(1400));
    let adapters = json!([{"id": "eth0", "port_group": "web"}]);
    write("30-web1.json", SmallGuest::spec(&agent, "web1", adapters.clone(), "").to_string());
    write("31-web2.json", SmallGuest::spec(&agent, "web2", adapters, "").to_string());
    let apply = format!("apply -f {}", site.path().display());
    let actions = |line: &str| -> Vec<String> {
        let steps = json(&agent, line);
        steps.as_array().unwrap().iter().map(|step| step["action"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(actions(&format!("{apply} --dry-run")), ["create"; 4]);
    assert_eq!(json(&agent, "vm list"), json!([]));
    assert_eq!(actions(&apply), ["create"; 4]);
    assert_eq!(actions(&apply), ["unchanged"; 4]);

    assert!(run(&agent, "vm boot web1").status.success());
    write("20-web.yaml", group(1300));
    let shown = run(&agent, &format!("{apply} --dry-run"));
    let shown = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.contains("settings.mtu: 1400 -> 1300"), "{shown}");
    assert_eq!(actions(&apply), ["unchanged", "change", "unchanged", "unchanged"]);
    assert_eq!(
        json(&agent, "port show web1/eth0")["status"]["policy"]["mtu"]["value"],
        1300,
        "it runs with it"
    );

    let larger = SmallGuest::spec(&agent, "web1", json!([]), "");
    write("30-web1.json", larger.to_string());
    write("20-web.yaml", group(1200));
    let blocked = run(&agent, &format!("{apply} --dry-run --output json"));
    let steps: Value = serde_json::from_slice(&blocked.stdout).unwrap();
    let problem: Value = serde_json::from_slice(&blocked.stderr).unwrap();
    assert_eq!((&steps[1]["action"], &steps[2]["action"]), (&json!("change"), &json!("blocked")));
    assert_eq!((blocked.status.code(), &problem["code"]), (Some(5), &json!("wrong_state")));
    fails(&agent, &apply, 5, "30-web1.json");
    assert_eq!(json(&agent, "port-group show web")["spec"]["settings"]["mtu"], 1300, "nothing was changed");
    write("20-web.yaml", group(1300));
    assert!(run(&agent, "vm stop web1").status.success());
    assert_eq!(actions(&apply), ["unchanged", "unchanged", "change", "unchanged"]);
    write("40-odd.toml", "name = 1".into());
    fails(&agent, &apply, 2, "40-odd.toml");
}

#[test]
fn exit_codes_and_formats() {
    let mut agent = start();
    let site = TempDir::with_prefix("site").unwrap();
    let file = site.path().join("web1.json");
    fs::write(&file, SmallGuest::spec(&agent, "web1", json!([{"id": "eth0"}]), "").to_string()).unwrap();
    let file = file.display();
    assert!(run(&agent, "health").status.success());
    assert!(run(&agent, &format!("vm create {file}")).status.success());
    fails(&agent, &format!("vm create {file}"), 5, "name_taken");
    fails(&agent, "vm show web2", 4, "not_found");
    fails(&agent, "vm boot", 2, "Usage");
    fails(&agent, "vm create /nonexistent.json", 2, "/nonexistent.json");
    fails(&agent, "vm wait web1 --for running --timeout 1", 6, "defined after 1 s");
    fails(&agent, "vm pause web1 --output json", 5, "\"code\": \"wrong_state\"");
    fails(&agent, "vm pause web1 --output yaml", 5, "code: wrong_state");
    assert!(run(&agent, "vm boot web1 --timeout 60").status.success());
    fails(&agent, "vm patch web1 --cpus 2", 5, "stop it first");
    assert!(run(&agent, "vm patch web1 --autostart true --restart always").status.success());
    let yaml = run(&agent, "vm show web1 --output yaml");
    let yaml = String::from_utf8_lossy(&yaml.stdout).into_owned();
    assert!(yaml.contains("  restart: always\n  autostart: true\n"), "{yaml}");
    assert!(run(&agent, "vm clone web1 web2").status.success());
    assert!(run(&agent, "vm rename web2 db").status.success());
    assert!(run(&agent, "vm stop web1").status.success());
    assert!(run(&agent, "vm wait web1 --for rest").status.success());
    agent.kill();
    fails(&agent, "vm list", 3, "No agent listens");
}

#[test]
fn a_host_is_checked_without_an_agent() {
    let root = TempDir::with_prefix("root").unwrap();
    let check = |arguments: &[&str]| {
        let root = root.path().to_str().unwrap();
        Command::new(binary()).args(["check", "--root", root]).args(arguments).output().unwrap()
    };
    fs::create_dir_all(root.path().join("sys/bus/pci/devices")).unwrap();
    fs::create_dir_all(root.path().join("proc")).unwrap();
    fs::write(root.path().join("proc/cpuinfo"), "vendor_id : AuthenticAMD\nflags : svm\n").unwrap();
    let output = check(&[]);
    let table = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(table.contains("FAIL  kvm") && table.contains("Fix: modprobe kvm_amd"), "{table}");
    fs::create_dir_all(root.path().join("dev")).unwrap();
    fs::write(root.path().join("dev/kvm"), "").unwrap();
    let output = check(&["--output", "json"]);
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&findings[0]["check"], &findings[0]["verdict"]), (&json!("kvm"), &json!("ok")));
    assert_eq!(output.status.code(), Some(0), "without an adapter the rest is a warning: {findings:#}");
}

#[test]
fn completions_and_man_pages_are_written() {
    for shell in ["bash", "zsh", "fish"] {
        let output = Command::new(binary()).args(["completions", shell]).output().unwrap();
        assert!(output.status.success() && output.stdout.len() > 10_000, "{shell}");
    }
    let directory = TempDir::with_prefix("man").unwrap();
    let status = Command::new(binary()).arg("man").arg(directory.path()).status().unwrap();
    assert!(status.success());
    for page in ["portcullis.1", "portcullis-apply.1", "portcullis-port-group-set.1"] {
        assert!(directory.path().join(page).exists(), "{page}");
    }
}

fn vm_file(agent: &Agent, directory: &Path) -> String {
    let path = directory.join("web1.json");
    fs::write(&path, SmallGuest::spec(agent, "web1", json!([{"id": "eth0"}]), "").to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_console_is_attached_both_ways_and_detached_by_its_key() {
    let agent = start();
    let directory = TempDir::with_prefix("vm").unwrap();
    let file = vm_file(&agent, directory.path());
    let mut terminal = OnTerminal::new(command(&agent, &format!("run {file}")));
    terminal.shows("attached to web1, Ctrl-] detaches");
    terminal.shows("ready\n");
    assert!(terminal.is_raw());
    // All keys go to the guest, Ctrl-C too: it reads it as an unknown word.
    terminal.type_keys(b"echo from the terminal\n");
    terminal.shows("from the terminal\n");
    terminal.type_keys(b"\x03\n");
    terminal.shows("unknown command");
    terminal.type_keys(b"\x1d");
    assert_eq!(terminal.ends(), Some(0));
    terminal.shows("detached from web1, which runs on");
    assert!(!terminal.is_raw(), "the terminal is as it was");
    assert_eq!(agent.vm("web1").status.state, VmState::Running);

    // Again; this time the guest ends the session.
    let mut terminal = OnTerminal::new(command(&agent, "console web1"));
    terminal.shows("from the terminal");
    terminal.type_keys(b"poweroff\n");
    assert_eq!(terminal.ends(), Some(0));
    assert!(!terminal.is_raw());
    assert_eq!(agent.wait_for_state("web1", VmState::Stopped).status.pid, None);

    // A signal detaches the terminal, too.
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut terminal = OnTerminal::new(command(&agent, &format!("run {file}")));
        terminal.shows("ready\n");
        kill_process(Pid::from_child(&terminal.child), signal).unwrap();
        assert_eq!(terminal.ends(), Some(0));
        assert!(!terminal.is_raw(), "{signal:?}");
        assert_eq!(agent.vm("web1").status.state, VmState::Running);
        agent.act("web1", VmAction::Stop).unwrap();
    }
    agent.act("web1", VmAction::Boot).unwrap();
    fails(&agent, &format!("run --rm {file}"), 5, "`portcullis console web1`");
    assert_eq!(
        agent.vm("web1").status.state,
        VmState::Running,
        "what this command did not make is left alone"
    );
}

/// An ended job leaves neither its VM nor a VF, so that the next one finds them.
#[test]
fn what_run_made_goes_with_it_when_it_is_ended() {
    let agent = start();
    let directory = TempDir::with_prefix("vm").unwrap();
    let file = vm_file(&agent, directory.path());
    for (signal, on_terminal) in
        [(Signal::TERM, false), (Signal::INT, false), (Signal::HUP, false), (Signal::TERM, true)]
    {
        let mut run = command(&agent, &format!("run --rm {file}"));
        let code = if on_terminal {
            let mut terminal = OnTerminal::new(run);
            terminal.shows("ready\n");
            kill_process(Pid::from_child(&terminal.child), signal).unwrap();
            let code = terminal.ends();
            assert!(!terminal.is_raw());
            code
        } else {
            run.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let mut run = run.spawn().unwrap();
            let deadline = Instant::now() + PATIENCE;
            while !agent.ask(agent.client.get_vm("web1")).is_ok_and(|vm| vm.status.state == VmState::Running)
            {
                assert!(Instant::now() < deadline, "it is not booted\n{}", agent.log());
                thread::sleep(Duration::from_millis(10));
            }
            kill_process(Pid::from_child(&run), signal).unwrap();
            run.wait().unwrap().code()
        };
        assert_eq!(code, Some(128 + signal.as_raw()), "{signal:?}");
        assert_eq!(agent.ask(agent.client.list_vms()).unwrap().len(), 0, "{signal:?}");
        assert!(agent.vfs().iter().all(|vf| vf.owner.is_none()), "{signal:?}");
    }
    // A VM that existed before stays, and the command still ends.
    agent.create(&serde_json::from_str::<Value>(&fs::read_to_string(&file).unwrap()).unwrap()).unwrap();
    let mut run = command(&agent, &format!("run --rm {file}"));
    run.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut run = run.spawn().unwrap();
    agent.wait_for_state("web1", VmState::Running);
    kill_process(Pid::from_child(&run), Signal::TERM).unwrap();
    assert_eq!(run.wait().unwrap().code(), Some(143));
    assert_eq!(agent.vm("web1").status.state, VmState::Running);
    agent.delete("web1").unwrap();

    // A deletion that has only begun.
    SmallGuest::boot(&agent, "web1", json!([{"id": "eth0"}]));
    let begun = Instant::now();
    let deleted = command(&agent, "vm delete web1 --wait 0").status().unwrap();
    assert!(deleted.success() && begun.elapsed() < Duration::from_secs(20));
    let deadline = Instant::now() + PATIENCE;
    while !agent.ask(agent.client.list_vms()).unwrap().is_empty() {
        assert!(Instant::now() < deadline, "it is not deleted\n{}", agent.log());
        thread::sleep(Duration::from_millis(10));
    }
}

/// Input that the guest does not read delays neither its output nor a signal.
#[test]
fn a_console_that_is_fed_by_a_pipe_can_be_ended() {
    let agent = start();
    let guest = SmallGuest::boot(&agent, "web1", json!([]));
    guest.guest.type_line("halt");
    for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
        let mut console = command(&agent, "console web1 --attach");
        console.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut console = console.spawn().unwrap();
        let mut input = console.stdin.take().unwrap();
        let feeder = thread::spawn(move || while input.write_all(&[b'x'; 4096]).is_ok() {});
        let mut shown = [0; 64];
        let count = console.stdout.as_mut().unwrap().read(&mut shown).unwrap();
        assert!(count > 0, "what the guest has written is shown");
        thread::sleep(Duration::from_secs(1));
        kill_process(Pid::from_child(&console), signal).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while console.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "it goes on after {signal:?}");
            thread::sleep(Duration::from_millis(10));
        }
        feeder.join().unwrap();
    }
}

#[test]
fn a_script_types_by_a_pipe_and_run_deletes_if_it_is_told_to() {
    let agent = start();
    let directory = TempDir::with_prefix("vm").unwrap();
    let file = vm_file(&agent, directory.path());
    let mut run = command(&agent, &format!("run --rm {file}"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !agent.ask(agent.client.get_vm("web1")).is_ok_and(|vm| vm.status.state == VmState::Running) {
        assert!(Instant::now() < deadline, "it is not booted\n{}", agent.log());
        thread::sleep(Duration::from_millis(10));
    }
    let mut console = command(&agent, "console web1 --attach")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    console.stdin.take().unwrap().write_all(b"echo by a pipe\npoweroff\n").unwrap();
    let output = console.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("by a pipe\n"), "{output:?}");
    assert!(run.wait().unwrap().success());
    fails(&agent, "vm show web1", 4, "not_found");
}

/// Each would stop the other's VMs, if they share a database, even with other run directories and sockets.
#[test]
fn a_second_agent_with_the_same_state_does_not_start() {
    let agent = start();
    let other = TempDir::new().unwrap();
    let mut second = Command::new(binary())
        .arg("--socket")
        .arg(other.path().join("api.sock"))
        .args(["serve", "--sandbox-off", "unavailable", "--state-dir"])
        .arg(agent.directory().join("state"))
        .arg("--run-dir")
        .arg(other.path().join("run"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + PATIENCE;
    while second.try_wait().unwrap().is_none() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    // One that has started would run for ever.
    second.kill().unwrap();
    let output = second.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("Another agent") && text.contains("--state-dir"), "{text}");
}

/// Each command reads another's output, in each format; and standard input takes all formats.
#[test]
fn a_policy_is_the_same_in_each_format_and_a_setting_is_replaced_as_a_whole() {
    let agent = start();
    let feed = |line: &str, text: &str| {
        let mut command = command(&agent, line);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{line}: {output:?}");
    };
    let vlan = || json(&agent, "port-group show web")["spec"]["settings"]["vlan"].clone();
    feed("port-group set web -f -", "switch: default\nsettings: {vlan: {access: {id: 100, qos: 3}}}\n");
    assert_eq!(vlan(), json!({"access": {"id": 100, "qos": 3}}));
    for (option, expect) in [
        ("200", json!({"access": {"id": 200}})),
        ("100/3", json!({"access": {"id": 100, "qos": 3}})),
        ("trunk:7", json!({"trunk": [7]})),
        ("100/0", json!({"access": {"id": 100}})),
    ] {
        let output = run(&agent, &format!("port-group patch web --vlan {option}"));
        assert!(output.status.success(), "{option}: {output:?}");
        assert_eq!(vlan(), expect, "{option}");
    }
    let yaml = run(&agent, "port-group show web --output yaml");
    let text = String::from_utf8(yaml.stdout).unwrap();
    assert!(!text.contains(" !"), "no tags: {text}");
    feed("port-group set web2 -f -", "switch = \"default\"\nsettings.vlan.trunk = [\"7\"]\n");
    feed("port-group set web3 -f -", r#"{"switch": "default"}"#);
}

/// Only root may read the file. A user of the socket's group names it; root boots, edits or copies the VM, and a
/// later agent boots it by itself. No action of root gives the file to the guest.
#[test]
fn a_file_is_opened_with_the_rights_of_whoever_chose_it() {
    const USER: &str = "65534";
    let mut agent = Agent::start_with(Options {
        arguments: ["--socket-mode", "0666"].map(Into::into).into(),
        ..Options::default()
    });
    assert!(rustix::process::geteuid().is_root(), "two users are needed: run it as root");
    let open = |path: &Path, mode| {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap()
    };
    open(agent.directory(), 0o755);
    let program = agent.directory().join("portcullis");
    fs::copy(binary(), &program).unwrap();
    open(&program, 0o755);
    let secret = agent.directory().join("secret");
    fs::write(&secret, "for root alone").unwrap();
    open(&secret, 0o600);
    SmallGuest::spec(&agent, "unused", json!([]), "");
    let as_user = |agent: &Agent, line: &str, text: &str| {
        let mut child = Command::new("setpriv")
            .args(["--reuid", USER, "--regid", USER, "--clear-groups"])
            .arg(&program)
            .arg("--socket")
            .arg(agent.directory().join("api.sock"))
            .args(line.split_whitespace())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let refused = |output: &Output| {
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains("initramfs_unreadable"), "{output:?}");
        assert!(text.contains(&format!("uid {USER}")), "it says whose rights: {text}");
    };
    let spec = json!({
        "name": "evil", "memory": "2MiB", "boot": { "kernel": "small-guest", "initramfs": secret },
    });
    let created = as_user(&agent, "vm create -", &spec.to_string());
    assert!(created.status.success(), "{created:?}");
    refused(&as_user(&agent, "vm boot evil", ""));
    refused(&run(&agent, "vm boot evil"));
    for line in ["vm patch evil --cpus 2 --autostart true", "vm clone evil copy"] {
        let output = run(&agent, line);
        assert!(output.status.success(), "{line}: {output:?}");
    }
    refused(&run(&agent, "vm boot evil"));
    refused(&run(&agent, "vm boot copy"));
    // The next agent boots it because of `autostart`.
    agent.restart();
    let failed = agent.wait_for_state("evil", VmState::Failed);
    assert_eq!(failed.status.cause.unwrap().code, api::types::CauseCode::BootFailed);
    // Root may choose the file itself.
    let own =
        json!({ "name": "own", "memory": "2MiB", "boot": { "kernel": "small-guest", "initramfs": secret } });
    agent.create(&own).unwrap();
    agent.act("own", api::types::VmAction::Boot).unwrap_or_else(|problem| panic!("{problem:?}"));
    // Another user's kernel could show the file to that user.
    agent.act("own", api::types::VmAction::Stop).unwrap();
    let edited = as_user(&agent, "vm patch own --cmdline dump", "");
    assert!(edited.status.success(), "{edited:?}");
    refused(&run(&agent, "vm boot own"));
}
