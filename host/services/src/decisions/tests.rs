// SPDX-License-Identifier: Apache-2.0

use std::time::Instant;

use api::types::{Cursor, DecisionFilter, EventKind, Listed, Timestamp};

use netpolicy::{
    Committed, Decision, MacAddress, Name, Outcome, Port, PortGroupId, PortId, Reason, VmId, VmRef, Weight,
};
use store::SqliteStore;
use uuid::Uuid;

use super::{DecisionLog, GATHER, PACE, RETRY, WAITING, events::EventHub};

pub(super) fn decision(vm: u128, requested: &str, outcome: Outcome, ms: u64) -> Decision {
    let vm = VmRef { id: VmId(Uuid::from_u128(vm)), name: Name::new(format!("vm{vm}")).unwrap() };
    let id = PortId(Uuid::from_u128(vm.id.0.as_u128() + 100));
    let mac = MacAddress::new([2, 0, 0, 0, 0, 1]);
    let port = Port::new(id, vm, "eth0", PortGroupId(Uuid::from_u128(7)), mac);
    let mut decision = Decision::new(Uuid::new_v4(), &port, "set_mac", outcome, ms);
    decision.requested = Some(requested.into());
    decision.reason = (outcome == Outcome::Denied).then_some(Reason::MacChangesRejected);
    decision
}

fn open(dir: &tempfile::TempDir, kept: u32) -> (DecisionLog, EventHub) {
    let path = dir.path().join("test.db");
    drop(SqliteStore::open(&path).unwrap());
    let events = EventHub::default();
    (DecisionLog::open(&path, kept, events.clone()).unwrap(), events)
}

fn filter() -> DecisionFilter {
    DecisionFilter { limit: 1000, ..DecisionFilter::default() }
}

#[tokio::test]
async fn equal_decisions_are_one_record_and_each_an_event() {
    let dir = tempfile::tempdir().unwrap();
    let (log, hub) = open(&dir, 100);
    let mut events = hub.subscribe(None).unwrap();
    for ms in 1..=5 {
        log.record(decision(1, "x", Outcome::Denied, ms)).await.unwrap();
    }
    log.note(decision(1, "y", Outcome::Denied, 6));
    log.note(decision(1, "x", Outcome::Denied, 7));
    let all = log.query(filter()).await.unwrap();
    let seen: Vec<_> = all.iter().map(|d| (d.requested.as_deref().unwrap(), d.count)).collect();
    assert_eq!(seen, [("x", 6), ("y", 1)]);
    assert_eq!((all[0].first_ms, all[0].last_ms), (1, 7));
    let counts: Vec<u64> = std::iter::from_fn(|| events.try_recv().ok())
        .map(|event| match event.what {
            EventKind::Decision { decision } => decision.count,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(counts, [1, 2, 3, 4, 5, 1, 6]);
}

#[tokio::test]
async fn what_comes_faster_than_it_can_be_written_is_bounded_and_does_not_keep_others_out() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = open(&dir, 100);
    let many = 4 * WAITING as u64;
    for ms in 0..many {
        log.note(decision(1, "x", Outcome::Denied, ms));
    }
    // This call waits for a place in the queue.
    log.record(decision(2, "y", Outcome::Denied, many)).await.unwrap();
    let counts: Vec<u64> = log.query(filter()).await.unwrap().iter().map(|d| d.count).collect();
    let [1, noted] = counts[..] else { panic!("{counts:?}") };
    assert!((WAITING as u64..many).contains(&noted), "{noted} of {many}");
}

#[tokio::test]
async fn filters_say_what_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = open(&dir, 100);
    log.note(decision(1, "a", Outcome::Denied, 10));
    log.note(decision(1, "b", Outcome::Allowed, 20));
    log.note(decision(2, "c", Outcome::Revoked, 30));
    let check = async |filter: DecisionFilter, expect: &[&str]| {
        let found = log.query(filter.clone()).await.unwrap();
        let found: Vec<_> = found.iter().filter_map(|d| d.requested.as_deref()).collect();
        assert_eq!(found, expect, "{filter:?}");
    };
    check(filter(), &["c", "b", "a"]).await;
    check(DecisionFilter { limit: 1, ..filter() }, &["c"]).await;
    check(DecisionFilter { vm: Some("vm1".into()), ..filter() }, &["b", "a"]).await;
    check(DecisionFilter { vm: Some(Uuid::from_u128(2).to_string()), ..filter() }, &["c"]).await;
    check(DecisionFilter { vm: Some("vm".into()), ..filter() }, &[]).await;
    check(DecisionFilter { port: Some(Uuid::from_u128(101)), ..filter() }, &["b", "a"]).await;
    check(DecisionFilter { verdict: Some(Outcome::Revoked), ..filter() }, &["c"]).await;
    check(DecisionFilter { since: Some(Timestamp::from_unix_ms(20)), ..filter() }, &["c", "b"]).await;
}

#[tokio::test]
async fn pages_list_every_record_once() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = open(&dir, 100);
    // Several records have the same time.
    for (n, ms) in [1, 2, 2, 2, 3, 3].into_iter().enumerate() {
        log.record(decision(1, &n.to_string(), Outcome::Denied, ms)).await.unwrap();
    }
    let (mut seen, mut cursor) = (Vec::new(), None);
    loop {
        let page = log.query(DecisionFilter { limit: 2, cursor: cursor.take(), ..filter() }).await.unwrap();
        let Some(last) = page.last() else { break };
        cursor = Some(Cursor::after(api::types::Decision::from(last.clone()).key()));
        seen.extend(page.into_iter().filter_map(|decision| decision.requested));
        if seen.len() == 2 {
            // A record that is counted again moves to a page already read, and a new record is
            // before that page. No other record moves.
            log.record(decision(1, "0", Outcome::Denied, 9)).await.unwrap();
            log.record(decision(1, "new", Outcome::Denied, 8)).await.unwrap();
        }
    }
    assert_eq!(seen, ["5", "4", "3", "2", "1"]);
}

/// No number of light decisions displaces a change, on any adapter of the VM.
#[tokio::test]
async fn what_has_changed_something_never_yields_to_what_has_not() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = open(&dir, 100);
    let granted = Decision { committed: Committed::Mailbox, ..decision(1, "granted", Outcome::Allowed, 1) };
    log.note(granted.clone());
    log.note(decision(1, "revoked", Outcome::Revoked, 2));
    for ms in 3..300 {
        let port = PortId(Uuid::from_u128(u128::from(100 + ms % 16)));
        log.note(Decision { port, ..decision(1, &ms.to_string(), Outcome::Denied, ms) });
        let multicast = Decision { request: "set_multicast".into(), ..granted.clone() };
        log.note(Decision { id: Uuid::new_v4(), port, requested: Some(ms.to_string()), ..multicast });
        log.note(decision(1, &format!("no change {ms}"), Outcome::Allowed, ms));
    }
    for vm in 2..30 {
        for ms in 0..10 {
            log.note(decision(vm, &ms.to_string(), Outcome::Denied, 1000 + ms));
        }
    }
    let filter = DecisionFilter { vm: Some("vm1".into()), ..filter() };
    let all = log.query(filter).await.unwrap();
    let kept: Vec<_> = all.iter().filter(|d| d.weight() != Weight::Light).collect();
    assert_eq!(kept.len(), 2, "{all:?}");
    assert!(all.len() <= 12, "{}", all.len());
}

/// A waiting caller is served at once, because the next request of its VM waits behind it.
#[tokio::test]
async fn what_somebody_waits_for_is_written_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = open(&dir, 1000);
    let begun = Instant::now();
    for ms in 0..50 {
        log.note(decision(2, &ms.to_string(), Outcome::Denied, ms));
        log.record(decision(1, &ms.to_string(), Outcome::Denied, ms)).await.unwrap();
    }
    assert!(begun.elapsed() < PACE * 40, "{:?} for 50", begun.elapsed());
}

/// Decisions made while the disk is full are recorded when there is room.
#[tokio::test]
async fn what_cannot_be_stored_is_stored_later() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = open(&dir, 100);
    log.record(decision(1, "a", Outcome::Denied, 0)).await.unwrap();
    let other = rusqlite::Connection::open(dir.path().join("test.db")).unwrap();
    other.execute_batch("ALTER TABLE decisions RENAME TO gone").unwrap();
    assert!(log.record(decision(1, "a", Outcome::Denied, 1)).await.is_err());
    let error = log.record(decision(1, "b", Outcome::Denied, 2)).await.unwrap_err();
    assert!(error.to_string().contains("earlier decisions"), "not each of them is a try: {error}");
    other.execute_batch("ALTER TABLE gone RENAME TO decisions").unwrap();
    let deadline = Instant::now() + RETRY * 10;
    loop {
        let all = log.query(filter()).await.unwrap_or_default();
        let count = |of: &str| -> u64 {
            all.iter().filter(|d| d.requested.as_deref() == Some(of)).map(|d| d.count).sum()
        };
        if (count("a"), count("b")) == (2, 1) {
            break;
        }
        assert!(Instant::now() < deadline, "{all:?}");
        tokio::time::sleep(GATHER).await;
    }
}

#[tokio::test]
async fn records_are_bounded_and_one_vm_has_only_its_share() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = open(&dir, 100);
    log.note(decision(1, "quiet", Outcome::Denied, 1));
    for ms in 2..200 {
        log.note(decision(2, &ms.to_string(), Outcome::Denied, ms));
    }
    let all = log.query(filter()).await.unwrap();
    assert_eq!(all.len(), 11, "ten of the noisy VM, one of the quiet one");
    assert_eq!(all[0].requested.as_deref(), Some("199"));
    assert_eq!(all[10].requested.as_deref(), Some("quiet"));
    for vm in 3..30 {
        for ms in 0..10 {
            log.note(decision(vm, &ms.to_string(), Outcome::Denied, 1000 + ms));
        }
    }
    assert_eq!(log.query(filter()).await.unwrap().len(), 100);
    for vm in 100..130 {
        for ms in 0..10 {
            log.note(decision(vm, &ms.to_string(), Outcome::Revoked, 2000 + ms));
        }
    }
    assert_eq!(log.query(filter()).await.unwrap().len(), 100, "changes are bounded, too");
}

#[tokio::test]
async fn records_outlive_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    let (log, _) = open(&dir, 100);
    log.record(decision(1, "a", Outcome::Denied, 1)).await.unwrap();
    drop(log);
    let (log, _) = open(&dir, 100);
    log.record(decision(1, "a", Outcome::Denied, 2)).await.unwrap();
    assert_eq!(log.query(filter()).await.unwrap().len(), 2);
    let port = PortId(Uuid::from_u128(101));
    assert_eq!(log.counters().await.unwrap()[&port].denied, 2);
    log.forget(port).await;
    assert_eq!(log.counters().await.unwrap().len(), 0);
}
