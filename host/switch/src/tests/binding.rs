// SPDX-License-Identifier: Apache-2.0

use std::time::Duration;

use api::{
    PolicyBackend as _,
    problem::ProblemCode,
    types::{ObjectRef, PortSpec},
};
use netpolicy::{Change, PfCapabilities, Request, VlanId};
use passthrough::relay::{Forwarded, RelayEvent};
use services::problem::ToProblem;
use tokio::time::timeout;

use super::fixture::{Host, PF, caller, mac, vf, vm};
use crate::SwitchError;

const TRUNK: &str = r#"{"vlan": {"trunk": ["100-200"]}, "mac_changes": "accept", "unicast_limit": 1}"#;

fn code(result: Result<(), SwitchError>) -> ProblemCode {
    result.unwrap_err().problem().code
}

#[tokio::test]
async fn an_adapter_without_a_port_group_is_under_the_default_policy() {
    let host = Host::empty().await;
    host.attach(1, None).await.unwrap();
    host.attach(1, None).await.unwrap();
    let port = host.port(1).await.status;
    assert_eq!((port.switch.as_str(), port.port_group.as_str()), ("default", "default"));
    assert_eq!(port.policy.mac_changes.value, netpolicy::MacChanges::Reject);
    let plan = host.switch.plan(vm(1)).await.unwrap();
    assert_eq!(plan[0].pfs, ["eth0", "eth1"], "all PFs are its uplinks");
    assert_eq!(code(host.attach(2, Some("no")).await), ProblemCode::PortGroupNotFound);
}

#[tokio::test]
async fn addresses_are_one_ports() {
    let host = Host::empty().await;
    host.attach(1, None).await.unwrap();
    let vm = netpolicy::VmRef { id: vm(2), name: netpolicy::Name::new("vm2").unwrap() };
    let adapter = |id: &str, n| crate::Adapter { id: id.into(), group: None, mac: mac(n) };
    let result = host.switch.attach(vm.clone(), vec![adapter("a", 5), adapter("b", 1)]).await;
    assert_eq!(code(result), ProblemCode::MacInUse);
    host.switch.attach(vm, vec![adapter("a", 5)]).await.unwrap();
}

#[tokio::test]
async fn what_a_pf_cannot_enforce_is_refused_naming_the_setting() {
    let mut host = Host::empty().await;
    host.set(r#"{"promiscuous": "accept"}"#).await.unwrap();
    host.attach(1, Some("web")).await.unwrap();
    let plan = host.switch.plan(vm(1)).await.unwrap();
    assert!(plan[0].pfs.is_empty() && plan[0].unfit[0].1.contains("promiscuous"), "{plan:?}");
    let error = host.power_on(1).await.unwrap_err().problem();
    assert_eq!(error.code, ProblemCode::PolicyUnenforceable);
    assert!(error.detail.contains("promiscuous") && error.detail.contains("vm1/eth0"), "{}", error.detail);
    assert_eq!(host.port(1).await.status.vf, None);
    host.set("{}").await.unwrap();
    host.power_on(1).await.unwrap();
    // An edit while it runs is refused, too.
    let problem = host.set(r#"{"blocked": true}"#).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::PolicyUnenforceable);
    host.pfs.world().capabilities = Some(PfCapabilities { link_state: true, ..PfCapabilities::igb_82576() });
    host.switch.plan(vm(1)).await.unwrap();
    host.set(r#"{"blocked": true}"#).await.unwrap();
}

/// A PF that can limit rates takes a range of them only: a rate beyond that would be accepted, and never be in force.
#[tokio::test]
async fn a_rate_that_no_pf_takes_is_refused_at_the_edit_and_at_the_boot() {
    let host = Host::new("{}").await;
    let rate = |mbit: u32| format!(r#"{{"rate": {{"max_tx_mbit": {mbit}}}}}"#);
    let revision = host.group().await.revision;
    let problem = host.set(&rate(1001)).await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::PolicyUnenforceable);
    for part in ["vm1/eth0", "and 1 other port", "rate", "1 to 1000 Mbit/s", "not 1001"] {
        assert!(problem.detail.contains(part), "{part}: {}", problem.detail);
    }
    assert_eq!(host.group().await.revision, revision, "nothing is stored");
    let port = host.port(1).await;
    let spec = PortSpec { settings: serde_json::from_str(&rate(1001)).unwrap() };
    let refused = host.policy.put_port(caller(), ObjectRef::Id(port.id), spec, None).await.unwrap_err();
    assert_eq!(refused.code, ProblemCode::PolicyUnenforceable);
    assert!(!refused.detail.contains("other port"), "{}", refused.detail);
    host.switch.settle().await;
    assert!(host.port(1).await.status.unmade.is_empty());
    assert_eq!(host.pfs.take_made(PF), [], "the PF is not asked");

    host.set(&rate(1000)).await.unwrap();
    host.until("made", async |host| host.pfs.vf(PF, 1).max_tx_rate == 1000).await;
    // Without a VF, no PF has to enforce the rate: the boot is refused.
    let mut host = Host::empty().await;
    host.set(&rate(1001)).await.unwrap();
    let error = host.power_on(1).await.unwrap_err().problem();
    assert_eq!(error.code, ProblemCode::PolicyUnenforceable);
    assert!(error.detail.contains("not 1001"), "{}", error.detail);
}

/// Releases before 0.2.0 stored any rate.
#[tokio::test]
async fn an_old_rate_that_no_pf_takes_does_not_stand_in_the_way_of_other_edits() {
    let rate = |mbit: u32, rest: &str| format!(r#"{{"rate": {{"max_tx_mbit": {mbit}}}{rest}}}"#);
    let mut host = Host::new(&rate(1000, "")).await;
    let database = host.database();
    let older = "UPDATE objects SET value = replace(value, '1000', '2000') WHERE kind = 'port_group'";
    host.restart_after(async |_| assert_eq!(database.execute(older, []).unwrap(), 1)).await;
    host.set(&rate(2000, r#", "multicast_limit": 1"#)).await.unwrap();
    for worse in [rate(2001, ""), rate(2000, r#", "blocked": true"#)] {
        assert_eq!(host.set(&worse).await.unwrap_err().code, ProblemCode::PolicyUnenforceable, "{worse}");
    }
    host.set(&rate(1000, "")).await.unwrap();
}

/// The cause of the failure is the disk: an error about a closed database would have users look for a dead agent.
#[tokio::test]
async fn a_full_disk_is_told_as_such() {
    let host = Host::new("{}").await;
    host.attach(0, Some("web")).await.unwrap();
    let other = host.database();
    for event in ["INSERT", "UPDATE", "DELETE"] {
        let trigger = format!(
            "CREATE TRIGGER full_{event} BEFORE {event} ON objects BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
        );
        other.execute_batch(&trigger).unwrap();
    }
    let bound = host.switch.bind(vm(0), "eth0", vf(0), "0000:01:10.0".into()).await.map(drop);
    let released = host.switch.released(vm(1), "eth0").await;
    let edited = host.set(r#"{"mtu": 1400}"#).await;
    for problem in [bound.unwrap_err().problem(), released.unwrap_err().problem(), edited.unwrap_err()] {
        let detail = &problem.detail;
        assert!(detail.contains("disk is full") && !detail.contains("closed"), "{detail}");
    }
}

#[tokio::test]
async fn what_a_tenant_left_is_known_until_it_is_taken_also_by_the_next_agent() {
    let mut host = Host::new(TRUNK).await;
    host.request(1, Request::SetMac(mac(9))).await;
    host.request(1, Request::SetVlan { vid: 100, add: true }).await;
    host.request(1, Request::AddUnicastFilter(mac(10))).await;
    host.request(1, Request::SetMulticast { count: 1, hashes: vec![7] }).await;
    host.restart().await;
    let left = host.switch.release(vm(1), "eth0").await.unwrap().unwrap();
    assert_eq!((left.vf.clone(), left.effective_mac), (vf(1), mac(9)));
    let vlan = Change::LeaveVlan(VlanId::new(100).unwrap());
    for change in [vlan, Change::ClearUnicast, Change::SetMulticast(Vec::new()), Change::SetMac(mac(1))] {
        assert!(left.changes.contains(&change), "{change:?} is missing in {:?}", left.changes);
    }
    assert_eq!(left.changes[0], Change::Reset);
    // The guest's last requests come too late.
    host.connect(1).await;
    host.send(1, Request::SetMac(mac(11))).await;
    assert_eq!(host.switch.release(vm(1), "eth0").await.unwrap().unwrap(), left, "asked again");
    assert!(!host.is_answered(1));
    assert_eq!(host.pf_mac(1), Some(mac(9)), "the PF is restored by who has the claim");
    host.switch.released(vm(1), "eth0").await.unwrap();
    assert_eq!(host.switch.release(vm(1), "eth0").await.unwrap(), None);
    let status = host.port(1).await.status;
    assert_eq!((status.vf, status.effective_mac, status.guest_mac), (None, mac(1), mac(1)));
    assert!(status.counters.allowed >= 4, "counters stay with the port");
    host.restart().await;
    assert_eq!(host.port(1).await.status.vf_index, None);
    host.power_on(1).await.unwrap();
    host.switch.settle().await;
    let left = host.switch.release(vm(1), "eth0").await.unwrap().unwrap();
    assert_eq!(left.changes, [Change::Reset], "a new tenant has nothing of the old one");
}

/// The changes that scrub the VF of VM 1 for its next tenant.
async fn left(host: &Host) -> Vec<Change> {
    host.switch.release(vm(1), "eth0").await.unwrap().unwrap().changes
}

/// The changes that scrub a VF that may have further addresses.
const CLEARED: [Change; 3] = [Change::Reset, Change::ClearUnicast, Change::SetMaxFrame(1526)];

#[tokio::test]
async fn a_vmm_that_lies_about_further_addresses_leaves_none_behind() {
    // The vmm has sent the message, and reports that the PF refused it.
    let mut host = Host::new(TRUNK).await;
    let seq = host.send(1, Request::AddUnicastFilter(mac(10))).await;
    host.answer(1).await;
    host.event(1, RelayEvent::Forwarded { seq, outcome: Forwarded::Refused }).await;
    host.switch.settle().await;
    host.restart().await;
    assert_eq!(left(&host).await, CLEARED, "refused");

    // The vmm has not sent the message, and reports that the PF took it.
    let mut host = Host::new(TRUNK).await;
    host.request(1, Request::AddUnicastFilter(mac(10))).await;
    host.request(1, Request::ClearUnicastFilters).await;
    // Without the permission, nothing else shows that the VF may have the address.
    host.set("{}").await.unwrap();
    host.restart().await;
    assert_eq!(left(&host).await, CLEARED, "cleared");

    let mut host = Host::new(TRUNK).await;
    host.request(1, Request::SetMulticast { count: 0, hashes: Vec::new() }).await;
    assert_eq!(left(&host).await, [Change::Reset], "it was never trusted");
}

#[tokio::test]
async fn the_record_of_an_older_agent_counts_as_the_policy_says() {
    for (settings, changes) in [(TRUNK, CLEARED.to_vec()), ("{}", vec![Change::Reset])] {
        let mut host = Host::new(settings).await;
        host.restart_after(async |attachments| {
            for mut entry in attachments.list().await.unwrap() {
                entry.value.device.was_trusted = None;
                let (name, expect) = (entry.name, store::Expect::Any);
                attachments.put(entry.id, &name, &entry.value, expect).await.unwrap();
            }
        })
        .await;
        assert_eq!(left(&host).await, changes, "{settings}");
    }
}

#[tokio::test]
async fn ports_go_with_their_vm_and_groups_stay_while_ports_use_them() {
    let host = Host::new("{}").await;
    let problem = host.delete_group("web").await.unwrap_err();
    assert_eq!(problem.code, ProblemCode::PortGroupInUse);
    assert!(host.switch.detach(vm(1)).await.is_err(), "it has a VF");
    for n in [1, 2] {
        host.switch.release(vm(n), "eth0").await.unwrap();
        host.switch.released(vm(n), "eth0").await.unwrap();
        host.switch.detach(vm(n)).await.unwrap();
    }
    host.delete_group("web").await.unwrap();
    host.attach(1, None).await.unwrap();
}

#[tokio::test]
async fn a_vf_has_one_port() {
    let mut host = Host::new("{}").await;
    host.power_on(2).await.unwrap_err();
    host.attach(3, Some("web")).await.unwrap();
    let result = host.switch.bind(vm(3), "eth0", vf(1), String::new()).await;
    assert_eq!(code(result.map(drop)), ProblemCode::VfInUse);
    assert_eq!(host.pfs.take_made(PF), []);
}

#[tokio::test]
async fn a_pf_that_does_not_answer_keeps_no_vm_from_another() {
    let mut host = Host::empty().await;
    host.set("{}").await.unwrap();
    host.attach(1, Some("web")).await.unwrap();
    host.pfs.world().hangs = Some("eth1".into());
    let plan = timeout(Duration::from_secs(8), host.switch.plan(vm(1))).await.expect("a plan").unwrap();
    assert!(plan[0].pfs.contains(&PF.to_owned()), "{plan:?}");
    host.power_on(1).await.unwrap();
    host.pfs.world().hangs = None;
}

#[tokio::test]
async fn an_agent_that_cannot_read_what_a_vf_has_does_not_start_and_says_of_what() {
    for kind in ["attachment", "port_group"] {
        let error = text::chain(&Host::new(TRUNK).await.restart_on_damaged(kind).await);
        assert!(error.contains(kind), "{error}");
    }
}

/// Such a port was once skipped, and with it the leftovers of its VF: the next tenant would have got them.
#[tokio::test]
async fn an_agent_that_cannot_take_up_a_port_with_a_vf_does_not_start_and_says_which() {
    let error = text::chain(&Host::new(TRUNK).await.restart_without("port_group").await);
    assert!(error.contains("port vm1/eth0 ") && error.contains("does not exist"), "{error}");
}
