// SPDX-License-Identifier: Apache-2.0

//! The stock driver's code on one side, a PF that behaves as igb on the other, the relay in between.

use std::time::Duration;

use netpolicy::{MacAddress, OnDenied, Reason, Request};

use super::{FORWARD, LOCAL, NACK, SILENT, mac};
use crate::relay::{
    Cancelled, Decision, Forwarded, RelayEvent, Verdict,
    testing::{Bench, Bus, Driver, driver::Failed},
};

const MS: Duration = Duration::from_millis(1);

/// A guest that runs on address 0x11.
pub(super) fn guest() -> (Bench, Driver<Bench>) {
    let bench = Bench::new(mac(0x11));
    let mut driver = bench.driver();
    driver.probe();
    assert_eq!((driver.netdev, driver.perm), (mac(0x11), mac(0x11)));
    bench.events();
    (bench, driver)
}

fn addresses(bench: &Bench, driver: &Driver<Bench>) -> (MacAddress, MacAddress) {
    (driver.netdev, bench.vf().pf().mac)
}

#[test]
fn a_refused_address_is_an_error_in_the_guest_and_nothing_changes() {
    let (bench, mut driver) = guest();
    bench.policy(|_| Some(NACK));
    assert!(!driver.set_mac(mac(0x22)), "EADDRNOTAVAIL");
    assert_eq!(addresses(&bench, &driver), (mac(0x11), mac(0x11)));
    driver.down_up();
    assert_eq!(addresses(&bench, &driver), (mac(0x11), mac(0x11)));
    assert_eq!(bench.vf().pf().warnings, 0, "the PF never heard of it");
}

#[test]
fn a_silently_refused_address_is_shown_by_the_guest_until_it_resets() {
    let (bench, mut driver) = guest();
    bench.policy(|_| Some(SILENT));
    assert!(driver.set_mac(mac(0x22)), "the command succeeds");
    assert_eq!(addresses(&bench, &driver), (mac(0x22), mac(0x11)), "guest and device differ");
    driver.down_up();
    assert_eq!(
        addresses(&bench, &driver),
        (mac(0x11), mac(0x11)),
        "the guest has the device's address again"
    );
    assert!(driver.set_mac(mac(0x33)), "silent again, not only once");
    assert_eq!(addresses(&bench, &driver), (mac(0x33), mac(0x11)));
}

#[test]
fn an_accepted_address_survives_resets_and_later_refusals() {
    let (bench, mut driver) = guest();
    bench.policy(|_| Some(LOCAL));
    assert!(driver.set_mac(mac(0x22)));
    driver.down_up();
    assert_eq!(addresses(&bench, &driver), (mac(0x22), mac(0x22)));

    // Only this order leaves the driver with a stale address to fall back to: accepted without a reset, then refused.
    for refusal in [NACK, SILENT] {
        let (bench, mut driver) = guest();
        bench.policy(move |request| {
            Some(if *request == Request::SetMac(mac(0x33)) { refusal } else { LOCAL })
        });
        assert!(driver.set_mac(mac(0x22)));
        assert_eq!(driver.set_mac(mac(0x33)), refusal == SILENT);
        driver.down_up();
        assert_eq!(addresses(&bench, &driver), (mac(0x22), mac(0x22)), "{refusal:?}");
    }
}

#[test]
fn an_address_revoked_by_the_host_is_learnt_at_the_next_reset() {
    let (bench, mut driver) = guest();
    assert!(driver.set_mac(mac(0x22)));
    bench.vf().set_admin_mac(mac(0x11));
    bench.0.borrow().relay.set_effective_mac(mac(0x11));
    bench.policy(|_| Some(SILENT));
    bench.0.borrow().relay.make_guest_reset();
    let requests = bench.requests().len();
    assert!(driver.set_mac(mac(0x22)), "no longer the equal one: asked, and silently refused");
    assert_eq!(bench.requests().len(), requests + 1);
    assert_eq!(bench.vf().pf().triggered, [1 << 2], "the vector that the guest gave the mailbox");
    assert!(driver.watchdog(), "the link check asks for a reset");
    driver.reset().expect("reset");
    assert_eq!(addresses(&bench, &driver), (mac(0x11), mac(0x11)));
    assert!(!driver.watchdog());
}

#[test]
fn a_guest_that_goes_on_talking_still_learns_that_it_must_reset() {
    const CTS: u32 = 0x2000_0000;
    let (bench, mut driver) = guest();
    assert!(driver.set_mac(mac(0x22)));
    bench.vf().set_admin_mac(mac(0x11));
    bench.0.borrow().relay.set_effective_mac(mac(0x11));
    bench.policy(|request| Some(if matches!(request, Request::SetMac(_)) { NACK } else { FORWARD }));
    bench.0.borrow().relay.make_guest_reset();
    bench.wait(MS);
    // A multicast join right behind it, granted; another address, denied; a message without a meaning.
    assert_eq!(driver.call(&[0x0001_0003, 0x230]).map(|word| word & CTS), Ok(0));
    assert!(!driver.set_mac(mac(0x33)));
    assert_eq!(driver.call(&[0x77]).map(|word| word & CTS), Ok(0));
    // Stock drivers do not reset twice within 10 s: their link check must ask until they do.
    for n in 0..8 {
        bench.wait(2000 * MS);
        if n % 2 == 1 {
            // The reply to a granted request asks for nothing by itself.
            assert_eq!(driver.call(&[0x0001_0003, 0x230]).map(|word| word & CTS), Ok(0));
        }
        assert!(driver.watchdog(), "the link check asks for a reset");
    }
    driver.reset().expect("reset");
    assert_eq!(addresses(&bench, &driver), (mac(0x11), mac(0x11)));
    assert!(!driver.watchdog());
    assert_eq!(driver.call(&[0x0001_0003, 0x230]).map(|word| word & CTS), Ok(CTS));
}

#[test]
fn what_the_guest_believes_is_told_where_the_authority_cannot_know_it() {
    let (bench, mut driver) = guest();
    bench.policy(|_| Some(SILENT));
    assert!(driver.set_mac(mac(0x22)));
    let requests = bench.requests().len();
    // The guest used another address before the refusal.
    assert!(driver.set_mac(mac(0x11)) && driver.set_mac(mac(0x11)));
    assert_eq!(bench.requests().len(), requests);
    let told = |last| RelayEvent::GuestMac { mac: mac(last) };
    assert_eq!(
        bench.events(),
        [told(0x22), told(0x11)],
        "the silently refused one, then the equal one, once"
    );
    // The driver sees the refusal of a restore, and does not use that address.
    assert!(driver.set_mac(mac(0x33)));
    driver.down_up();
    assert_eq!(bench.events().last(), Some(&told(0x33)));
}

#[test]
fn no_verdict_is_a_refusal_within_what_the_driver_waits() {
    let (bench, mut driver) = guest();
    bench.policy(|_| None);
    let before = bench.now();
    assert!(!driver.set_mac(mac(0x22)));
    let took = bench.now() - before;
    assert!(took >= 400 * MS && took < 500 * MS, "{took:?}");
    let request = Request::SetMac(mac(0x22));
    assert!(
        matches!(&bench.events()[..], [RelayEvent::Cancelled { request: asked, why: Cancelled::Deadline, .. }] if *asked == request)
    );
    // A reset still succeeds: the PF's own reply has the address.
    driver.down_up();
    assert_eq!(addresses(&bench, &driver), (mac(0x11), mac(0x11)));
}

#[test]
fn an_authority_that_is_away_costs_the_guest_nothing_and_is_told_in_bounded_events() {
    let (bench, mut driver) = guest();
    bench.set_away(true);
    let before = bench.now();
    for _ in 0..10 {
        assert!(!driver.set_mac(mac(0x22)));
    }
    driver.reset().expect("a reset needs no verdict");
    assert!(bench.now() - before < 100 * MS);
    bench.wait(1000 * MS);
    let counts: Vec<_> = bench
        .events()
        .iter()
        .filter_map(|event| match event {
            RelayEvent::Refused { reason: Reason::AuthorityUnreachable, count, .. } => Some(*count),
            _ => None,
        })
        .collect();
    assert_eq!(counts, [1, 10], "ten addresses and a reset");
}

#[test]
fn a_verdict_after_a_reset_answers_nothing() {
    let (bench, mut driver) = guest();
    bench.slow_policy(|_| Some((100 * MS, LOCAL)));
    for (index, word) in [2, 0x2, 0x2200].into_iter().enumerate() {
        driver.bus.write(0x800 + 4 * index as u64, word);
    }
    driver.bus.write(0xc40, 1);
    bench.wait(10 * MS);
    driver.bus.write(0, 1 << 26);
    bench.wait(10 * MS);
    assert!(matches!(&bench.events()[..], [RelayEvent::Cancelled { why: Cancelled::GuestReset, .. }]));
    bench.wait(200 * MS);
    assert_eq!(driver.bus.read(0xc40), 0, "no answer to the voided message");
    driver.reset().expect("reset");
}

#[test]
fn a_late_answer_to_one_message_does_not_lose_the_next() {
    let (bench, mut driver) = guest();
    bench.slow_policy(|request| match request {
        Request::SetMulticast { .. } => Some((100 * MS, FORWARD)),
        _ => Some((Duration::ZERO, LOCAL)),
    });
    // igbvf does not read the reply to this one.
    driver.post(&[0x2_0003, 0x0222_0111]).expect("multicast");
    assert!(driver.set_mac(mac(0x22)));
    let pf = bench.vf().pf();
    assert_eq!((pf.mac, pf.multicast), (mac(0x22), vec![0x111, 0x222]));
}

#[test]
fn filters_are_cleared_with_a_valid_address_and_only_when_there_are_some() {
    let (bench, mut driver) = guest();
    bench.vf().with_pf(|pf| pf.trusted = true);
    bench.policy(|_| Some(FORWARD));
    assert_eq!(driver.call(&[0x1_0002, 0, 0]), Ok(0xa001_0002));
    assert_eq!(driver.call(&[0x2_0002, 0x2, 0x4400]), Ok(0xa002_0002));
    assert_eq!(bench.vf().pf().filters, [mac(0x44)]);
    assert_eq!(driver.call(&[0x1_0002, 0, 0]), Ok(0xa001_0002));
    let pf = bench.vf().pf();
    assert!(pf.filters.is_empty());
    assert_eq!(pf.received.last().map(|words| words[..3].to_vec()), Some(vec![0x1_0002, 0x2, 0x1100]));
    assert_eq!(
        bench.requests().iter().filter(|request| **request == Request::ClearUnicastFilters).count(),
        1
    );
}

/// The agent died at a reboot, and its successor removes the old boot's address from the PF while the new boot uses it.
#[test]
fn a_guest_learns_an_address_that_is_changed_behind_its_back() {
    let (bench, mut driver) = guest();
    let told = |mac| {
        bench.vf().set_admin_mac(mac);
        bench.0.borrow().relay.set_effective_mac(mac);
        bench.wait(MS);
    };
    assert!(driver.set_mac(mac(0x22)));
    bench.0.borrow().relay.hardware_reset();
    bench.wait(MS);
    bench.set_away(true);
    let mut driver = bench.driver();
    driver.probe();
    assert_eq!(addresses(&bench, &driver), (mac(0x22), mac(0x22)), "the authority was away");
    assert!(bench.events().contains(&RelayEvent::GuestMac { mac: mac(0x22) }));
    bench.set_away(false);
    assert!(!driver.watchdog());

    told(mac(0x11));
    assert!(driver.watchdog(), "the link check asks for a reset");
    bench.policy(|request| Some(if matches!(request, Request::SetMac(_)) { NACK } else { LOCAL }));
    driver.reset().expect("reset");
    assert_eq!(addresses(&bench, &driver), (mac(0x11), mac(0x11)));
    // A guest that has the address, and one without an address yet, get no event.
    let triggered = bench.vf().pf().triggered;
    told(mac(0x11));
    assert!(!driver.watchdog());
    bench.0.borrow().relay.hardware_reset();
    told(mac(0x33));
    assert_eq!(bench.vf().pf().triggered, triggered);
}

/// Another port has the address and releases it later: the authority must then see the driver's next list.
#[test]
fn after_an_address_in_use_filters_are_cleared_by_the_authority() {
    for (reason, asked) in [(Reason::MacInUse, 1), (Reason::LimitExceeded, 0)] {
        let (bench, mut driver) = guest();
        bench.policy(move |request| match request {
            Request::AddUnicastFilter(_) => Some(Decision::Refuse { tell: OnDenied::Nack, reason }),
            _ => Some(LOCAL),
        });
        assert_eq!(driver.call(&[0x2_0002, 0x2, 0x4400]), Ok(0x6002_0002));
        assert_eq!(driver.call(&[0x1_0002, 0, 0]), Ok(0xa001_0002));
        let cleared = bench.requests().into_iter().filter(|one| *one == Request::ClearUnicastFilters);
        assert_eq!(cleared.count(), asked, "{reason}");
    }
}

#[test]
fn what_the_pf_does_not_answer_is_refused_and_the_guest_resets() {
    for (pf_fails, outcome) in [
        ((|bench: &Bench| bench.vf().with_pf(|pf| pf.mute = true)) as fn(&Bench), Forwarded::Unanswered),
        (|bench| bench.vf().with_pf(|pf| pf.down = true), Forwarded::Unanswered),
        (|bench| bench.vf().with_pf(|pf| pf.busy = true), Forwarded::Unanswered),
        // The PF has lost the VF's reset; it NACKs without "clear to send", once some time has passed.
        (
            |bench| {
                bench.wait(2100 * MS);
                bench.vf().with_pf(|pf| pf.clear_to_send = false);
            },
            Forwarded::Refused,
        ),
    ] {
        let (bench, mut driver) = guest();
        bench.policy(|_| Some(FORWARD));
        pf_fails(&bench);
        let before = bench.now();
        let reply = driver.call(&[0x1_0004, 100]).expect("answered all the same");
        assert_eq!(reply, 0x4000_0004, "refused, and not clear to send");
        assert!(bench.now() - before < 900 * MS);
        assert!(
            bench.events().iter().any(
                |event| matches!(event, RelayEvent::Forwarded { outcome: seen, .. } if *seen == outcome)
            )
        );
        bench.vf().with_pf(|pf| (pf.mute, pf.down, pf.busy) = (false, false, false));
        bench.wait(2000 * MS);
        assert!(driver.watchdog());
        driver.reset().expect("reset");
        assert_eq!(driver.call(&[0x1_0004, 100]), Ok(0xa001_0004));
    }
}

#[test]
fn pings_reach_the_guest() {
    let (bench, mut driver) = guest();
    driver.watchdog();
    bench.vf().ping();
    bench.wait(300 * MS);
    assert_eq!(driver.bus.read(0xc40) & 0x10, 0x10, "without the guest's help");
    assert_eq!(driver.bus.read(0x800), 0x2000_0100);
    // A guest's read triggers a poll, unless the relay has just polled.
    bench.wait(30 * MS);
    bench.vf().ping();
    driver.bus.read(0xc40);
    bench.wait(3 * MS);
    assert_eq!(driver.bus.read(0xc40) & 0x10, 0x10);
    assert_eq!(driver.bus.read(0x800), 0x2000_0100);
    bench.vf().ping();
    driver.bus.read(0xc40);
    bench.wait(3 * MS);
    assert_eq!(driver.bus.read(0xc40) & 0x10, 0, "it has just looked");
    bench.wait(300 * MS);
    assert_eq!(driver.bus.read(0xc40) & 0x10, 0x10, "a message within that time is found too");
}

/// The first read clears the reset bits; the word stays.
#[test]
fn a_word_without_clear_to_send_is_enough_to_know_of_a_reset() {
    let (bench, mut driver) = guest();
    driver.watchdog();
    bench.vf().with_pf(|pf| pf.clear_to_send = false);
    bench.vf().ping();
    bench.wait(300 * MS);
    assert!(bench.events().contains(&RelayEvent::PfReset));
    assert_eq!(driver.bus.read(0x800) & 0x2000_0000, 0, "the guest is not clear to send either");
}

#[test]
fn after_a_reset_of_the_pf_the_guest_resets_and_runs_again() {
    let (bench, mut driver) = guest();
    driver.watchdog();
    bench.vf().pf_reset_begins();
    bench.wait(2000 * MS);
    assert_eq!(driver.bus.read(0xc40) & 0x40, 0x40, "RSTI is shown");
    assert!(!driver.watchdog(), "a reset now would fail");
    bench.vf().pf_reset_ends();
    bench.wait(300 * MS);
    assert!(bench.events().contains(&RelayEvent::PfReset));
    assert_eq!(bench.vf().pf().triggered, [1 << 2], "the interrupt that the PF cannot raise for it");
    let resets = (0..3).filter(|_| {
        let reset = driver.watchdog();
        bench.wait(2000 * MS);
        reset
    });
    assert!(resets.count() > 0, "the link check sees it");
    driver.reset().expect("reset");
    assert_eq!(addresses(&bench, &driver), (mac(0x11), mac(0x11)));
    assert!(bench.vf().pf().clear_to_send);
    assert!(!driver.watchdog());
    assert!(driver.set_mac(mac(0x22)));
}

#[test]
fn a_reset_while_the_pf_is_down_fails_and_keeps_the_address() {
    let (bench, mut driver) = guest();
    bench.vf().pf_reset_begins();
    assert_eq!(driver.reset(), Err(Failed::StillResetting));
    assert_eq!(addresses(&bench, &driver), (mac(0x11), mac(0x11)));
    bench.vf().pf_reset_ends();
    bench.wait(2000 * MS);
    assert!(driver.watchdog());
    driver.reset().expect("reset");
    assert!(bench.vf().pf().clear_to_send);
}

#[test]
fn a_device_that_is_gone_is_refused_not_waited_for() {
    let (bench, mut driver) = guest();
    bench.vf().remove();
    bench.policy(|_| Some(FORWARD));
    let before = bench.now();
    assert_eq!(driver.call(&[0x1_0004, 100]), Ok(0x4000_0004));
    assert_eq!(driver.reset(), Err(Failed::StillResetting));
    assert!(bench.now() - before < 100 * MS);
    assert!(!bench.events().contains(&RelayEvent::PfReset), "the PF has nothing to do with it");
}

#[test]
fn a_reset_of_the_pf_that_nobody_saw_is_noticed() {
    let (bench, mut driver) = guest();
    driver.watchdog();
    bench.vf().pf_reset_at_once();
    bench.wait(300 * MS);
    assert!(bench.events().contains(&RelayEvent::PfReset));
    assert!(driver.watchdog());
}

#[test]
fn a_verdict_for_another_message_is_nobodys() {
    let (bench, mut driver) = guest();
    bench.policy(|_| None);
    driver.bus.write(0x800, 4);
    driver.bus.write(0xc40, 1);
    bench.wait(10 * MS);
    let seq = bench.0.borrow().authority.requests.lock().unwrap().last().expect("asked").seq;
    for wrong in [seq - 1, seq + 1] {
        bench.0.borrow().relay.verdict(Verdict { seq: wrong, effective_mac: mac(0x66), decision: FORWARD });
        bench.wait(10 * MS);
        assert_eq!(driver.bus.read(0xc40) & 0x30, 0);
    }
    bench.0.borrow().relay.verdict(Verdict { seq, effective_mac: mac(0x11), decision: LOCAL });
    bench.wait(10 * MS);
    assert_eq!(driver.bus.read(0xc40) & 0x30, 0x30);
}

#[test]
fn after_a_reset_of_the_device_the_guest_must_reset_too() {
    let (bench, mut driver) = guest();
    let received = bench.vf().pf().received.len();
    crate::hardware::VfHardware::reset(&*bench.vf()).expect("reset");
    bench.0.borrow().relay.hardware_reset();
    bench.wait(MS);
    assert_eq!(driver.call(&[0x1_0004, 100]), Ok(0x4000_0004));
    assert_eq!(bench.vf().pf().received.len(), received);
    driver.reset().expect("reset");
    assert_eq!(driver.call(&[5, 1522]), Ok(0xa000_0005));
}

#[test]
fn messages_are_counted_by_opcode_and_verdict() {
    let (bench, mut driver) = guest();
    bench.policy(|_| Some(NACK));
    driver.set_mac(mac(0x22));
    driver.call(&[7]).expect("answered");
    let stats = bench.0.borrow().relay.stats();
    let count = |name: &str| stats.messages.get(name).copied().unwrap_or(0);
    assert_eq!((count("set_mac:refused"), count("unknown:unknown"), count("reset:forwarded")), (1, 1, 2));
    // Two resets, each with its restore.
    assert_eq!((count("set_mac:equal"), stats.round_trips.count), (1, stats.messages.values().sum::<u64>()));
    assert!(stats.round_trips.max_us < 10_000, "{:?}", stats.round_trips);
}
