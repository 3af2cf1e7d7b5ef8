// SPDX-License-Identifier: Apache-2.0

//! Lists of receive addresses that the guest set while the authority was away.

use std::time::Duration;

use netpolicy::{OnDenied, Reason, Request};

use super::{FORWARD, LOCAL, mac};
use crate::relay::{
    Cancelled, Decision, RelayEvent,
    testing::{Bench, Driver},
};

const SECOND: Duration = Duration::from_secs(1);
const ADD_44: [u32; 3] = [0x2_0002, 0x2, 0x4400];
const ADD_55: [u32; 3] = [0x2_0002, 0x2, 0x5500];
const CLEAR: [u32; 3] = [0x1_0002, 0, 0];
const HASHES: [u32; 2] = [0x2_0003, 0x0222_0111];

/// A guest with one further address, and then without an authority.
fn guest() -> (Bench, Driver<Bench>) {
    let bench = Bench::new(mac(0x11));
    let mut driver = bench.driver();
    driver.probe();
    bench.vf().with_pf(|pf| pf.trusted = true);
    bench.policy(|_| Some(FORWARD));
    assert_eq!(driver.call(&ADD_44), Ok(0xa002_0002));
    bench.set_away(true);
    bench.events();
    (bench, driver)
}

fn asked(bench: &Bench) -> usize {
    bench.requests().len()
}

#[test]
fn lists_that_nobody_decided_about_are_set_when_the_authority_is_back() {
    let (bench, mut driver) = guest();
    // Linux' igbvf ignores these answers.
    for message in [&CLEAR[..], &ADD_55, &HASHES] {
        assert_eq!(driver.call(message).map(|word| word >> 30), Ok(1), "{message:x?} is refused");
    }
    bench.wait(5 * SECOND);
    bench.set_away(false);
    bench.wait(3 * SECOND / 2);
    let pf = bench.vf().pf();
    assert_eq!((pf.filters, pf.multicast), (vec![mac(0x55)], vec![0x111, 0x222]));
    let before = asked(&bench);
    bench.wait(60 * SECOND);
    assert_eq!(asked(&bench), before, "once");
    assert!(!driver.has_reply(), "the guest gets no reply to a retry");
}

#[test]
fn a_filter_that_is_granted_before_the_others_are_cleared_stays() {
    let (bench, mut driver) = guest();
    assert_eq!(driver.call(&CLEAR).map(|word| word >> 30), Ok(1));
    bench.set_away(false);
    assert_eq!(driver.call(&ADD_55), Ok(0xa002_0002));
    bench.wait(2 * SECOND);
    assert_eq!(bench.vf().pf().filters, [mac(0x55)]);
}

#[test]
fn a_guest_that_sets_its_lists_itself_is_not_asked_for() {
    // The same address again, a clear, or a reset.
    let again: [fn(&mut Driver<Bench>); 3] = [
        |driver| assert!(driver.call(&ADD_55).is_ok()),
        |driver| assert!(driver.call(&CLEAR).is_ok()),
        |driver| driver.reset().expect("reset"),
    ];
    for set in again {
        let (bench, mut driver) = guest();
        assert_eq!(driver.call(&ADD_55).map(|word| word >> 30), Ok(1));
        bench.set_away(false);
        set(&mut driver);
        let before = asked(&bench);
        bench.wait(10 * SECOND);
        assert_eq!(asked(&bench), before);
    }
}

#[test]
fn a_refusal_ends_it_and_silence_costs_a_request_a_second() {
    let (bench, mut driver) = guest();
    assert_eq!(driver.call(&ADD_55).map(|word| word >> 30), Ok(1));
    assert_eq!(driver.call(&HASHES).map(|word| word >> 30), Ok(1));
    bench.set_away(false);
    bench.policy(|_| None);
    let before = asked(&bench);
    bench.wait(20 * SECOND);
    let silent = asked(&bench) - before;
    assert!((10..=20).contains(&silent), "{silent} questions in 20 s");
    let withdrawn =
        |event: &RelayEvent| matches!(event, RelayEvent::Cancelled { why: Cancelled::Withdrawn, .. });
    let events = bench.events();
    assert!(events.iter().filter(|event| withdrawn(event)).count() + 1 >= silent, "{events:?}");
    bench.policy(|_| Some(Decision::Refuse { tell: OnDenied::Nack, reason: Reason::LimitExceeded }));
    bench.wait(3 * SECOND);
    let before = asked(&bench);
    bench.wait(10 * SECOND);
    assert_eq!(asked(&bench), before);
    assert_eq!(bench.vf().pf().filters, [mac(0x44)]);
}

/// The guest's own message does not wait for a request that it does not know.
#[test]
fn a_message_of_the_guest_goes_first() {
    let (bench, mut driver) = guest();
    assert_eq!(driver.call(&ADD_55).map(|word| word >> 30), Ok(1));
    bench.set_away(false);
    bench.slow_policy(|request| match request {
        Request::AddUnicastFilter(_) => Some((300 * SECOND / 1000, FORWARD)),
        _ => Some((Duration::ZERO, LOCAL)),
    });
    let own = |bench: &Bench| {
        bench.requests().iter().filter(|one| **one == Request::AddUnicastFilter(mac(0x55))).count()
    };
    let before = own(&bench);
    while own(&bench) == before {
        bench.wait(SECOND / 100);
    }
    let begun = bench.now();
    assert_eq!(driver.call(&[5, 1522]), Ok(0xa000_0005));
    assert!(bench.now() - begun < SECOND / 10, "{:?}", bench.now() - begun);
    let withdrawn =
        |event: &RelayEvent| matches!(event, RelayEvent::Cancelled { why: Cancelled::Withdrawn, .. });
    assert_eq!(
        bench.events().iter().filter(|event| withdrawn(event)).count(),
        1,
        "the relay's question is withdrawn once"
    );
    bench.wait(3 * SECOND);
    assert_eq!(bench.vf().pf().filters, [mac(0x44), mac(0x55)], "and it is asked again");
}
