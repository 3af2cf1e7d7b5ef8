// SPDX-License-Identifier: Apache-2.0

use std::time::Duration;

use api::{
    PolicyBackend as _,
    types::{EventKind, ObjectKind, PfState},
};
use netpolicy::{Change, Committed, MacAddress, Outcome, Request, Setting, VlanId};
use passthrough::relay::RelayEvent;
use protocol::VmmCommand;
use sriov::{Hint, VfChange};

use crate::Timing;

use super::fixture::{FORWARD, Host, LOCAL, PF, Revokes, TIMING, mac, vf, vm};

const ACCEPT: &str = r#"{"mac_changes": "accept"}"#;
const TRUNK: &str = r#"{"vlan": {"trunk": ["100-200"]}}"#;
const NARROW: &str = r#"{"vlan": {"trunk": ["150-200"]}}"#;

fn leave(id: u16) -> Change {
    Change::LeaveVlan(VlanId::new(id).unwrap())
}

async fn joined(vids: &[u16]) -> Host {
    let mut host = Host::new(TRUNK).await;
    for vid in vids {
        assert_eq!(host.request(1, Request::SetVlan { vid: *vid, add: true }).await, FORWARD);
    }
    host.vmm(1).commands();
    host
}

#[tokio::test]
async fn an_address_that_is_no_longer_allowed_is_revoked_and_the_guest_made_to_learn_it() {
    let mut host = Host::new(ACCEPT).await;
    host.request(1, Request::SetMac(mac(9))).await;
    host.set("{}").await.unwrap();
    host.switch.settle().await;
    assert_eq!((host.pf_mac(1), host.addresses(1).await), (Some(mac(1)), (mac(1), mac(9))));
    let adapter = || "eth0".to_owned();
    assert_eq!(
        host.vmm(1).commands(),
        [
            VmmCommand::EffectiveMac { adapter: adapter(), mac: mac(1) },
            VmmCommand::MakeGuestReset { adapter: adapter() }
        ]
    );
    let taken = host.decisions(1, Outcome::Revoked).await;
    assert_eq!(taken.len(), 1);
    assert_eq!(taken[0].decided_by.unwrap().setting, Setting::MacChanges);
    assert_eq!(taken[0].edited_by.as_deref(), Some("uid 0"), "who edited the policy");
    assert_eq!((taken[0].old.as_deref(), taken[0].committed), (Some("02:00:00:00:00:09"), Committed::Pf));
    assert_eq!(host.decisions(2, Outcome::Revoked).await, []);
    host.request(1, Request::Reset).await;
    assert_eq!(host.addresses(1).await, (mac(1), mac(1)));
}

#[tokio::test]
async fn a_vlan_that_is_no_longer_allowed_is_left_by_message() {
    let host = joined(&[100, 160]).await;
    host.set(NARROW).await.unwrap();
    host.switch.settle().await;
    assert_eq!(host.vmm(1).revoked(), [leave(100)]);
    let taken = host.decisions(1, Outcome::Revoked).await;
    assert_eq!((taken.len(), taken[0].committed), (1, Committed::Mailbox));
    host.set(NARROW).await.unwrap();
    host.switch.settle().await;
    assert_eq!(host.vmm(1).revoked(), [], "nothing is left to correct");
    assert!(host.vmm(1).heard().stopped.is_empty());
}

#[tokio::test]
async fn what_waits_for_the_guests_reset_is_recorded_when_it_is_made() {
    let mut host = joined(&[100]).await;
    host.vmm(1).heard().revokes = Revokes::Deferred;
    assert_eq!(host.port(1).await.status.pending, None);
    host.set(NARROW).await.unwrap();
    host.switch.settle().await;
    assert_eq!(host.decisions(1, Outcome::Revoked).await, []);
    let pending = host.port(1).await.status.pending.expect("what waits is shown");
    assert_eq!(pending.changes, ["set_vlan leave 100"]);
    host.vmm(1).heard().revokes = Revokes::Done;
    host.event(1, RelayEvent::Revoked { id: 7, failed: Vec::new(), deferred: false }).await;
    assert_eq!(host.request(1, Request::Reset).await, LOCAL);
    let taken = host.decisions(1, Outcome::Revoked).await;
    assert_eq!((taken.len(), taken[0].edited_by.as_deref()), (1, Some("uid 0")));
    assert!(taken[0].detail.as_deref().is_some_and(|detail| detail.starts_with("Reported by")), "{taken:?}");
    assert_eq!(host.port(1).await.status.pending, None);
    assert_eq!(host.vmm(1).revoked(), [leave(100)], "commanded once");

    // If the correction fails at the reset, it is commanded again.
    host.set(TRUNK).await.unwrap();
    host.request(1, Request::SetVlan { vid: 101, add: true }).await;
    host.vmm(1).heard().revokes = Revokes::Deferred;
    host.set(NARROW).await.unwrap();
    host.switch.settle().await;
    host.vmm(1).commands();
    host.vmm(1).heard().revokes = Revokes::Done;
    host.event(1, RelayEvent::Revoked { id: 8, failed: vec![leave(101)], deferred: false }).await;
    host.switch.settle().await;
    assert_eq!(host.vmm(1).revoked(), [leave(101)]);
    assert_eq!(host.decisions(1, Outcome::Revoked).await.len(), 2);
}

#[tokio::test]
async fn a_vmm_that_does_not_confirm_is_stopped() {
    for revokes in [Revokes::Never, Revokes::Refused] {
        let host = joined(&[100]).await;
        host.vmm(1).heard().revokes = revokes;
        host.set(NARROW).await.unwrap();
        host.until("stopped", async |host| !host.vmm(1).heard().stopped.is_empty()).await;
        assert!(host.vmm(2).heard().stopped.is_empty());
        let left = host.switch.release(vm(1), "eth0").await.unwrap().unwrap();
        assert!(left.changes.contains(&leave(100)), "{revokes:?}: cleaned when it is gone");
    }
}

#[tokio::test]
async fn a_vmm_that_stays_away_is_stopped_and_one_that_comes_back_is_not() {
    for back in [false, true] {
        let mut host = joined(&[100]).await;
        host.switch.disconnected(vm(1)).await;
        host.set(NARROW).await.unwrap();
        if back {
            host.connect(1).await;
        }
        tokio::time::sleep(TIMING.confirm * 3).await;
        assert_eq!(host.vmm(1).heard().stopped.is_empty(), back);
        assert_eq!(host.vmm(1).revoked(), if back { vec![leave(100)] } else { vec![] });
    }
}

#[tokio::test]
async fn a_pf_that_does_not_take_an_address_back_is_asked_again() {
    let mut host = Host::new(ACCEPT).await;
    host.request(1, Request::SetMac(mac(9))).await;
    host.pfs.world().pfs.get_mut(PF).unwrap().answers = vec![Some(libc::EBUSY)];
    host.set("{}").await.unwrap();
    host.until("revoked", async |host| host.pf_mac(1) == Some(mac(1))).await;
    host.switch.settle().await;
    let taken = host.decisions(1, Outcome::Revoked).await;
    let how: Vec<Committed> = taken.iter().map(|decision| decision.committed).collect();
    assert_eq!(how, [Committed::Pf, Committed::Failed]);
}

/// igb refuses every rate while its link is down.
#[tokio::test]
async fn a_setting_that_the_pf_refuses_is_not_shown_as_if_it_were_in_force() {
    let host = Host::new("{}").await;
    host.pfs.world().pfs.get_mut(PF).unwrap().answers = vec![Some(libc::EINVAL); 2];
    host.set(r#"{"rate": {"max_tx_mbit": 50}}"#).await.unwrap();
    host.until("told", async |host| !host.port(1).await.status.unmade.is_empty()).await;
    let unmade = host.port(1).await.status.unmade;
    assert_eq!((unmade.len(), unmade[0].change.as_str()), (1, "set_max_tx_rate 50 Mbit/s"));
    assert!(!unmade[0].detail.is_empty());
    assert_eq!(host.decisions(1, Outcome::Revoked).await[0].committed, Committed::Failed);
    host.until("made", async |host| host.port(1).await.status.unmade.is_empty()).await;
    assert_eq!(host.pfs.vf(PF, 1).max_tx_rate, 50);
}

#[tokio::test]
async fn a_foreign_change_is_repaired_and_recorded_once() {
    let host = Host::new("{}").await;
    host.pfs.foreign_mac(PF, 1, mac(0x66));
    host.pfs.foreign(PF, 1, VfChange::Trust(true));
    host.changed(true).await;
    assert_eq!((host.pf_mac(1), host.pfs.vf(PF, 1).trust), (Some(mac(1)), Some(false)));
    let repaired = host.decisions(1, Outcome::Repaired).await;
    let mut what: Vec<_> = repaired.iter().map(|d| (d.request.as_str(), d.old.as_deref().unwrap())).collect();
    what.sort_unstable();
    assert_eq!(what, [("set_mac", "02:00:00:00:00:66"), ("set_trust", "on")]);
    assert_eq!(host.port(1).await.status.counters.repaired, 2);
    host.pfs.take_made(PF);
    for _ in 0..5 {
        host.changed(true).await;
    }
    host.hint(Hint::All).await;
    assert_eq!(host.pfs.take_made(PF), [], "the repair's own news cause no loop");
    assert_eq!(host.decisions(1, Outcome::Repaired).await.iter().map(|d| d.count).sum::<u64>(), 2);
}

#[tokio::test]
async fn what_becomes_of_a_pf_is_told_once() {
    let host = Host::new("{}").await;
    let mut events = host.policy.events(None).await.unwrap();
    for up in [true, false, false, true, true] {
        host.changed(up).await;
    }
    let new = || Hint::Changed { index: 9, name: Some("eth9".into()), up: true };
    host.hint(new()).await;
    host.pfs.world().pfs.insert("eth9".into(), sriov::fake::FakePf::new("eth9", 7));
    host.hint(new()).await;
    let told = async |events: &mut tokio::sync::mpsc::Receiver<api::types::Event>| match tokio::time::timeout(
        Duration::from_secs(10),
        events.recv(),
    )
    .await
    .unwrap()
    .unwrap()
    .what
    {
        EventKind::PfState { pf, state } => (pf, state),
        other => panic!("{other:?}"),
    };
    assert_eq!(told(&mut events).await, (PF.to_owned(), PfState::Down));
    assert_eq!(told(&mut events).await, (PF.to_owned(), PfState::Up));
    assert_eq!(told(&mut events).await, ("eth9".to_owned(), PfState::Added));
    host.pfs.world().pfs.remove("eth9");
    host.hint(Hint::All).await;
    assert_eq!(told(&mut events).await, ("eth9".to_owned(), PfState::Removed));
}

/// Its PF was moved to another network namespace, for example.
#[tokio::test]
async fn a_port_that_cannot_be_compared_is_told_once_and_again_when_it_can() {
    let host = Host::new("{}").await;
    let mut events = host.policy.events(None).await.unwrap();
    let mut told = || {
        let mut ports = Vec::new();
        while let Ok(event) = events.try_recv() {
            if let EventKind::Changed { object, .. } = event.what
                && object.kind == ObjectKind::Port
            {
                ports.push(object.name);
            }
        }
        ports.sort();
        ports
    };
    let unchecked = async || host.port(1).await.status.unchecked.map(|unchecked| unchecked.detail);
    let pf = host.pfs.world().pfs.remove(PF).unwrap();
    for _ in 0..3 {
        host.hint(Hint::All).await;
        host.until("it is shown", async |host| host.port(2).await.status.unchecked.is_some()).await;
    }
    assert_eq!(told(), ["vm1/eth0", "vm2/eth0"], "once");
    let detail = unchecked().await.unwrap();
    assert!(detail.contains(PF), "{detail}");
    let metrics = host.metrics.text(&[]).unwrap();
    assert!(metrics.lines().any(|line| line == "portcullis_ports_unchecked 2"), "{metrics}");

    host.pfs.world().pfs.insert(PF.into(), pf);
    for _ in 0..3 {
        host.hint(Hint::All).await;
        host.until("it is over", async |host| host.port(2).await.status.unchecked.is_none()).await;
    }
    assert_eq!((told(), unchecked().await), (vec!["vm1/eth0".to_owned(), "vm2/eth0".to_owned()], None));
}

#[tokio::test]
async fn what_the_switch_does_is_counted() {
    let mut host = Host::new(
        r#"{"mac_changes": {"list": ["02:00:00:00:00:00/ff:ff:ff:ff:ff:f0"]}, "vlan": {"trunk": [7]}}"#,
    )
    .await;
    assert_eq!(host.request(1, Request::SetMac(mac(9))).await, LOCAL);
    assert_eq!(host.request(1, Request::SetVlan { vid: 7, add: true }).await, FORWARD);
    host.request(1, Request::SetMac(mac(0x66))).await;
    host.pfs.foreign(PF, 1, VfChange::Trust(true));
    host.changed(true).await;
    let text = host.metrics.text(&[]).unwrap();
    for line in [
        "portcullis_decisions_total{request=\"set_mac\",verdict=\"allowed\"} 1",
        "portcullis_decisions_total{request=\"set_mac\",verdict=\"denied\"} 1",
        "portcullis_decisions_total{request=\"set_vlan\",verdict=\"allowed\"} 1",
        // The agent granted one request, the PF another, and one was denied.
        "portcullis_decision_duration_seconds_count{verdict=\"allowed\"} 2",
        "portcullis_decision_duration_seconds_count{verdict=\"denied\"} 1",
        "portcullis_commit_duration_seconds_count{result=\"made\"} 2",
        "portcullis_drift_repairs_total{setting=\"set_trust\",result=\"repaired\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
}

#[tokio::test]
async fn own_commits_are_no_drift() {
    let mut host = Host::new(ACCEPT).await;
    let gate = host.pfs.world().gate.clone();
    let held = gate.lock().await;
    host.send(1, Request::SetMac(mac(9))).await;
    let (_, ()) = tokio::join!(host.changed_soon(), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(held);
    });
    host.answer(1).await;
    host.switch.settle().await;
    assert_eq!(host.decisions(1, Outcome::Repaired).await, []);
    assert_eq!(host.pf_mac(1), Some(mac(9)));
}

/// Between binding a VF to a port and programming its PF, port and PF differ without any drift.
#[tokio::test]
async fn a_port_whose_pf_is_being_programmed_is_not_repaired() {
    let host = Host::new("{}").await;
    host.attach(0, Some("web")).await.unwrap();
    let changes = host.switch.bind(vm(0), "eth0", vf(0), "0000:01:10.0".into()).await.unwrap();
    let before = host.pf_mac(0);
    assert_ne!(before, Some(mac(0)));
    host.changed(true).await;
    host.changed(false).await;
    host.changed(true).await;
    assert_eq!((host.decisions(0, Outcome::Repaired).await, host.pf_mac(0)), (Vec::new(), before));
    host.switch.program(&vf(0), changes).await.unwrap();
    host.changed(true).await;
    assert_eq!((host.decisions(0, Outcome::Repaired).await, host.pf_mac(0)), (Vec::new(), Some(mac(0))));
    host.pfs.foreign_mac(PF, 0, mac(0x66));
    host.changed(true).await;
    assert_eq!(host.decisions(0, Outcome::Repaired).await.len(), 1);
    assert_eq!(host.pf_mac(0), Some(mac(0)));
}

#[tokio::test]
async fn after_a_reset_of_the_pf_everything_is_set_again_and_the_check_switched_on_and_off() {
    let host = Host::new(r#"{"forged_transmits": "accept", "vlan": {"access": {"id": 10}}}"#).await;
    let check = |host: &Host| {
        let made: Vec<VfChange> =
            host.pfs.take_made(PF).into_iter().filter(|(vf, _)| *vf == 1).map(|(_, c)| c).collect();
        let at = |wanted| made.iter().position(|change| *change == wanted);
        assert!(at(VfChange::Mac(Some(mac(1)))).is_some(), "{made:?}");
        assert!(made.iter().any(|change| matches!(change, VfChange::Vlan(vlan) if vlan.id == 10)));
        assert!(at(VfChange::SpoofCheck(true)) < at(VfChange::SpoofCheck(false)), "{made:?}");
        assert!(at(VfChange::SpoofCheck(true)).is_some());
    };
    host.changed(false).await;
    host.pfs.take_made(PF);
    host.changed(true).await;
    check(&host);
    host.event(1, RelayEvent::PfReset).await;
    host.switch.settle().await;
    check(&host);
    assert_eq!(host.decisions(1, Outcome::Repaired).await, [], "nothing was foreign");
}

/// The former agent let the vmm forget the reboot, and died before it did the work of it.
#[tokio::test]
async fn the_next_agent_does_the_work_of_a_reboot_that_it_finds_noted() {
    let mut host = Host::new(ACCEPT).await;
    host.request(1, Request::SetMac(mac(9))).await;
    for noted in [false, true] {
        host.restart_after(async |attachments| {
            for mut entry in attachments.list().await.unwrap() {
                assert!(!entry.value.rebooting);
                entry.value.rebooting = noted;
                let (name, expect) = (entry.name, store::Expect::Any);
                attachments.put(entry.id, &name, &entry.value, expect).await.unwrap();
            }
        })
        .await;
        let address = if noted { mac(1) } else { mac(9) };
        host.switch.settle().await;
        assert_eq!((host.pf_mac(1), host.addresses(1).await), (Some(address), (address, address)), "{noted}");
        // The guest may have rebooted meanwhile, with the former address of the PF.
        host.connect(1).await;
        host.switch.settle().await;
        assert_eq!(
            host.vmm(1).commands(),
            [VmmCommand::EffectiveMac { adapter: "eth0".into(), mac: address }]
        );
    }
    // The work is done once.
    host.restart_after(async |attachments| {
        assert!(attachments.list().await.unwrap().iter().all(|entry| !entry.value.rebooting));
    })
    .await;
}

/// The reboot is stored before the vmm may forget it, even while work for the boot before is under
/// way.
#[tokio::test]
async fn a_reboot_is_noted_before_it_is_forgotten() {
    let mut host = Host::new(ACCEPT).await;
    let gate = host.pfs.world().gate.clone();
    let held = gate.lock().await;
    host.send(1, Request::SetMac(mac(9))).await;
    host.intake(1).rebooted().await;
    assert!(host.stored(1).await.rebooting);
    drop(held);
    host.switch.settle().await;
    assert_eq!(host.addresses(1).await, (mac(1), mac(1)));
    host.until("it is over", async |host| !host.stored(1).await.rebooting).await;
}

#[tokio::test]
async fn a_reboot_revokes_what_a_reset_does_not() {
    let mut host = Host::new(r#"{"mac_changes": "accept", "unicast_limit": 1}"#).await;
    host.request(1, Request::AddUnicastFilter(mac(9))).await;
    host.pfs.take_made(PF);
    // The device was reset, so the PF ignores messages until the guest's next reset message.
    host.vmm(1).heard().revokes = Revokes::Deferred;
    host.intake(1).rebooted().await;
    host.switch.settle().await;
    assert_eq!(host.vmm(1).revoked(), [Change::ClearUnicast]);
    // The PF denies the deferred change, for want of trust.
    host.vmm(1).heard().revokes = Revokes::Done;
    host.pfs.take_made(PF);
    host.event(1, RelayEvent::Revoked { id: 1, failed: vec![Change::ClearUnicast], deferred: false }).await;
    host.request(1, Request::Reset).await;
    assert_eq!(host.vmm(1).revoked(), [Change::ClearUnicast]);
    assert_eq!(host.pfs.take_made(PF), [(1, VfChange::Trust(true)), (1, VfChange::Trust(false))]);
    assert_eq!(host.request(1, Request::AddUnicastFilter(mac(10))).await, FORWARD, "there is room again");
}

#[tokio::test]
async fn a_vmm_that_tells_of_resets_for_ever_costs_its_pf_no_more_than_one() {
    let mut host = Host::new(ACCEPT).await;
    let gate = std::sync::Arc::clone(&host.pfs.world().gate);
    let held = gate.lock_owned().await;
    // This request keeps the port's queue busy meanwhile.
    host.send(1, Request::SetMac(mac(9))).await;
    for _ in 0..10_000 {
        host.event(1, RelayEvent::PfReset).await;
        host.intake(1).rebooted().await;
    }
    host.pfs.world().reads = 0;
    drop(held);
    host.switch.settle().await;
    let reads = host.pfs.world().reads;
    assert!(reads < 50, "the PF was read {reads} times");
    assert_eq!(host.addresses(1).await, (mac(1), mac(1)), "it was rebooted");
}

/// A vmm may defer to the guest's next reset as often as it likes, with reboots and resets that it claims. Only the end of all
/// revocations ends the time that it has.
#[tokio::test]
async fn deferred_revocations_may_have_a_deadline() {
    const LIMIT: Duration = Duration::from_secs(1);
    for (limited, in_time) in [(true, false), (true, true), (false, false)] {
        let timing = Timing { deferred: limited.then_some(LIMIT), ..TIMING };
        let mut host = Host::with_timing(TRUNK, timing).await;
        assert_eq!(host.request(1, Request::SetVlan { vid: 100, add: true }).await, FORWARD);
        host.vmm(1).heard().revokes = Revokes::Deferred;
        host.switch.settle().await;
        let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        let before = tasks();
        host.set(NARROW).await.unwrap();
        host.switch.settle().await;
        let begun = tokio::time::Instant::now();
        for id in 0..4 {
            tokio::time::sleep(LIMIT / 8).await;
            // It has made nothing, and defers again.
            host.event(1, RelayEvent::Revoked { id, failed: vec![leave(100)], deferred: false }).await;
            host.switch.settle().await;
        }
        assert!(host.port(1).await.status.pending.is_some());
        assert!(host.vmm(1).heard().stopped.is_empty(), "before its time");
        if in_time {
            host.vmm(1).heard().revokes = Revokes::Done;
            host.event(1, RelayEvent::Revoked { id: 9, failed: Vec::new(), deferred: false }).await;
            host.switch.settle().await;
            // A guest can have this again and again.
            host.until("its timer has ended", async |_| tasks() <= before).await;
            assert!(begun.elapsed() < LIMIT, "before the time would have ended it");
        }
        let is_stopped = limited && !in_time;
        tokio::time::sleep_until(begun + LIMIT * 5 / 4).await;
        assert_eq!(!host.vmm(1).heard().stopped.is_empty(), is_stopped, "{limited} {in_time}");
        assert!(host.vmm(2).heard().stopped.is_empty());
        if is_stopped {
            assert!(host.vmm(1).heard().stopped[0].contains("not revoked within 1s"));
        }
    }
}

/// A reboot that the vmm claims does not end the time, nor is it needed to have a right that the guest keeps.
#[tokio::test]
async fn rights_of_a_former_boot_have_the_same_deadline() {
    const LIMIT: Duration = Duration::from_millis(600);
    let timing = Timing { deferred: Some(LIMIT), ..TIMING };
    let mut host = Host::with_timing(TRUNK, timing).await;
    assert_eq!(host.request(1, Request::SetVlan { vid: 100, add: true }).await, FORWARD);
    host.vmm(1).heard().revokes = Revokes::Deferred;
    for _ in 0..3 {
        host.intake(1).rebooted().await;
        host.switch.settle().await;
        tokio::time::sleep(LIMIT / 4).await;
    }
    host.until("it is stopped", async |host| !host.vmm(1).heard().stopped.is_empty()).await;
    assert!(host.vmm(2).heard().stopped.is_empty());
}

#[tokio::test]
async fn a_vmm_that_defers_for_ever_is_stopped() {
    let vids: Vec<u16> = (100..108).collect();
    let mut host = joined(&vids).await;
    host.vmm(1).heard().revokes = Revokes::Deferred;
    host.set(NARROW).await.unwrap();
    // Each reset commands the same changes again, because the one before did not make them.
    for _ in 0..passthrough::relay::MAX_CHANGES / vids.len() {
        host.request(1, Request::Reset).await;
    }
    assert!(host.vmm(1).heard().stopped.is_empty(), "so much may wait");
    for _ in 0..passthrough::relay::MAX_CHANGES / vids.len() {
        host.request(1, Request::Reset).await;
    }
    assert!(!host.vmm(1).heard().stopped.is_empty());
}

/// Two guests share a virtual router's address. The backup's driver requests it once, at its start.
const VIRTUAL: &str =
    r#"{"mac_changes": {"list": ["00:00:5e:00:01:00/ff:ff:ff:ff:ff:00"]}, "unicast_limit": 1}"#;

async fn a_backup_that_waits() -> (Host, MacAddress) {
    let address = "00:00:5e:00:01:33".parse().unwrap();
    let mut host = Host::new(VIRTUAL).await;
    assert_eq!(host.request(1, Request::AddUnicastFilter(address)).await, FORWARD);
    assert_ne!(host.request(2, Request::AddUnicastFilter(address)).await, FORWARD);
    host.vmm(2).commands();
    (host, address)
}

#[tokio::test]
async fn an_address_is_given_to_the_guest_that_was_refused_it_when_its_port_gives_it_up() {
    let (mut host, address) = a_backup_that_waits().await;
    // A driver that sets its list anew does not lose the address in between.
    assert_eq!(host.request(1, Request::ClearUnicastFilters).await, FORWARD);
    assert_eq!(host.request(1, Request::AddUnicastFilter(address)).await, FORWARD);
    tokio::time::sleep(TIMING.offer * 2).await;
    assert_eq!(host.vmm(2).revoked(), []);

    host.request(1, Request::ClearUnicastFilters).await;
    host.changed_after(TIMING.offer, 2, &Change::AddUnicast(address)).await;
    let allowed = host.decisions(2, Outcome::Allowed).await;
    let last = &allowed[0];
    assert_eq!(
        (last.request.as_str(), last.requested.as_deref()),
        ("add_unicast_filter", Some("00:00:5e:00:01:33"))
    );
    assert!(last.detail.as_deref().is_some_and(|detail| detail.starts_with("Denied before")), "{last:?}");
    assert_ne!(host.request(1, Request::AddUnicastFilter(address)).await, FORWARD, "it is the other's now");
}

#[tokio::test]
async fn an_agent_that_starts_again_knows_which_guest_waits_for_an_address() {
    let (mut host, address) = a_backup_that_waits().await;
    host.switch.settle().await;
    host.restart().await;
    host.connect(1).await;
    host.connect(2).await;
    host.request(1, Request::ClearUnicastFilters).await;
    host.changed_after(TIMING.offer, 2, &Change::AddUnicast(address)).await;
}

#[tokio::test]
async fn an_address_that_the_pf_refuses_is_not_tried_again_for_a_guest_that_waited() {
    let (mut host, address) = a_backup_that_waits().await;
    host.vmm(2).heard().revokes = Revokes::Refused;
    host.request(1, Request::ClearUnicastFilters).await;
    host.changed_after(TIMING.offer, 2, &Change::AddUnicast(address)).await;
    host.switch.settle().await;
    let denied = host.decisions(2, Outcome::Denied).await;
    assert_eq!((denied.len(), denied[0].committed), (2, Committed::Failed));
    host.vmm(2).commands();
    tokio::time::sleep(TIMING.confirm * 3).await;
    host.switch.settle().await;
    assert_eq!((host.vmm(2).revoked(), host.vmm(2).heard().stopped.len()), (vec![], 0));
}

#[tokio::test]
async fn a_vm_whose_vmm_is_away_is_not_stopped_for_an_address_that_it_only_gets() {
    let (mut host, address) = a_backup_that_waits().await;
    host.switch.disconnected(vm(2)).await;
    host.request(1, Request::ClearUnicastFilters).await;
    tokio::time::sleep(TIMING.offer + TIMING.confirm * 3).await;
    assert_eq!((host.vmm(2).revoked(), host.vmm(2).heard().stopped.len()), (vec![], 0));
    host.connect(2).await;
    host.changed_after(Duration::ZERO, 2, &Change::AddUnicast(address)).await;
}

#[tokio::test]
async fn the_next_agent_adds_nothing_that_the_guest_no_longer_wants() {
    let (mut host, address) = a_backup_that_waits().await;
    host.until("kept", async |host| host.stored(2).await.device.wanted_unicast == [address].into()).await;
    host.request(2, Request::ClearUnicastFilters).await;
    host.until("stored", async |host| host.stored(2).await.device.wanted_unicast.is_empty()).await;
}
