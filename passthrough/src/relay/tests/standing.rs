// SPDX-License-Identifier: Apache-2.0

//! Denials that the authority has given in advance.

use std::time::Duration;

use netpolicy::{MacAddress, OnDenied, Reason, Request, StandingRefusal};

use super::{LOCAL, mac};
use crate::{
    channel::mailbox::register_bits::{ACK_MESSAGE, NACK_MESSAGE, PFACK, PFSTS, REQ},
    function::BarHandler,
    relay::{
        RelayEvent,
        testing::{Bench, Driver},
    },
};

const MAILBOX: u64 = 0xc40;
const BUFFER: u64 = 0x800;

fn refusal(on_denied: OnDenied) -> Option<StandingRefusal> {
    let unless = vec![mac(0x11).into(), mac(0x44).into()];
    Some(StandingRefusal { unless, reason: Reason::MacChangesRejected, on_denied })
}

fn guest(on_denied: OnDenied) -> (Bench, Driver<Bench>) {
    let bench = Bench::new(mac(0x11));
    // The authority grants every request: a denial is not its own.
    bench.policy(|_| Some(LOCAL));
    bench.0.borrow().relay.set_standing_refusal(refusal(on_denied));
    let mut driver = bench.driver();
    driver.probe();
    bench.events();
    (bench, driver)
}

fn declined(last: u8, silent: bool) -> RelayEvent {
    RelayEvent::Declined { mac: mac(last), reason: Reason::MacChangesRejected, silent }
}

/// Posts a message as a vCPU does, and gives the relay's thread no turn.
fn post(bench: &Bench, mac: MacAddress) {
    let page = bench.0.borrow().page.clone();
    let [a, b, c, d, e, f] = mac.bytes();
    for (n, word) in
        [2, u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, 0, 0])].iter().enumerate()
    {
        page.write(BUFFER + 4 * n as u64, &word.to_le_bytes());
    }
    page.write(MAILBOX, &REQ.to_le_bytes());
}

/// PFACK and PFSTS, and word 0.
fn answer(bench: &Bench) -> (bool, u32) {
    let page = bench.0.borrow().page.clone();
    let read = |offset| {
        let mut data = [0; 4];
        page.read(offset, &mut data);
        u32::from_le_bytes(data)
    };
    (read(MAILBOX) & (PFACK | PFSTS) == PFACK | PFSTS, read(BUFFER))
}

#[test]
fn it_is_given_by_who_asks_without_another_threads_turn() {
    let (bench, _driver) = guest(OnDenied::Nack);
    let requests = bench.requests().len();
    for last in 0x20..0x20 + 16 {
        post(&bench, mac(last));
        let (answered, word) = answer(&bench);
        assert!(answered && word & NACK_MESSAGE != 0 && word & ACK_MESSAGE == 0, "{last:#x}: {word:#x}");
    }
    assert_eq!(bench.events(), [], "the thread had no turn");
    // No more denials may wait for the relay's thread.
    post(&bench, mac(0x99));
    assert!(!answer(&bench).0, "in flight");
    bench.0.borrow_mut().settle();
    assert!(answer(&bench).0);
    let told: Vec<RelayEvent> = (0x20..0x20 + 16).chain([0x99]).map(|last| declined(last, false)).collect();
    assert_eq!(bench.events(), told, "in their order");
    assert_eq!(bench.requests().len(), requests);
    assert_eq!(bench.vf().pf().mac, mac(0x11));
}

#[test]
fn it_is_told_with_the_next_look() {
    let (bench, mut driver) = guest(OnDenied::Nack);
    post(&bench, mac(0x22));
    bench.wait(Duration::from_millis(250));
    assert_eq!(bench.events(), [declined(0x22, false)]);
    assert!(!driver.set_mac(mac(0x22)));
}

#[test]
fn the_guest_sees_what_it_sees_of_every_refusal() {
    let (bench, mut driver) = guest(OnDenied::Nack);
    assert!(!driver.set_mac(mac(0x22)), "EADDRNOTAVAIL");
    assert_eq!((driver.netdev, bench.vf().pf().mac), (mac(0x11), mac(0x11)));
    driver.down_up();
    assert_eq!((driver.netdev, bench.vf().pf().mac), (mac(0x11), mac(0x11)));
    assert_eq!(bench.events(), [declined(0x22, false)]);
    let addresses = |request: &Request| matches!(request, Request::SetMac(_));
    assert!(!bench.requests().iter().any(addresses), "{:?}", bench.requests());
    let stats = bench.0.borrow().relay.stats();
    assert_eq!(stats.messages.get("set_mac:refused"), Some(&1), "{stats:?}");

    let (bench, mut driver) = guest(OnDenied::Silent);
    assert!(driver.set_mac(mac(0x22)), "the command succeeds");
    assert_eq!((driver.netdev, bench.vf().pf().mac), (mac(0x22), mac(0x11)), "guest and device differ");
    assert_eq!(bench.events(), [RelayEvent::GuestMac { mac: mac(0x22) }, declined(0x22, true)]);
    driver.down_up();
    assert_eq!((driver.netdev, bench.vf().pf().mac), (mac(0x11), mac(0x11)), "the restore is refused openly");
    assert!(bench.events().contains(&declined(0x22, false)));
    assert!(driver.set_mac(mac(0x33)), "silent again");
}

#[test]
fn what_it_does_not_cover_is_asked() {
    let (bench, mut driver) = guest(OnDenied::Nack);
    let requests = || bench.requests().len();
    let before = requests();
    assert!(driver.set_mac(mac(0x11)), "the effective address needs no question");
    assert_eq!(requests(), before);
    assert!(driver.set_mac(mac(0x44)), "an exception");
    assert_eq!(requests(), before + 1);
    // The address is effective now. After a refusal the driver goes back to the address of its last reset, and that
    // restore is stale.
    assert!(!driver.set_mac(mac(0x22)));
    driver.down_up();
    assert_eq!((driver.netdev, bench.vf().pf().mac), (mac(0x44), mac(0x44)));

    bench.0.borrow().relay.set_standing_refusal(None);
    assert!(driver.set_mac(mac(0x22)), "it is withdrawn");
    assert_eq!(bench.vf().pf().mac, mac(0x22));
    // No thread denies the effective address, although the policy would no longer grant it.
    bench.0.borrow().relay.set_standing_refusal(refusal(OnDenied::Nack));
    let before = requests();
    assert!(driver.set_mac(mac(0x22)));
    assert_eq!(requests(), before);
    driver.down_up();
    assert_eq!((driver.netdev, bench.vf().pf().mac), (mac(0x22), mac(0x22)));
}

#[test]
fn a_command_comes_before_the_next_message() {
    let (bench, _driver) = guest(OnDenied::Nack);
    bench.vf().set_admin_mac(mac(0x22));
    bench.0.borrow().relay.set_effective_mac(mac(0x22));
    post(&bench, mac(0x22));
    assert!(!answer(&bench).0, "the thread must first carry out the order");
    bench.0.borrow_mut().settle();
    let (answered, word) = answer(&bench);
    assert!(answered && word & ACK_MESSAGE != 0, "the equal one: {word:#x}");
}

#[test]
fn it_needs_a_pf_that_listens_and_a_token() {
    // The VF was not reset since the device was: word 0 must show it.
    let (bench, mut driver) = guest(OnDenied::Nack);
    bench.0.borrow().relay.hardware_reset();
    bench.0.borrow_mut().settle();
    post(&bench, mac(0x22));
    assert!(!answer(&bench).0);
    driver.probe();

    let before = bench.now();
    for last in 0x50..=0xff {
        assert!(!driver.set_mac(mac(last)), "{last:#x}");
    }
    let took = bench.now() - before;
    assert!(took > Duration::from_secs(2), "176 messages at 50 per second after 64: {took:?}");
}
