// SPDX-License-Identifier: Apache-2.0

//! 10 000 ports in 100 groups.

use std::time::{Duration, Instant};

use crate::many_ports::Host;

/// Pairs of measurements. The median of their ratios ignores other load of the machine during a few of them.
const PAIRS: usize = 31;

/// Decisions in one measurement: a few milliseconds.
const ROUNDS: usize = 200;

fn time(mut decide: impl FnMut()) -> Duration {
    let started = Instant::now();
    (0..ROUNDS).for_each(|_| decide());
    started.elapsed()
}

fn check(what: &str, decide: fn(&mut Host)) {
    let (mut few, mut many) = (Host::new(100), Host::new(10_000));
    let mut pairs: Vec<(f64, Duration, Duration)> = (0..PAIRS)
        .map(|_| {
            let (few, many) = (time(|| decide(&mut few)), time(|| decide(&mut many)));
            (many.as_secs_f64() / few.as_secs_f64(), few, many)
        })
        .collect();
    pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (ratio, few, many) = pairs[PAIRS / 2];
    println!("{ROUNDS} {what}: {few:?} with 100 ports, {many:?} with 10 000, {ratio:.2} times as long");
    // The trees are twice as deep. A scan would cost a hundred times as much.
    assert!(ratio < 3.0, "{what}: {few:?} with 100 ports, but {many:?} with 10 000");
}

#[test]
fn many_ports_do_not_slow_a_refusal() {
    check("refusals", Host::refuse);
}

#[test]
fn many_ports_do_not_slow_a_change() {
    check("changes", Host::change);
}
