// SPDX-License-Identifier: Apache-2.0

//! A taken-over process of a VM is worthless: the tests attack each layer of its sandbox alone.

use std::{fs, path::Path, thread};

use api::{
    problem::ProblemCode,
    types::{CauseCode, DecisionFilter, PortGroupSpec, Protection, VmAction, VmState},
};
use rustix::process::geteuid;
use serde_json::json;

use crate::fixture::{
    Agent, Options, SmallGuest,
    attack::{
        FILTERS_ALONE, INTERFACES, Outcome, adapter, agent, agent_with, attempt, attempt_and_leave,
        attempt_by_simulated_pf, report,
    },
    bridge::Bridge,
    host,
};

/// Attacks that must fail under the filters alone, and under namespaces, user and limits alone.
const ATTEMPTS: [&str; 24] = [
    "open_file",
    "create_file",
    "list_processes",
    "connect_tcp",
    "connect_unix",
    "connect_abstract",
    "netlink",
    "packet_socket",
    "signal_agent",
    "ptrace_agent",
    "read_agent_memory",
    "take_agent_descriptor",
    "agent_limits",
    "shared_memory",
    "mount",
    "change_root",
    "become_root",
    "host_name",
    "fork",
    "user_namespace",
    "exec",
    "bpf",
    "perf",
    "keyring",
];

/// Attacks that reach nothing outside of the process: only the filters stop them.
const CONVENIENCES: [&str; 4] = ["map_code", "memory_file", "io_uring", "socket_pair"];

/// The sandbox without one of its layers, or with one alone; [`FILTERS_ALONE`] is another.
const USER_ALONE: &[&str] = &["seccomp", "landlock"];
const LANDLOCK_ALONE: &[&str] = &["own_user", "namespaces", "empty_root", "limits", "seccomp"];
const NOTHING: &[&str] = &["own_user", "namespaces", "empty_root", "limits", "seccomp", "landlock"];

/// Whether the outcomes of `what` are right: in the whole sandbox, under the filters alone, under all but filters and
/// Landlock, under Landlock alone, and without any layer.
fn as_they_should_be(what: &str, outcomes: &[Outcome; 5]) -> bool {
    let [in_all, by_filters, by_user, by_landlock, by_nothing] = outcomes;
    let convenience = CONVENIENCES.contains(&what);
    // The purpose of Landlock: an agent without root has no other layer that hides its files.
    let a_file = what.ends_with("_file") && !convenience;
    *in_all == Outcome::Killed
        && *by_filters == Outcome::Killed
        && (*by_user != Outcome::Succeeded || convenience)
        && (*by_landlock != Outcome::Succeeded || !a_file)
        && *by_nothing == Outcome::Succeeded
}

#[test]
fn each_layer_alone_stops_every_attack_and_without_layers_each_succeeds() {
    assert!(geteuid().is_root(), "namespaces and users need root: run tests/run as root");
    let layers = [&[][..], FILTERS_ALONE, USER_ALONE, LANDLOCK_ALONE, NOTHING].map(agent);
    let [all, filters, user, landlock, nothing] = &layers;
    report(&format!(
        "{:24}{:28}{:28}{:28}{:28}no sandbox",
        "attempt on a vCPU", "whole sandbox", "seccomp alone", "user, namespaces, limits", "Landlock alone"
    ));
    let mut wrong = Vec::new();
    for what in ATTEMPTS.into_iter().chain(CONVENIENCES) {
        let outcomes = thread::scope(|scope| {
            [all, filters, user, landlock, nothing]
                .map(|agent| scope.spawn(move || attempt(agent, what, "vcpu", &json!([]))))
                .map(|attempted| attempted.join().unwrap())
        });
        let [in_all, by_filters, by_user, by_landlock, by_nothing] = &outcomes;
        report(&format!("{what:24}{in_all:28}{by_filters:28}{by_user:28}{by_landlock:28}{by_nothing}"));
        wrong.extend((!as_they_should_be(what, &outcomes)).then_some(what));
    }
    assert!(wrong.is_empty(), "not as they should be: {wrong:?}");
}

/// The process of a simulated PF parses guests' frames. Its sandbox has the layers of a VM's process, except for the
/// pair of sockets that is the connection of a VF.
#[test]
fn each_layer_alone_stops_every_attack_by_a_simulated_pf() {
    assert!(geteuid().is_root(), "namespaces and users need root: run tests/run as root");
    let layers = [
        ("all0", &[][..]),
        ("filters0", FILTERS_ALONE),
        ("user0", USER_ALONE),
        ("landlock0", LANDLOCK_ALONE),
        ("nothing0", NOTHING),
    ];
    let layers = layers.map(|(name, off)| (name, agent_with(name, off)));
    let mut wrong = Vec::new();
    let conveniences = CONVENIENCES.into_iter().filter(|what| *what != "socket_pair");
    for what in ATTEMPTS.into_iter().chain(conveniences) {
        let outcomes = layers.each_ref().map(|(name, agent)| attempt_by_simulated_pf(agent, name, what));
        let [in_all, by_filters, by_user, by_landlock, by_nothing] = &outcomes;
        report(&format!("{what:24}{in_all:28}{by_filters:28}{by_user:28}{by_landlock:28}{by_nothing}"));
        wrong.extend((!as_they_should_be(what, &outcomes)).then_some(what));
    }
    assert!(wrong.is_empty(), "not as they should be: {wrong:?}");
}

#[test]
fn every_thread_of_a_vm_is_confined() {
    let agent = agent(FILTERS_ALONE);
    for thread in ["main", "vcpu", "io-thread", "disk-thread", "relay", "function-thread", "simulated-vf"] {
        for what in ["open_file", "connect_tcp", "signal_agent", "fork", "exec", "map_code", "socket_pair"] {
            let outcome = attempt(&agent, what, thread, &adapter());
            report(&format!("{what:16}{thread:20}{outcome}"));
            assert_eq!(outcome, Outcome::Killed, "{what} on {thread}");
        }
    }
}

/// Attacks with the files that a thread has.
const OF_DISKS: [&str; 2] = ["unlock_disk", "take_room"];
const OF_NICS: [&str; 1] = ["keep_tap"];

#[test]
fn every_attack_ends_on_the_threads_of_disks_and_nics() {
    let bridge = Bridge::new(INTERFACES).expect("interfaces need root: run tests/run as root");
    let [filters, nothing] = [FILTERS_ALONE, NOTHING].map(|off| {
        let mut options = Options::for_tests(&["--sandbox-off", &off.join(",")]);
        options.arguments.extend(bridge.options());
        Agent::start_with(options)
    });
    let mut wrong = Vec::new();
    for (thread, own) in [("disk-thread", &OF_DISKS[..]), ("network-thread", &OF_NICS)] {
        for what in ATTEMPTS.iter().chain(&CONVENIENCES).chain(own).copied() {
            let outcomes = thread::scope(|scope| {
                [&filters, &nothing]
                    .map(|agent| scope.spawn(move || attempt(agent, what, thread, &json!([]))))
                    .map(|attempted| attempted.join().unwrap())
            });
            let [by_filters, by_nothing] = &outcomes;
            report(&format!("{what:24}{thread:20}{by_filters:28}{by_nothing}"));
            wrong.extend((outcomes != [Outcome::Killed, Outcome::Succeeded]).then_some((what, thread)));
        }
    }
    assert!(wrong.is_empty(), "not as they should be: {wrong:?}");
}

#[test]
fn messages_about_another_vms_port_change_nothing() {
    let agent = agent(&[]);
    let group: PortGroupSpec = serde_json::from_value(json!({
        "switch": "default",
        "settings": { "mac_changes": "accept" },
    }))
    .unwrap();
    agent.ask(agent.client.put_port_group("trusting", &group, None)).unwrap();
    let adapters = json!([{ "id": "victim", "port_group": "trusting" }]);
    let _bob = SmallGuest::boot(&agent, "bob", adapters);
    let before = agent.vm("bob");
    let mine = json!([{ "id": "eth0", "port_group": "trusting" }]);
    assert_eq!(attempt(&agent, "forge_messages", "main", &mine), Outcome::Succeeded, "they are sent");
    let after = agent.vm("bob");
    assert_eq!((after.status.state, after.status.adapters), (VmState::Running, before.status.adapters));
    let filter = DecisionFilter { vm: Some("bob".into()), ..serde_json::from_value(json!({})).unwrap() };
    let decisions = agent.ask(agent.client.decisions(&filter)).unwrap();
    let forged = |text: &str| text.contains("02:00:00:00:00:99");
    assert!(
        !decisions.iter().any(|decision| forged(&serde_json::to_string(decision).unwrap())),
        "{decisions:?}"
    );
}

/// The agent would close it, and the last close of a VFIO device or of a VM takes long, on the one thread that serves
/// all.
#[test]
fn no_vmm_can_pass_a_descriptor_to_its_agent() {
    assert_eq!(attempt(&agent(FILTERS_ALONE), "pass_descriptor", "main", &json!([])), Outcome::Killed);
    let without_filters = agent(&["seccomp", "limits"]);
    let sent = attempt_and_leave(&without_filters, "pass_descriptor_later", "vcpu", &json!([]));
    assert_eq!(sent, Outcome::Succeeded, "it is going to be sent");
    let vm = without_filters.wait_for_state("mallory", VmState::Failed);
    let cause = vm.status.cause.unwrap();
    assert_eq!(cause.code, CauseCode::VmmMisbehaved, "{cause:?}");
}

/// Its filters would end it before, and its limits leave it no thread for this.
#[test]
fn a_process_that_speaks_for_another_vm_is_killed_and_its_vm_says_so() {
    let agent = agent(&["seccomp", "limits"]);
    let sent = attempt_and_leave(&agent, "forge_messages_later", "vcpu", &adapter());
    assert_eq!(sent, Outcome::Succeeded, "they are going to be sent");
    let vm = agent.wait_for_state("mallory", VmState::Failed);
    let cause = vm.status.cause.unwrap();
    assert_eq!(cause.code, CauseCode::VmmMisbehaved, "{cause:?}");
    assert_eq!(host::processes(&["vmm", &vm.id.to_string()]), [] as [u32; 0]);
}

#[test]
fn a_vm_says_which_parts_of_its_sandbox_are_off() {
    let off = |options: &[&str]| {
        let arguments = options.iter().map(ToString::to_string).collect();
        let agent = Agent::start_with(Options { arguments, ..Options::default() });
        let vm = SmallGuest::boot(&agent, "web1", json!([])).guest.name;
        let status = agent.vm(&vm).status;
        let proc = format!("/proc/{}/status", status.pid.unwrap());
        let filtered = fs::read_to_string(proc).unwrap().contains("Seccomp:\t2");
        agent.act("web1", VmAction::Stop).unwrap();
        (status.sandbox.off, filtered)
    };
    let root = geteuid().is_root();
    let of_root = if root { &[][..] } else { &Protection::OF_ROOT };
    assert_eq!(off(&[]), (of_root.to_vec(), true));
    let (parts, filtered) = off(&["--sandbox-off", "seccomp,landlock"]);
    assert_eq!(parts, [of_root, &[Protection::Seccomp, Protection::Landlock]].concat());
    assert!(!filtered);
}

/// The kernel's view of a VM's process: it has no right that an attack above does not try.
#[test]
fn a_vm_process_has_no_right_left() {
    assert!(geteuid().is_root(), "a process gets a user of its own from root only");
    let agent = agent(&[]);
    let vm = SmallGuest::boot(&agent, "web1", json!([])).guest.name;
    let status = fs::read_to_string(format!("/proc/{}/status", agent.vm(&vm).status.pid.unwrap())).unwrap();
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {name} in {status}")).split_whitespace().collect::<Vec<_>>()
    };
    for (name, expect) in [
        ("Groups", &[][..]),
        ("CapInh", &["0000000000000000"]),
        ("CapPrm", &["0000000000000000"]),
        ("CapEff", &["0000000000000000"]),
        ("CapBnd", &["0000000000000000"]),
        ("CapAmb", &["0000000000000000"]),
        ("NoNewPrivs", &["1"]),
        ("Seccomp", &["2"]),
    ] {
        assert_eq!(of(name), expect, "{name}");
    }
    for name in ["Uid", "Gid"] {
        let ids = of(name);
        assert!(ids[0] != "0" && ids.iter().all(|id| *id == ids[0]), "{name}: {ids:?}");
    }
}

/// The agent does not boot a VM with limits that the host cannot enforce; `lab::sandbox` has a real hierarchy.
#[test]
fn limits_that_the_host_cannot_set_are_an_error_that_says_what_to_do() {
    let agent = Agent::start_with(Options {
        arguments: ["--sandbox-off", "unavailable", "--cgroup-parent", "/proc/nowhere"]
            .map(Into::into)
            .into(),
        ..Options::default()
    });
    let mut spec = SmallGuest::spec(&agent, "web1", json!([]), "");
    spec["limits"] = json!({ "cpu_percent": 50 });
    agent.create(&spec).unwrap();
    let problem = agent.act("web1", VmAction::Boot).unwrap_err();
    assert_eq!(problem.code, ProblemCode::SandboxUnavailable);
    assert!(
        problem.detail.contains("/proc/nowhere") && problem.detail.contains("--cgroup-parent"),
        "{problem:?}"
    );
    let vm = agent.vm("web1");
    assert_eq!((vm.status.state, vm.status.pid), (VmState::Failed, None));
    assert_eq!(host::processes(&["vmm", &vm.id.to_string()]), [] as [u32; 0]);
    // A default limit applies only if the host can enforce it.
    for name in ["web2", "web3"] {
        drop(SmallGuest::boot(&agent, name, json!([])));
    }
    let said = agent.log().lines().filter(|line| line.contains("no default limit of memory")).count();
    assert_eq!(said, 1, "{}", agent.log());
}

/// The pool of huge pages is the administrator's, and no other limit counts it. A guest that is in them: `lab::boot`.
#[test]
fn the_process_of_a_vm_without_huge_pages_gets_none() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let version_2 = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    let parent = version_2
        .and_then(|line| line.split(' ').nth(1))
        .map_or("/proc/nowhere".into(), |root| Path::new(root).join("portcullis-test-huge-pages"));
    let controllers = parent.parent().map(|root| root.join("cgroup.controllers"));
    let available = controllers.and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
    let agent = Agent::start_with(Options {
        arguments: ["--sandbox-off", "unavailable", "--cgroup-parent", &parent.display().to_string()]
            .map(Into::into)
            .into(),
        ..Options::default()
    });
    drop(SmallGuest::boot(&agent, "web1", json!([])));
    let group = parent.join(agent.vm("web1").id.to_string());
    let said = agent.log().lines().filter(|line| line.contains("no limit of huge pages")).count();
    if !available.split_whitespace().any(|controller| controller == "hugetlb") {
        assert_eq!(said, 1, "{}", agent.log());
        return;
    }
    assert_eq!(said, 0, "{}", agent.log());
    let limits: Vec<(String, String)> = fs::read_dir(&group)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("hugetlb.") && name.ends_with(".max"))
        .map(|name| (name.clone(), fs::read_to_string(group.join(name)).unwrap()))
        .collect();
    assert!(!limits.is_empty() && limits.iter().all(|(_, most)| most.trim() == "0"), "{limits:?}");
    let members = fs::read_to_string(group.join("cgroup.procs")).unwrap();
    assert_eq!(members.trim(), agent.vm("web1").status.pid.unwrap().to_string());
    agent.delete("web1").unwrap();
    assert!(!group.exists());
    fs::remove_dir(&parent).unwrap();
}
