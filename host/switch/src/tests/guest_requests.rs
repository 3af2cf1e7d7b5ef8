// SPDX-License-Identifier: Apache-2.0

use std::time::Duration;

use netpolicy::{
    Change, Committed, OnDenied, OnDenied::Nack, OnDenied::Silent, Outcome, PfCapabilities, Reason, Request,
    Setting, Source, VlanId,
};
use passthrough::relay::{Cancelled, Forwarded, GuestRequest, RelayEvent};
use sriov::VfChange;
use store::Expect;
use tokio::time::sleep;

use super::fixture::{FORWARD, Host, LOCAL, PF, Revokes, TIMING, mac, refused, vf, vm};

const ACCEPT: &str = r#"{"mac_changes": "accept", "unicast_limit": 2}"#;
const TRUNK: &str = r#"{"vlan": {"trunk": ["100-200"]}, "vlan_limit": 2}"#;

fn join(vid: u16) -> Request {
    Request::SetVlan { vid, add: true }
}

fn vlan(id: u16) -> VlanId {
    VlanId::new(id).unwrap()
}

#[tokio::test]
async fn a_rejected_address_changes_nothing_and_is_told_recorded_and_published() {
    let mut host = Host::new("{}").await;
    let mut events = host.policy.events.subscribe(None).unwrap();
    let wish = Request::SetMac(mac(9));
    assert_eq!(host.request(1, wish).await, refused(Nack, Reason::MacChangesRejected));
    assert_eq!((host.pf_mac(1), host.addresses(1).await), (Some(mac(1)), (mac(1), mac(1))));
    assert_eq!(host.pfs.take_made(PF), [], "the PF hears nothing of it");
    let decisions = host.decisions(1, Outcome::Denied).await;
    let [decision] = &decisions[..] else { panic!("{decisions:?}") };
    assert_eq!((decision.vm.name.as_str(), decision.vf.clone()), ("vm1", Some(vf(1))));
    assert_eq!((decision.request.as_str(), decision.reason), ("set_mac", Some(Reason::MacChangesRejected)));
    assert_eq!(decision.old.as_deref(), Some("02:00:00:00:00:01"));
    assert_eq!(decision.requested.as_deref(), Some("02:00:00:00:00:09"));
    let by = decision.decided_by.unwrap();
    assert_eq!((by.setting, by.source), (Setting::MacChanges, Source::Default));
    assert_eq!(decision.committed, Committed::Nothing);
    assert_eq!(host.port(1).await.status.counters.denied, 1);
    let event = serde_json::to_value(events.recv().await.unwrap()).unwrap();
    assert_eq!(event["event"], "decision");
    let told = &event["decision"];
    assert_eq!(told["owner"], serde_json::json!({ "vm": vm(1).0, "name": "vm1", "adapter": "eth0" }));
    assert_eq!(told["port"], serde_json::json!(host.port(1).await.id));
    for (field, value) in [
        ("pf", serde_json::json!(PF)),
        ("vf_index", 1.into()),
        ("request", "set_mac".into()),
        ("old", "02:00:00:00:00:01".into()),
        ("requested", "02:00:00:00:00:09".into()),
        ("verdict", "denied".into()),
        ("reason", "mac_changes_rejected".into()),
    ] {
        assert_eq!(told[field], value, "{field}");
    }
}

#[tokio::test]
async fn a_silent_refusal_leaves_guest_and_device_differing_until_the_guest_resets() {
    let mut host = Host::new(r#"{"on_denied": "silent"}"#).await;
    assert_eq!(host.request(1, Request::SetMac(mac(9))).await, refused(Silent, Reason::MacChangesRejected));
    assert_eq!(host.addresses(1).await, (mac(1), mac(1)), "only its relay knows what the guest was told");
    host.event(1, RelayEvent::GuestMac { mac: mac(9) }).await;
    assert_eq!((host.pf_mac(1), host.addresses(1).await), (Some(mac(1)), (mac(1), mac(9))));
    assert!(host.decisions(1, Outcome::Denied).await[0].detail.as_ref().unwrap().contains("reports success"));
    assert_eq!(host.request(1, Request::Reset).await, LOCAL);
    assert_eq!(host.addresses(1).await, (mac(1), mac(1)));
}

/// The standing denial of VM 1's relay, if it has one, and how and why it denies address 9, if it
/// does.
fn standing(host: &Host) -> Option<Option<(OnDenied, Reason)>> {
    let standing = host.vmm(1).heard().standing.clone()?;
    assert!(!standing.covers(mac(1)), "the initial address needs a request");
    Some(standing.covers(mac(9)).then_some((standing.on_denied, standing.reason)))
}

/// The lab's controls of the policy's tests have such a switch.
#[tokio::test]
async fn a_permissive_switch_grants_what_the_policy_denies_and_revokes_nothing() {
    let mut host = Host::permissive("{}").await;
    assert_eq!(standing(&host), None);
    assert_eq!(host.request(1, Request::SetMac(mac(9))).await, LOCAL);
    assert_eq!(host.request(1, join(100)).await, FORWARD);
    host.set(r#"{"vlan": {"trunk": ["200"]}}"#).await.unwrap();
    assert_eq!(host.request(1, Request::Reset).await, LOCAL);
    host.switch.settle().await;
    assert_eq!(host.pf_mac(1), Some(mac(9)));
    assert_eq!((host.vmm(1).commands(), host.decisions(1, Outcome::Revoked).await), (vec![], vec![]));
}

#[tokio::test]
async fn relays_know_at_once_what_is_refused_in_any_case() {
    let mut host = Host::new("{}").await;
    assert_eq!(standing(&host), Some(Some((Nack, Reason::MacChangesRejected))), "from the first connection");
    host.set(r#"{"on_denied": "silent"}"#).await.unwrap();
    assert_eq!(standing(&host), Some(Some((Silent, Reason::MacChangesRejected))));
    host.set(ACCEPT).await.unwrap();
    assert_eq!(standing(&host), None, "when the edit's answer is there, not some time later");
    host.set(r#"{"mac_changes": {"list": ["02:00:00:00:00:09"]}}"#).await.unwrap();
    assert_eq!(standing(&host), Some(None), "a listed one is asked for");
    // A vmm that reconnects gets the standing denial, too.
    host.switch.disconnected(vm(1)).await;
    host.set("{}").await.unwrap();
    host.connect(1).await;
    host.switch.settle().await;
    assert_eq!(standing(&host), Some(Some((Nack, Reason::MacChangesRejected))));
}

#[tokio::test]
async fn what_a_relay_refused_is_recorded_as_if_it_had_been_asked() {
    let mut host = Host::new("{}").await;
    host.request(1, Request::SetMac(mac(9))).await;
    host.event(1, RelayEvent::Declined { mac: mac(8), reason: Reason::MacChangesRejected, silent: true })
        .await;
    let decisions = host.decisions(1, Outcome::Denied).await;
    let [told, asked] = &decisions[..] else { panic!("{decisions:?}") };
    let what = |decision: &netpolicy::Decision| {
        (
            decision.request.clone(),
            decision.reason,
            decision.decided_by,
            decision.old.clone(),
            decision.committed,
        )
    };
    assert_eq!(what(told), what(asked));
    assert_eq!(told.requested.as_deref(), Some("02:00:00:00:00:08"));
    assert!(told.detail.as_ref().unwrap().contains("reports success"));
    assert_eq!(host.port(1).await.status.counters.denied, 2);

    // The denial crossed an edit of the policy: the record has the vmm's reason and names no
    // setting.
    host.set(ACCEPT).await.unwrap();
    host.event(1, RelayEvent::Declined { mac: mac(8), reason: Reason::MacChangesRejected, silent: true })
        .await;
    let decision = &host.decisions(1, Outcome::Denied).await[0];
    assert_eq!((decision.reason, decision.decided_by), (Some(Reason::MacChangesRejected), None));
    let detail = decision.detail.as_ref().unwrap();
    assert!(detail.contains("before its last change") && detail.contains("reports success"), "{detail}");
}

/// The agent was away during the guest's reset. The guest must not get "done" for an address that
/// the reboot's own work then revokes.
#[tokio::test]
async fn an_address_that_a_reboot_is_about_to_take_is_given_again() {
    let mut host = Host::new(ACCEPT).await;
    host.request(1, Request::SetMac(mac(9))).await;
    let gate = host.pfs.world().gate.clone();
    // Without the gate, the reboot would be over before the request comes.
    let held = gate.lock().await;
    host.intake(1).rebooted().await;
    host.send(1, Request::SetMac(mac(9))).await;
    sleep(Duration::from_millis(20)).await;
    drop(held);
    assert_eq!(host.answer(1).await.effective_mac, mac(9));
    host.switch.settle().await;
    assert_eq!((host.pf_mac(1), host.addresses(1).await), (Some(mac(9)), (mac(9), mac(9))));
}

#[tokio::test]
async fn an_accepted_address_is_on_the_pf_and_survives_reset_and_agent_but_no_reboot() {
    let mut host = Host::new(ACCEPT).await;
    assert_eq!(host.request(1, Request::SetMac(mac(9))).await, LOCAL);
    assert_eq!((host.pf_mac(1), host.addresses(1).await), (Some(mac(9)), (mac(9), mac(9))));
    let allowed = host.decisions(1, Outcome::Allowed).await;
    assert_eq!((allowed[0].committed, allowed[0].old.as_deref()), (Committed::Pf, Some("02:00:00:00:00:01")));
    assert_eq!(host.request(1, Request::SetMac(mac(9))).await, LOCAL, "the effective one, without a change");
    host.send(1, Request::Reset).await;
    assert_eq!(host.answer(1).await.effective_mac, mac(9));
    host.switch.settle().await;

    host.pfs.take_made(PF);
    host.restart().await;
    host.connect(1).await;
    host.switch.settle().await;
    assert_eq!((host.pf_mac(1), host.addresses(1).await), (Some(mac(9)), (mac(9), mac(9))));
    assert_eq!(host.pfs.take_made(PF), []);
    assert_eq!(host.decisions(1, Outcome::Repaired).await, []);

    host.intake(1).rebooted().await;
    host.send(1, Request::Reset).await;
    assert_eq!(host.answer(1).await.effective_mac, mac(1), "the reset waits for the reboot's settings");
    assert_eq!((host.pf_mac(1), host.addresses(1).await), (Some(mac(1)), (mac(1), mac(1))));
}

#[tokio::test]
async fn an_address_of_another_port_is_refused_also_while_that_one_is_being_given_it() {
    let mut host = Host::new(ACCEPT).await;
    assert_eq!(host.request(1, Request::SetMac(mac(2))).await, refused(Nack, Reason::MacInUse));
    let gate = host.pfs.world().gate.clone();
    let held = gate.lock().await;
    host.send(1, Request::SetMac(mac(9))).await;
    host.send(2, Request::SetMac(mac(9))).await;
    let verdict = host.answer(2).await;
    assert_eq!(verdict.decision, refused(Nack, Reason::MacInUse));
    drop(held);
    assert_eq!(host.answer(1).await.decision, LOCAL);
}

#[tokio::test]
async fn what_the_pf_refuses_is_refused() {
    let mut host = Host::new(ACCEPT).await;
    host.pfs.world().pfs.get_mut(PF).unwrap().answers = vec![Some(libc::EINVAL)];
    assert_eq!(host.request(1, Request::SetMac(mac(9))).await, refused(Nack, Reason::CommitFailed));
    assert_eq!((host.pf_mac(1), host.addresses(1).await), (Some(mac(1)), (mac(1), mac(1))));
    let denied = host.decisions(1, Outcome::Denied).await;
    assert_eq!((denied[0].reason, denied[0].committed), (Some(Reason::CommitFailed), Committed::Failed));
    assert_eq!(host.request(1, Request::SetMac(mac(9))).await, LOCAL, "nothing is left of it");
}

#[tokio::test]
async fn vlans_are_forwarded_in_range_and_older_ones_make_room() {
    let mut host = Host::new(TRUNK).await;
    assert_eq!(host.request(1, join(300)).await, refused(Nack, Reason::VlanNotAllowed));
    for vid in [100, 101] {
        assert_eq!(host.request(1, join(vid)).await, FORWARD);
    }
    assert_eq!(host.request(1, join(102)).await, refused(Nack, Reason::LimitExceeded));
    assert_eq!(host.request(1, Request::Reset).await, LOCAL);
    host.vmm(1).commands();
    // The PF may still have the VLANs from before the reset.
    for (new, old) in [(102, 100), (103, 101)] {
        assert_eq!(host.request(1, join(new)).await, FORWARD);
        assert_eq!(host.vmm(1).revoked(), [Change::LeaveVlan(vlan(old))]);
    }
    assert_eq!(host.decisions(1, Outcome::Allowed).await[0].committed, Committed::Mailbox);
}

/// A change of trust would make such a PF ignore the message, and the guest reset.
#[tokio::test]
async fn a_pf_whose_trust_needs_a_reset_keeps_a_running_guest_untrusted() {
    let mut host = Host::empty().await;
    let capabilities = PfCapabilities { trust_needs_reset: true, ..PfCapabilities::igb_82576() };
    host.pfs.world().capabilities = Some(capabilities);
    host.set(ACCEPT).await.unwrap();
    host.power_on(1).await.unwrap();
    host.pfs.take_made(PF);
    assert_eq!(host.request(1, Request::AddUnicastFilter(mac(9))).await, FORWARD);
    host.set("{}").await.unwrap();
    host.switch.settle().await;
    assert_eq!(host.vmm(1).revoked(), [Change::ClearUnicast]);
    assert_eq!(host.pfs.take_made(PF), []);
}

#[tokio::test]
async fn trust_is_on_only_around_messages_that_need_it() {
    let mut host = Host::new(ACCEPT).await;
    let seq = host.send(1, Request::AddUnicastFilter(mac(9))).await;
    assert_eq!(host.answer(1).await.decision, FORWARD);
    assert_eq!(host.pfs.vf(PF, 1).trust, Some(true));
    host.event(1, RelayEvent::Forwarded { seq, outcome: Forwarded::Accepted }).await;
    host.switch.settle().await;
    assert_eq!(host.pfs.take_made(PF), [(1, VfChange::Trust(true)), (1, VfChange::Trust(false))]);

    // If the vmm reports nothing, the filter may be set, and trust is off again.
    host.send(1, Request::AddUnicastFilter(mac(10))).await;
    host.answer(1).await;
    tokio::time::sleep(TIMING.forwarded).await;
    host.switch.settle().await;
    assert_eq!(host.pfs.vf(PF, 1).trust, Some(false));
    assert_eq!(
        host.request(1, Request::AddUnicastFilter(mac(11))).await,
        refused(Nack, Reason::LimitExceeded)
    );
    assert_eq!(host.decisions(1, Outcome::Denied).await.len(), 2);
}

#[tokio::test]
async fn refusals_wait_for_nothing() {
    let mut host = Host::new(r#"{"mac_changes": {"list": ["02:00:00:00:00:09"]}}"#).await;
    let gate = host.pfs.world().gate.clone();
    let held = gate.lock().await;
    host.send(1, Request::SetMac(mac(9))).await;
    host.send(2, Request::SetMac(mac(8))).await;
    assert_eq!(host.answer(2).await.decision, refused(Nack, Reason::MacNotAllowed));
    assert!(!host.is_answered(1));
    drop(held);
    host.answer(1).await;
}

#[tokio::test]
async fn a_commit_that_lands_after_the_deadline_is_reverted() {
    let mut host = Host::new(ACCEPT).await;
    let gate = host.pfs.world().gate.clone();
    let held = gate.lock().await;
    let request = Request::SetMac(mac(9));
    let seq = host.send(1, request.clone()).await;
    let cancelled = RelayEvent::Cancelled { seq, request: request.clone(), why: Cancelled::Deadline };
    host.event(1, cancelled.clone()).await;
    drop(held);
    host.switch.settle().await;
    assert_eq!((host.pf_mac(1), host.addresses(1).await), (Some(mac(1)), (mac(1), mac(1))));
    assert!(!host.is_answered(1));
    let made: Vec<_> = host.pfs.take_made(PF);
    assert_eq!(made, [(1, VfChange::Mac(Some(mac(9)))), (1, VfChange::Mac(Some(mac(1))))]);
    for outcome in [Outcome::Denied, Outcome::Reverted] {
        let decisions = host.decisions(1, outcome).await;
        assert_eq!(decisions.len(), 1, "{outcome:?}");
        assert_eq!(decisions[0].reason, Some(Reason::AuthorityUnreachable));
    }

    // The same with a response that was already on its way.
    let seq = host.send(1, request.clone()).await;
    assert_eq!(host.answer(1).await.decision, LOCAL);
    host.event(1, RelayEvent::Cancelled { seq, request, why: Cancelled::Deadline }).await;
    host.switch.settle().await;
    assert_eq!((host.pf_mac(1), host.addresses(1).await), (Some(mac(1)), (mac(1), mac(1))));
    // A repeated event reverts nothing more.
    host.event(1, cancelled).await;
    host.switch.settle().await;
    assert_eq!(host.decisions(1, Outcome::Reverted).await[0].count, 2);
}

#[tokio::test]
async fn a_request_that_is_given_up_before_its_turn_changes_nothing() {
    let mut host = Host::new(TRUNK).await;
    host.vmm(1).heard().revokes = Revokes::Never;
    host.request(1, join(100)).await;
    // A correction is under way while the guest sends its request.
    host.set(r#"{"vlan": {"trunk": ["101-200"]}, "mac_changes": "accept"}"#).await.unwrap();
    let request = Request::SetMac(mac(9));
    let seq = host.send(1, request.clone()).await;
    host.event(1, RelayEvent::Cancelled { seq, request, why: Cancelled::Deadline }).await;
    tokio::time::sleep(TIMING.confirm * 2).await;
    assert_eq!(host.pfs.take_made(PF), []);
    assert!(!host.is_answered(1));
}

#[tokio::test]
async fn an_agent_that_dies_during_a_commit_believes_the_vmm_about_what_its_guest_heard() {
    for (made, heard) in [(true, true), (true, false), (false, false)] {
        let mut host = Host::new(ACCEPT).await;
        let request = Request::SetMac(mac(9));
        let port = host.port(1).await.id;
        if made {
            host.pfs.foreign_mac(PF, 1, mac(9));
        }
        host.restart_after(async |table| {
            let mut entry = table.get(port).await.unwrap();
            entry.value.pending = vec![Change::SetMac(mac(9))];
            table.put(port, &entry.name, &entry.value, Expect::Any).await.unwrap();
        })
        .await;
        host.connect(1).await;
        if !heard {
            host.event(1, RelayEvent::Cancelled { seq: 77, request, why: Cancelled::Deadline }).await;
        }
        host.switch.settle().await;
        let expect = if heard { mac(9) } else { mac(1) };
        assert_eq!((host.pf_mac(1), host.addresses(1).await.0), (Some(expect), expect), "{made} {heard}");
        let reverted = host.decisions(1, Outcome::Reverted).await;
        assert_eq!(reverted.len(), usize::from(made && !heard), "{reverted:?}");
        assert_eq!(host.decisions(1, Outcome::Repaired).await, []);
    }
}

/// The vmm has forgotten the cancelled request after it reported it.
#[tokio::test]
async fn an_agent_that_dies_when_it_has_heard_of_a_request_given_up_leaves_its_revert_to_the_next() {
    for (answered, made) in [(false, false), (false, true), (true, true), (true, false)] {
        let mut host = Host::new(ACCEPT).await;
        let gate = host.pfs.world().gate.clone();
        let request = Request::SetMac(mac(9));
        let (seq, held) = if answered {
            let seq = host.send(1, request.clone()).await;
            host.answer(1).await;
            host.switch.settle().await;
            (seq, gate.lock_owned().await)
        } else {
            let held = gate.lock_owned().await;
            (host.send(1, request.clone()).await, held)
        };
        host.event(1, RelayEvent::Cancelled { seq, request, why: Cancelled::Deadline }).await;
        let noted = host.stored(1).await;
        drop(held);
        host.switch.settle().await;
        let port = host.port(1).await.id;
        host.until("the revert is over", async |host| host.stored(1).await.revert.is_none()).await;

        // Restart as if the agent had died right after the event, or during the work that followed.
        host.pfs.foreign_mac(PF, 1, if made { mac(9) } else { mac(1) });
        host.restart_after(async |table| {
            let name = table.get(port).await.unwrap().name;
            table.put(port, &name, &noted, Expect::Any).await.unwrap();
        })
        .await;
        host.connect(1).await;
        host.switch.settle().await;
        let addresses = (host.pf_mac(1), host.addresses(1).await);
        assert_eq!(addresses, (Some(mac(1)), (mac(1), mac(1))), "{answered} {made}");
        assert_eq!(host.decisions(1, Outcome::Repaired).await, []);
        host.until("it is not done again", async |host| host.stored(1).await.revert.is_none()).await;
    }
}

#[tokio::test]
async fn a_granted_address_waits_for_one_durable_write() {
    let mut host = Host::new(ACCEPT).await;
    let database = host.database();
    let written = || -> u64 {
        database
            .query_row("SELECT seq FROM sqlite_sequence WHERE name = 'changes'", [], |row| row.get(0))
            .unwrap()
    };
    host.switch.settle().await;
    let before = written();
    let gate = std::sync::Arc::clone(&host.pfs.world().gate);
    let closed = gate.lock().await;
    host.send(1, Request::SetMac(mac(9))).await;
    host.until("the change is stored", async |_| written() > before).await;
    // It is about to be made on the PF.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(written() - before, 1, "the change is stored before it is made");
    // No other write succeeds from now on, and the guest does not wait for one.
    database.execute_batch("BEGIN IMMEDIATE").unwrap();
    drop(closed);
    // Sooner than the store gives up.
    let answer =
        tokio::time::timeout(Duration::from_secs(2), host.answer(1)).await.expect("no wait for the disk");
    assert_eq!(answer.decision, LOCAL);
    database.execute_batch("ROLLBACK").unwrap();
    host.until("the rest is stored", async |_| written() - before == 2).await;
    host.switch.settle().await;
    assert_eq!(written() - before, 2, "and nothing more");
}

#[tokio::test]
async fn a_former_connection_is_not_heard() {
    let mut host = Host::new(ACCEPT).await;
    let guest_request = |seq| GuestRequest { seq, request: Request::SetMac(mac(9)) };
    let mut former = host.intake(1);
    // Both may still be on their way when the agent has connected again, or has not yet.
    host.connect(1).await;
    former.request("eth0".into(), 1, guest_request(1)).await;
    let forgotten = former.event("eth0".into(), RelayEvent::GuestMac { mac: mac(9) }).await;
    assert!(!forgotten && !former.rebooted().await, "the vmm must repeat them on the present connection");
    let mut present = host.intake(1);
    host.switch.disconnected(vm(1)).await;
    present.request("eth0".into(), 2, guest_request(2)).await;
    host.switch.settle().await;
    assert_eq!(host.pfs.take_made(PF), []);
    assert!(!host.is_answered(1));
    assert_eq!(host.port(1).await.status.guest_mac, mac(1));
    host.connect(1).await;
    assert_eq!(host.request(1, Request::SetMac(mac(9))).await, LOCAL);
}

#[tokio::test]
async fn a_vmm_speaks_for_its_own_vm_only() {
    let mut host = Host::new(ACCEPT).await;
    let guest_request = GuestRequest { seq: 1, request: Request::SetMac(mac(9)) };
    let mut intake = host.intake(1);
    host.switch.newest_intake(vm(7)).request("eth0".into(), 1, guest_request.clone()).await;
    intake.request("eth1".into(), 1, guest_request.clone()).await;
    intake.request("x".repeat(100_000), 1, guest_request).await;
    intake.event("eth9".into(), RelayEvent::GuestMac { mac: mac(9) }).await;
    host.switch.settle().await;
    assert_eq!(host.pfs.take_made(PF), []);
    assert!(!host.is_answered(1));
    assert_eq!(host.request(1, Request::SetMac(mac(9))).await, LOCAL);
}

#[tokio::test]
async fn what_a_relay_refused_by_itself_is_recorded() {
    let host = Host::new("{}").await;
    let event = RelayEvent::Refused { request: None, word: 0x99, reason: Reason::UnknownMessage, count: 7 };
    host.event(1, event.clone()).await;
    host.event(1, event).await;
    let denied = host.decisions(1, Outcome::Denied).await;
    assert_eq!((denied.len(), denied[0].count, denied[0].reason), (1, 14, Some(Reason::UnknownMessage)));
    assert_eq!(denied[0].requested.as_deref(), Some("message 0x00000099"));
}
