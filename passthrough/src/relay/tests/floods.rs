// SPDX-License-Identifier: Apache-2.0

//! The rates of messages and resets, and the bounds of their records.

use std::time::Duration;

use netpolicy::Reason;

use super::{guest::guest, mac};
use crate::relay::{
    Config, Rate, RelayEvent,
    testing::{Bench, Bus, driver::Failed},
};

const MS: Duration = Duration::from_millis(1);

#[test]
fn a_flood_is_slowed_down_and_never_refused() {
    let (bench, mut driver) = guest();
    let before = bench.now();
    for _ in 0..200 {
        assert!(driver.set_mac(mac(0x11)));
    }
    let seconds = (bench.now() - before).as_secs_f64();
    assert!((2.0..4.0).contains(&seconds), "136 messages beyond the burst at 50 per second: {seconds}");
}

#[test]
fn resets_are_slowed_down_and_reach_the_device_at_their_rate() {
    let (bench, mut driver) = guest();
    let resets = bench.vf().pf().vf_resets;
    let before = bench.now();
    for _ in 0..20 {
        driver.reset().expect("late, but not refused");
    }
    let took = bench.now() - before;
    assert!(took > 5000 * MS, "{took:?}");
    assert_eq!(bench.vf().pf().vf_resets - resets, 20, "each reached the device");
    // Without the driver's waiting times: thousands of writes, a few resets.
    for _ in 0..5000 {
        driver.bus.write(0, 1 << 26);
    }
    assert!(bench.vf().pf().vf_resets - resets <= 20 + 8);
    assert_eq!(bench.0.borrow().relay.stats().resets, 2 + 20 + 5000);
}

#[test]
fn what_would_be_delayed_for_too_long_is_refused() {
    let slow = Rate { burst: 3, period: Duration::from_secs(60) };
    let bench = Bench::with(mac(0x11), Config { messages: slow, ..Config::default() });
    let mut driver = bench.driver();
    driver.reset_hw().expect("reset");
    for _ in 0..2 {
        assert_eq!(driver.call(&[5, 1522]), Ok(0xa000_0005));
    }
    let before = bench.now();
    assert_eq!(driver.call(&[5, 1522]), Ok(0x6000_0005));
    let took = bench.now() - before;
    assert!(took >= 500 * MS && took < 600 * MS, "{took:?}");
    let limited = |event: &RelayEvent| {
        matches!(event, RelayEvent::Refused { reason: Reason::RateLimited, count: 1, .. })
    };
    assert!(bench.events().iter().any(limited));

    let bench = Bench::with(mac(0x11), Config { resets: slow, ..Config::default() });
    let mut driver = bench.driver();
    driver.probe();
    driver.reset().expect("the third");
    assert_eq!(driver.reset(), Err(Failed::StillResetting));
    assert_eq!((driver.perm, bench.vf().pf().vf_resets), (mac(0x11), 3), "it keeps its address");
}

#[test]
fn reset_messages_have_their_own_bound() {
    let (bench, mut driver) = guest();
    let before = bench.now();
    for _ in 0..20 {
        driver.post(&[1]).expect("late, but not refused");
    }
    assert!(bench.now() - before > 5000 * MS);
}

#[test]
fn a_flood_of_rubbish_causes_a_bounded_number_of_events() {
    let (bench, mut driver) = guest();
    let before = bench.now();
    for word in 0..300u32 {
        driver.call(&[0x8888 + word]).expect("answered");
    }
    bench.wait(2000 * MS);
    let seconds = usize::try_from((bench.now() - before).as_secs()).expect("a few");
    let events = bench.events();
    assert!(events.len() <= seconds + 1, "{} in {seconds} s", events.len());
    let counted: u64 = events
        .iter()
        .map(|event| if let RelayEvent::Refused { count, .. } = event { *count } else { 0 })
        .sum();
    assert_eq!(counted, 300);
    assert_eq!((bench.vf().pf().unhandled, bench.vf().pf().warnings), (0, 0));
}
