// SPDX-License-Identifier: Apache-2.0

//! NICs on interfaces of the host, by the virtio driver of the small guest. Agent and interfaces are in a network namespace
//! of the test.

use std::process::Command;

use api::{
    problem::ProblemCode,
    types::{CloneSpec, VmAction, VmState},
};
use serde_json::{Value, json};

use crate::fixture::{Agent, Options, SmallGuest, host};

/// A network namespace with a bridge `br0`.
struct Namespace(String);

impl Namespace {
    fn new(test: &str) -> Self {
        let namespace = Self(format!("pc-{test}-{}", std::process::id()));
        host::run("ip", &["netns", "add", &namespace.0]);
        namespace.ip(&["link", "add", "br0", "type", "bridge"]);
        namespace.ip(&["link", "set", "br0", "up"]);
        namespace
    }

    fn ip(&self, words: &[&str]) {
        host::run("ip", &[&["-netns", &self.0], words].concat());
    }

    /// An agent in the namespace with VMs that may use these interfaces.
    fn agent(&self, interfaces: &[&str]) -> Agent {
        let arguments = interfaces.iter().map(|name| format!("--interface={name}")).collect();
        self.agent_with(Options { arguments, ..Options::default() })
    }

    fn agent_with(&self, options: Options) -> Agent {
        let through = ["ip", "netns", "exec", &self.0].map(ToString::to_string).into();
        Agent::start_with(Options { through, ..options })
    }

    /// An attribute of an interface in sysfs.
    fn attribute(&self, interface: &str, name: &str) -> String {
        let path = format!("/sys/class/net/{interface}/{name}");
        host::run("ip", &["netns", "exec", &self.0, "cat", &path]).trim().to_owned()
    }

    /// The names of the interfaces on the bridge.
    fn ports(&self) -> Vec<String> {
        let shown = Command::new("ip")
            .args(["-netns", &self.0, "-json", "link", "show", "master", "br0"])
            .output()
            .unwrap();
        let links: Vec<Value> = serde_json::from_slice(&shown.stdout).unwrap_or_default();
        links.iter().map(|link| link["ifname"].as_str().unwrap().to_owned()).collect()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

fn boot<'a>(agent: &'a Agent, name: &str, nics: &Value) -> SmallGuest<'a> {
    let mut spec = SmallGuest::spec(agent, name, json!([]), "");
    spec["nics"] = nics.clone();
    let mut guest = SmallGuest { guest: agent.boot(&spec) };
    guest.wait_for_ready();
    guest
}

fn on_bridge() -> Value {
    json!([{ "id": "mgmt0", "bridge": "br0" }])
}

/// Probes the NIC, and returns its address.
fn probe(guest: &mut SmallGuest) -> String {
    let mac = begin(guest);
    // The NIC's thread starts after the driver, and drops the frames that it finds then. It answers this afterwards.
    assert_eq!(guest.ask(&format!("nic-mac {mac}")), "ok");
    mac
}

/// Probes the guest's NIC, and does not wait for the NIC's thread. Returns the address.
fn begin(guest: &mut SmallGuest) -> String {
    let probe = guest.ask("nic-probe");
    let mac = probe.split(' ').find_map(|word| word.strip_prefix("mac=")).expect(&probe);
    mac.to_owned()
}

#[test]
fn guests_on_a_bridge_exchange_frames_from_their_own_addresses_only() {
    let namespace = Namespace::new("exchange");
    let agent = namespace.agent(&["br0"]);
    let (mut one, mut two) = (boot(&agent, "one", &on_bridge()), boot(&agent, "two", &on_bridge()));
    let (first, second) = (probe(&mut one), probe(&mut two));
    assert_ne!(first, second);
    assert_eq!(one.ask(&format!("nic-send {second} hello")), "ok");
    assert_eq!(two.ask("nic-receive"), format!("{first} hello"));
    assert_eq!(two.ask(&format!("nic-send ff:ff:ff:ff:ff:ff all source={second}")), "ok");
    assert_eq!(one.ask("nic-receive"), format!("{second} all"));
    // The bridge stops the sender, not the vmm, which the guest may have taken over.
    for forged in ["02:00:00:00:00:99", &first] {
        assert_eq!(two.ask(&format!("nic-send {first} forged source={forged}")), "ok");
    }
    assert_eq!(one.ask("nic-receive ms=300"), "nothing");
    assert_eq!(two.ask(&format!("nic-send {first} honest")), "ok", "the port still works");
    assert_eq!(one.ask("nic-receive"), format!("{second} honest"));
    // Another address is refused, and a frame to it does not pass the filter.
    assert_eq!(two.ask("nic-mac 02:00:00:00:00:99"), "refused");
    assert_eq!(two.ask(&format!("nic-mac {second}")), "ok");
    assert_eq!(one.ask("nic-send 02:00:00:00:00:99 stray"), "ok");
    assert_eq!(two.ask("nic-receive ms=300"), "nothing", "the bridge floods it, and the filter drops it");
    assert_eq!(two.ask("nic-promiscuous on"), "ok");
    assert_eq!(one.ask("nic-send 02:00:00:00:00:99 stray"), "ok");
    assert_eq!(two.ask("nic-receive"), format!("{first} stray"));
    let stats = agent.stats("two").nics["mgmt0"];
    // The host's own messages reach a promiscuous NIC, too.
    assert!(stats.received >= 2, "{stats:?}");
    assert_eq!((stats.sent, stats.dropped, stats.refused), (4, 0, 1));
    let status = agent.vm("two").status.nics;
    assert_eq!(status[0].mac.unwrap().to_string(), second);
    let ports = namespace.ports();
    assert!(ports.contains(status[0].interface.as_ref().unwrap()) && ports.len() == 2, "{ports:?}");
}

#[test]
fn a_nic_lives_as_long_as_its_vm_and_outlives_its_agent() {
    let namespace = Namespace::new("life");
    let mut agent = namespace.agent(&["br0"]);
    let nics = json!([{ "id": "mgmt0", "bridge": "br0", "mac": "02:00:00:00:01:01", "mtu": 1400 }]);
    {
        let (mut one, mut two) = (boot(&agent, "one", &nics), boot(&agent, "two", &on_bridge()));
        assert!(one.ask("nic-probe").ends_with(" mac=02:00:00:00:01:01 mtu=1400"));
        let second = probe(&mut two);
        assert_eq!(one.ask("reboot"), "ok");
        one.wait_for_ready();
        assert_eq!(probe(&mut one), "02:00:00:00:01:01");
        assert_eq!(one.ask(&format!("nic-send {second} rebooted")), "ok");
        assert_eq!(two.ask("nic-receive"), "02:00:00:00:01:01 rebooted");
    }
    agent.kill_and_restart();
    for (name, ports) in [("one", 1), ("two", 0)] {
        assert_eq!(agent.vm(name).status.state, VmState::Running);
        agent.act(name, VmAction::Stop).unwrap();
        assert_eq!(namespace.ports().len(), ports, "after {name}");
        assert_eq!(agent.vm(name).status.nics[0].interface, None);
    }
    agent.act("two", VmAction::Boot).unwrap();
    let pid = agent.vm("two").status.pid.unwrap();
    assert_eq!(namespace.ports().len(), 1);
    host::run("kill", &["-KILL", &pid.to_string()]);
    agent.wait_for_state("two", VmState::Failed);
    assert_eq!(namespace.ports(), Vec::<String>::new(), "nothing is left behind");
}

#[test]
fn interfaces_that_cannot_be_used_are_named_and_nothing_is_left() {
    let namespace = Namespace::new("errors");
    namespace.ip(&["tuntap", "add", "tap0", "mode", "tap", "vnet_hdr"]);
    namespace.ip(&["tuntap", "add", "tun0", "mode", "tun"]);
    let agent = namespace.agent(&["br0", "tap0", "tun0", "none", "lo"]);
    let refusal = |nics: Value| {
        let mut spec = SmallGuest::spec(&agent, "web1", json!([]), "");
        spec["nics"] = nics;
        let created = agent.create(&spec);
        let problem = match created {
            Ok(_) => {
                let problem = agent.act("web1", VmAction::Boot).unwrap_err();
                agent.delete("web1").unwrap();
                problem
            }
            Err(problem) => problem,
        };
        (problem.code, problem.field.map(String::from).unwrap_or_default())
    };
    let first = json!({ "id": "a", "bridge": "br0" });
    for (second, code, field) in [
        (json!({ "id": "b", "bridge": "br1" }), ProblemCode::InterfaceNotAllowed, "nics[1].bridge"),
        (json!({ "id": "b", "bridge": "none" }), ProblemCode::InterfaceNotFound, "nics[1].bridge"),
        (json!({ "id": "b", "bridge": "lo" }), ProblemCode::InterfaceNotFound, "nics[1].bridge"),
        (json!({ "id": "b", "tap": "br0" }), ProblemCode::InterfaceNotFound, "nics[1].tap"),
        (json!({ "id": "b", "macvtap": "br0" }), ProblemCode::InterfaceNotFound, "nics[1].macvtap"),
        (json!({ "id": "b", "tap": "tun0" }), ProblemCode::InterfaceUnusable, "nics[1].tap"),
        (json!({ "id": "b", "tap": "tap0", "queues": 2 }), ProblemCode::InterfaceUnusable, "nics[1].tap"),
        (
            json!({ "id": "b", "bridge": "br0", "mac": "02:00:00:00:00:01", "mtu": 65500, "queues": 9 }),
            ProblemCode::InvalidRequest,
            "nics[1].queues",
        ),
        (json!({ "id": "b" }), ProblemCode::InvalidRequest, "nics[1]"),
        (json!({ "id": "b", "tap": "a/b" }), ProblemCode::InvalidRequest, "nics[1].tap"),
        (json!({ "id": "b", "bridge": "br0", "tap": "tap0" }), ProblemCode::InvalidRequest, "nics[1]"),
        (json!({ "id": "a", "bridge": "br0" }), ProblemCode::InvalidRequest, "nics[1].id"),
        (json!({ "id": "b", "bridge": "br0", "mtu": 67 }), ProblemCode::InvalidRequest, "nics[1].mtu"),
    ] {
        let (got, at) = refusal(json!([first.clone(), second.clone()]));
        assert_eq!((got, at.as_str()), (code, field), "{second}");
        assert_eq!(namespace.ports(), Vec::<String>::new(), "{second}");
    }
    let tap = json!([{ "id": "a", "tap": "tap0" }]);
    let _one = boot(&agent, "one", &tap);
    assert_eq!(refusal(tap), (ProblemCode::InterfaceUnusable, "nics[0].tap".to_owned()), "it is busy");
    namespace.ip(&["link", "set", "br0", "address", "02:00:00:00:09:09"]);
    let as_bridge = json!([{ "id": "a", "bridge": "br0", "mac": "02:00:00:00:09:09" }]);
    assert_eq!(refusal(as_bridge), (ProblemCode::InterfaceUnusable, "nics[0].bridge".to_owned()));
    let long = json!([{ "id": "a", "bridge": "br0", "mtu": 1501 }]);
    assert_eq!(refusal(long), (ProblemCode::InterfaceUnusable, "nics[0].bridge".to_owned()));
}

/// Addresses and MTUs of bridges are the host's. A second holder of an address would get the frames of the first.
#[test]
fn a_nic_changes_neither_its_bridge_nor_another_vm() {
    let namespace = Namespace::new("bridge");
    namespace.ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"]);
    namespace.ip(&["link", "set", "v0", "address", "f2:00:00:00:00:01", "master", "br0", "up"]);
    let of_bridge = || ["address", "mtu"].map(|name| namespace.attribute("br0", name));
    let before = of_bridge();
    assert_eq!(before, ["f2:00:00:00:00:01", "1500"]);
    let agent = namespace.agent(&["br0"]);
    let nics = json!([{ "id": "mgmt0", "bridge": "br0", "mac": "02:00:00:00:03:01", "mtu": 1280 }]);
    let mut one = boot(&agent, "one", &nics);
    assert!(one.ask("nic-probe").ends_with(" mtu=1280"));
    assert_eq!(of_bridge(), before);
    let copy = CloneSpec { name: "two".parse().unwrap() };
    let copied = agent.ask(agent.client.clone_vm("one", &copy)).unwrap();
    assert_eq!(copied.spec.nics[0].mac, None, "the agent chooses another");
    let mut spec = SmallGuest::spec(&agent, "three", json!([]), "");
    spec["nics"] = nics;
    let problem = agent.create(&spec).unwrap_err();
    assert_eq!((problem.code, problem.field.as_deref()), (ProblemCode::MacInUse, Some("nics[0].mac")));
}

#[test]
fn a_new_disk_does_not_move_a_nic() {
    let namespace = Namespace::new("slots");
    let agent = namespace.agent(&["br0"]);
    agent.disk("web1.raw", 1 << 20);
    let mut spec = SmallGuest::spec(&agent, "web1", json!([]), "");
    spec["nics"] = on_bridge();
    spec["disks"] = json!([{ "id": "root", "path": "web1.raw", "format": "raw" }]);
    let mut guest = SmallGuest { guest: agent.boot(&spec) };
    guest.wait_for_ready();
    assert!(guest.ask("nic-probe").starts_with("slot=1 "));
    assert!(guest.ask("disk-probe").starts_with("slot=2 "));
}

#[test]
fn taps_and_macvtaps_that_are_there_carry_frames() {
    let namespace = Namespace::new("taps");
    namespace.ip(&["tuntap", "add", "tap0", "mode", "tap", "vnet_hdr", "multi_queue"]);
    namespace.ip(&["link", "set", "tap0", "master", "br0", "up"]);
    namespace.ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"]);
    namespace.ip(&["link", "set", "v1", "master", "br0", "up"]);
    namespace.ip(&["link", "set", "v0", "up"]);
    namespace.ip(&[
        "link",
        "add",
        "link",
        "v0",
        "name",
        "mv0",
        "address",
        "02:00:00:00:02:02",
        "type",
        "macvtap",
        "mode",
        "bridge",
    ]);
    namespace.ip(&["link", "set", "mv0", "up"]);
    let agent = namespace.agent(&["tap0", "mv0"]);
    let mut one =
        boot(&agent, "one", &json!([{ "id": "a", "tap": "tap0", "mac": "02:00:00:00:02:01", "queues": 2 }]));
    let mut two = boot(&agent, "two", &json!([{ "id": "a", "macvtap": "mv0" }]));
    // The small guest knows the control queue of a NIC with one pair of queues only.
    assert_eq!(begin(&mut one), "02:00:00:00:02:01");
    assert_eq!(probe(&mut two), "02:00:00:00:02:02", "the address of the interface");
    assert_eq!(two.ask("nic-send 02:00:00:00:02:01 up"), "ok");
    assert_eq!(one.ask("nic-receive"), "02:00:00:00:02:02 up");
    assert_eq!(one.ask("nic-send 02:00:00:00:02:02 down"), "ok");
    assert_eq!(two.ask("nic-receive"), "02:00:00:00:02:01 down");
    // The kernel would spread an interface's frames over all that have it open.
    for (name, nic) in [
        ("four", json!({ "id": "a", "tap": "tap0", "queues": 2 })),
        ("five", json!({ "id": "a", "macvtap": "mv0" })),
    ] {
        let mut spec = SmallGuest::spec(&agent, name, json!([]), "");
        spec["nics"] = json!([nic]);
        agent.create(&spec).unwrap();
        let problem = agent.act(name, VmAction::Boot).unwrap_err();
        assert!(problem.detail.contains("another VM uses it"), "{problem:?}");
    }
    drop((one, two));
    agent.act("two", VmAction::Stop).unwrap();
    agent.act("five", VmAction::Boot).unwrap();
    agent.act("five", VmAction::Stop).unwrap();
    let spec = json!([{ "id": "a", "macvtap": "mv0", "mac": "02:00:00:00:02:03" }]);
    let mut other = SmallGuest::spec(&agent, "three", json!([]), "");
    other["nics"] = spec;
    agent.create(&other).unwrap();
    let problem = agent.act("three", VmAction::Boot).unwrap_err();
    assert_eq!(problem.code, ProblemCode::InterfaceUnusable, "another address: {problem:?}");
}

#[test]
fn a_hostile_driver_loses_its_nic_and_nothing_else() {
    let namespace = Namespace::new("hostile");
    let agent = namespace.agent(&["br0"]);
    let (mut one, mut two) = (boot(&agent, "one", &on_bridge()), boot(&agent, "two", &on_bridge()));
    let (first, second) = (probe(&mut one), probe(&mut two));
    // A neighbour sends meanwhile, so that receive buffers are used.
    for _ in 0..8 {
        two.ask(&format!("nic-send {first} noise"));
    }
    assert_eq!(one.ask("nic-hostile"), "ok faults=36");
    assert_eq!(one.ask(&format!("nic-send {second} alive")), "ok");
    assert_eq!(two.ask("nic-receive"), format!("{first} alive"));
    assert_eq!(agent.vm("one").status.state, VmState::Running);
}
