// SPDX-License-Identifier: Apache-2.0

use std::time::Duration;

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

#[tokio::test]
async fn a_thread_is_there_as_long_as_its_pf() {
    let pfs = FakePfs::new(&["eth0"]);
    let handle = PfHandle::start(pfs.clone()).unwrap();
    let until = async |n| {
        let so = async {
            while handle.0.of_pfs().len() != n {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(10), so).await.expect("so many threads");
    };
    handle.read("eth0").await.unwrap();
    for n in 0..1000 {
        handle.read(&format!("eth{}", n + 1)).await.unwrap_err();
    }
    until(1).await;
    let gone = pfs.world().pfs.remove("eth0").unwrap();
    handle.list().await.unwrap();
    until(0).await;
    pfs.world().pfs.insert("eth0".into(), gone);
    handle.read("eth0").await.unwrap();
    until(1).await;
}
