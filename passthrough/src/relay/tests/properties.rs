// SPDX-License-Identifier: Apache-2.0

//! A guest with arbitrary behaviour: the PF must only ever hear granted messages.

use std::{cell::RefCell, rc::Rc, time::Duration};

use netpolicy::Request;
use proptest::prelude::*;

use super::{FORWARD, LOCAL, NACK, SILENT, mac};
use crate::{
    family::igb::fuzz::assert_canonical,
    family::{Context, Session, igb::IGBVF},
    relay::{
        RelayEvent,
        testing::{Bench, Bus},
    },
};

#[derive(Clone, Debug)]
enum Step {
    /// Words from the start of the buffer, then REQ.
    Message(Vec<u32>),
    Write(u64, u32),
    Read(u64),
    Wait(u64),
    Ping,
    PfReset,
    DeviceReset,
    Hold,
    AnswerLate,
}

fn word0() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => Just(1u32),
        8 => (1u32..8, 0u32..4).prop_map(|(opcode, argument)| opcode | argument << 16),
        2 => (0u32..256).prop_map(|count| 3 | count << 16),
        1 => any::<u32>(),
    ]
}

fn payload() -> impl Strategy<Value = u32> {
    prop_oneof![3 => 0u32..0x30, 2 => Just(0x1100u32), 2 => Just(2u32), 2 => 60u32..10_000, 1 => any::<u32>()]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => (word0(), proptest::collection::vec(payload(), 0..16))
            .prop_map(|(first, rest)| Step::Message([vec![first], rest].concat())),
        4 => (prop_oneof![Just(0u64), Just(0xc40), (0u64..16).prop_map(|word| 0x800 + word * 4)], any::<u32>())
            .prop_map(|(offset, value)| Step::Write(offset, value)),
        4 => prop_oneof![Just(0xc40u64), Just(0x800), 0u64..0x1000].prop_map(Step::Read),
        6 => (0u64..700_000).prop_map(Step::Wait),
        1 => Just(Step::Ping),
        1 => Just(Step::PfReset),
        1 => Just(Step::DeviceReset),
        1 => Just(Step::Hold),
        2 => Just(Step::AnswerLate),
    ]
}

fn run(steps: Vec<Step>, verdicts: Vec<u8>) {
    let bench = Bench::new(mac(0x11));
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
                    bus.write(0x800 + 4 * index as u64, word);
                }
                bus.write(0xc40, 1);
            }
            Step::Write(offset, value) => bus.write(offset, value),
            Step::Read(offset) => {
                let value = bus.read(offset & !3);
                assert!(offset & !3 != 0xc40 || value & 8 == 0, "PFU");
            }
            Step::Wait(us) => bus.delay(Duration::from_micros(us)),
            Step::Ping => bench.vf().ping(),
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
    for words in &world.vf.pf().received {
        assert_canonical(words);
        if words[0] == 1 {
            continue;
        }
        // Each was granted, in the order of the grants. Grants may be skipped (resets), never used twice.
        let context = Context { effective: mac(0x11), session: Session::default() };
        let same = |request: &Request| {
            // Which valid address a "clear" carries does not matter.
            let clear = matches!(request, Request::ClearUnicastFilters) && words[0] == 0x1_0002;
            clear
                || IGBVF.codec.encode(request, context).is_some_and(|encoded| encoded.words.padded() == words)
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
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn the_pf_hears_only_what_was_granted(
        steps in proptest::collection::vec(step(), 1..80),
        verdicts in proptest::collection::vec(any::<u8>(), 1..20),
    ) {
        run(steps, verdicts);
    }
}
