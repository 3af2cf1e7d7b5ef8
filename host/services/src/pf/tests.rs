// SPDX-License-Identifier: Apache-2.0

use std::{sync::Arc, time::Duration};

use netpolicy::VfRef;
use sriov::VfChange;
use tokio::time::timeout;

use super::{PfFailure, PfHandle, fake::FakePfs};

fn vf(index: u32) -> netpolicy::VfRef {
    netpolicy::VfRef { pf: "eth0".into(), index }
}

#[tokio::test]
async fn changes_are_all_made_or_all_undone() {
    let pfs = FakePfs::new(&["eth0"]);
    let handle = PfHandle::start(pfs.clone()).unwrap();
    let mac = VfChange::Mac(Some("02:00:00:00:00:11".parse().unwrap()));
    handle.apply(&vf(1), vec![mac, VfChange::Trust(true)]).await.unwrap();
    assert!(mac.holds(&pfs.vf("eth0", 1)));
    assert_eq!(pfs.vf("eth0", 1).trust, Some(true));
    let before = pfs.vf("eth0", 1);
    pfs.world().pfs.get_mut("eth0").unwrap().answers = vec![None, Some(libc::EINVAL)];
    let other = VfChange::Mac(Some("02:00:00:00:00:12".parse().unwrap()));
    let error = handle.apply(&vf(1), vec![other, VfChange::Trust(false)]).await.unwrap_err();
    assert!(matches!(error, PfFailure::Apply(_)), "{error}");
    assert_eq!(pfs.vf("eth0", 1), before);
}

#[tokio::test]
async fn what_is_not_there_is_told_and_found_again_later() {
    let pfs = FakePfs::new(&["eth0"]);
    let handle = PfHandle::start(pfs.clone()).unwrap();
    assert!(handle.read("eth9").await.is_err());
    assert!(handle.apply(&vf(70_000), vec![VfChange::Trust(false)]).await.is_err());
    let gone = pfs.world().pfs.remove("eth0").unwrap();
    assert!(handle.read("eth0").await.is_err());
    pfs.world().pfs.insert("eth0".into(), gone);
    assert_eq!(handle.read("eth0").await.unwrap().len(), 7);
}

/// Far less than the deadline of a relay.
const SOON: Duration = Duration::from_millis(300);

#[tokio::test]
async fn a_pf_that_does_not_answer_keeps_nobody_waiting_for_another() {
    let pfs = FakePfs::new(&["eth0", "eth1"]);
    let handle = PfHandle::start(pfs.clone()).unwrap();
    let mac = VfChange::Mac(Some("02:00:00:00:00:11".parse().unwrap()));
    pfs.world().hangs = Some("eth0".into());
    let waiting = handle.clone();
    let stuck = tokio::spawn(async move { waiting.read("eth0").await });
    let waiting = handle.clone();
    let behind = tokio::spawn(async move { waiting.apply(&vf(1), vec![mac]).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let other = VfRef { pf: "eth1".into(), index: 1 };
    timeout(SOON, handle.apply(&other, vec![mac])).await.expect("at once").unwrap();
    assert_eq!(timeout(SOON, handle.list()).await.expect("at once").unwrap().len(), 2);
    assert!(mac.holds(&pfs.vf("eth1", 1)) && !stuck.is_finished() && !behind.is_finished());
    pfs.world().hangs = None;
    let read = stuck.await.unwrap().unwrap();
    assert!(!mac.holds(&read[&1]), "asked first, it was read first");
    behind.await.unwrap().unwrap();
    assert!(mac.holds(&pfs.vf("eth0", 1)));
}

/// The threads of single PFs that run now. Each of them can reach the PFs, as the handle and the list's thread can.
/// Each link event of the host makes the switch look at all PFs, and it waits for a few seconds only.
#[tokio::test]
async fn a_pf_that_does_not_answer_is_not_asked_again_for_those_that_gave_up() {
    let pfs = FakePfs::new(&["eth0"]);
    let handle = PfHandle::start(pfs.clone()).unwrap();
    pfs.world().hangs = Some("eth0".into());
    let waiting = handle.clone();
    let stuck = tokio::spawn(async move { waiting.read("eth0").await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    for _ in 0..20 {
        assert!(timeout(Duration::from_millis(1), handle.read("eth0")).await.is_err());
        assert!(timeout(Duration::from_millis(1), handle.capabilities("eth0")).await.is_err());
    }
    let before = pfs.world().reads;
    pfs.world().hangs = None;
    stuck.await.unwrap().unwrap();
    handle.apply(&vf(1), vec![VfChange::Trust(true)]).await.unwrap();
    handle.read("eth0").await.unwrap();
    let reads = pfs.world().reads - before;
    assert!(reads <= 4, "{reads} reads");
}

fn threads(handle: &PfHandle) -> usize {
    Arc::strong_count(&handle.0.pfs) - 2
}

async fn until_threads(handle: &PfHandle, n: usize) {
    let so = async {
        while threads(handle) != n || handle.0.of_pfs().len() != n {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(10), so).await.expect("so many threads");
}

#[tokio::test]
async fn a_thread_is_there_as_long_as_its_pf() {
    let pfs = FakePfs::new(&["eth0"]);
    let handle = PfHandle::start(pfs.clone()).unwrap();
    until_threads(&handle, 0).await;
    handle.read("eth0").await.unwrap();
    for n in 0..1000 {
        handle.read(&format!("eth{}", n + 1)).await.unwrap_err();
    }
    until_threads(&handle, 1).await;
    for _ in 0..100 {
        let gone = pfs.world().pfs.remove("eth0").unwrap();
        handle.list().await.unwrap();
        until_threads(&handle, 0).await;
        pfs.world().pfs.insert("eth0".into(), gone);
        handle.read("eth0").await.unwrap();
        until_threads(&handle, 1).await;
    }
}

#[tokio::test]
async fn a_pf_that_goes_away_while_it_hangs_ends_its_thread_after_its_commands() {
    let pfs = FakePfs::new(&["eth0"]);
    let handle = PfHandle::start(pfs.clone()).unwrap();
    pfs.world().hangs = Some("eth0".into());
    let waiting = handle.clone();
    let stuck = tokio::spawn(async move { waiting.read("eth0").await });
    while pfs.world().reads == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    pfs.world().pfs.remove("eth0");
    handle.list().await.unwrap();
    assert_eq!((threads(&handle), handle.0.of_pfs().len()), (1, 0));
    pfs.world().hangs = None;
    stuck.await.unwrap().unwrap_err();
    until_threads(&handle, 0).await;
}

#[tokio::test]
async fn a_late_command_of_a_pf_does_not_end_the_thread_of_its_successor() {
    let pfs = FakePfs::new(&["eth0"]);
    let handle = PfHandle::start(pfs.clone()).unwrap();
    let generation = || handle.0.of_pfs()["eth0"].generation;
    handle.read("eth0").await.unwrap();
    let former = generation();
    let pf = pfs.world().pfs.remove("eth0").unwrap();
    handle.list().await.unwrap();
    pfs.world().pfs.insert("eth0".into(), pf);
    handle.read("eth0").await.unwrap();
    handle.0.end("eth0", former);
    until_threads(&handle, 1).await;
    handle.0.end("eth0", generation());
    until_threads(&handle, 0).await;
}
