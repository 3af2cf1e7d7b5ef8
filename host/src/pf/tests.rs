use passthrough::host::VfChange;

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
