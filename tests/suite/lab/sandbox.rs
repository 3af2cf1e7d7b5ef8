//! The sandbox of a VM that has a real VF: all of it is on, and it reaches no other group.

use api::{problem::ProblemCode, types::VmAction};
use serde_json::json;

use super::spec;
use crate::fixture::{
    Agent, Options,
    attack::{Outcome, agent, attempt, report},
    host,
};

#[test]
fn with_a_real_vf_nothing_is_off_and_every_thread_is_confined() {
    let agent = Agent::start_with(Options::for_tests(&[]));
    let adapters = json!([{ "id": "eth0", "vf": host::VF0 }]);
    for thread in ["main", "vcpu", "relay", "function-thread"] {
        for what in ["open_vfio", "open_file", "connect_tcp", "netlink", "exec", "map_code"] {
            let outcome = attempt(&agent, what, thread, &adapters);
            report(&format!("{what:16}{thread:20}{outcome}"));
            assert_eq!(outcome, Outcome::Killed, "{what} on {thread}");
        }
    }
    drop(agent);
    let agent = Agent::start_with(Options {
        arguments: ["--sandbox-off", "seccomp"].map(Into::into).into(),
        ..Options::default()
    });
    agent.create(&spec(&agent, "web1", host::VF0)).unwrap();
    let problem = agent.act("web1", VmAction::Boot).unwrap_err();
    assert_eq!(problem.code, ProblemCode::SandboxUnavailable);
    assert!(problem.detail.contains("--sandbox-off") && problem.detail.contains("seccomp"), "{problem}");
}

#[test]
fn each_layer_alone_keeps_vfio_from_a_vm() {
    let filters = ["own_user", "namespaces", "empty_root", "limits", "landlock"];
    let nothing = ["own_user", "namespaces", "empty_root", "limits", "landlock", "seccomp"];
    for (layers, off) in [
        ("whole sandbox", &[][..]),
        ("seccomp alone", &filters),
        ("user, namespaces, limits", &["seccomp", "landlock"]),
        ("no sandbox", &nothing),
    ] {
        let agent = agent(off);
        // No real VF: an agent that leaves something off gives none.
        let outcome = attempt(&agent, "open_vfio", "vcpu", &json!([]));
        report(&format!("open_vfio       {layers:28}{outcome}"));
        assert_eq!(outcome == Outcome::Succeeded, off == nothing, "{layers}");
    }
}
