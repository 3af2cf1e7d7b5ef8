// SPDX-License-Identifier: Apache-2.0

use netpolicy::MacAddress;

use super::*;
use crate::relay::testing::{FakeClock, FakeVf, fake_vf::Pf};

const MS: Duration = Duration::from_millis(1);

fn port() -> (Port, Arc<FakeVf>, Arc<FakeClock>) {
    let clock = Arc::new(FakeClock::default());
    clock.sleep(1000 * MS);
    let vf = FakeVf::new(MacAddress::new([2, 0, 0, 0, 0, 0x11]), clock.clone());
    let mut port = Port::new(vf.clone(), &crate::mailbox::layout::IGBVF, clock.clone());
    let reply = port.exchange(&Words::new(&[1]), 3, 100 * MS).expect("reset");
    assert_eq!(reply.as_slice(), [0x8000_0001, 0x0000_0002, 0x0000_1100]);
    (port, vf, clock)
}

fn vlan(port: &mut Port) -> Result<u32, PortError> {
    port.exchange(&Words::new(&[0x1_0004, 100]), 1, 100 * MS).map(|reply| reply.first())
}

#[test]
fn a_ping_before_or_during_an_exchange_is_kept_for_the_next_look() {
    for ping in [|vf: &FakeVf| vf.ping(), |vf: &FakeVf| vf.with_pf(|pf| pf.pings_first = true)] {
        let (mut port, vf, _) = port();
        ping(&vf);
        assert_eq!(vlan(&mut port), Ok(0xa001_0004), "the ping is not taken for the reply");
        assert_eq!(port.poll().message, Some(0x2000_0100));
        assert_eq!(port.poll(), Observed::default());
    }
}

#[test]
fn bits_that_an_exchange_clears_by_reading_are_latched() {
    let (mut port, vf, _) = port();
    vf.pf_reset_ends();
    assert_eq!(vlan(&mut port), Ok(0xa001_0004));
    assert_eq!(port.poll(), Observed { reset_done: true, ..Observed::default() });
    assert_eq!(port.poll(), Observed::default());
}

#[test]
fn an_answer_lacks_what_igb_takes_out_of_the_argument_unless_it_does_not_listen() {
    let (mut port, vf, _) = port();
    let promiscuous =
        |port: &mut Port| port.exchange(&Words::new(&[0x2_0006]), 1, 100 * MS).map(|reply| reply.first());
    assert_eq!(promiscuous(&mut port), Ok(0xa000_0006));
    vf.with_pf(|pf| pf.clear_to_send = false);
    assert_eq!(promiscuous(&mut port), Ok(0x4002_0006));
}

#[test]
fn a_late_reply_to_another_message_is_not_taken() {
    let (mut port, vf, _) = port();
    vf.hold();
    assert_eq!(vlan(&mut port), Err(PortError::NoReply));
    vf.answer_late();
    let reply = port.exchange(&Words::new(&[5, 1522]), 1, 100 * MS);
    assert_eq!(reply.map(|reply| reply.first()), Ok(0xa000_0005));
    assert_eq!(port.poll().message, None, "nor for something the PF said on its own");
}

#[test]
fn a_pf_that_fails_is_given_up_in_time_and_not_left_without_its_buffer() {
    for (change, expected) in [
        ((|pf| pf.down = true) as fn(&mut Pf), PortError::NotTaken),
        (|pf| pf.mute = true, PortError::NoReply),
        (|pf| pf.busy = true, PortError::Busy),
    ] {
        let (mut port, vf, clock) = port();
        vf.with_pf(change);
        let before = clock.now();
        assert_eq!(vlan(&mut port), Err(expected));
        assert!(clock.now() - before <= 112 * MS, "{expected}");
        assert!(!vf.holds_buffer());
    }
    let (mut port, vf, _) = port();
    vf.pf_reset_begins();
    assert_eq!(vlan(&mut port), Err(PortError::PfResetting));
    assert!(port.poll().resetting && !vf.holds_buffer());
    vf.remove();
    assert_eq!(vlan(&mut port), Err(PortError::Gone));
    assert!(port.poll().gone);
}

#[test]
fn the_buffer_is_given_back_and_words_behind_a_message_are_zero() {
    let (mut port, vf, _) = port();
    for words in [&[0x1e_0003, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15][..], &[6]] {
        port.exchange(&Words::new(words), 1, 100 * MS).expect("answered");
        assert!(!vf.holds_buffer());
    }
    let received = vf.pf().received;
    assert_eq!(received.last(), Some(Words::new(&[6]).padded()));
}

#[test]
fn an_interrupt_is_raised_on_the_vector_that_the_guest_chose() {
    let (mut port, vf, _) = port();
    port.raise_interrupt();
    assert_eq!(vf.pf().triggered, [1 << 2]);
}

#[test]
fn words_of_a_late_reply_are_not_sent_with_the_next_message() {
    let (mut port, vf, _) = port();
    let reset = Words::new(&[1]);
    vf.hold();
    assert_eq!(port.exchange(&reset, 3, 100 * MS), Err(PortError::NoReply));
    vf.answer_late();
    port.exchange(&reset, 3, 100 * MS).expect("answered");
    assert_eq!(vf.pf().received.last(), Some(reset.padded()));
}
