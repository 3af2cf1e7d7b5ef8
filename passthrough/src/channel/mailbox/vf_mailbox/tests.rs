// SPDX-License-Identifier: Apache-2.0

mod storm;

use netpolicy::MacAddress;

use super::*;
use crate::{
    family::{igb::IGBVF, ixgbe::IXGBEVF},
    relay::testing::{FakeClock, FakeVf, fake_vf::Pf, ixgbe::Ixgbe},
};

const MS: Duration = Duration::from_millis(1);

fn message(words: &[u32], reply_words: usize) -> Exchange {
    Exchange { words: Words::new(words), reply_words }
}

fn mailbox() -> (VfMailbox, Arc<FakeVf>, Arc<FakeClock>) {
    let clock = Arc::new(FakeClock::default());
    clock.sleep(1000 * MS);
    let vf = FakeVf::new(MacAddress::new([2, 0, 0, 0, 0, 0x11]), clock.clone());
    let mut mailbox = VfMailbox::new(vf.clone(), &IGBVF, clock.clone());
    let reply = mailbox.exchange(&message(&[1], 3), 100 * MS).expect("reset");
    assert_eq!(reply.as_slice(), [0x8000_0001, 0x0000_0002, 0x0000_1100]);
    (mailbox, vf, clock)
}

fn vlan(mailbox: &mut VfMailbox) -> Result<u32, VfMailboxError> {
    mailbox.exchange(&message(&[0x1_0004, 100], 1), 100 * MS).map(|reply| reply.first())
}

#[test]
fn a_ping_before_or_during_an_exchange_is_kept_for_the_next_look() {
    for ping in [|vf: &FakeVf| vf.ping(), |vf: &FakeVf| vf.with_pf(|pf| pf.pings_first = true)] {
        let (mut mailbox, vf, _) = mailbox();
        ping(&vf);
        assert_eq!(vlan(&mut mailbox), Ok(0xa001_0004), "the ping is not taken for the reply");
        assert_eq!(mailbox.poll().message.map(|message| message.word), Some(0x2000_0100));
        assert_eq!(mailbox.poll(), Observed::default());
    }
}

#[test]
fn bits_that_an_exchange_clears_by_reading_are_latched() {
    let (mut mailbox, vf, _) = mailbox();
    vf.pf_reset_ends();
    assert_eq!(vlan(&mut mailbox), Ok(0xa001_0004));
    assert_eq!(mailbox.poll(), Observed { reset_done: true, ..Observed::default() });
    assert_eq!(mailbox.poll(), Observed::default());
}

#[test]
fn an_answer_lacks_what_igb_takes_out_of_the_argument_unless_it_does_not_listen() {
    let (mut mailbox, vf, _) = mailbox();
    let promiscuous = |mailbox: &mut VfMailbox| {
        mailbox.exchange(&message(&[0x2_0006], 1), 100 * MS).map(|reply| reply.first())
    };
    assert_eq!(promiscuous(&mut mailbox), Ok(0xa000_0006));
    vf.with_pf(|pf| pf.clear_to_send = false);
    assert_eq!(promiscuous(&mut mailbox), Ok(0x4002_0006));
}

#[test]
fn a_late_reply_to_another_message_is_not_taken() {
    let (mut mailbox, vf, _) = mailbox();
    vf.hold();
    assert_eq!(vlan(&mut mailbox), Err(VfMailboxError::NoReply));
    vf.answer_late();
    let reply = mailbox.exchange(&message(&[5, 1522], 1), 100 * MS);
    assert_eq!(reply.map(|reply| reply.first()), Ok(0xa000_0005));
    assert_eq!(mailbox.poll().message, None, "nor for something the PF said on its own");
}

#[test]
fn a_pf_that_fails_is_given_up_in_time_and_not_left_without_its_buffer() {
    for (change, expected) in [
        ((|pf| pf.down = true) as fn(&mut Pf), VfMailboxError::NotTaken),
        (|pf| pf.mute = true, VfMailboxError::NoReply),
        (|pf| pf.busy = true, VfMailboxError::Busy),
    ] {
        let (mut mailbox, vf, clock) = mailbox();
        vf.with_pf(change);
        let before = clock.now();
        assert_eq!(vlan(&mut mailbox), Err(expected));
        assert!(clock.now() - before <= 112 * MS, "{expected}");
        assert!(!vf.holds_buffer());
    }
    let (mut mailbox, vf, _) = mailbox();
    vf.pf_reset_begins();
    assert_eq!(vlan(&mut mailbox), Err(VfMailboxError::PfResetting));
    assert!(mailbox.poll().resetting && !vf.holds_buffer());
    vf.remove();
    assert_eq!(vlan(&mut mailbox), Err(VfMailboxError::Gone));
    assert!(mailbox.poll().gone);
}

#[test]
fn the_buffer_is_given_back_and_words_behind_a_message_are_zero() {
    let (mut mailbox, vf, _) = mailbox();
    for words in [&[0x1e_0003, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15][..], &[6]] {
        mailbox.exchange(&message(words, 1), 100 * MS).expect("answered");
        assert!(!vf.holds_buffer());
    }
    let received = vf.pf().received;
    assert_eq!(received.last(), Some(Words::new(&[6]).padded()));
}

#[test]
fn an_interrupt_is_raised_on_the_vector_that_the_guest_chose() {
    let (mut mailbox, vf, _) = mailbox();
    mailbox.raise_interrupt();
    assert_eq!(vf.pf().triggered, [1 << 2]);
}

#[test]
fn words_of_a_late_reply_are_not_sent_with_the_next_message() {
    let (mut mailbox, vf, _) = mailbox();
    let reset = message(&[1], 3);
    vf.hold();
    assert_eq!(mailbox.exchange(&reset, 100 * MS), Err(VfMailboxError::NoReply));
    vf.answer_late();
    mailbox.exchange(&reset, 100 * MS).expect("answered");
    assert_eq!(vf.pf().received.last(), Some(reset.words.padded()));
}

#[test]
fn a_message_that_collides_with_one_of_the_pf_is_sent_once_more() {
    let (mut mailbox, vf, clock) = mailbox();
    vf.with_pf(|pf| pf.collides = true);
    let before = clock.now();
    assert_eq!(vlan(&mut mailbox), Ok(0xa001_0004));
    assert!(clock.now() - before < 20 * MS, "without a wait for the deadline");
    assert_eq!(vf.pf().received.len(), 2, "the reset message, and the second attempt");
    assert_eq!(mailbox.poll().message.map(|message| message.word), Some(0x2000_0100));
    // A PF that is down has written nothing in between: one attempt.
    vf.with_pf(|pf| pf.down = true);
    assert_eq!(vlan(&mut mailbox), Err(VfMailboxError::NotTaken));
}

#[test]
fn a_pf_that_does_not_listen_is_not_acknowledged() {
    let clock = Arc::new(FakeClock::default());
    clock.sleep(1000 * MS);
    let vf = FakeVf::of(&Ixgbe, MacAddress::new([2, 0, 0, 0, 0, 0x11]), clock.clone());
    let mut mailbox = VfMailbox::new(vf.clone(), &IXGBEVF, clock);
    let refused = mailbox.exchange(&message(&[5, 0x5ee], 1), 100 * MS).map(|reply| reply.first());
    assert_eq!(refused, Ok(0x4000_0005), "at once, without a silence");
    vf.ping();
    let word = |mailbox: &mut VfMailbox| mailbox.poll().message.map(|message| message.word);
    assert_eq!(word(&mut mailbox), Some(0x100));
    assert_eq!((vf.pf().acknowledgements, word(&mut mailbox)), (0, None));
    // An acknowledgement that crosses the loss is answered by a word that says so.
    mailbox.exchange(&message(&[1], 4), 100 * MS).expect("reset");
    vf.ping();
    vf.with_pf(|pf| pf.clear_to_send = false);
    assert_eq!(word(&mut mailbox), Some(0x2000_0100));
    let lost = PfMessage { word: 0x4000_0000, clear_to_send: false };
    assert_eq!(mailbox.poll().message, Some(lost));
    assert_eq!(word(&mut mailbox), None);
}
