// SPDX-License-Identifier: Apache-2.0

//! Two adapters of one VM on two PFs, and the addresses that they share.

use std::{
    thread,
    time::{Duration, Instant},
};

use api::types::{DecisionFilter, PortGroupSpec};
use serde_json::{Value, json};

use crate::fixture::{Agent, Options, SmallGuest};

const A: &str = "02:00:00:00:0a:01";
const B: &str = "02:00:00:00:0a:02";
const C: &str = "02:00:00:00:0a:03";
const BOB: &str = "02:00:00:00:0b:01";

fn settings(agent: &Agent, settings: Value) {
    let spec = json!({"switch": "default", "settings": settings});
    let spec: PortGroupSpec = serde_json::from_value(spec).unwrap();
    agent.ask(agent.client.put_port_group("tests", &spec, None)).unwrap();
}

/// An adapter of the group on the VF of this index of a PF.
fn adapter(agent: &Agent, id: &str, mac: &str, pf: &str, index: u32) -> Value {
    let vf = agent.vfs().into_iter().find(|vf| vf.pf == pf && vf.index == index).unwrap();
    json!({"id": id, "port_group": "tests", "mac": mac, "vf": vf.bdf.to_string()})
}

/// The effective address of an adapter's port of the VM `alice`.
fn effective(agent: &Agent, adapter: &str) -> String {
    let name = format!("alice/{adapter}");
    let ports = agent.ask(agent.client.list_ports()).unwrap();
    ports.into_iter().find(|port| port.name == name).unwrap().status.effective_mac.to_string()
}

/// The addresses of its first two adapters in the status of the VM `alice`: the initial ones, as their description says.
fn initial(agent: &Agent) -> [String; 2] {
    let adapters = agent.vm("alice").status.adapters;
    [&adapters[0], &adapters[1]].map(|adapter| adapter.mac.to_string())
}

fn details_of_refusals(agent: &Agent) -> Vec<String> {
    let verdict = serde_json::from_value(json!("denied")).unwrap();
    let filter = DecisionFilter { verdict: Some(verdict), limit: 100, ..DecisionFilter::default() };
    let decisions = agent.ask(agent.client.decisions(&filter)).unwrap();
    decisions.into_iter().filter_map(|decision| decision.detail).collect()
}

/// Has the guest drive another of its VFs from now on. The former VF keeps its settings.
fn use_vf(guest: &mut SmallGuest<'_>, index: u32) {
    assert!(guest.ask(&format!("probe {index}")).starts_with("8086:10ca "));
    assert!(guest.ask("up").starts_with("ok "));
}

#[test]
fn ports_of_one_vm_share_an_address_on_two_pfs_only_and_give_it_back() {
    let arguments = ["--sim-pf", "sim0=2", "--sim-pf", "sim1=2"].map(ToString::to_string).into();
    let mut agent = Agent::start_with(Options { arguments, ..Options::default() });
    settings(&agent, json!({ "mac_changes": "accept" }));
    let adapters = json!([
        adapter(&agent, "eth0", A, "sim0", 0),
        adapter(&agent, "eth1", B, "sim1", 0),
        adapter(&agent, "eth2", C, "sim0", 1),
    ]);
    let bob = json!([adapter(&agent, "eth0", BOB, "sim1", 1)]);
    {
        let mut alice = SmallGuest::boot(&agent, "alice", adapters.clone());
        let mut bob = SmallGuest::boot(&agent, "bob", bob);
        assert!(bob.ask("up").starts_with("ok "));
        use_vf(&mut alice, 1);
        assert_eq!(alice.ask(&format!("set-mac {A}")), "nack", "one holder by default");
        settings(&agent, json!({ "mac_sharing": "same_vm" }));

        // As a bond with `fail_over_mac=none` does: both adapters have the address of the first.
        assert_eq!(alice.ask(&format!("set-mac {A}")), "ok");
        assert_eq!(alice.ask("down-up"), format!("ok mac={A} reply={A}"));
        assert_eq!([effective(&agent, "eth0"), effective(&agent, "eth1")], [A, A]);
        assert_eq!(initial(&agent), [A, B]);
        assert!(bob.ask(&format!("send dst={A} text=hello")).starts_with("ok "));
        assert!(alice.ask(&format!("expect 2000 src={BOB} text=hello")).contains("hello"));
        assert_eq!(bob.ask(&format!("set-mac {A}")), "nack", "another VM has no part in it");

        // The PF of the first port has the address once.
        use_vf(&mut alice, 2);
        assert_eq!(alice.ask(&format!("set-mac {A}")), "nack");
        let same_pf = "The port alice/eth0 of the same VM has it, on the same PF";
        let details = details_of_refusals(&agent);
        assert!(details.iter().any(|detail| detail.starts_with(same_pf)), "{details:?}");

        // As `follow` does: the old port takes over the address of the new one.
        use_vf(&mut alice, 0);
        assert_eq!(alice.ask(&format!("set-mac {B}")), "ok");
    }

    agent.kill_and_restart();
    assert_eq!([effective(&agent, "eth0"), effective(&agent, "eth1")], [B, A], "the next agent knows it");
    assert_eq!(initial(&agent), [A, B]);
    // An edit revokes it, also where each address by itself is allowed.
    settings(&agent, json!({ "mac_changes": "accept" }));
    let deadline = Instant::now() + Duration::from_secs(10);
    while [effective(&agent, "eth0"), effective(&agent, "eth1")] != [A, B] {
        assert!(Instant::now() < deadline, "{}", agent.log());
        thread::sleep(Duration::from_millis(50));
    }
    agent.delete("alice").unwrap();
    let mut again = SmallGuest::boot(&agent, "alice", adapters);
    use_vf(&mut again, 1);
    assert_eq!(again.ask(&format!("set-mac {A}")), "nack");
}
