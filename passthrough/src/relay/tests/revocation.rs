// SPDX-License-Identifier: Apache-2.0

//! Revocations by messages, at once or after the guest's reset.

use std::time::Duration;

use netpolicy::{Change, PromiscuousMode, VlanId};

use super::{FORWARD, guest::guest, mac};
use crate::relay::{
    MAX_CHANGES, RelayEvent, Verdict,
    testing::{Bench, Bus, Driver},
};

const MS: Duration = Duration::from_millis(1);

fn joined(bench: &Bench, driver: &mut Driver<Bench>) {
    bench.vf().with_pf(|pf| pf.trusted = true);
    bench.policy(|_| Some(FORWARD));
    for words in [&[0x1_0004, 100][..], &[0x2_0003, 0x0222_0111], &[0x2_0006], &[0x2_0002, 0x2, 0x4400]] {
        driver.post(words).expect("posted");
    }
    let pf = bench.vf().pf();
    assert!(pf.all_multicast && pf.vlans.len() == 1 && pf.multicast.len() == 2 && pf.filters.len() == 1);
    bench.events();
}

fn everything() -> Vec<Change> {
    vec![
        Change::LeaveVlan(VlanId::new(100).expect("a VLAN")),
        Change::SetMulticast(Vec::new()),
        Change::SetPromiscuous(PromiscuousMode::OFF),
        Change::ClearUnicast,
    ]
}

fn nothing_left(bench: &Bench) -> bool {
    let pf = bench.vf().pf();
    !pf.all_multicast && pf.vlans.is_empty() && pf.multicast.is_empty() && pf.filters.is_empty()
}

#[test]
fn what_is_no_longer_allowed_is_revoked() {
    let (bench, mut driver) = guest();
    joined(&bench, &mut driver);
    bench.0.borrow().relay.revoke(7, everything());
    bench.wait(MS);
    assert_eq!(bench.events(), [RelayEvent::Revoked { id: 7, failed: vec![], deferred: false }]);
    assert!(nothing_left(&bench));
    assert!(driver.set_mac(mac(0x11)), "the guest's next message finds its reply");
}

#[test]
fn what_is_granted_and_then_revoked_is_not_there() {
    let (bench, mut driver) = guest();
    bench.policy(|_| None);
    driver.bus.write(0x800, 0x1_0004);
    driver.bus.write(0x804, 100);
    driver.bus.write(0xc40, 1);
    {
        // Both arrive while the relay is busy.
        let world = bench.0.borrow();
        let seq = world.authority.requests.lock().unwrap().last().expect("asked").seq;
        world.relay.verdict(Verdict { seq, effective_mac: mac(0x11), decision: FORWARD });
        world.relay.revoke(1, everything());
    }
    bench.wait(10 * MS);
    let received: Vec<u32> =
        bench.vf().pf().received.iter().map(|words| words[0]).filter(|word| word & 0xff == 4).collect();
    assert_eq!(received, [0x1_0004, 0x0004], "joined, then left");
    assert!(bench.vf().pf().vlans.is_empty());
}

#[test]
fn a_revocation_waits_for_a_reset_and_is_done_before_its_answer() {
    let (bench, mut driver) = guest();
    joined(&bench, &mut driver);
    driver.bus.write(0, 1 << 26);
    bench.0.borrow().relay.revoke(8, everything());
    bench.wait(MS);
    assert_eq!(bench.events(), [RelayEvent::Revoked { id: 8, failed: vec![], deferred: true }]);
    assert!(!nothing_left(&bench));
    driver.bus.write(0x800, 1);
    driver.bus.write(0xc40, 1);
    while driver.bus.read(0xc40) & 0x20 == 0 {
        bench.wait(MS / 100);
    }
    assert!(nothing_left(&bench));
    assert_eq!(bench.events(), [RelayEvent::Revoked { id: 8, failed: vec![], deferred: false }]);
}

#[test]
fn what_waits_for_a_reset_is_bounded() {
    let (bench, mut driver) = guest();
    joined(&bench, &mut driver);
    driver.bus.write(0, 1 << 26);
    let fits = u64::try_from(MAX_CHANGES / everything().len()).unwrap();
    for id in 0..=fits {
        bench.0.borrow().relay.revoke(id, everything());
        bench.wait(MS);
        let deferred = id < fits;
        let failed = if deferred { vec![] } else { everything() };
        assert_eq!(bench.events(), [RelayEvent::Revoked { id, failed, deferred }]);
    }
}

#[test]
fn what_cannot_be_revoked_is_said() {
    let (bench, mut driver) = guest();
    joined(&bench, &mut driver);
    bench.vf().with_pf(|pf| pf.trusted = false);
    let mut changes = everything();
    // These are not the relay's: netlink programs an address, and only the guest resets.
    changes.extend([Change::SetMac(mac(0x55)), Change::Reset]);
    bench.0.borrow().relay.revoke(9, changes);
    bench.wait(MS);
    let failed = vec![Change::ClearUnicast, Change::SetMac(mac(0x55)), Change::Reset];
    assert_eq!(bench.events(), [RelayEvent::Revoked { id: 9, failed, deferred: false }]);
    // A PF that does not answer costs one exchange, not one for each change.
    bench.vf().with_pf(|pf| pf.mute = true);
    let before = bench.now();
    bench.0.borrow().relay.revoke(10, everything());
    bench.wait(MS);
    assert!(bench.now() - before < 300 * MS);
    assert!(bench.events().contains(&RelayEvent::Revoked { id: 10, failed: everything(), deferred: false }));
}
