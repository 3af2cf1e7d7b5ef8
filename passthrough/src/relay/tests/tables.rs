// SPDX-License-Identifier: Apache-2.0

//! The tables of `testing::table`, against the relay and against the PF double behind it.

use std::{sync::Arc, time::Duration};

use netpolicy::MacAddress;

use crate::{
    channel::mailbox::vf_mailbox::Clock,
    relay::{
        Config,
        testing::{
            Bench, Bus, FakeClock, FakeVf,
            conformance::{pf_differences, relay_differences},
            ixgbe_table::IXGBE,
            table::{EFFECTIVE, IGB, RelayCase, Tables},
        },
    },
};

/// The result of a message.
#[derive(Debug, PartialEq)]
struct Outcome {
    asked: bool,
    reply: Option<Vec<u32>>,
    forwarded: Vec<Vec<u32>>,
}

fn run(tables: &Tables, case: &RelayCase) -> Outcome {
    let bench = Bench::of(tables.double, MacAddress::new(EFFECTIVE), Config::default());
    let mut driver = bench.driver();
    driver.probe();
    for words in tables.before {
        driver.call(words).expect("answered");
    }
    let (requests, received) = (bench.requests().len(), bench.vf().pf().received.len());
    let decision = case.decision;
    bench.policy(move |_| decision);

    let mut words = [0xdead_beef; 16];
    words[..case.words.len()].copy_from_slice(case.words);
    driver.post(&words).expect("acknowledged");
    let reply = driver.has_reply().then(|| driver.words(1 + case.data.len()));
    let forwarded = bench.vf().pf().received.split_off(received);
    let trimmed = |words: &[u32; 16]| {
        let len = words.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        words[..len].to_vec()
    };
    Outcome {
        asked: bench.requests().len() > requests,
        reply,
        forwarded: forwarded.iter().map(trimmed).collect(),
    }
}

#[test]
fn every_message_is_answered_as_the_table_says() {
    for tables in [&IGB, &IXGBE] {
        for case in tables.relay {
            let expected = Outcome {
                asked: case.decision.is_some(),
                reply: case.reply.map(|word| [&[word], case.data].concat()),
                forwarded: case.forwarded.iter().map(|words| words.to_vec()).collect(),
            };
            assert_eq!(run(tables, case), expected, "{}", case.name);
        }
    }
}

#[test]
fn nothing_but_a_reset_is_heard_before_a_reset() {
    for (tables, case) in
        [&IGB, &IXGBE].into_iter().flat_map(|tables| tables.relay.iter().map(move |case| (tables, case)))
    {
        let bench = Bench::of(tables.double, MacAddress::new(EFFECTIVE), Config::default());
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
fn each_fake_pf_answers_as_its_driver_with_and_without_a_relay() {
    for tables in [&IGB, &IXGBE] {
        let clock = Arc::new(FakeClock::default());
        clock.sleep(Duration::from_secs(10));
        let vf = FakeVf::of(tables.double, MacAddress::new(EFFECTIVE), clock);
        assert_eq!(pf_differences(vf.clone()), [] as [String; 0]);
        assert_eq!(relay_differences(vf), [] as [String; 0]);
    }
}
