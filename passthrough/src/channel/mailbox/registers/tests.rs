// SPDX-License-Identifier: Apache-2.0

use proptest::prelude::*;

use super::*;
use crate::{
    channel::mailbox::{
        fuzz,
        layout::Access,
        register_bits::{ACK, ACK_MESSAGE, CONTROL_RST, CTS, PF_CONTROL},
    },
    family::igb::IGBVF,
};

const MAILBOX: u64 = 0x0c40;
const BUFFER: u64 = 0x0800;

/// Refused, and not clear to send.
const RESET_WANTED: u32 = 0x4000_0100;

fn registers() -> Registers {
    Registers::new(&IGBVF)
}

fn read(registers: &mut Registers, offset: u64) -> u32 {
    match registers.read(offset, 4) {
        Read::Shadow { value, .. } => value,
        other => panic!("{offset:#x} is not a shadow register: {other:?}"),
    }
}

fn write(registers: &mut Registers, offset: u64, value: u32) -> Effect {
    registers.write(offset, 4, value).0
}

/// Posts as igbvf does: take the buffer, flush, words, REQ.
fn post(registers: &mut Registers, words: &[u32]) -> Snapshot {
    write(registers, MAILBOX, VFU);
    assert_ne!(read(registers, MAILBOX) & VFU, 0);
    read(registers, MAILBOX);
    for (index, word) in words.iter().enumerate() {
        write(registers, BUFFER + 4 * index as u64, *word);
    }
    match write(registers, MAILBOX, REQ) {
        Effect::Ring(snapshot) => snapshot,
        other => panic!("REQ yields {other:?}"),
    }
}

#[test]
fn a_message_is_taken_once_and_answered_once() {
    let mut registers = registers();
    let snapshot = post(&mut registers, &[2, 0xccbb_aa02, 0x1dd]);
    assert_eq!(snapshot.words[..4], [2, 0xccbb_aa02, 0x1dd, 0]);
    assert_eq!(read(&mut registers, MAILBOX), 0, "no PFACK, no PFU before the decision; REQ gave VFU back");

    assert!(registers.complete(snapshot.seq, Some(&Words::new(&[0xa000_0002]))));
    assert_eq!(read(&mut registers, MAILBOX), PFACK | PFSTS, "both at once");
    assert_eq!(read(&mut registers, MAILBOX), 0, "cleared by reading");
    assert_eq!(read(&mut registers, BUFFER), 0xa000_0002);
    assert_eq!(read(&mut registers, BUFFER + 4), 0xccbb_aa02, "igb answers in word 0 only");
    assert!(!registers.complete(snapshot.seq, Some(&Words::new(&[0x6000_0002]))), "answered twice");
}

#[test]
fn an_acknowledgement_without_a_reply_raises_pfack_only() {
    let mut registers = registers();
    let snapshot = post(&mut registers, &[ACK_MESSAGE | 2]);
    assert!(registers.complete(snapshot.seq, None));
    assert_eq!(read(&mut registers, MAILBOX), PFACK);
    assert_eq!(read(&mut registers, BUFFER), ACK_MESSAGE | 2);
}

#[test]
fn while_a_message_is_in_flight_requests_and_buffer_writes_are_dropped() {
    let mut registers = registers();
    let snapshot = post(&mut registers, &[1]);
    write(&mut registers, BUFFER, 0xdead);
    assert_eq!(write(&mut registers, MAILBOX, REQ), Effect::None);
    assert_eq!(write(&mut registers, MAILBOX, 0xffff_ffff), Effect::None);
    assert_eq!(read(&mut registers, BUFFER), 1);
    assert_eq!((registers.seq(), registers.counts().dropped_requests), (snapshot.seq, 2));
    assert_eq!(registers.counts().dropped_writes, 1);
}

#[test]
fn a_reset_voids_the_message_in_flight() {
    for reset in [
        (|registers: &mut Registers| write(registers, 0, CONTROL_RST)) as fn(&mut Registers) -> Effect,
        |registers| Effect::Reset(registers.function_reset()),
    ] {
        let mut registers = registers();
        let snapshot = post(&mut registers, &[1]);
        write(&mut registers, MAILBOX, VFU);
        assert!(matches!(reset(&mut registers), Effect::Reset(seq) if seq > snapshot.seq));
        assert!(!registers.complete(snapshot.seq, Some(&Words::new(&[0x8000_0001]))));
        assert_eq!(read(&mut registers, MAILBOX), 0, "neither VFU nor an answer outlives the reset");
        assert!(post(&mut registers, &[1]).seq > snapshot.seq);
    }
}

#[test]
fn control_writes_without_the_reset_bit_do_nothing() {
    let mut registers = registers();
    assert_eq!(write(&mut registers, 0, !CONTROL_RST), Effect::None);
    assert!(IGBVF.layout.passes(0, 4, Access::Read) && !IGBVF.layout.passes(0, 4, Access::Write));
}

#[test]
fn only_statistics_and_status_are_read_from_the_hardware() {
    let hardware: Vec<u64> =
        (0..0x400).map(|i| i * 4).filter(|&offset| IGBVF.layout.passes(offset, 4, Access::Read)).collect();
    assert_eq!(hardware, [0, 8, 0xf10, 0xf14, 0xf18, 0xf34, 0xf3c, 0xf40, 0xf44, 0xf48, 0xf50]);
    assert!((0..0x1000).all(|offset| !IGBVF.layout.passes(offset, 4, Access::Write)), "nothing is written");
    assert!(
        (0..0x1000).all(|offset| !IGBVF.layout.passes(offset, 8, Access::Read)),
        "nor read in another width"
    );
}

#[test]
fn who_owns_the_buffer_looks_for_no_news() {
    let mut registers = registers();
    let hint = |registers: &mut Registers, offset| match registers.read(offset, 4) {
        Read::Shadow { hint, .. } => hint,
        other => panic!("{offset:#x}: {other:?}"),
    };
    assert!(hint(&mut registers, MAILBOX) && hint(&mut registers, BUFFER));
    write(&mut registers, MAILBOX, VFU);
    assert!(!hint(&mut registers, MAILBOX) && !hint(&mut registers, BUFFER));
    let snapshot = match write(&mut registers, MAILBOX, REQ) {
        Effect::Ring(snapshot) => snapshot,
        other => panic!("REQ yields {other:?}"),
    };
    assert!(!hint(&mut registers, MAILBOX), "it waits for its answer");
    assert!(registers.complete(snapshot.seq, Some(&Words::new(&[ACK_MESSAGE]))));
    assert!(hint(&mut registers, MAILBOX) && hint(&mut registers, BUFFER));
}

#[test]
fn unknown_registers_are_told_once_each() {
    let mut registers = registers();
    assert_eq!(registers.read(0xf04, 4), Read::Unknown { first: true });
    assert_eq!(registers.write(0xf04, 4, 1), (Effect::None, false));
    assert_eq!(registers.write(0xf0c, 4, 1), (Effect::None, true));
    assert_eq!(registers.read(0xf04, 4), Read::Unknown { first: false });
}

#[test]
fn other_widths_are_ignored() {
    let mut registers = registers();
    write(&mut registers, BUFFER, 0x1234_5678);
    for (offset, len) in [(BUFFER, 1), (BUFFER, 2), (BUFFER, 8), (BUFFER + 2, 4), (MAILBOX + 1, 2)] {
        assert_eq!(registers.read(offset, len), Read::Shadow { value: 0, hint: false });
        assert_eq!(registers.write(offset, len, u32::MAX), (Effect::None, false));
    }
    assert_eq!(read(&mut registers, BUFFER), 0x1234_5678);
    assert_eq!(registers.counts().bad_width, 10);
}

#[test]
fn a_ping_is_never_taken_for_a_reply() {
    let ping = PF_CONTROL | CTS;
    let mut registers = registers();
    // Before the request: the driver's flush takes it.
    registers.pf_message(ping);
    assert_eq!((read(&mut registers, MAILBOX), read(&mut registers, BUFFER)), (PFSTS, ping));
    // While the guest owns the buffer it must not be overwritten.
    write(&mut registers, MAILBOX, VFU);
    write(&mut registers, BUFFER, 2);
    registers.pf_message(ping);
    assert_eq!(read(&mut registers, BUFFER), 2);
    let Effect::Ring(snapshot) = write(&mut registers, MAILBOX, REQ) else { panic!("no ring") };
    assert_eq!(snapshot.words[0], 2);
    // While the message is in flight.
    registers.pf_message(ping);
    assert_eq!(read(&mut registers, MAILBOX), 0);
    // While the answer is unread.
    registers.complete(snapshot.seq, Some(&Words::new(&[0xa000_0002])));
    registers.pf_message(ping);
    assert_eq!(read(&mut registers, MAILBOX), PFACK | PFSTS);
    write(&mut registers, MAILBOX, VFU);
    assert_eq!(read(&mut registers, BUFFER), 0xa000_0002);
    assert_eq!(read(&mut registers, MAILBOX), VFU);
    // Then it arrives.
    write(&mut registers, MAILBOX, ACK);
    assert_eq!((read(&mut registers, MAILBOX), read(&mut registers, BUFFER)), (PFSTS, ping));
}

#[test]
fn lost_clear_to_send_is_seen_by_the_link_check_even_behind_an_unread_reply() {
    let mut registers = registers();
    let snapshot = post(&mut registers, &[3]);
    registers.complete(snapshot.seq, Some(&Words::new(&[0xa000_0003])));
    read(&mut registers, MAILBOX);
    registers.lost_clear_to_send();
    // A late ping does not hide the request.
    registers.pf_message(PF_CONTROL | CTS);
    // First watchdog: RSTD makes it look at word 0, which still is the reply.
    assert_eq!(read(&mut registers, MAILBOX) & RSTD, RSTD);
    assert_eq!(read(&mut registers, BUFFER), 0xa000_0003);
    // Second watchdog.
    assert_eq!(read(&mut registers, MAILBOX) & RSTD, RSTD);
    assert_eq!(read(&mut registers, BUFFER), RESET_WANTED);
    // The reset that follows must find neither RSTI nor RSTD.
    registers.lost_clear_to_send();
    registers.set_pf_resetting(true);
    write(&mut registers, 0, CONTROL_RST);
    assert_eq!(read(&mut registers, MAILBOX), 0);
}

#[test]
fn only_the_answer_to_a_reset_message_gives_clear_to_send_back() {
    let mut registers = registers();
    registers.lost_clear_to_send();
    // The interface is down: the driver runs no link check. Whatever it requests first, the reply does not hide
    // that it must reset.
    for word in [2, 3, 4] {
        let snapshot = post(&mut registers, &[word]);
        registers.pf_message(PF_CONTROL | CTS);
        assert!(registers.complete(snapshot.seq, Some(&Words::new(&[ACK_MESSAGE | CTS | word]))));
        assert_eq!(read(&mut registers, MAILBOX) & (PFACK | PFSTS), PFACK | PFSTS);
        assert_eq!(read(&mut registers, BUFFER), ACK_MESSAGE | word, "the reply is not clear to send");
        registers.pf_message(PF_CONTROL | CTS);
        assert_eq!(read(&mut registers, MAILBOX) & RSTD, RSTD);
        assert_eq!(read(&mut registers, BUFFER), RESET_WANTED);
    }
    // A reset that the PF does not carry out, or one of the device, changes nothing.
    write(&mut registers, 0, CONTROL_RST);
    assert_eq!(read(&mut registers, MAILBOX), 0, "the driver would give up its reset");
    let snapshot = post(&mut registers, &[1]);
    registers.complete(snapshot.seq, Some(&Words::new(&[RESET_WANTED])));
    registers.function_reset();
    assert_eq!(read(&mut registers, MAILBOX), 0);
    let snapshot = post(&mut registers, &[3]);
    registers.complete(snapshot.seq, Some(&Words::new(&[ACK_MESSAGE | CTS | 3])));
    assert_eq!(read(&mut registers, BUFFER), ACK_MESSAGE | 3);
    assert_eq!(read(&mut registers, BUFFER), RESET_WANTED);

    write(&mut registers, 0, CONTROL_RST);
    let snapshot = post(&mut registers, &[1]);
    assert!(registers.complete_reset(snapshot.seq, &Words::new(&[ACK_MESSAGE | 1])));
    assert_eq!(
        (read(&mut registers, BUFFER), read(&mut registers, BUFFER)),
        (ACK_MESSAGE | 1, ACK_MESSAGE | 1)
    );
    assert_eq!(read(&mut registers, MAILBOX), PFACK | PFSTS);
    let snapshot = post(&mut registers, &[2]);
    registers.complete(snapshot.seq, Some(&Words::new(&[ACK_MESSAGE | CTS | 2])));
    assert_eq!(read(&mut registers, BUFFER), ACK_MESSAGE | CTS | 2);
}

#[test]
fn rsti_is_shown_but_not_while_the_guest_resets() {
    let mut registers = registers();
    registers.set_pf_resetting(true);
    assert_eq!(
        (read(&mut registers, MAILBOX), read(&mut registers, MAILBOX)),
        (RSTI, RSTI),
        "not cleared by reading"
    );
    write(&mut registers, 0, CONTROL_RST);
    assert_eq!(read(&mut registers, MAILBOX), 0);
    let snapshot = post(&mut registers, &[1]);
    registers.complete(snapshot.seq, Some(&Words::new(&[RESET_WANTED])));
    assert_eq!(read(&mut registers, MAILBOX), RSTI | PFSTS | PFACK);
    registers.set_pf_resetting(false);
    assert_eq!(read(&mut registers, MAILBOX), 0);
}

proptest! {
    #[test]
    fn the_registers_keep_their_laws(data in proptest::collection::vec(any::<u8>(), 0..2000)) {
        fuzz::fuzz_registers(&data);
    }
}
