// SPDX-License-Identifier: Apache-2.0

//! The relay in front of the sample family. Nothing in the relay knows the family.

use std::{sync::Arc, time::Duration};

use netpolicy::{MacAddress, OnDenied, Reason, Request, StandingRefusal};

use super::double::{CLAIMED_QUEUES, FILTER_TYPE, SamplePf};
use crate::{
    channel::mailbox::{
        channel::MailboxChannel,
        register_bits::{CONTROL_RST, PFACK, PFSTS, REQ},
        vf_mailbox::Clock,
    },
    family::Family,
    hardware::VfHardware,
    relay::{
        Config, Decision, How, RelayEvent,
        testing::{Bench, Bus, Driver, FakeClock, FakeVf},
    },
};

const LOCAL: Decision = Decision::Grant { how: How::Local };
const FORWARD: Decision = Decision::Grant { how: How::Forward };

fn mac(last: u8) -> MacAddress {
    MacAddress::new([2, 0, 0, 0, 0, last])
}

fn refuse(tell: OnDenied) -> Decision {
    Decision::Refuse { tell, reason: Reason::MacChangesRejected }
}

/// A guest whose driver has reset the VF.
fn guest() -> (Bench, Driver<Bench>) {
    let bench = Bench::of(&SamplePf, mac(0x11), Config::default());
    let mut driver = bench.driver();
    driver.reset_hw().expect("reset");
    assert_eq!(driver.perm, mac(0x11));
    bench.events();
    (bench, driver)
}

fn words(bench: &Bench, count: u64) -> Vec<u32> {
    (0..count).map(|index| bench.clone().read(0x200 + 4 * index)).collect()
}

/// Posts a message, and returns the first `count` words of the reply.
fn call(bench: &Bench, driver: &mut Driver<Bench>, message: &[u32], count: u64) -> Vec<u32> {
    driver.post(message).expect("posted");
    assert!(driver.has_reply(), "{message:x?} has no reply");
    words(bench, count)
}

fn set_mac(last: u8) -> [u32; 3] {
    [2, 0x2, u32::from(last) << 8]
}

#[test]
fn every_message_is_answered_as_the_table_says() {
    /// Message, decision (None if the relay must not ask), reply, the PF's message.
    type Case = (&'static [u32], Option<Decision>, &'static [u32], Option<&'static [u32]>);
    let nack = Some(refuse(OnDenied::Nack));
    let silent = Some(refuse(OnDenied::Silent));
    let cases: &[Case] = &[
        (&[2, 0x2, 0x1100], None, &[0xa000_0002, 0x2, 0x1100], None),
        (&[2, 0x2, 0x2200], Some(LOCAL), &[0xa000_0002, 0x2, 0x2200], None),
        // The reply's data are the PF's.
        (&[2, 0x2, 0x2200], Some(FORWARD), &[0xa000_0002, 0x2, 0x0005_2200], Some(&[2, 0x2, 0x2200])),
        (&[2, 0x2, 0x2200], nack, &[0x6000_0002], None),
        // There is no "fresh" rule: this driver learns its address at each reset.
        (&[2, 0x2, 0x2200], silent, &[0xa000_0002, 0x2, 0x2200], None),
        (&[2, 0x3, 0x2200], None, &[0x6000_0002], None),
        // The PF claims more queues than a guest may believe to have.
        (&[8, 1], None, &[0xa000_0008, 1, 4], Some(&[8, 1])),
        // The PF agrees on another version than the one that was asked for.
        (&[8, 2], None, &[0x6000_0008], Some(&[8, 2])),
        (&[8, 3], None, &[0x6000_0008], None),
        (&[7], None, &[0x6000_0007], None),
        (&[0x1_0001], None, &[0x6000_0001], None),
    ];
    const { assert!(CLAIMED_QUEUES > 4) };
    for (message, decision, reply, forwarded) in cases {
        let (bench, mut driver) = guest();
        bench.vf().with_pf(|pf| pf.trusted = true);
        let (asked, received) = (bench.requests().len(), bench.vf().pf().received.len());
        let decision = *decision;
        bench.policy(move |_| decision);
        let answer = call(&bench, &mut driver, message, reply.len() as u64);
        assert_eq!(answer, *reply, "{message:x?} {decision:?}");
        assert_eq!(bench.requests().len() > asked, decision.is_some(), "{message:x?}");
        let heard: Vec<Vec<u32>> = bench
            .vf()
            .pf()
            .received
            .split_off(received)
            .iter()
            .map(|words| {
                words[..words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1)].to_vec()
            })
            .collect();
        let expected: Vec<Vec<u32>> = forwarded.iter().map(|words| words.to_vec()).collect();
        assert_eq!(heard, expected, "{message:x?}");
    }
}

#[test]
fn a_resets_reply_has_the_pfs_further_word() {
    let (bench, _) = guest();
    assert_eq!(words(&bench, 4), [0x8000_0001, 0x2, 0x1100, FILTER_TYPE], "without the bits above it");
}

#[test]
fn a_reset_that_the_pf_does_not_hear_is_answered_by_the_familys_word() {
    let (bench, mut driver) = guest();
    bench.vf().with_pf(|pf| pf.down = true);
    assert!(driver.reset_hw().is_err());
    assert_eq!(words(&bench, 1), [0x0000_0100]);
    bench.vf().with_pf(|pf| pf.down = false);
    driver.reset_hw().expect("the next one succeeds");
}

#[test]
fn a_version_lasts_until_the_next_reset() {
    let (bench, mut driver) = guest();
    bench.vf().with_pf(|pf| pf.trusted = true);
    bench.policy(|_| Some(FORWARD));
    assert_eq!(call(&bench, &mut driver, &[8, 1], 3), [0xa000_0008, 1, 4]);
    assert_eq!(call(&bench, &mut driver, &[8, 1], 1), [0x6000_0008], "agreed on already");
    driver.reset_hw().expect("reset");
    assert_eq!(call(&bench, &mut driver, &[8, 1], 3), [0xa000_0008, 1, 4]);
    // A reset of the device from outside ends it too.
    bench.0.borrow().relay.hardware_reset();
    bench.wait(Duration::from_millis(1));
    driver.reset_hw().expect("reset");
    assert_eq!(call(&bench, &mut driver, &[8, 1], 3), [0xa000_0008, 1, 4]);
    let stats = bench.0.borrow().relay.stats();
    assert_eq!(stats.messages.get("version:forwarded"), Some(&3), "{stats:?}");
    assert_eq!(stats.messages.get("version:refused"), Some(&1), "{stats:?}");
}

#[test]
fn nothing_but_a_reset_is_heard_before_a_reset() {
    let (bench, mut driver) = guest();
    driver.bus.write(0x10, CONTROL_RST);
    let received = bench.vf().pf().received.len();
    for message in [&set_mac(0x22)[..], &[8, 1]] {
        let reply = call(&bench, &mut driver, message, 1);
        assert_eq!(reply[0] & 0xe000_0000, 0x4000_0000, "{message:x?}: refused, not clear to send");
    }
    assert_eq!(bench.vf().pf().received.len(), received);
    assert_eq!(bench.requests().iter().filter(|request| **request != Request::Reset).count(), 0);
}

#[test]
fn a_pf_that_does_not_answer_a_protocol_message_makes_the_guest_reset() {
    let (bench, mut driver) = guest();
    bench.vf().with_pf(|pf| pf.mute = true);
    assert_eq!(call(&bench, &mut driver, &[8, 1], 1)[0] & 0x4000_0000, 0x4000_0000);
    assert_eq!(bench.events(), [RelayEvent::PfReset]);
    bench.vf().with_pf(|pf| pf.mute = false);
    bench.wait(Duration::from_secs(1));
    driver.reset_hw().expect("reset");
    assert_eq!(call(&bench, &mut driver, &[8, 1], 3), [0xa000_0008, 1, 4]);
}

#[test]
fn a_lost_clear_to_send_is_told_by_two_words() {
    let (bench, mut driver) = guest();
    let mut bus = bench.clone();
    bench.vf().pf_reset_at_once();
    bench.wait(Duration::from_secs(1));
    assert_eq!(bus.read(0x2fc) & PFSTS, PFSTS);
    assert_eq!(bus.read(0x200), 0x0000_0100);
    let interrupts = bench.vf().pf().triggered.len();
    bus.write(0x2fc, 0x2);
    assert_eq!((bus.read(0x2fc) & PFSTS, bus.read(0x200)), (PFSTS, 0x4000_0000));
    assert_eq!(bench.vf().pf().triggered.len(), interrupts + 1, "the driver waits for an interrupt");
    for _ in 0..10 {
        bus.write(0x2fc, 0x2);
    }
    assert_eq!(bench.vf().pf().triggered.len(), interrupts + 1, "once: a guest cannot make a storm of it");
    driver.reset_hw().expect("reset");
    assert_eq!(call(&bench, &mut driver, &set_mac(0x11), 1), [0xa000_0002]);
}

#[test]
fn a_revoked_address_is_learnt_at_a_reset() {
    let (bench, mut driver) = guest();
    assert_eq!(call(&bench, &mut driver, &set_mac(0x22), 1), [0xa000_0002]);
    bench.policy(|_| Some(refuse(OnDenied::Nack)));
    bench.vf().set_admin_mac(mac(0x11));
    bench.0.borrow().relay.set_effective_mac(mac(0x11));
    bench.wait(Duration::from_secs(1));
    assert_eq!(driver.bus.read(0x200), 0x0000_0100, "without clear to send");
    // Whatever the guest says first, it has no "clear to send".
    let reply = call(&bench, &mut driver, &set_mac(0x22), 1)[0];
    assert_eq!(reply & 0x2000_0000, 0, "{reply:#x}");
    driver.reset_hw().expect("reset");
    assert_eq!(driver.perm, mac(0x11));
}

#[test]
fn a_standing_denial_needs_no_other_thread() {
    let (bench, mut driver) = guest();
    let standing = StandingRefusal {
        unless: vec![mac(0x11).into()],
        reason: Reason::MacChangesRejected,
        on_denied: OnDenied::Nack,
    };
    bench.0.borrow().relay.set_standing_refusal(Some(standing));
    let _ = call(&bench, &mut driver, &set_mac(0x11), 1);
    let page = bench.0.borrow().page.clone();
    for (index, word) in set_mac(0x33).iter().enumerate() {
        crate::function::BarHandler::write(&*page, 0x200 + 4 * index as u64, &word.to_le_bytes());
    }
    crate::function::BarHandler::write(&*page, 0x2fc, &REQ.to_le_bytes());
    let mut bits = [0; 4];
    crate::function::BarHandler::read(&*page, 0x2fc, &mut bits);
    assert_eq!(u32::from_le_bytes(bits) & (PFACK | PFSTS), PFACK | PFSTS, "the relay's thread had no turn");
    assert_eq!(words(&bench, 1), [0x6000_0002]);
}

#[test]
fn passed_registers_reach_the_hardware_and_no_others() {
    let (bench, _) = guest();
    let mut bus = bench.clone();
    // (offset, read from the hardware, written to the hardware)
    for (offset, read, write) in [
        (0x0008, true, false),
        (0x0108, true, true),
        (0x0114, true, true),
        (0x0118, false, false),
        (0x0820, false, true),
        (0x0824, false, false),
        (0x0ffc, false, false),
    ] {
        let before = bench.vf().pf().passed.len();
        bus.write(offset, 0x1234_5678);
        let written = bench.vf().pf().passed.split_off(before);
        assert_eq!(written, if write { vec![(offset, 0x1234_5678)] } else { vec![] }, "{offset:#x}");
        assert_eq!(bus.read(offset) != 0, read, "{offset:#x}");
    }
    // The trigger is the guest's as well, and the mailbox never.
    let before = bench.vf().pf();
    bus.write(0x104, 2);
    bus.write(0x2fc, 0x4);
    let after = bench.vf().pf();
    assert_eq!(after.triggered.len(), before.triggered.len() + 1);
    assert!(!bench.vf().holds_buffer(), "the real mailbox is the relay's");
}

#[test]
fn passed_registers_wait_for_no_lock() {
    let (bench, _) = guest();
    let page = bench.0.borrow().page.clone();
    let held = page.lock_registers_for_test();
    crate::function::BarHandler::write(&*page, 0x0108, &7_u32.to_le_bytes());
    let mut data = [0; 4];
    crate::function::BarHandler::read(&*page, 0x0108, &mut data);
    drop(held);
    assert_eq!(bench.vf().pf().passed.last(), Some(&(0x0108, 7)));
    assert_ne!(u32::from_le_bytes(data), 0);
}

#[test]
fn the_agent_reaches_the_pf_without_a_relay() {
    let clock = Arc::new(FakeClock::default());
    clock.sleep(Duration::from_secs(10));
    let vf = FakeVf::of(&SamplePf, mac(0x11), clock.clone());
    let mut ids = [0; 4];
    vf.config_read(0, &mut ids);
    let [a, b, c, d] = ids;
    let family = Family::of(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])).expect("a family");
    let mut channel = MailboxChannel::new(family, vf.clone(), clock);
    let limit = Duration::from_millis(100);
    assert_eq!(channel.reset(limit).expect("reset").mac, Some(mac(0x11)));
    vf.with_pf(|pf| pf.trusted = true);
    let reply = channel.send(&Request::SetMac(mac(0x22)), mac(0x11), limit).expect("sent");
    assert!(reply.outcome.accepted && vf.pf().mac == mac(0x22));
    assert!(channel.send(&Request::ClearUnicastFilters, mac(0x11), limit).is_err(), "no such message");
}
