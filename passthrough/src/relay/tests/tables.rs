// SPDX-License-Identifier: Apache-2.0

//! The tables of `testing::table`, against the relay and against the PF double behind it.

use std::{sync::Arc, time::Duration};

use netpolicy::MacAddress;

use crate::{
    channel::mailbox::vf_mailbox::Clock,
    relay::testing::{
        Bench, Bus, FakeClock, FakeVf,
        conformance::{pf_differences, relay_differences},
        table::{EFFECTIVE, RELAY_CASES, RelayCase},
    },
};

/// The result of a message.
#[derive(Debug, PartialEq)]
struct Outcome {
    asked: bool,
    reply: Option<u32>,
    forwarded: Vec<Vec<u32>>,
}

fn run(case: &RelayCase) -> Outcome {
    let bench = Bench::new(MacAddress::new(EFFECTIVE));
    let mut driver = bench.driver();
    driver.probe();
    let (requests, received) = (bench.requests().len(), bench.vf().pf().received.len());
    let decision = case.decision;
    bench.policy(move |_| decision);

    let mut words = [0xdead_beef; 16];
    words[..case.words.len()].copy_from_slice(case.words);
    driver.post(&words).expect("acknowledged");
    let answered = driver.has_reply();
    let word = driver.bus.read(0x800);
    let forwarded = bench.vf().pf().received.split_off(received);
    let trimmed = |words: &[u32; 16]| {
        let len = words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        words[..len].to_vec()
    };
    Outcome {
        asked: bench.requests().len() > requests,
        reply: answered.then_some(word),
        forwarded: forwarded.iter().map(trimmed).collect(),
    }
}

#[test]
fn every_message_is_answered_as_the_table_says() {
    for case in RELAY_CASES {
        let expected = Outcome {
            asked: case.decision.is_some(),
            reply: case.reply,
            forwarded: case.forwarded.iter().map(|words| words.to_vec()).collect(),
        };
        assert_eq!(run(case), expected, "{}", case.name);
    }
}

#[test]
fn nothing_but_a_reset_is_heard_before_a_reset() {
    for case in RELAY_CASES {
        let bench = Bench::new(MacAddress::new(EFFECTIVE));
        let mut driver = bench.driver();
        driver.reset_hw().expect("reset");
        driver.bus.write(0, 1 << 26);
        let received = bench.vf().pf().received.len();
        match driver.call(case.words) {
            Ok(reply) => {
                assert_eq!(reply & 0xe000_0000, 0x4000_0000, "{}: refused, not clear to send", case.name)
            }
            Err(error) => assert_eq!(case.reply, None, "{}: {error:?}", case.name),
        }
        assert_eq!(bench.vf().pf().received.len(), received, "{}", case.name);
    }
}

#[test]
fn the_fake_pf_answers_as_igb() {
    let clock = Arc::new(FakeClock::default());
    clock.sleep(Duration::from_secs(10));
    let vf = FakeVf::new(MacAddress::new(EFFECTIVE), clock);
    assert_eq!(pf_differences(vf.clone()), [] as [String; 0]);
    assert_eq!(relay_differences(vf), [] as [String; 0]);
}
