// SPDX-License-Identifier: Apache-2.0

//! A guest with arbitrary behaviour: the PF must only ever hear granted messages.

use std::{cell::RefCell, rc::Rc, time::Duration};

use netpolicy::Request;
use proptest::prelude::*;

use super::{FORWARD, LOCAL, NACK, SILENT, mac};
use crate::{
    channel::mailbox::message::BUFFER_WORDS,
    family::{Context, Session, igb, ixgbe},
    relay::{
        Config, RelayEvent,
        testing::{Bench, Bus, Double, igb::Igb, ixgbe::Ixgbe},
    },
};

/// A family, with what the PF may hear.
struct Case {
    double: &'static dyn Double,
    assert_canonical: fn(&[u32; BUFFER_WORDS]),
    /// The message clears further addresses: any valid address in it has the same effect.
    clears: fn(&[u32; BUFFER_WORDS]) -> bool,
    /// Opcodes of messages that need no grant.
    protocol: &'static [u32],
    /// The opcode of granted messages that the relay may repeat.
    repeated: u32,
}

static CASES: [Case; 2] = [
    Case {
        double: &Igb,
        assert_canonical: igb::fuzz::assert_canonical,
        clears: |words| words[0] == 0x1_0002,
        protocol: &[],
        repeated: 0,
    },
    Case {
        double: &Ixgbe,
        assert_canonical: ixgbe::fuzz::assert_canonical,
        clears: |words| words[0] == 6,
        protocol: &[8, 9, 0x10],
        repeated: 5,
    },
];

#[derive(Clone, Debug)]
enum Step {
    /// Words from the start of the buffer, then REQ.
    Message(Vec<u32>),
    Write(u64, u32),
    Read(u64),
    Wait(u64),
    Ping,
    /// The PF no longer listens, and pings.
    Revoke,
    PfReset,
    DeviceReset,
    Hold,
    AnswerLate,
}

fn word0() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => Just(1u32),
        8 => (1u32..0x14, 0u32..4).prop_map(|(opcode, argument)| opcode | argument << 16),
        2 => (0u32..256).prop_map(|count| 3 | count << 16),
        1 => any::<u32>(),
    ]
}

fn payload() -> impl Strategy<Value = u32> {
    prop_oneof![3 => 0u32..0x30, 2 => Just(0x1100u32), 2 => Just(2u32), 2 => 60u32..10_000, 1 => any::<u32>()]
}

/// Mostly registers of the mailbox: of igb, and as many of ixgbe.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0u64),
        prop_oneof![Just(0xc40u64), Just(0x2fc)],
        (0u64..16, prop_oneof![Just(0x800u64), Just(0x200)]).prop_map(|(word, buffer)| buffer + word * 4),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => (word0(), proptest::collection::vec(payload(), 0..16))
            .prop_map(|(first, rest)| Step::Message([vec![first], rest].concat())),
        4 => (offset(), any::<u32>()).prop_map(|(offset, value)| Step::Write(offset, value)),
        4 => prop_oneof![2 => offset(), 1 => 0u64..0x1000].prop_map(Step::Read),
        6 => (0u64..700_000).prop_map(Step::Wait),
        1 => Just(Step::Ping),
        1 => Just(Step::Revoke),
        1 => Just(Step::PfReset),
        1 => Just(Step::DeviceReset),
        1 => Just(Step::Hold),
        2 => Just(Step::AnswerLate),
    ]
}

fn run(case: &Case, steps: Vec<Step>, verdicts: Vec<u8>) {
    let bench = Bench::of(case.double, mac(0x11), Config::default());
    let at = case.double.offsets();
    let mut bus = bench.clone();
    let verdicts = Rc::new(RefCell::new(verdicts.into_iter().cycle()));
    bench.slow_policy(move |_| {
        let verdict = verdicts.borrow_mut().next()?;
        let delay = Duration::from_millis([0, 0, 1, 100, 399, 401][usize::from(verdict) % 6]);
        let decision = [LOCAL, FORWARD, FORWARD, NACK, SILENT][usize::from(verdict / 6) % 5];
        (verdict < 250).then_some((delay, decision))
    });
    for step in steps {
        match step {
            Step::Message(words) => {
                for (index, word) in words.into_iter().enumerate() {
                    bus.write(at.buffer + 4 * index as u64, word);
                }
                bus.write(at.mailbox, 1);
            }
            Step::Write(offset, value) => bus.write(offset, value),
            Step::Read(offset) => {
                let value = bus.read(offset & !3);
                assert!(offset & !3 != at.mailbox || value & 8 == 0, "PFU");
            }
            Step::Wait(us) => bus.delay(Duration::from_micros(us)),
            Step::Ping => bench.vf().ping(),
            Step::Revoke => {
                bench.vf().with_pf(|pf| pf.clear_to_send = false);
                bench.vf().ping();
            }
            Step::PfReset => {
                bench.vf().pf_reset_begins();
                bus.delay(Duration::from_millis(10));
                bench.vf().pf_reset_ends();
            }
            Step::DeviceReset => {
                crate::hardware::VfHardware::reset(&*bench.vf()).expect("reset");
                bench.0.borrow().relay.hardware_reset();
            }
            Step::Hold => bench.vf().hold(),
            Step::AnswerLate => bench.vf().answer_late(),
        }
    }
    bus.delay(Duration::from_secs(2));

    let world = bench.0.borrow();
    let mut granted = world.granted.iter();
    let received = world.vf.pf().received;
    // The last version, so that each granted request has a form.
    let context = Context { effective: mac(0x11), session: Session { version: 4 } };
    for (index, words) in received.iter().enumerate() {
        (case.assert_canonical)(words);
        let opcode = words[0] & 0xffff;
        if words[0] == 1 || case.protocol.contains(&opcode) {
            continue;
        }
        if opcode == case.repeated && received[..index].contains(words) {
            continue;
        }
        // Each was granted, in the order of the grants. Grants may be skipped (resets), never used twice.
        let same = |request: &Request| {
            let clear = matches!(request, Request::ClearUnicastFilters) && (case.clears)(words);
            let codec = case.double.family().codec;
            clear || codec.encode(request, context).is_some_and(|encoded| encoded.words.padded() == words)
        };
        assert!(granted.any(same), "{words:x?} was not granted");
    }
    assert_eq!(world.vf.pf().unhandled, 0);
    // The relay reports forwarded messages, and no others.
    let told = world.authority.events.lock().unwrap();
    let forwarded = told.iter().filter(|event| matches!(event, RelayEvent::Forwarded { .. })).count();
    assert!(forwarded <= world.granted.len());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn the_pf_hears_only_what_was_granted(
        case in 0..CASES.len(),
        steps in proptest::collection::vec(step(), 1..80),
        verdicts in proptest::collection::vec(any::<u8>(), 1..20),
    ) {
        run(&CASES[case], steps, verdicts);
    }
}
